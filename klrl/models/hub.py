"""Finds models by their names on the Hugging Face hub, in its cache first.

A name is OWNER/NAME, or OWNER/NAME@REVISION for another revision than `main`. Only configurations,
safetensors and the tokenizer's files are fetched: nothing that could run code.
"""

import functools
import pathlib
import re

from klrl import schema
from klrl.errors import UserError
from klrl.run import progress

_NAME = re.compile(r"([\w-][\w.-]{0,95}/[\w-][\w.-]{0,95})(?:@([\w][\w./-]{0,199}))?")
_FILES = (
  "config.json",
  "generation_config.json",
  "adapter_config.json",
  "adapter_model.safetensors",
  "model.safetensors",
  "model-*.safetensors",
  "model.safetensors.index.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "tokenizer.model",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
  "additional_chat_templates/*.jinja",
  "vocab.json",
  "vocab.txt",
  "merges.txt",
)


def is_name(path: str) -> bool:
  """Returns whether `path` can be the name of a model on the hub, and no folder that is missing.

  A path whose first folder is there is taken for one of this machine.
  """
  owner = str(path).partition("/")[0]
  return _NAME.fullmatch(str(path)) is not None and not pathlib.Path(owner).exists()


@functools.cache  # A run asks several times, and a download would not change in between.
def snapshot(name: str) -> pathlib.Path:
  """Returns the folder with the files of a model on the hub, and says which revision they are.

  Raises:
    UserError: the library is not installed, there is no such model, or it is neither in the cache
      nor to be reached.
  """
  folder, source = cached(name), "from the cache"
  if folder is None:
    folder, source = _downloaded(name), "downloaded"
    if missing := _missing(folder):
      raise UserError(
        f"{name}: {missing} is not in the hub's cache and was not fetched: either the model has "
        "none (pickles are not read), or there is no network. Then copy the model's folder here "
        "and name that."
      )
  progress.console.print(
    f"{name}: revision {folder.name}, {source} ({folder})", soft_wrap=True, markup=False
  )
  return folder


def cached(name: str) -> pathlib.Path | None:
  """Returns the folder of a model in the hub's cache; None if a file of the model is missing.

  Nothing is fetched.
  """
  repository, revision = _NAME.fullmatch(name).groups()
  try:
    found = _library().snapshot_download(
      repository, revision=revision, allow_patterns=list(_FILES), local_files_only=True
    )
  except (OSError, ValueError, UserError):  # It is not there, or only in part, or no library is.
    return None
  folder = pathlib.Path(found)
  return None if _missing(folder) else folder


def _downloaded(name: str) -> pathlib.Path:
  library = _library()
  repository, revision = _NAME.fullmatch(name).groups()
  try:
    return pathlib.Path(
      library.snapshot_download(repository, revision=revision, allow_patterns=list(_FILES))
    )
  except library.errors.GatedRepoError as error:
    raise UserError(
      f"{name} is gated on the hub: accept its terms on its page, and log in by `hf auth login`."
    ) from error
  except library.errors.RevisionNotFoundError as error:
    raise UserError(
      f"{name}: the hub has no such revision of {repository}; write a branch, a tag or a commit."
    ) from error
  except (library.errors.RepositoryNotFoundError, library.errors.HFValidationError) as error:
    raise UserError(
      f"{name} is neither a folder here nor a model on the hub. Write the path of a folder, or "
      "OWNER/NAME as on the model's page, e.g. Qwen/Qwen3-0.6B; a private model takes "
      "`hf auth login`."
    ) from error
  except Exception as error:  # The library passes on what its own libraries raise.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise UserError(
      f"{name} is no folder here, is not whole in the hub's cache, and cannot be fetched "
      f"({lines[0][:200]}). Where there is no network, copy the model's folder here and name that."
    ) from error


def _missing(folder: pathlib.Path) -> str:
  """Returns the first file of a model, or of adapters, that a snapshot lacks; "" for none."""
  if (folder / "adapter_config.json").is_file():
    needed = ["adapter_model.safetensors"]
  else:
    needed = ["config.json", "tokenizer.json"]
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
      rule = {"weight_map": schema.object_of(schema.text())}
      needed += sorted(
        set(schema.check(schema.read(index), rule, index, required=rule)["weight_map"].values())
      )
    else:
      needed.append("model.safetensors")
  return next((name for name in needed if not (folder / name).is_file()), "")


def _library():
  try:
    import huggingface_hub
    import huggingface_hub.errors
  except ImportError as error:
    raise UserError(
      "A model is named as on the Hugging Face hub, which takes a library: "
      "pip install 'klrl[hf]'. Or write the path of a folder."
    ) from error
  return huggingface_hub
