"""Loads and saves model directories in the layout of Hugging Face.

A model directory holds `config.json`, `model.safetensors` (or its shards with
`model.safetensors.index.json`), `tokenizer.json` and `tokenizer_config.json`. Wherever one is
wanted, a run directory that holds one as `model/` will do. Llama and Qwen2 are known. Only
safetensors is read: a pickle can run code.

Loaded params are float32, whatever the file holds. Hugging Face stores a linear map as [out, in],
we as [in, out]; its layers are separate tensors, ours are stacked on a leading axis.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from flax import traverse_util

from klrl.errors import UserError
from klrl.models.decoder import DecoderConfig, Params, policy_model, scalar_model

# Our path -> Hugging Face's name.
_NAMES = {
  ("decoder", "embed", "embedding"): "model.embed_tokens.weight",
  ("decoder", "final_norm", "scale"): "model.norm.weight",
  ("unembedding",): "lm_head.weight",
  ("head",): "score.weight",
}
# Our path under ("decoder", "layers") -> Hugging Face's name under "model.layers.<i>.".
_LAYER_NAMES = {
  ("attention_norm", "scale"): "input_layernorm.weight",
  ("attention", "query", "kernel"): "self_attn.q_proj.weight",
  ("attention", "query", "bias"): "self_attn.q_proj.bias",
  ("attention", "key", "kernel"): "self_attn.k_proj.weight",
  ("attention", "key", "bias"): "self_attn.k_proj.bias",
  ("attention", "value", "kernel"): "self_attn.v_proj.weight",
  ("attention", "value", "bias"): "self_attn.v_proj.bias",
  ("attention", "output", "kernel"): "self_attn.o_proj.weight",
  ("mlp_norm", "scale"): "post_attention_layernorm.weight",
  ("mlp", "gate", "kernel"): "mlp.gate_proj.weight",
  ("mlp", "up", "kernel"): "mlp.up_proj.weight",
  ("mlp", "down", "kernel"): "mlp.down_proj.weight",
}
_SPECIAL = ("bos", "eos", "pad")
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
  """A tokenizer and its special tokens; `bos_id` and `eos_id` are None where there is none."""

  tokenizer: tokenizers.Tokenizer = dataclasses.field(repr=False)
  bos_id: int | None
  eos_id: int | None
  pad_id: int


def load_config(path: str | os.PathLike) -> DecoderConfig:
  """Returns the config of a model directory, which may lack the weights."""
  return _decoder_config(_model_dir(path) / "config.json")


def load_policy(path: str | os.PathLike) -> tuple[DecoderConfig, Params]:
  """Returns the config and params (numpy, float32) of a causal language model.

  Raises UserError for a missing or broken directory or file, a model that the decoder does not
  compute, and a tensor that is missing, left over or of the wrong shape.
  """
  directory = _model_dir(path)
  config = _decoder_config(directory / "config.json")
  # Some files hold the tied matrix twice.
  ignored = {"lm_head.weight"} if config.tie_embeddings else set()
  return config, _load_params(directory, policy_model(config).init, ignored)


def load_scalar(path: str | os.PathLike) -> tuple[DecoderConfig, Params]:
  """Returns the config and params (numpy, float32) of a sequence classifier with one label.

  Raises as `load_policy` does, also where there is no score head.
  """
  directory = _model_dir(path)
  config = _decoder_config(directory / "config.json")
  if "score.weight" not in _tensor_files(directory):
    raise UserError(
      f"{directory} has no score.weight, so it is no value or reward model. To start one from a"
      " language model: load_policy, then scalar_params_from."
    )
  return config, _load_params(directory, scalar_model(config).init, set())


def save_policy(
  path: str | os.PathLike, config: DecoderConfig, params: Params, tokenizer: TokenizerInfo
) -> None:
  """Writes a directory that `load_policy` and `transformers.AutoModelForCausalLM` open.

  Parameters keep their dtype. Each file appears whole or not at all, `config.json` last.
  """
  _save(path, config, params, tokenizer, "ForCausalLM", {})


def save_scalar(
  path: str | os.PathLike, config: DecoderConfig, params: Params, tokenizer: TokenizerInfo
) -> None:
  """Writes a directory that `load_scalar` and `AutoModelForSequenceClassification` open."""
  one_label = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
  _save(path, config, params, tokenizer, "ForSequenceClassification", one_label)


def load_tokenizer(path: str | os.PathLike) -> TokenizerInfo:
  """Returns the tokenizer of a model directory.

  The special tokens that `tokenizer_config.json` names go before the ids in `config.json` (which
  may list several EOS; the first one counts). Without a pad token, `pad_id` is the EOS, else 0.
  """
  directory = _model_dir(path)
  file = directory / "tokenizer.json"
  if not file.is_file():
    raise UserError(f"{directory} has no tokenizer.json; save one beside the model.")
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # the library raises nothing more specific
    raise UserError(f"{file} is not a tokenizer: {error}") from None
  config = _read_json(directory / "config.json")
  named_file = directory / "tokenizer_config.json"
  named = _read_json(named_file) if named_file.is_file() else {}

  def special_id(kind):
    token = named.get(f"{kind}_token")
    if isinstance(token, dict):
      token = token.get("content")
    if token is not None:
      token_id = tokenizer.token_to_id(token)
      if token_id is None:
        raise UserError(f"{kind}_token {token!r} of {named_file} is not in {file}.")
      return token_id
    ids = config.get(f"{kind}_token_id")
    return ids[0] if isinstance(ids, list) else ids

  bos_id, eos_id, pad_id = map(special_id, _SPECIAL)
  if pad_id is None:
    pad_id = 0 if eos_id is None else eos_id
  return TokenizerInfo(tokenizer, bos_id, eos_id, pad_id)


def check_tokenizer(info: TokenizerInfo, config: DecoderConfig) -> None:
  """Raises UserError if the tokenizer does not fit: ids without an embedding, or an EOS of its own.

  A prompt that the tokenizer closes with EOS leaves nothing to complete.
  """
  vocab = info.tokenizer.get_vocab(with_added_tokens=True)
  special_ids = [i for i in (info.bos_id, info.eos_id, info.pad_id) if i is not None]
  largest = max([*vocab.values(), *special_ids])
  if largest >= config.vocab_size:
    raise UserError(
      f"the tokenizer's ids go up to {largest}, but the model has vocab_size={config.vocab_size}:"
      " this tokenizer belongs to another model."
    )
  if info.eos_id is not None and info.tokenizer.encode("a").ids[-1:] == [info.eos_id]:
    raise UserError(
      "the tokenizer ends every text with its EOS, prompts too; take that out of the post_processor"
      " in tokenizer.json."
    )


def _model_dir(path):
  path = pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f"model directory {path} does not exist.")
  # A run directory has a config.json too, that of the run.
  for directory in (path, path / "model"):
    file = directory / "config.json"
    if file.is_file() and "model_type" in _read_json(file):
      return directory
  raise UserError(
    f"neither {path} nor {path / 'model'} has a config.json with a model_type; name a directory"
    " in the layout of Hugging Face."
  )


def _read_json(file):
  try:
    value = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{file} is not valid JSON: {error}") from None
  if not isinstance(value, dict):
    raise UserError(f"{file} must hold a JSON object.")
  return value


def _decoder_config(file: pathlib.Path) -> DecoderConfig:
  """Returns the config, or says what in it the decoder does not compute."""
  raw = _read_json(file)
  model_type = raw["model_type"]
  if model_type not in ("llama", "qwen2"):
    raise UserError(f"{file}: model_type {model_type!r} is not supported; llama and qwen2 are.")
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  rope_type = rope.get("rope_type", rope.get("type", "default"))
  if rope_type != "default":
    raise UserError(f"{file}: rope_scaling of type {rope_type!r} is not supported.")
  for name, supported in {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    # Llama puts this bias on the output projection too.
    "attention_bias": model_type == "qwen2" and raw.get("attention_bias", False),
  }.items():
    if raw.get(name, supported) != supported:
      raise UserError(f"{file}: {name}={raw[name]!r} is not supported.")
  try:
    return DecoderConfig(
      vocab_size=raw["vocab_size"],
      width=raw["hidden_size"],
      num_layers=raw["num_hidden_layers"],
      num_heads=raw["num_attention_heads"],
      num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
      head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
      mlp_dim=raw["intermediate_size"],
      max_len=raw["max_position_embeddings"],
      rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
      norm_eps=raw.get("rms_norm_eps", 1e-6),
      tie_embeddings=raw.get("tie_word_embeddings", False),
      attention_bias=model_type == "qwen2",
    )
  except KeyError as error:
    raise UserError(f"{file} lacks {error}.") from None
  except ValueError as error:
    raise UserError(f"{file}: {error}") from None


def _hf_config(config: DecoderConfig, tokenizer: TokenizerInfo, dtype: str) -> dict[str, Any]:
  return {
    "model_type": "qwen2" if config.attention_bias else "llama",
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.mlp_dim,
    "max_position_embeddings": config.max_len,
    "rope_theta": config.rope_theta,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "hidden_act": "silu",
    "torch_dtype": dtype,
    **{f"{kind}_token_id": getattr(tokenizer, f"{kind}_id") for kind in _SPECIAL},
  }


def _is_stacked(path):
  return path[:2] == ("decoder", "layers")


def _is_transposed(path):
  return path[-1] in ("kernel", "unembedding", "head")


def _names(path, leaf):
  """Returns the names of one leaf's tensors: one, or one per layer."""
  if _is_stacked(path):
    return [f"model.layers.{i}.{_LAYER_NAMES[path[2:]]}" for i in range(leaf.shape[0])]
  return [_NAMES[path]]


def _tensor_files(directory: pathlib.Path) -> dict[str, Any]:
  """Returns the open safetensors file of each tensor, by the tensor's name."""
  if (directory / _WEIGHTS).is_file():
    names = [_WEIGHTS]
  elif (directory / _INDEX).is_file():
    names = sorted(set(_read_json(directory / _INDEX).get("weight_map", {}).values()))
  elif pickles := sorted([*directory.glob("*.bin"), *directory.glob("*.pt*")]):
    raise UserError(
      f"{pickles[0]} is a pickle, which can run code and is not read; convert it to safetensors."
    )
  else:
    raise UserError(f"{directory} has neither {_WEIGHTS} nor {_INDEX}.")
  tensor_files = {}
  for name in names:
    if pathlib.PurePath(name).name != name:
      raise UserError(f"{directory / _INDEX} names {name!r}, which is outside the directory.")
    if not (directory / name).is_file():
      raise UserError(f"{directory} lacks the shard {name}.")
    try:
      file = safetensors.safe_open(directory / name, framework="np")
    except safetensors.SafetensorError as error:
      raise UserError(f"{directory / name} is not a safetensors file: {error}") from None
    tensor_files |= dict.fromkeys(file.keys(), file)
  return tensor_files


def _load_params(directory, init, ignored):
  """Returns params of the structure that `init` makes, after checking every tensor."""
  tensor_files = _tensor_files(directory)
  leaves = traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0)))
  wanted = {name for path, leaf in leaves.items() for name in _names(path, leaf)}
  # Old files carry the rotation's frequencies, which the config determines.
  found = {name for name in tensor_files if not name.endswith("rotary_emb.inv_freq")} - ignored
  if wanted != found:
    raise UserError(
      f"{directory} does not hold the model of its config.json: missing tensors"
      f" {sorted(wanted - found)[:5]}, unexpected tensors {sorted(found - wanted)[:5]}."
    )

  def read(name, path, shape):
    shape = shape[::-1] if _is_transposed(path) else shape
    array = tensor_files[name].get_tensor(name)
    if array.shape != shape:
      raise UserError(f"{directory}: tensor {name} has shape {array.shape}, not {shape}.")
    array = array.astype(np.float32)
    return array.T if _is_transposed(path) else array

  params = {}
  for path, leaf in leaves.items():
    names = _names(path, leaf)
    if _is_stacked(path):
      params[path] = np.stack([read(name, path, leaf.shape[1:]) for name in names])
    else:
      params[path] = np.ascontiguousarray(read(names[0], path, leaf.shape))
  return traverse_util.unflatten_dict(params)


def _save(path, config, params, tokenizer, task, labels):
  if config.lora_rank:
    raise ValueError(f"lora_rank={config.lora_rank}: merge_lora first; the layout has no adapters.")
  directory = pathlib.Path(path)
  directory.mkdir(parents=True, exist_ok=True)
  tensors = {}
  for leaf_path, leaf in traverse_util.flatten_dict(params).items():
    array = np.asarray(leaf)
    parts = array if _is_stacked(leaf_path) else [array]
    for name, part in zip(_names(leaf_path, array), parts, strict=True):
      tensors[name] = np.ascontiguousarray(part.T if _is_transposed(leaf_path) else part)
  _write_weights(directory, tensors)

  def token(token_id):
    return None if token_id is None else tokenizer.tokenizer.id_to_token(token_id)

  named = {f"{kind}_token": token(getattr(tokenizer, f"{kind}_id")) for kind in _SPECIAL}
  _write(directory / "tokenizer.json", tokenizer.tokenizer.to_str(pretty=True).encode())
  _write_json(
    directory / "tokenizer_config.json",
    {
      "tokenizer_class": "PreTrainedTokenizerFast",
      **{name: value for name, value in named.items() if value is not None},
      "model_max_length": config.max_len,
      "clean_up_tokenization_spaces": False,
    },
  )
  dtype = str(tensors["model.embed_tokens.weight"].dtype)
  hf_config = _hf_config(config, tokenizer, dtype)
  prefix = {"llama": "Llama", "qwen2": "Qwen2"}[hf_config["model_type"]]
  _write_json(directory / "config.json", {"architectures": [prefix + task], **hf_config, **labels})


def _write_weights(directory, tensors):
  shards, size = [{}], 0
  for name, tensor in tensors.items():
    if shards[-1] and size + tensor.nbytes > _MAX_SHARD_BYTES:
      shards.append({})
      size = 0
    shards[-1][name] = tensor
    size += tensor.nbytes
  metadata = {"format": "pt"}
  if len(shards) == 1:
    _write(directory / _WEIGHTS, safetensors.numpy.save(tensors, metadata))
    (directory / _INDEX).unlink(missing_ok=True)
    return
  weight_map = {}
  for i, shard in enumerate(shards, 1):
    file = f"model-{i:05}-of-{len(shards):05}.safetensors"
    _write(directory / file, safetensors.numpy.save(shard, metadata))
    weight_map |= dict.fromkeys(shard, file)
  total_size = sum(tensor.nbytes for tensor in tensors.values())
  index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
  _write_json(directory / _INDEX, index)
  (directory / _WEIGHTS).unlink(missing_ok=True)


def _write_json(file, value):
  _write(file, (json.dumps(value, indent=2) + "\n").encode())


def _write(file, data):
  """Writes through a temporary file: a reader sees the old bytes or all of the new ones."""
  temporary = file.with_name(f".{file.name}.tmp")
  temporary.write_bytes(data)
  os.replace(temporary, file)
