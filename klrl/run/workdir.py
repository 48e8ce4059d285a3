"""The folder of a run, and the rule that one folder holds one configuration.

Without `--workdir` the folder is named by the hash of the configuration, so that the same command
resumes and another command gets a folder of its own.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import secrets

import jax

from klrl import schema
from klrl.devices import processes
from klrl.errors import UserError
from klrl.run import checkpoint, fingerprints, lock, pending

DRY_RUN = "dry_run.json"
_SETTINGS = ("config.json", "flags.txt", fingerprints.FILE, DRY_RUN)
# Files that a command at work, or one that was killed, may leave. They belong to no run.
_HALF_WRITTEN = (".shared-*", "*.partial")
_LEFT = (*_HALF_WRITTEN, lock.FILE, pending.FILES)
# Fields that change no figure of a run or of a member, so any value of them shares the folder.
NOT_PART_OF_THE_RESULT = (
  *("workdir", "save_every", "keep", "profile", "tensorboard", "wandb_project"),
  *("sweep", "seeds", "best_of_n", "dry_run", "topology", "accept_changed_inputs"),
  *("compilation_cache", "reward_timeout", "reward_retries"),
)


def config_hash(config) -> str:
  """Returns 8 hex digits that name everything in `config` that can change a result."""
  return hashlib.sha256(json.dumps(_result_fields(config), sort_keys=True).encode()).hexdigest()[:8]


@processes.on_writer
def find_workdir(experiment: str, config, *, root: str = "runs") -> pathlib.Path:
  """Returns the folder of this run, which may not exist yet; nothing is written.

  Args:
    experiment: name of the experiment, first part of a folder's default name.
    config: a frozen dataclass; its `workdir` is used if it is not empty.
    root: where folders with default names are.

  Raises:
    UserError: the folder holds something else, or a run that has begun with another
      configuration; the message names the fields that differ.
  """
  directory = pathlib.Path(config.workdir or f"{root}/{experiment}-{config_hash(config)}")
  directory = directory.absolute()  # A reward may go to another folder.
  theirs = _read_config(directory / "config.json")
  if theirs and _has_begun(directory):
    ours = {"experiment": experiment, **_result_fields(config)}
    differing = [
      name
      for name in sorted(ours.keys() | (theirs.keys() - set(NOT_PART_OF_THE_RESULT)))
      if theirs.get(name) != ours.get(name)
    ]
    if differing and not (
      differing == ["num_iterations"]
      and _is_longer(directory, theirs.get("num_iterations"), config)
    ):
      listed = (f"{x} is {theirs.get(x)!r} there and {ours.get(x)!r} here" for x in differing)
      raise UserError(
        f"{directory} holds a run with another configuration: {'; '.join(listed)}. "
        "Choose another --workdir, or leave it out."
      )
    fingerprints.check(directory, accept=getattr(config, "accept_changed_inputs", False))
  elif not theirs and any((directory / name).exists() for name in ("checkpoints", "metrics.jsonl")):
    raise UserError(
      f"{directory} holds a run, but its config.json is missing or damaged, so that nobody knows "
      "whether this command is the same. Put it back from a copy, or choose another --workdir."
    )
  elif directory.is_file() or (directory.exists() and not theirs and _holds_other(directory)):
    raise UserError(f"{directory} is no empty folder and holds no run. Choose another --workdir.")
  return directory


def check_writable(directory: pathlib.Path) -> None:
  """Raises UserError where nothing can be written in `directory`, which need not exist yet."""
  nearest = next(x for x in (directory.absolute(), *directory.absolute().parents) if x.exists())
  if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
    by = "" if processes.is_alone() else f" by process {jax.process_index()}"
    raise UserError(f"{nearest} is no folder that can be written to{by}. Choose another --workdir.")


def _is_longer(directory: pathlib.Path, before: int, config) -> bool:
  """Returns whether `config` continues the run of `before` iterations in `directory`.

  Raises:
    UserError: it does, but has no checkpoint to go on from, or a schedule has led the run towards
      its old end.
  """
  if not (schema.integer(1).holds(before) and before < config.num_iterations):
    return False
  checkpoints = directory / "checkpoints"
  if not checkpoint.saved_iterations(checkpoints):
    raise UserError(
      f"The run in {directory} cannot be made longer, since {checkpoints} holds no checkpoint to "
      "go on from. Put them back from a copy, or choose another --workdir."
    )
  for name in ("learning_rate_schedule", "controller"):
    value = getattr(config, name, None)
    if value in ("linear", "cosine"):
      raise UserError(
        f"--{name}={value} has led the run in {directory} towards its end after {before} "
        f"iterations. One of {config.num_iterations} differs from the first iteration on: choose "
        "another --workdir for it."
      )
  return True


def create_workdir(directory: pathlib.Path, experiment: str, config, *, read=()) -> None:
  """Writes `config.json`, `flags.txt` and `inputs.json` into the folder of `find_workdir`.

  Call it when all inputs are loaded, so that a command that cannot work leaves nothing behind.

  Args:
    directory: the folder of the run.
    experiment: name of the experiment.
    config: its settings.
    read: paths of files or models that were read besides those that fields of `config` name.

  Raises:
    UserError: an input has changed since the run began, and this is not accepted.
  """
  # No process may look for the folder after another has begun to write.
  processes.wait_for_all("looked at")
  processes.together(directory.mkdir)(parents=True, exist_ok=True)
  _remove_left(directory)
  _check_is_shared(directory)
  inputs, stamps = _inputs(directory, config, read)
  _check_same_inputs(json.loads(inputs)["files"], stamps)
  fields = dataclasses.asdict(config)
  # It comes first: after a kill in here the folder is known as that of a run.
  write_text(
    directory / "config.json", json.dumps({"experiment": experiment, **fields}, indent=2) + "\n"
  )
  write_text(
    directory / "flags.txt",
    "".join(
      f"--{field.name}={fields[field.name]}\n"
      for field in dataclasses.fields(config)
      if is_read(config, field)
    ),
  )
  write_text(directory / fingerprints.FILE, inputs + "\n")


@processes.on_writer
def _inputs(directory: pathlib.Path, config, read) -> tuple[str, dict]:
  """Returns the new content of `inputs.json`, and the stamps of the inputs that are read now."""
  changed = []
  if _has_begun(directory):
    changed = fingerprints.check(directory, accept=getattr(config, "accept_changed_inputs", False))
  else:
    (directory / fingerprints.FILE).unlink(missing_ok=True)
  paths = {*fingerprints.paths_of(config), *read}
  return fingerprints.record(directory, paths, changed=changed), fingerprints.stamps(paths)


@processes.together
def _check_same_inputs(recorded: dict, stamps: dict) -> None:
  """Raises UserError if a process reads other inputs than the writer, which found these.

  Only files with other stamps are read: those of a folder that all hosts share have the same.
  """
  own = fingerprints.stamps(stamps)
  elsewhere = [path for path in stamps if own[path] != stamps[path]]
  if files := fingerprints.differing(recorded, fingerprints.digests(elsewhere)):
    raise UserError(
      f"Process {jax.process_index()} reads another content than process 0 of {', '.join(files)}. "
      "Copy the inputs anew to every host, or put them where all hosts read the same."
    )


@processes.on_writer
def _remove_left(directory: pathlib.Path) -> None:
  """Removes what commands that were killed had half written."""
  # Commands without the lock may be writing these just now.
  unlocked = ("report.html", DRY_RUN)
  for path in directory.iterdir():
    if _matches(path, _HALF_WRITTEN) and path.is_file() and not path.name.startswith(unlocked):
      path.unlink()


def _check_is_shared(directory: pathlib.Path) -> None:
  """Raises UserError if a process cannot write to `directory`, or sees another one there."""

  @processes.on_writer
  def leave_mark():
    # The name is new, since network file systems remember for a while that a file was not there.
    path = directory / f".shared-{secrets.token_hex(4)}"
    path.touch()
    return path

  @processes.together
  def look(path):
    if not path.exists():
      raise UserError(
        f"{directory} is not the same folder for all processes, which checkpoints need. Choose a "
        "--workdir that all processes share, and start the command in a folder that they share: "
        "runs/stages is made there."
      )
    check_writable(directory)  # Each saves its part, and waits for those of the others.

  path = leave_mark()
  try:
    look(path)
  finally:
    processes.on_writer(path.unlink)()


def is_read(config, field: dataclasses.Field) -> bool:
  """Returns whether anything reads `field`, given the other values of `config`.

  The metadata of a field may hold `read_when`: (other field, values under which it is read). A flag
  that nothing reads must not be given, not even with its default.
  """
  other, values = field.metadata.get("read_when") or (None, ())
  return other is None or getattr(config, other) in values


def _is_left(path: pathlib.Path) -> bool:
  return _matches(path, _LEFT)


def _matches(path: pathlib.Path, patterns) -> bool:
  return any(path.match(pattern) for pattern in patterns)


def _holds_other(directory: pathlib.Path) -> bool:
  return any(path.name != DRY_RUN and not _is_left(path) for path in directory.iterdir())


def _read_config(path: pathlib.Path) -> dict | None:
  """Returns the configuration of a run, or None: the config.json of a model is no run's."""
  try:
    config = schema.read(path)
  except UserError:
    return None
  return config if isinstance(config, dict) and "experiment" in config else None


def _has_begun(directory: pathlib.Path) -> bool:
  """Returns whether a run has saved anything; a run that failed at once has not."""

  def shows_it(path):
    empty = path.is_dir() and not any(path.iterdir())
    return path.name not in _SETTINGS and not _is_left(path) and not empty

  return directory.is_dir() and any(map(shows_it, directory.iterdir()))


def _result_fields(config) -> dict:
  fields = dataclasses.asdict(config)
  return {name: fields[name] for name in fields if name not in NOT_PART_OF_THE_RESULT}


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes the whole file or nothing: after an interrupted write the old file is still there."""
  if not processes.is_writer():
    return
  # The name has the process in it, since another command may write the same file.
  temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
  temporary.write_text(text, encoding="utf-8")
  temporary.replace(path)
