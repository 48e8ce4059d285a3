"""The tokenizer's files in a model directory: read as `transformers` does, saved byte for byte.

`tokenizer.json` holds the tokenizer, `tokenizer_config.json` and `special_tokens_map.json` name the
special tokens, and `config.json` and `generation_config.json` list the ids that end a completion.
Truncation, padding and random encodings (BPE's dropout) are switched off.
"""

import json
import os
import pathlib
import re
from typing import Any

import tokenizers

from klrl import schema
from klrl.errors import UserError
from klrl.models.directory import CONFIG, adapters_dir, model_dir, write, write_json
from klrl.models.families import language_config
from klrl.models.hf_config import MAX_TOKENS
from klrl.models.tokenizer import DEFAULT_TEMPLATE, TokenizerInfo, refusals
from klrl.run import progress

_TOKENIZER = "tokenizer.json"
_NAMES = "tokenizer_config.json"
_MAP = "special_tokens_map.json"
_GENERATION = "generation_config.json"
_TEMPLATE = "chat_template.jinja"
_TEMPLATE_JSON = "chat_template.json"  # of models that also read images
_TEMPLATES = "additional_chat_templates"
# The files of a tokenizer, which are saved with every model as they were found.
_KEPT = (
  _TEMPLATE,
  _TEMPLATE_JSON,
  _TOKENIZER,
  _NAMES,
  _MAP,
  _GENERATION,
  "added_tokens.json",
  "tokenizer.model",
  "vocab.json",
  "vocab.txt",
  "merges.txt",
)
_MAX_BYTES = 2**28  # Of tokenizer.json; that of Gemma 3 has 33 MB.
_SPECIAL = ("bos", "eos", "pad")
# The attributes of a tokenizer that name a special token, in the order in which they are added.
_NAMED = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def load_tokenizer(path: str | os.PathLike) -> TokenizerInfo:
  """Returns the tokenizer of a model directory.

  The tokens that `tokenizer_config.json` names take precedence over the ids in `config.json`, and
  these over the ids in `generation_config.json`; an EOS that any of them names ends a completion.
  Without a pad token, `pad_id` is the EOS, or else 0.

  Raises:
    UserError: a file is missing, broken, or names a token or id that the model does not have.
  """
  model = model_dir(path)
  directory = adapters_dir(path) or model
  if not (directory / _TOKENIZER).is_file():
    directory = model
  files = {name: _bytes(directory / name) for name in _KEPT if (directory / name).is_file()}
  more = sorted((directory / _TEMPLATES).glob("*.jinja"))
  files |= {f"{_TEMPLATES}/{file.name}": _bytes(file) for file in more if file.is_file()}
  if directory != model and _GENERATION not in files and (model / _GENERATION).is_file():
    files[_GENERATION] = _bytes(model / _GENERATION)  # Adapters come without.
  if _TOKENIZER not in files:
    raise UserError(f"{directory} has no tokenizer.json; save one beside the model.")

  def parsed(name):
    file = directory / name
    return schema.check(schema.parse(files.get(name, b"{}"), file), {}, file)

  file, rule = model / CONFIG, schema.integer(1, MAX_TOKENS)
  config = schema.check(schema.read(file), {}, file)
  config = schema.check(language_config(config, file), {"vocab_size": rule}, file)
  num_rows = config.get("vocab_size", MAX_TOKENS)
  config_ids = _ids(config, file, num_rows)
  generation_ids = _ids(parsed(_GENERATION), directory / _GENERATION, num_rows)
  named = _named(parsed, directory, config)
  templates = _templates(files, parsed, named, directory)
  content = parsed(_TOKENIZER)
  if (named.get("tokenizer_class") or "").removesuffix("Fast") == "LlamaTokenizer":
    named, content = _as_llama(named, content)
  _without_chance(content, directory / _TOKENIZER)
  with refusals(f"{directory / _TOKENIZER} is not a tokenizer"):
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
  _add_named_tokens(tokenizer, named, content, num_rows)
  tokenizer.encode_special_tokens = named.get("split_special_tokens") is True

  first = {}
  for kind in _SPECIAL:
    token = _content(named.get(f"{kind}_token"))
    ids = [*config_ids[kind], *generation_ids[kind]]
    if token is not None:
      ids.insert(0, tokenizer.token_to_id(token))
      if ids[0] is None:
        raise UserError(
          f"{kind}_token {token!r} of {directory / _NAMES} is not in {directory / _TOKENIZER}, and"
          " the model has no row for another token."
        )
    first[kind] = list(dict.fromkeys(ids))
  eos_id, *other_eos_ids = first["eos"] or [None]
  pad_id = next(iter(first["pad"]), 0 if eos_id is None else eos_id)
  info = TokenizerInfo(
    tokenizer,
    next(iter(first["bos"]), None),
    eos_id,
    pad_id,
    other_eos_ids=tuple(other_eos_ids),
    # It would remove blanks that are part of a text of BPE.
    cleans_up=named.get("clean_up_tokenization_spaces") is True
    and not isinstance(tokenizer.model, tokenizers.models.BPE),
    files=files,
    config_ids={name: value for name, value in config.items() if name.endswith("_token_id")},
    special_tokens={name: _content(named[name]) for name in _NAMED if named.get(name) is not None},
    chat_templates=templates,
  )
  with refusals(f"{directory / _TOKENIZER} does not encode"):
    info.encode_batch([])  # The tokens that it puts around a text may not be in its vocabulary.
  num_rows = min(info.num_tokens, config["vocab_size"])
  num_holes = num_rows - sum(i < num_rows for i in set(tokenizer.get_vocab().values()))
  if num_holes:
    progress.warn_once(
      f"{directory / _TOKENIZER}: {num_holes} of the ids below {num_rows} have no token. The"
      " model may draw them; they decode to nothing."
    )
  return info


def config_ids(info: TokenizerInfo) -> dict[str, Any]:
  """Returns the `*_token_id` fields for a config.json, unchanged if they were read from one."""
  if info.config_ids is not None:
    return dict(info.config_ids)
  return {f"{kind}_token_id": getattr(info, f"{kind}_id") for kind in _SPECIAL}


def save_tokenizer(directory: pathlib.Path, info: TokenizerInfo, *, max_len: int) -> None:
  """Writes the tokenizer's files, byte for byte if they were read from a directory."""
  if info.files:
    for name, content in info.files.items():
      (directory / name).parent.mkdir(exist_ok=True)
      write(directory / name, content)
    return
  named = {
    f"{kind}_token": info.tokenizer.id_to_token(token_id)
    for kind in _SPECIAL
    if (token_id := getattr(info, f"{kind}_id")) is not None
  }
  write(directory / _TOKENIZER, info.tokenizer.to_str(pretty=True).encode())
  write_json(
    directory / _NAMES,
    {
      "tokenizer_class": "PreTrainedTokenizerFast",
      **named,
      "model_max_length": max_len,
      "clean_up_tokenization_spaces": False,
    },
  )


def _bytes(file) -> bytes:
  try:
    with file.open("rb") as stream:
      content = stream.read(_MAX_BYTES + 1)
  except OSError as error:
    raise UserError(f"{file} cannot be read: {error.strerror}.") from error
  if len(content) > _MAX_BYTES:
    raise UserError(
      f"{file} is larger than {_MAX_BYTES} bytes, which no tokenizer's file has to be."
    )
  return content


def _ids(config, file, num_rows: int) -> dict[str, list[int]]:
  """Returns the ids of each kind that a configuration lists: one, or several for EOS."""
  token_id = schema.integer(0, num_rows - 1)
  none = schema.Rule("-1 for none", lambda value: type(value) is int and value == -1)
  rules = {
    "bos": schema.optional(schema.either(token_id, none)),
    "eos": schema.optional(schema.either(token_id, schema.list_of(token_id, min_len=1))),
    "pad": schema.optional(schema.either(token_id, none)),
  }
  schema.check(config, {f"{kind}_token_id": rule for kind, rule in rules.items()}, file)
  ids = {}
  for kind in _SPECIAL:
    value = config.get(f"{kind}_token_id")
    ids[kind] = value if isinstance(value, list) else [] if value in (None, -1) else [value]
  return ids


def _is_token(value) -> bool:
  if isinstance(value, dict):
    flags = all(isinstance(value.get(flag, False), bool) for flag in _FLAGS)
    return flags and _is_token(value.get("content")) and isinstance(value["content"], str)
  return isinstance(value, str) and 0 < len(value) <= 1000


_TOKEN = schema.Rule("a token, as text or an object with the text as content", _is_token)


def _content(token) -> str | None:
  return token["content"] if isinstance(token, dict) else token


def _named(parsed, directory, config) -> dict[str, Any]:
  """Returns the content of tokenizer_config.json, with the fields that are read checked."""
  rules = dict.fromkeys(_NAMED, schema.optional(_TOKEN))
  lists = schema.optional(schema.either(schema.list_of(_TOKEN), schema.object_of(_TOKEN)))
  rules |= dict.fromkeys(_EXTRA, lists)
  rules |= {
    "tokenizer_class": schema.optional(schema.text(200)),
    "added_tokens_decoder": schema.object_of(_TOKEN),
  }
  named, in_map = (schema.check(parsed(name), rules, directory / name) for name in (_NAMES, _MAP))
  if not all(re.fullmatch("[0-9]{1,9}", key) for key in named.get("added_tokens_decoder", {})):
    raise UserError(f"{directory / _NAMES}: the names in added_tokens_decoder must be ids.")
  if "added_tokens_decoder" not in named:  # With it the map is not needed, and may be out of date.
    named = named | in_map
  if named.get("tokenizer_class") is None:
    schema.check(config, {"tokenizer_class": rules["tokenizer_class"]}, directory / CONFIG)
    named["tokenizer_class"] = config.get("tokenizer_class")
  return named


_NAME_AND_TEMPLATE = schema.Rule(
  "an object with a name and a template",
  lambda value: (
    isinstance(value, dict) and all(isinstance(value.get(x), str) for x in ("name", "template"))
  ),
)


def _templates(files, parsed, named, directory) -> dict[str, str]:
  """Returns the chat templates by name, those of files of their own before the others."""
  rule = schema.optional(schema.either(schema.text(2**20), schema.list_of(_NAME_AND_TEMPLATE)))
  found = {}
  in_json = parsed(_TEMPLATE_JSON)
  for name, content in ((_TEMPLATE_JSON, in_json), (_NAMES, named)):
    schema.check(content, {"chat_template": rule}, directory / name)
    value = content.get("chat_template")
    if isinstance(value, list):
      found |= {entry["name"]: entry["template"] for entry in value}
    elif value is not None:
      found[DEFAULT_TEMPLATE] = value
  for name, content in files.items():
    if name.endswith(".jinja"):
      try:
        path = pathlib.PurePath(name)
        found[DEFAULT_TEMPLATE if name == _TEMPLATE else path.stem] = content.decode()
      except UnicodeDecodeError as error:
        raise UserError(f"{directory / name} is not UTF-8: {error}.") from error
  return found


def _as_llama(named, content):
  """Returns both as the class LlamaTokenizer of transformers reads them, by a pipeline of its own.

  That class keeps the vocabulary, the merges, the added tokens and the post-processor. It leaves
  files with a byte-level tokenizer, such as those of Llama 3, as they are.
  """
  model = content.get("model")
  is_bpe = isinstance(model, dict) and "merges" in model
  if not is_bpe or '"ByteLevel"' in json.dumps(content):
    return named, content
  defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  named = defaults | named
  has_prefix = named.get("add_prefix_space") is not False
  scheme = "never" if not has_prefix else "always" if named.get("legacy") is True else "first"
  decoders = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
  ]
  if has_prefix:
    decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
  added = content.get("added_tokens") or []
  if "added_tokens_decoder" in named:
    added = []
  return named, {
    "version": content.get("version", "1.0"),
    "added_tokens": added,
    "normalizer": None,
    "pre_tokenizer": {
      "type": "Metaspace",
      "replacement": "▁",
      "prepend_scheme": scheme,
      "split": False,
    },
    "post_processor": content.get("post_processor"),
    "decoder": {"type": "Sequence", "decoders": decoders},
    "model": {
      "type": "BPE",
      "fuse_unk": True,
      "byte_fallback": True,
      "vocab": model.get("vocab"),
      "merges": model["merges"],
    },
    "truncation": content.get("truncation"),
    "padding": content.get("padding"),
  }


def _without_chance(content, file) -> None:
  """Switches truncation, padding and dropout off, in place, and says so."""
  model = content.get("model")
  found = [name for name in ("truncation", "padding") if content.get(name) is not None]
  content |= dict.fromkeys(found)
  if isinstance(model, dict) and model.get("dropout"):
    found.append("model.dropout")
    content["model"] = model | {"dropout": None}
  if found:
    progress.warn_once(
      f"{file}: {' and '.join(found)} {'is' if len(found) == 1 else 'are'} switched off: texts are"
      " encoded whole, without padding, and the same every time."
    )


def _add_named_tokens(tokenizer, named, content, num_rows: int) -> None:
  """Adds the tokens that other files than tokenizer.json name, as transformers does.

  Tokens of the vocabulary keep their ids and become special; others get the ids after the last one,
  as long as the model has rows for them.
  """

  def added_token(token, **flags):
    if isinstance(token, str):
      return tokenizers.AddedToken(token, special=True)
    flags |= {flag: token[flag] for flag in _FLAGS if flag in token}
    return tokenizers.AddedToken(token["content"], **flags)

  decoder = named.get("added_tokens_decoder")
  if decoder is None:
    listed = {token["id"]: token for token in content.get("added_tokens") or []}
  else:
    listed = {int(key): token for key, token in decoder.items()}
  tokens = {_content(token): added_token(token) for _, token in sorted(listed.items())}
  extra = next((named[name] for name in _EXTRA if named.get(name)), [])
  extra = [*extra.values()] if isinstance(extra, dict) else extra
  known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
  for token in [*(named.get(name) for name in _NAMED), *extra]:
    if token is not None and _content(token) not in tokens and _content(token) not in known:
      tokens[_content(token)] = added_token(token, special=True)
  special = {_content(named.get(name)) for name in _NAMED}
  next_id = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
  fitting = []
  for token in tokens.values():
    token.special = token.special or token.content in special
    if tokenizer.token_to_id(token.content) is None:
      if next_id >= num_rows:
        continue
      next_id += 1
    fitting.append(token)
  tokenizer.add_tokens(fitting)
