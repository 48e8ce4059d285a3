"""The families of models: for each `model_type` one row, and nothing else knows a family by name.

A row says which fields of `DecoderConfig` follow from a config.json, and how the tensors are
called. A field that its function reads is computed; `hf_config.py` refuses every other field that
could change the logits. docs/models.md says how to add a family.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from klrl import schema
from klrl.errors import UserError
from klrl.models.blocks import DecoderConfig
from klrl.models.directory import CONFIG
from klrl.models.hf_config import MAX_TOKENS, Fields, rope_theta

Path = tuple[str, ...]


class Stored(NamedTuple):
  """Where a leaf of the params is in the files.

  `name` is that of the tensor; of a layer's tensor, without the layer's prefix. Where several
  leaves share a tensor, `rows(config)` are the outputs of it that are this leaf's.
  """

  name: str
  rows: Callable[[DecoderConfig], slice | np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Family:
  """One family.

  classes: what its classes in `transformers` begin with, e.g. "Llama".
  config: the fields of `DecoderConfig` that follow from those of a config.json.
  tensors: path of a leaf in the params -> `Stored`. A path that begins with ("decoder", "layers")
    is a layer's, stacked here and one tensor for each layer there.
  layers: what the names of the tensors of layer i begin with, with {} for i.
  out_in: whether a linear map of a layer is stored as [out, in]; klrl has [in, out].
  renamed: (pattern, name) pairs: a tensor whose whole name matches the pattern is known by that
    name, as `re.sub` understands it; None leaves the tensor aside.
  """

  classes: str
  config: Callable[[Fields], dict[str, Any]]
  tensors: Mapping[Path, Stored]
  layers: str = "model.layers.{}."
  out_in: bool = True
  renamed: tuple[tuple[str, str | None], ...] = ((r".*rotary_emb\.inv_freq", None),)

  def known_as(self, name: str) -> str | None:
    """Returns the name in `tensors` of a file's tensor; None if it is left aside.

    Files of one family may differ in a prefix, and may hold what the config determines (old files
    have the rotation's frequencies) or what is no part of the language model (a vision tower).
    """
    for pattern, known in self.renamed:
      if re.fullmatch(pattern, name):
        return None if known is None else re.sub(pattern, known, name)
    return name


def is_stacked(path: Path) -> bool:
  """Returns whether a leaf of the params is a layer's, with the layers on its leading axis."""
  return path[:2] == ("decoder", "layers")


def is_map(path: Path) -> bool:
  """Returns whether a leaf is a linear map [in, out], which files may hold as [out, in]."""
  return path[-1] in ("kernel", "unembedding", "head")


def _llama(read: Fields) -> dict[str, Any]:
  return _sizes(read) | {
    "norm_eps": float(read("rms_norm_eps", schema.number(0, 1), 1e-6)),
    "rope_theta": rope_theta(read),
  }


def _qwen2(read: Fields) -> dict[str, Any]:
  # Qwen2 has the biases without being told, and a switch beside the window.
  read.ignore("attention_bias", "sliding_window")
  return _llama(read) | {"attention_bias": True}


def _sizes(read: Fields) -> dict[str, Any]:
  """Returns the sizes of a decoder, under the names that most families give them."""
  width = read("hidden_size", schema.integer(1, 10**6))
  num_heads = read("num_attention_heads", schema.integer(1, 10**5))
  num_kv_heads = read("num_key_value_heads", schema.optional(schema.integer(1, 10**5)), None)
  head_dim = read("head_dim", schema.optional(schema.integer(2, 10**5)), None)
  if head_dim is None and width % num_heads:
    raise ValueError(
      f"hidden_size={width} is no multiple of num_attention_heads={num_heads}, and there is no"
      " head_dim."
    )
  read.choice("hidden_act", {"silu": None, "swish": None}, "silu")
  return {
    "vocab_size": read("vocab_size", schema.integer(1, MAX_TOKENS)),
    "width": width,
    "num_layers": read("num_hidden_layers", schema.integer(1, 10**4)),
    "num_heads": num_heads,
    "num_kv_heads": num_kv_heads or num_heads,
    "head_dim": head_dim or width // num_heads,
    "mlp_dim": read("intermediate_size", schema.integer(1, 10**7)),
    "max_len": read("max_position_embeddings", schema.integer(2, 2**24)),
    "tie_embeddings": read("tie_word_embeddings", schema.boolean(), False),
  }


_LLAMA_TENSORS = {
  ("decoder", "embed", "embedding"): Stored("model.embed_tokens.weight"),
  ("decoder", "final_norm", "scale"): Stored("model.norm.weight"),
  ("unembedding",): Stored("lm_head.weight"),
  ("head",): Stored("score.weight"),
} | {
  ("decoder", "layers", *path): Stored(name)
  for path, name in {
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
  }.items()
}

FAMILIES = {
  "llama": Family("Llama", _llama, _LLAMA_TENSORS),
  "qwen2": Family("Qwen2", _qwen2, _LLAMA_TENSORS),
}


def family_of(config: DecoderConfig) -> tuple[str, Family]:
  """Returns the model_type and the family of a model; a fresh one is written as Llama or Qwen2."""
  model_type = config.model_type or ("qwen2" if config.attention_bias else "llama")
  return model_type, FAMILIES[model_type]


def decoder_config(directory: pathlib.Path) -> DecoderConfig:
  """Returns the decoder's config of a model directory.

  Raises:
    UserError: a field of config.json is missing or of another type, or it names something that the
      decoder does not compute.
  """
  file = directory / CONFIG
  raw = schema.check(schema.read(file), {"model_type": schema.text(100)}, file)
  model_type = raw["model_type"]
  if model_type not in FAMILIES:
    raise UserError(
      f"{file}: model_type {model_type!r} is not supported; {', '.join(FAMILIES)} are."
    )
  read = Fields(raw, file)
  try:
    fields = FAMILIES[model_type].config(read)
    read.refuse_the_others()
    return DecoderConfig(**fields, model_type=model_type, hf_config=json.dumps(raw))
  except ValueError as error:
    raise UserError(f"{file}: {error}") from None
