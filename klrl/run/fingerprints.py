"""Digests of a run's inputs, by which edited prompts, rewards, tokenizers or weights are noticed.

`inputs.json` in the folder of a run holds digests of the files at each path that its flags name.
Files that a reward's file imports are not compared.
"""

import concurrent.futures
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable

from klrl import schema
from klrl.errors import UserError
from klrl.models import hub
from klrl.models.directory import adapters_dir, model_dir
from klrl.run import checkpoint, progress

FILE = "inputs.json"
# Fields of a config that name a file or a model's directory.
_FIELDS = ("policy", "reference", "reward_model", "value_model", "teacher")
_FIELDS += ("prompts", "data", "pretrain_data", "chat_template")
_SUFFIXES = (".json", ".safetensors", ".model", ".jinja", ".txt")  # of a model's files
_OF_DATA = (".parquet", ".arrow")
_RULES = {
  "files": schema.object_of(schema.object_of(schema.text(64))),
  "accepted": schema.list_of(schema.text()),
}


def paths_of(config) -> list[str]:
  """Returns the paths of the inputs that the fields of `config` name."""
  named = [getattr(config, name, "") for name in _FIELDS]
  # Of several, each; factors of a reference have powers.
  named += [path.rpartition("*")[2].strip() for name in named for path in name.split(",")]
  for item in getattr(config, "reward", "").split(","):
    source = item.rpartition("*")[2].strip().rpartition(":")[0]
    named.append(source if source.endswith(".py") else "")
  # A folder of data may be followed by the name of a split.
  named += [path.rpartition(":")[0] for path in named]
  return sorted({path for path in named if path and _is_there(path)})


def digests(paths: Iterable[str]) -> dict[str, dict[str, str]]:
  """Returns {path: {name of a file: digest of its bytes}}; of a directory, those that are read."""
  files = {path: _files(pathlib.Path(path)) for path in paths}
  every = [file for some in files.values() for file in some.values()]
  with concurrent.futures.ThreadPoolExecutor() as pool:  # A disk is faster than one hash.
    found = dict(zip(every, pool.map(_digest, every), strict=True))
  return {path: {name: found[file] for name, file in some.items()} for path, some in files.items()}


def stamps(paths: Iterable[str]) -> dict[str, dict[str, tuple[int, int, int]]]:
  """Returns as `digests` does what tells of another file without reading it.

  It is the size in bytes, the time of the last change in nanoseconds, and the inode.
  """
  return {
    path: {name: _stamp(file) for name, file in _files(pathlib.Path(path)).items()}
    for path in paths
  }


def differing(recorded: dict, present: dict) -> list[str]:
  """Returns the files that differ, at the paths that are in both."""
  return [
    path if file == pathlib.Path(path).name else f"{path}/{file}"
    for path in sorted(recorded.keys() & present.keys())
    for file in sorted(recorded[path].keys() | present[path].keys())
    if recorded[path].get(file) != present[path].get(file)
  ]


def read(directory: pathlib.Path) -> dict:
  """Returns {"files": digests, "accepted": texts} of the run in `directory`.

  Raises:
    UserError: its file is damaged.
  """
  path = directory / FILE
  if not path.exists():
    return {"files": {}, "accepted": []}
  try:
    return schema.check(schema.read(path), _RULES, path, required=_RULES)
  except UserError as error:
    raise UserError(
      f"{error} Put it back from a copy, or move it away; then edited inputs are not noticed."
    ) from error


def check(directory: pathlib.Path, *, accept: bool) -> list[str]:
  """Returns the inputs that have changed since the run in `directory` began.

  An input that is missing now is reported when it is loaded.

  Raises:
    UserError: some have changed, and `accept` is false.
  """
  recorded = read(directory)["files"]
  changed = differing(recorded, digests(path for path in recorded if _is_there(path)))
  if changed:
    are = "are not what they were" if len(changed) > 1 else "is not what it was"
    text = f"{', '.join(changed)} {are} when the run in {directory} began."
    if not accept:
      raise UserError(
        f"{text} Its figures are of the old content. Put that back, choose another --workdir to "
        "start again, or go on anyway with --accept_changed_inputs."
      )
    progress.warn(f"{text} It is accepted.")
  return changed


def record(directory: pathlib.Path, paths: Iterable[str], *, changed: list[str]) -> str:
  """Returns the new content of `inputs.json`: the inputs read, and those accepted as `changed`."""
  before = read(directory)
  accepted = before["accepted"] + [
    f"{file} was changed after the run had begun" for file in changed
  ]
  return json.dumps({"files": before["files"] | digests(paths), "accepted": accepted}, indent=1)


def _is_there(path: str) -> bool:
  """Returns whether there is a file or a folder at `path`, or a model of this name in the cache."""
  return pathlib.Path(path).exists() or (hub.is_name(path) and hub.cached(path) is not None)


def _files(path: pathlib.Path) -> dict[str, pathlib.Path]:
  if path.exists() and not path.is_dir():
    return {path.name: path}
  if folder := checkpoint.named(path):  # Its record holds the digests of its arrays.
    return {f"{folder.name}/{checkpoint.METADATA}": folder / checkpoint.METADATA}
  try:
    folders = [model_dir(path), *filter(None, [adapters_dir(path)])]
  except UserError:  # It holds data, or is refused where it is loaded.
    files = [*path.iterdir(), *(x for suffix in _OF_DATA for x in path.rglob(f"*/*{suffix}"))]
    return {
      str(file.relative_to(path)): file
      for file in sorted(files)
      if file.suffix in (*_SUFFIXES, *_OF_DATA) and file.is_file()
    }
  files = [file for folder in folders for file in sorted(folder.iterdir())]
  return {file.name: file for file in files if file.suffix in _SUFFIXES and file.is_file()}


def _digest(path: pathlib.Path) -> str:
  return _digest_of(path.absolute(), *_stamp(path))


def _stamp(path: pathlib.Path) -> tuple[int, int, int]:
  seen = path.stat()
  return seen.st_size, seen.st_mtime_ns, seen.st_ino


@functools.cache  # Many members of a sweep have the same inputs.
def _digest_of(path: pathlib.Path, *_) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
