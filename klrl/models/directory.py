"""Finds the files of a model, and writes files into its directory."""

import json
import os
import pathlib
from typing import Any

from klrl import schema
from klrl.errors import UserError
from klrl.models import hub

CONFIG = "config.json"
ADAPTERS = "adapter_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def model_dir(path: str | os.PathLike) -> pathlib.Path:
  """Returns the directory that holds the model's files.

  That is the folder at `path`, or `path / "model"` of a run, or, of adapters, the directory of the
  model that they adapt. `path` may be the name of a model on the hub, see `hub.py`.

  Raises:
    UserError: there is none. If `path` holds a cache of the hub, or weights in another layout, the
      message says what to do.
  """
  path = _found(path)
  if (path / ADAPTERS).is_file():
    return _base_of(path)
  # The folder of a run has a config.json too, with the settings of the run.
  for directory in (path, path / "model"):
    file = directory / CONFIG
    if file.is_file() and "model_type" in schema.check(schema.read(file), {}, file):
      return directory
  raise UserError(
    f"neither {path} nor {path / 'model'} has a config.json with a model_type; name a directory"
    f" in the layout of Hugging Face.{advice(path)}"
  )


def adapters_dir(path: str | os.PathLike) -> pathlib.Path | None:
  """Returns the directory of the adapters at `path`, in the layout of PEFT; None for a model."""
  found = _found(path)
  return found if (found / ADAPTERS).is_file() else None


def _found(path) -> pathlib.Path:
  """Returns the folder at a path, or of a name on the hub."""
  path, shown = pathlib.Path(path), str(path)[:300]
  try:
    is_there = path.is_dir()
  except (OSError, ValueError) as error:  # a name too long, a loop of links, a zero byte
    raise UserError(f"model directory {shown} cannot be opened: {error}"[:300]) from error
  if is_there:
    return path
  if path.is_file():
    raise UserError(f"{shown} is a file; name the model's folder.")
  if hub.is_name(str(path)):
    return hub.snapshot(str(path))
  hint = ""
  if len(path.parts) <= 2 and not path.is_absolute() and not shown.startswith("."):
    hint = " A model on the Hugging Face hub is named as OWNER/NAME, e.g. Qwen/Qwen3-0.6B."
  raise UserError(f"model directory {shown} does not exist.{hint}")


def _base_of(path: pathlib.Path) -> pathlib.Path:
  """Returns the directory of the model that the adapters in a directory adapt."""
  file, name = path / ADAPTERS, "base_model_name_or_path"
  rules = {name: schema.text(4000), "revision": schema.optional(schema.text(200))}
  raw = schema.check(schema.read(file), rules, file, required=(name,))
  base = raw[name]
  if raw.get("revision") and hub.is_name(base):
    base = f"{base}@{raw['revision']}"
  try:
    if adapters_dir(base) is not None:
      raise UserError("that holds adapters itself.")
    return model_dir(base)
  except UserError as error:
    raise UserError(f"{file}: of base_model_name_or_path {base[:200]!r}: {error}") from error


def advice(path):
  """Returns what to do with a directory that holds something other than a model's files."""
  if (path / "checkpoints").is_dir() or "checkpoints" in (path.name, path.parent.name):
    return (
      " Checkpoints hold the state of training. The folder of a run can be named when the run has"
      " finished; before that, --keep_best=score leaves its best model so far in model_best, and"
      " --reference takes a checkpoint that is whole."
    )
  snapshots = sorted(path.glob("snapshots/*/config.json"))
  snapshots += sorted(path.glob("models--*/snapshots/*/config.json"))
  if snapshots:
    return f" This is a cache of the hub: name the snapshot in it, {snapshots[0].parent}."
  if next(path.glob("consolidated*"), None):
    return (
      " The consolidated weights are in the layout of their makers; take the files of the same"
      " model that transformers reads: config.json and model*.safetensors."
    )
  return ""


def write_json(file: pathlib.Path, value: Any) -> None:
  """Writes a JSON file, either whole or not at all."""
  write(file, (json.dumps(value, indent=2) + "\n").encode())


def write(file: pathlib.Path, data: bytes) -> None:
  """Writes through a temporary file, so that a reader sees the old bytes or all of the new ones."""
  temporary = file.with_name(f".{file.name}.tmp")
  temporary.write_bytes(data)
  os.replace(temporary, file)
