"""Finds the files of a model, and writes files into its directory."""

import json
import os
import pathlib
from typing import Any

from klrl import schema
from klrl.errors import UserError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def model_dir(path: str | os.PathLike) -> pathlib.Path:
  """Returns the directory that holds the model's files: `path`, or `path / "model"` of a run.

  Raises:
    UserError: there is none. If `path` holds adapters, a cache of the hub, or weights in another
      layout, the message says what to do.
  """
  path, shown = pathlib.Path(path), str(path)[:300]
  try:
    is_there = path.is_dir()
  except (OSError, ValueError) as error:  # a name too long, a loop of links, a zero byte
    raise UserError(f"model directory {shown} cannot be opened: {error}"[:300]) from error
  if not is_there:
    hint = ""
    if not path.is_absolute() and len(path.parts) <= 2 and not shown.startswith("."):
      hint = (
        " Where that is the id of a model on the Hugging Face hub, download it and name the folder:"
        f" hf download {shown} --local-dir DIR."
      )
    raise UserError(f"model directory {shown} does not exist.{hint}")
  # The folder of a run has a config.json too, with the settings of the run.
  for directory in (path, path / "model"):
    file = directory / CONFIG
    if file.is_file() and "model_type" in schema.check(schema.read(file), {}, file):
      return directory
  raise UserError(
    f"neither {path} nor {path / 'model'} has a config.json with a model_type; name a directory"
    f" in the layout of Hugging Face.{advice(path)}"
  )


def advice(path):
  """Returns what to do with a directory that holds something other than a model's files."""
  snapshots = sorted(path.glob("snapshots/*/config.json"))
  snapshots += sorted(path.glob("models--*/snapshots/*/config.json"))
  if snapshots:
    return f" This is a cache of the hub: name the snapshot in it, {snapshots[0].parent}."
  if (path / "adapter_config.json").is_file():
    return (
      " It holds adapters alone. Merge them into their model and save that: peft's"
      " AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(DIR)."
    )
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
