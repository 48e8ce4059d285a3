"""The folder of a run, and the rule that one folder holds one configuration.

Without `--workdir` the folder is named by the hash of the configuration, so that the same command
resumes and another command gets a folder of its own.
"""

import dataclasses
import hashlib
import json
import pathlib

from klrl.errors import UserError

# Fields that change no figure of a run: the same folder serves any value of them.
NOT_PART_OF_THE_RESULT = ("workdir", "save_every", "keep", "profile", "tensorboard")


def config_hash(config) -> str:
  """Returns 8 hex digits that name everything in `config` that can change a result."""
  return hashlib.sha256(json.dumps(_result_fields(config), sort_keys=True).encode()).hexdigest()[:8]


def open_workdir(experiment: str, config, *, root: str = "runs") -> pathlib.Path:
  """Returns the folder of this run, with its `config.json` and `flags.txt` in it.

  Args:
    experiment: name of the experiment, first part of a folder's default name.
    config: a frozen dataclass; its `workdir` field is used where it is not empty.
    root: where folders with default names are.

  Raises:
    UserError: the folder holds a run with another configuration; the fields are named.
  """
  directory = pathlib.Path(config.workdir or f"{root}/{experiment}-{config_hash(config)}")
  path = directory / "config.json"
  if path.exists():
    theirs = json.loads(path.read_text())
    ours = {"experiment": experiment, **_result_fields(config)}
    differing = [
      f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
      for name in sorted(ours.keys() | (theirs.keys() - set(NOT_PART_OF_THE_RESULT)))
      if theirs.get(name) != ours.get(name)
    ]
    if differing:
      raise UserError(
        f"{directory} holds a run with another configuration: {'; '.join(differing)}. "
        "Choose another --workdir, or leave it out."
      )
  elif directory.exists() and any(directory.iterdir()):
    raise UserError(f"{directory} is not empty and holds no run. Choose another --workdir.")
  directory.mkdir(parents=True, exist_ok=True)
  fields = dataclasses.asdict(config)
  write_text(path, json.dumps({"experiment": experiment, **fields}, indent=2) + "\n")
  write_text(
    directory / "flags.txt", "".join(f"--{name}={value}\n" for name, value in fields.items())
  )
  return directory


def _result_fields(config) -> dict:
  fields = dataclasses.asdict(config)
  return {name: fields[name] for name in fields if name not in NOT_PART_OF_THE_RESULT}


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a whole file or nothing: an interrupted write leaves what was there."""
  temporary = path.with_name(path.name + ".partial")
  temporary.write_text(text, encoding="utf-8")
  temporary.replace(path)
