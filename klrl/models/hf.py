"""Loads and saves model directories in the layout of Hugging Face.

A model directory holds `config.json`, `model.safetensors` (or its shards with
`model.safetensors.index.json`) and the tokenizer's files (see `tokenizer.py`). The folder of a run,
which holds one as `model/`, can be given in its place. `families.py` says which families there are
and how their tensors are called. Only safetensors is read, since a pickle can run code.

Loaded params are float32, whatever the file holds. Hugging Face stores a linear map as [out, in],
and klrl as [in, out]; there layers are separate tensors, and here they are stacked on a leading
axis.
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from klrl import schema
from klrl.errors import UserError
from klrl.models.decoder import DecoderConfig, Params, policy_model, scalar_model
from klrl.models.directory import CONFIG, INDEX, WEIGHTS, advice, model_dir, write, write_json
from klrl.models.families import decoder_config, family_of, is_map, is_stacked
from klrl.models.tokenizer import TokenizerInfo
from klrl.models.tokenizer_files import config_ids, save_tokenizer
from klrl.run import progress

_EMBEDDING = ("decoder", "embed", "embedding")
_UNEMBEDDING = ("unembedding",)
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
_MAX_SHARD_BYTES = 5 * 10**9


def load_config(path: str | os.PathLike) -> DecoderConfig:
  """Returns the config of a model directory, which may lack the weights."""
  return decoder_config(model_dir(path))


def load_policy(path: str | os.PathLike) -> tuple[DecoderConfig, Params]:
  """Returns the config and params (numpy, float32) of a causal language model.

  If the config says that the embeddings are tied, but the file holds two different matrices, both
  are loaded, as `transformers` does, and `tie_embeddings` is False.

  Raises UserError for a missing or broken directory or file, a model that the decoder does not
  compute, and a tensor that is missing, left over, of the wrong shape, or holds no finite numbers.
  """
  directory = model_dir(path)
  config = decoder_config(directory)
  tensors = _Tensors(directory, config)
  names = family_of(config)[1].tensors
  unembedding, embedding = names[_UNEMBEDDING].name, names[_EMBEDDING].name
  if config.tie_embeddings and unembedding in tensors.files:
    if embedding not in tensors.files:
      tensors.rename(unembedding, embedding)
    elif np.array_equal(tensors.read(unembedding), tensors.read(embedding)):
      del tensors.files[unembedding]  # Some files hold the tied matrix twice.
    else:
      progress.warn_once(
        f"{directory}: tie_word_embeddings is true, but {unembedding} is another matrix than"
        f" {embedding}; both are taken, as transformers does."
      )
      config = dataclasses.replace(config, tie_embeddings=False)
  return config, tensors.params(policy_model(config).init, config)


def load_scalar(path: str | os.PathLike) -> tuple[DecoderConfig, Params]:
  """Returns the config and params (numpy, float32) of a sequence classifier with one label.

  Raises as `load_policy` does, also where there is no score head.
  """
  directory = model_dir(path)
  config = decoder_config(directory)
  tensors = _Tensors(directory, config)
  if "score.weight" not in tensors.files:
    raise UserError(
      f"{directory} has no score.weight, so it is no value or reward model. To start one from a"
      " language model: load_policy, then scalar_params_from."
    )
  return config, tensors.params(scalar_model(config).init, config)


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
  fields = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
  # transformers finds the last token of a row by its padding, and would take an EOS for padding.
  if (
    tokenizer.pad_id not in tokenizer.eos_ids and config_ids(tokenizer).get("pad_token_id") is None
  ):
    fields["pad_token_id"] = tokenizer.pad_id
  _save(path, config, params, tokenizer, "ForSequenceClassification", fields)


def _hf_config(config: DecoderConfig, model_type: str, dtype: str) -> dict[str, Any]:
  """Returns the config.json of a model: the one that it was read from, or a new one."""
  if config.hf_config:
    fields = json.loads(config.hf_config)
    fields.pop("torch_dtype", None)
  else:
    fields = {
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
      "hidden_act": "silu",
    }
  changed = {"model_type": model_type, "tie_word_embeddings": config.tie_embeddings}
  return fields | changed | {"dtype": dtype}


def _names(family, path, num_layers):
  """Returns the names of one leaf's tensors: one, or one per layer."""
  name = family.tensors[path].name
  return [family.layers.format(i) + name for i in range(num_layers)] if is_stacked(path) else [name]


def _is_transposed(family, path):
  return is_map(path) and (family.out_in or not is_stacked(path))


def _fused_outs(family, leaves):
  """Returns the number of outputs of each fused tensor, by its name."""
  outs = collections.Counter()
  for path, leaf in leaves.items():
    if family.tensors[path].rows is not None:
      outs[family.tensors[path].name] += leaf.shape[-1]
  return outs


class _Tensors:
  """The tensors of a model directory by name; nothing is read before it is asked for."""

  def __init__(self, directory: pathlib.Path, config: DecoderConfig):
    self.directory, self.family = directory, family_of(config)[1]
    self.files, self._stored = {}, {}
    for stored, file in _tensor_files(directory).items():
      if (name := self.family.known_as(stored)) is not None:
        self.files[name], self._stored[name] = file, stored

  def rename(self, old: str, new: str) -> None:
    self.files[new] = self.files.pop(old)
    self._stored[new] = self._stored.pop(old)

  def read(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Returns a tensor as float32; UserError where it is none, not finite, or not of `shape`."""
    file, stored = self.files[name], self._stored[name]
    where = f"{self.directory}: tensor {stored}"
    try:
      view = file.get_slice(stored)
      found, dtype = tuple(view.get_shape()), view.get_dtype()
      if shape is not None and found != shape:
        raise UserError(f"{where} has shape {found}, not {shape}.")
      if dtype not in _FLOATS:
        raise UserError(
          f"{where} holds {dtype}, but must hold one of {', '.join(_FLOATS)}; save the model's"
          " weights unquantized."
        )
      array = file.get_tensor(stored)
    except safetensors.SafetensorError as error:
      raise UserError(f"{where} cannot be read: {error}") from None
    with np.errstate(over="ignore"):
      array = array.astype(np.float32)
    # Both are NaN where any number is.
    if array.size and not np.isfinite([array.min(), array.max()]).all():
      raise UserError(f"{where} holds NaN, infinity, or numbers beyond float32.")
    return array

  def params(self, init, config: DecoderConfig) -> Params:
    """Returns params of the structure that `init` makes, after checking every tensor."""
    # A config of another model may ask for more layers than there is memory for their names.
    layer = re.escape(self.family.layers).replace(r"\{\}", r"(\d+)")
    layers = {match[1] for name in self.files if (match := re.match(layer, name))}
    if len(layers) < config.num_layers:
      raise UserError(
        f"{self.directory} does not hold the model of its config.json: num_hidden_layers is"
        f" {config.num_layers}, and there are tensors of {len(layers)}."
      )
    leaves = traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0)))
    num_layers = config.num_layers
    wanted = {name for path in leaves for name in _names(self.family, path, num_layers)}
    found = set(self.files)
    if wanted != found:
      raise UserError(
        f"{self.directory} does not hold the model of its config.json: missing tensors"
        f" {sorted(wanted - found)[:5]}, unexpected tensors {sorted(found - wanted)[:5]}."
      )

    outs = _fused_outs(self.family, leaves)

    def read(name, path, shape):
      stored = self.family.tensors[path]
      if stored.rows is not None:
        shape = (*shape[:-1], outs[stored.name])
      is_transposed = _is_transposed(self.family, path)
      array = self.read(name, shape[::-1] if is_transposed else shape)
      array = array.T if is_transposed else array
      return array if stored.rows is None else array[..., stored.rows(config)]

    params = {}
    for path, leaf in leaves.items():
      names = _names(self.family, path, num_layers)
      if is_stacked(path):
        params[path] = np.stack([read(name, path, leaf.shape[1:]) for name in names])
      else:
        params[path] = np.ascontiguousarray(read(names[0], path, leaf.shape))
    return traverse_util.unflatten_dict(params)


def _tensor_files(directory: pathlib.Path) -> dict[str, Any]:
  """Returns the open safetensors file of each tensor, by the tensor's name."""
  if (directory / WEIGHTS).is_file():
    names = [WEIGHTS]
  elif (directory / INDEX).is_file():
    names = _shards(directory / INDEX)
  elif pickles := sorted([*directory.glob("*.bin"), *directory.glob("*.pt*")]):
    raise UserError(
      f"{pickles[0]} is a pickle, which can run code and is not read; convert it to safetensors."
    )
  else:
    raise UserError(f"{directory} has neither {WEIGHTS} nor {INDEX}.{advice(directory)}")
  tensor_files = {}
  for name in names:
    if not (directory / name).is_file():
      raise UserError(f"{directory} lacks the shard {name}.")
    try:
      file = safetensors.safe_open(directory / name, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
      raise UserError(f"{directory / name} is not a safetensors file: {error}") from None
    tensor_files |= dict.fromkeys(file.keys(), file)
  return tensor_files


def _shards(file: pathlib.Path) -> list[str]:
  shard = schema.Rule(
    "the name of a .safetensors file in the same directory",
    lambda value: isinstance(value, str) and re.fullmatch(r"[\w.-]{1,200}\.safetensors", value),
  )
  index = schema.check(
    schema.read(file), {"weight_map": schema.object_of(shard)}, file, required=("weight_map",)
  )
  return sorted(set(index["weight_map"].values()))


def _save(path, config, params, tokenizer, task, labels):
  if config.lora_rank:
    raise ValueError(f"lora_rank={config.lora_rank}: merge_lora first; the layout has no adapters.")
  directory = pathlib.Path(path)
  directory.mkdir(parents=True, exist_ok=True)
  model_type, family = family_of(config)
  leaves = {path: np.asarray(x) for path, x in traverse_util.flatten_dict(params).items()}
  outs, tensors = _fused_outs(family, leaves), {}
  for leaf_path, array in leaves.items():
    stored = family.tensors[leaf_path]
    parts = array if is_stacked(leaf_path) else [array]
    for name, part in zip(_names(family, leaf_path, len(parts)), parts, strict=True):
      if stored.rows is not None:
        shape = (*part.shape[:-1], outs[stored.name])
        whole = tensors[name].T if name in tensors and _is_transposed(family, leaf_path) else None
        whole = tensors.get(name, np.zeros(shape, part.dtype)) if whole is None else whole
        whole[..., stored.rows(config)] = part
        part = whole
      tensors[name] = np.ascontiguousarray(part.T if _is_transposed(family, leaf_path) else part)
  _write_weights(directory, tensors)

  save_tokenizer(directory, tokenizer, max_len=config.max_len)
  dtype = str(leaves["decoder", "embed", "embedding"].dtype)
  fields = _hf_config(config, model_type, dtype) | config_ids(tokenizer)
  write_json(directory / CONFIG, {**fields, "architectures": [family.classes + task], **labels})


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
    write(directory / WEIGHTS, safetensors.numpy.save(tensors, metadata))
    (directory / INDEX).unlink(missing_ok=True)
    return
  weight_map = {}
  for i, shard in enumerate(shards, 1):
    file = f"model-{i:05}-of-{len(shards):05}.safetensors"
    write(directory / file, safetensors.numpy.save(shard, metadata))
    weight_map |= dict.fromkeys(shard, file)
  total_size = sum(tensor.nbytes for tensor in tensors.values())
  index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
  write_json(directory / INDEX, index)
  (directory / WEIGHTS).unlink(missing_ok=True)
