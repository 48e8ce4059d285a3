"""Loads and saves model directories in the layout of Hugging Face.

A model directory holds `config.json`, `model.safetensors` (or its shards with
`model.safetensors.index.json`) and the tokenizer's files (see `tokenizer.py`). The folder of a run,
which holds one as `model/`, can be given in its place. `families.py` says which families there are
and how their tensors are called, and `weights.py` reads and writes the files.

Hugging Face stores a linear map as [out, in], and klrl as [in, out]; there layers are separate
tensors, and here they are stacked on a leading axis. Params that are opened are `Unread`: they stay
in their files until `parallel.put` reads each device's part, in the dtype of the file or in
another. Params that are loaded are arrays.
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from klrl.devices import parallel, processes, unread
from klrl.devices.unread import Block, Index, Unread
from klrl.errors import UserError
from klrl.models import heads
from klrl.models.decoder import DecoderConfig, Params, policy_model, scalar_model
from klrl.models.directory import CONFIG, adapters_dir, model_dir, write_json
from klrl.models.families import (
  Family,
  Stored,
  config_json,
  decoder_config,
  family_of,
  is_map,
  is_stacked,
)
from klrl.models.lora import merged_kernel
from klrl.models.peft import add_adapters, base_name, save_adapters
from klrl.models.tokenizer import TokenizerInfo
from klrl.models.tokenizer_files import config_ids, save_tokenizer
from klrl.models.weights import Planned, Tensors, write_weights
from klrl.run import progress

_EMBEDDING = ("decoder", "embed", "embedding")
_UNEMBEDDING = ("unembedding",)
_HEAD = ("head",)
_BLOCK_BYTES = 2**22  # Each device holds a block while the tables are saved.
ADAPTERS = "adapters"  # the folder beside merged weights


def load_config(path: str | os.PathLike) -> DecoderConfig:
  """Returns the config of a model directory, which may lack the weights."""
  return decoder_config(model_dir(path))


def open_policy(path: str | os.PathLike) -> tuple[DecoderConfig, Params]:
  """Returns the config and the unread params of a causal language model, in the file's dtypes.

  If the config says that the embeddings are tied, but the file holds two different matrices, both
  are taken, as `transformers` does, and `tie_embeddings` is False.

  Raises:
    UserError: a missing or broken directory or file, a model that the decoder does not compute, or
      a tensor that is missing, left over, or of the wrong shape. That it holds no finite numbers is
      found when it is read.
  """
  config, tensors = _opened(path)
  names = family_of(config)[1].tensors
  unembedding, embedding = names[_UNEMBEDDING].name, names[_EMBEDDING].name
  if config.tie_embeddings and unembedding in tensors.names:
    if embedding not in tensors.names:
      tensors.rename(unembedding, embedding)
    elif tensors.equal(unembedding, embedding):
      tensors.rename(unembedding, None)  # Some files hold the tied matrix twice.
    else:
      progress.warn_once(
        f"{tensors.directory}: tie_word_embeddings is true, but {unembedding} is another matrix"
        f" than {embedding}; both are taken, as transformers does."
      )
      config = dataclasses.replace(config, tie_embeddings=False)
  shapes = jax.eval_shape(policy_model(config).init, jax.random.key(0))
  return _params(config, tensors, shapes)


def open_scalar(path: str | os.PathLike) -> tuple[DecoderConfig, Params]:
  """Returns the config and the unread params of a sequence classifier with one label.

  Its head is one of those in `heads.py`. An unembedding beside it is left aside.

  Raises as `open_policy` does, also where there is no head.
  """
  config, tensors = _opened(path)
  family = family_of(config)[1]
  head = heads.find(tensors.names)
  if head is None:
    raise UserError(
      f"{tensors.directory} has no score.weight and no other head that is known, so it is no value"
      " or reward model. To start one from a language model: load_policy, then scalar_params_from."
    )
  if family.tensors[_UNEMBEDDING].name in tensors.names:
    tensors.rename(family.tensors[_UNEMBEDDING].name, None)
  shapes = jax.eval_shape(scalar_model(config).init, jax.random.key(0))
  if not head.hidden and f"{head.output}.bias" not in tensors.names:
    tensors.rename(f"{head.output}.weight", family.tensors[_HEAD].name)
    return _params(config, tensors, shapes)
  config = dataclasses.replace(config, head=head)
  found = {path: name for path, name in head.tensors().items() if name in tensors.names}
  num_hidden = config.width
  if head.hidden:
    num_hidden = (*tensors.shape(f"{head.hidden}.weight"), 1)[0]
  sizes = {"hidden": (config.width, num_hidden), "output": (num_hidden, 1)}
  leaves = traverse_util.flatten_dict(shapes | {"head": {}})
  for path in found:
    shape = sizes[path[1]] if path[2] == "kernel" else sizes[path[1]][1:]
    leaves[path] = jax.ShapeDtypeStruct(shape, np.float32)
  return _params(config, tensors, traverse_util.unflatten_dict(leaves))


def load_policy(path: str | os.PathLike) -> tuple[DecoderConfig, Params]:
  """Returns what `open_policy` returns, with float32 numpy arrays in place of unread params."""
  return _loaded(*open_policy(path))


def load_scalar(path: str | os.PathLike) -> tuple[DecoderConfig, Params]:
  """Returns what `open_scalar` returns, with float32 numpy arrays in place of unread params."""
  return _loaded(*open_scalar(path))


def _loaded(config, params):
  return config, unread.read(jax.tree.map(lambda leaf: leaf.astype(np.float32), params))


def save_policy(
  path: str | os.PathLike,
  config: DecoderConfig,
  params: Params,
  tokenizer: TokenizerInfo,
  *,
  dtype: str = "",
  base: str = "",
) -> None:
  """Writes a directory that `load_policy` and `transformers.AutoModelForCausalLM` open.

  All processes call it, outside of `on_writer`. Parameters may be unread or on any devices; they
  are fetched and written layer by layer, and adapters are merged into them. They get `dtype`, or by
  default that of the files from which the model was read; those of a fresh model keep their own.
  Each file appears whole or not at all, `config.json` last.

  If `base` is given, the path of the model that adapters adapt, they are also written by
  themselves, into the folder `adapters`, as `peft` opens them; see `peft.base_name`.
  """
  _save(path, config, params, tokenizer, dtype, base, "ForCausalLM", {})


def save_scalar(
  path: str | os.PathLike,
  config: DecoderConfig,
  params: Params,
  tokenizer: TokenizerInfo,
  *,
  dtype: str = "",
  base: str = "",
) -> None:
  """Writes a directory that `load_scalar` and `AutoModelForSequenceClassification` open.

  It does so as `save_policy` does.
  """
  fields = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
  # transformers finds the last token of a row by its padding, and would take an EOS for padding.
  if (
    tokenizer.pad_id not in tokenizer.eos_ids and config_ids(tokenizer).get("pad_token_id") is None
  ):
    fields["pad_token_id"] = tokenizer.pad_id
  _save(path, config, params, tokenizer, dtype, base, "ForSequenceClassification", fields)


def file_dtype(config: DecoderConfig) -> str:
  """Returns the dtype of the files that a model was read from; "" for a fresh model."""
  fields = json.loads(config.hf_config or "{}")
  dtype = fields.get(_dtype_field(fields))
  return dtype if dtype in ("float32", "float16", "bfloat16") else ""


def _dtype_field(fields):
  return "torch_dtype" if "torch_dtype" in fields else "dtype"


def _hf_config(config: DecoderConfig, model_type: str, dtype: str) -> dict[str, Any]:
  """Returns the config.json of a model: the one that it was read from, or a new one."""
  fields = config_json(config)
  changed = {"model_type": model_type, "tie_word_embeddings": config.tie_embeddings}
  return fields | changed | {_dtype_field(fields): dtype}


def _family(config: DecoderConfig) -> tuple[str, Family]:
  """Returns `family_of` a model, with the tensors of its own head."""
  model_type, family = family_of(config)
  if config.head is None:
    return model_type, family
  head = {path: Stored(name) for path, name in config.head.tensors().items()}
  return model_type, dataclasses.replace(family, tensors={**family.tensors, **head})


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


def _opened(path) -> tuple[DecoderConfig, Tensors]:
  """Returns the config and the tensors of a model directory, under the names of the family."""
  directory = model_dir(path)
  config, tensors = decoder_config(directory), Tensors(directory)
  family = family_of(config)[1]
  for stored in sorted(tensors.names):
    if (name := family.known_as(stored)) != stored:
      tensors.rename(stored, name)
  if (adapters := adapters_dir(path)) is not None:
    add_adapters(adapters, tensors, family)
  return config, tensors


def _params(config: DecoderConfig, tensors: Tensors, shapes) -> tuple[DecoderConfig, Params]:
  """Returns the config, and unread params of these shapes, after checking the tensors.

  The `hf_config` of the returned config names the dtype that the tensors have.
  """
  family = _family(config)[1]
  # A config of another model may ask for more layers than there is memory for their names.
  prefix = re.escape(family.layers).replace(r"\{\}", r"(\d+)")
  layers = {match[1] for name in tensors.names if (match := re.match(prefix, name))}
  if len(layers) < config.num_layers:
    raise UserError(
      f"{tensors.directory} does not hold the model of its config.json: num_hidden_layers is"
      f" {config.num_layers}, and there are tensors of {len(layers)}."
    )
  leaves = traverse_util.flatten_dict(shapes)
  outs = _fused_outs(family, leaves)
  wanted = {
    name: _stored_shape(family, path, leaf, outs)
    for path, leaf in leaves.items()
    for name in _names(family, path, config.num_layers)
  }
  if wanted.keys() != tensors.names:
    raise UserError(
      f"{tensors.directory} does not hold the model of its config.json: missing tensors"
      f" {sorted(wanted.keys() - tensors.names)[:5]}, unexpected tensors"
      f" {sorted(tensors.names - wanted.keys())[:5]}."
    )
  for name, shape in wanted.items():
    if (found := tensors.shape(name)) != shape:
      raise UserError(f"{tensors.where(name)} has shape {found}, not {shape}.")
    tensors.dtype(name)
  params = {
    path: _unread(config, family, tensors, path, leaf.shape, outs) for path, leaf in leaves.items()
  }
  fields = json.loads(config.hf_config)
  fields[_dtype_field(fields)] = str(params[_EMBEDDING].dtype)
  config = dataclasses.replace(config, hf_config=json.dumps(fields))
  return config, traverse_util.unflatten_dict(params)


def _stored_shape(family, path, leaf, outs):
  """Returns the shape of the tensors that hold a leaf."""
  shape = leaf.shape[1:] if is_stacked(path) else leaf.shape
  if family.tensors[path].rows is not None:
    shape = (*shape[:-1], outs[family.tensors[path].name])
  return shape[::-1] if _is_transposed(family, path) else shape


def _unread(
  config: DecoderConfig, family: Family, tensors: Tensors, path, shape: tuple[int, ...], outs
) -> Unread:
  """Returns a leaf of the params as it is in the tensors of a model."""
  names, stored = _names(family, path, config.num_layers), family.tensors[path]
  places = [range(size) for size in shape]
  if stored.rows is not None:
    total = range(outs[stored.name])
    rows = stored.rows(config)
    places[-1] = total[rows] if isinstance(rows, slice) else np.asarray(rows)

  def blocks(index: Index) -> Iterator[Block]:
    index = [axis[part] for axis, part in zip(places, index, strict=True)]
    layers = index.pop(0) if is_stacked(path) else [0]
    if _is_transposed(family, path):
      index.reverse()
    for number, layer in enumerate(layers):
      for rows, values in tensors.parts(names[layer], index):
        where = (rows,)
        if _is_transposed(family, path):
          where, values = (slice(None), rows), values.T
        where = (number, *where) if is_stacked(path) else where
        yield Block(tensors.where(names[layer]), where, values)

  dtypes = {tensors.dtype(name) for name in names}
  dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
  return Unread(shape, dtype, blocks)


def _save(path, config, params, tokenizer, dtype, base, task, labels):
  directory = pathlib.Path(path)
  processes.on_writer(directory.mkdir)(parents=True, exist_ok=True)
  model_type, family = _family(config)
  planned = _planned(config, family, params, dtype or file_dtype(config))
  write_weights(directory, planned)
  # A head of its own kind is unknown to transformers, and so to peft.
  if (
    config.lora_rank
    and base
    and config.head is None
    and (name := processes.on_writer(base_name)(base))
  ):
    save_adapters(directory / ADAPTERS, config, params, base=name)
  dtype = next(x.dtype for x in planned if x.name == family.tensors[_EMBEDDING].name)
  fields = _hf_config(config, model_type, str(dtype)) | config_ids(tokenizer)
  if config.head is None:
    fields["architectures"] = [family.architecture(task)]

  @processes.on_writer
  def finish():
    save_tokenizer(directory, tokenizer, max_len=config.max_len)
    write_json(directory / CONFIG, fields | labels)

  finish()


def _planned(config: DecoderConfig, family: Family, params: Params, dtype: str) -> list[Planned]:
  """Returns the tensors that hold `params`, of which none is made yet."""
  leaves = traverse_util.flatten_dict(params)
  factors = {
    (*path[:-2], "kernel"): (leaf, leaves[*path[:-1], "lora_b"])
    for path, leaf in leaves.items()
    if path[-1] == "lora_a"
  }
  leaves = {path: leaf for path, leaf in leaves.items() if "lora" not in path}
  outs = _fused_outs(family, leaves)
  paths = collections.defaultdict(list)  # of the leaves that share a tensor
  for leaf_path in leaves:
    for layer, name in enumerate(_names(family, leaf_path, config.num_layers)):
      paths[name, layer].append(leaf_path)

  def in_layer(path, layer):
    """Returns a layer of a leaf on the host."""
    if path in factors:
      return parallel.fetch(_merged_layer(leaves[path], *factors[path], layer, config.lora_rank))
    return parallel.fetch_layer(leaves[path], layer)

  def parts(name, layer, shape, dtype):
    """Yields a tensor, some rows after the other."""
    first, *others = paths[name, layer]
    is_transposed = _is_transposed(family, first)
    if not is_stacked(first):
      axis = 1 if is_transposed else 0
      row_bytes = 4 * leaves[first].size // leaves[first].shape[axis]
      size = max(1, _BLOCK_BYTES // row_bytes)
      for block in parallel.fetch_blocks(leaves[first], axis, size):
        yield block.T if is_transposed else block
    elif family.tensors[first].rows is None:
      whole = in_layer(first, layer)
      yield whole.T if is_transposed else whole
    else:
      whole = np.zeros(shape, dtype)
      view = whole.T if is_transposed else whole
      for path in (first, *others):
        view[..., family.tensors[path].rows(config)] = in_layer(path, layer)
      yield whole

  planned = []
  for (name, layer), (first, *_) in paths.items():
    shape = _stored_shape(family, first, leaves[first], outs)
    own = np.dtype(dtype or leaves[first].dtype)
    make = functools.partial(parts, name, layer, shape, own)
    planned.append(Planned(name, shape, own, make))
  return planned


# The layer is traced: one program serves all layers.
@functools.partial(jax.jit, static_argnums=4)
def _merged_layer(kernel, lora_a, lora_b, layer, rank):
  parts = (parallel.layer_of(jnp.asarray(x), layer) for x in (kernel, lora_a, lora_b))
  return merged_kernel(*parts, rank=rank)
