"""The families of models: for each `model_type` one row, and nothing else knows a family by name.

A row says which fields of `DecoderConfig` follow from a config.json, and how the tensors are
called. A field that its function reads is computed; `hf_config.py` refuses every other field that
could change the logits. docs/models.md says how to add a family.

The functions follow `transformers` 5.23, in the values that it takes for absent fields too.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from klrl import schema
from klrl.errors import UserError
from klrl.models.blocks import DecoderConfig, LayerKind
from klrl.models.directory import CONFIG
from klrl.models.hf_config import ANYTHING, MAX_TOKENS, Fields, rotation_of, rotations_of_gemma3
from klrl.models.rotations import Rotation
from klrl.run import progress

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
  defaults: what `transformers` takes for fields that a config.json of this family lacks.
  """

  classes: str
  config: Callable[[Fields], dict[str, Any]]
  tensors: Mapping[Path, Stored]
  layers: str = "model.layers.{}."
  out_in: bool = True
  renamed: tuple[tuple[str, str | None], ...] = ()
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def known_as(self, name: str) -> str | None:
    """Returns the name in `tensors` of a file's tensor; None if it is left aside.

    Files of one family may differ in a prefix, and may hold what the config determines (old files
    have the rotation's frequencies) or what is no part of the language model (a vision tower).
    """
    for pattern, known in (*self.renamed, (r".*rotary_emb\.inv_freq", None)):
      if match := re.fullmatch(pattern, name):
        return None if known is None else match.expand(known)
    return name

  def architecture(self, task: str) -> str:
    """Returns the class in `transformers` for a task, "ForCausalLM" for example."""
    return _OTHER_CLASSES.get(self.classes + task, self.classes + task)


_OTHER_CLASSES = {
  "GPT2ForCausalLM": "GPT2LMHeadModel",
  "Gemma3ForSequenceClassification": "Gemma3TextForSequenceClassification",
}


def is_stacked(path: Path) -> bool:
  """Returns whether a leaf of the params is a layer's, with the layers on its leading axis."""
  return path[:2] == ("decoder", "layers")


def is_map(path: Path) -> bool:
  """Returns whether a leaf is a linear map [in, out], which files may hold as [out, in]."""
  return path[-1] in ("kernel", "unembedding", "head")


# Fields of config.json.

# How a decoder is computed and stored; its other fields say what it computes.
_SETTINGS = ("dtype", "param_dtype", "remat", "lora_rank", "num_tokens", "head")
_SETTINGS += ("model_type", "hf_config")

_BOOL = schema.boolean()
_SIZE = schema.integer(1, 10**7)
_COUNT = schema.integer(1, 10**4)
_POSITIVE = schema.number(1e-30, 1e30)
_MAYBE_POSITIVE = schema.optional(_POSITIVE)
_WINDOW = schema.optional(schema.integer(1))
_ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
}


def _common(read: Fields, *, activation="hidden_act", activations=_ACTIVATIONS) -> dict[str, Any]:
  """Returns the fields that all families have, under the names that most of them use."""
  num_heads, head_dim = read("num_attention_heads", _SIZE), _head_dim(read)
  return {
    "vocab_size": read("vocab_size", schema.integer(1, MAX_TOKENS)),
    "width": read("hidden_size", _SIZE),
    "num_layers": read("num_hidden_layers", _COUNT),
    "num_heads": num_heads,
    "num_kv_heads": read("num_key_value_heads", schema.optional(_SIZE), None) or num_heads,
    "head_dim": head_dim,
    "mlp_dim": read("intermediate_size", _SIZE),
    "max_len": read("max_position_embeddings", schema.integer(2, 2**24)),
    "activation": read.choice(activation, activations, "silu"),
    "tie_embeddings": read("tie_word_embeddings", _BOOL, False),
  }


def _with_rms_norm(read, **names) -> dict[str, Any]:
  return _common(read, **names) | {
    "norm_eps": float(read("rms_norm_eps", schema.number(0, 1), 1e-6))
  }


def _head_dim(read) -> int:
  width, num_heads = read("hidden_size", _SIZE), read("num_attention_heads", _SIZE)
  head_dim = read("head_dim", schema.optional(schema.integer(2, 10**5)), None)
  if head_dim is None and width % num_heads:
    raise ValueError(
      f"hidden_size={width} is no multiple of num_attention_heads={num_heads}, and there is no"
      " head_dim."
    )
  return head_dim or width // num_heads


def _rotation(read, **options) -> Rotation:
  return rotation_of(
    read,
    head_dim=_head_dim(read),
    max_len=read("max_position_embeddings", schema.integer(2, 2**24)),
    **options,
  )


def _attention_biases(read) -> dict[str, Any]:
  bias = read("attention_bias", _BOOL, False)
  return {"attention_bias": bias, "output_bias": bias}


def _layers(read, kind_of: Callable[[int], LayerKind]) -> dict[str, Any]:
  """Returns the kinds of layers, where `kind_of(i)` is that of layer i."""
  layers = [kind_of(i) for i in range(read("num_hidden_layers", _COUNT))]
  kinds = tuple(dict.fromkeys(layers))
  return {
    "kinds": kinds,
    "kind_of_layer": tuple(map(kinds.index, layers)) if len(kinds) > 1 else (),
  }


def _windows(read, is_windowed: Callable[[int], bool], window: int | None) -> Sequence[int]:
  """Returns the window of each layer, 0 for none: as `layer_types` say, or else `is_windowed`."""
  num_layers = read("num_hidden_layers", _COUNT)
  types = read("layer_types", schema.optional(schema.list_of(schema.text())), None)
  if types is None:
    return [window if window and is_windowed(i) else 0 for i in range(num_layers)]
  allowed = {"full_attention", "sliding_attention"} if window else {"full_attention"}
  if len(types) != num_layers or not allowed.issuperset(types):
    raise ValueError(
      f"layer_types={types[:4]}... is not supported: it must have {num_layers} entries, each one of"
      f" {sorted(allowed)}; sliding_window is {window}."
    )
  return [window if kind == "sliding_attention" else 0 for kind in types]


def _window_of_all(read) -> int:
  """Returns the window that all layers have; 0 where it holds every row."""
  window = read("sliding_window", _WINDOW, None) or 0
  return window if window < read("max_position_embeddings", _SIZE) else 0


def _llama(read: Fields) -> dict[str, Any]:
  return {
    **_with_rms_norm(read),
    **_attention_biases(read),
    "mlp_bias": read("mlp_bias", _BOOL, False),
    "kinds": (LayerKind(_rotation(read)),),
  }


def _mistral(read: Fields) -> dict[str, Any]:
  return _with_rms_norm(read) | {"kinds": (LayerKind(_rotation(read), _window_of_all(read)),)}


def _qwen2(read: Fields) -> dict[str, Any]:
  read.ignore("attention_bias")  # Qwen2 has one without being told.
  return _with_rms_norm(read) | _layers_of_qwen(read) | {"attention_bias": True}


def _qwen3(read: Fields) -> dict[str, Any]:
  return {
    **_with_rms_norm(read),
    **_attention_biases(read),
    **_layers_of_qwen(read),
    "qk_norm": "head",
  }


def _layers_of_qwen(read):
  window = read("sliding_window", _WINDOW) if read("use_sliding_window", _BOOL, False) else None
  read.ignore("sliding_window")  # without the switch
  first = read("max_window_layers", schema.integer(0))
  windows, rotation = _windows(read, lambda i: i >= first, window), _rotation(read)
  return _layers(read, lambda i: LayerKind(rotation, windows[i]))


def _smollm3(read: Fields) -> dict[str, Any]:
  num_layers = read("num_hidden_layers", _COUNT)
  interval = read("no_rope_layer_interval", schema.integer(1))
  rotates = read("no_rope_layers", schema.optional(schema.list_of(schema.integer(0, 1))), None)
  if rotates is None:
    rotates = [int((i + 1) % interval != 0) for i in range(num_layers)]
  if len(rotates) < num_layers:
    raise ValueError(f"no_rope_layers has {len(rotates)} entries for {num_layers} layers.")
  window = None
  if read("use_sliding_window", _BOOL, False):
    window = read("sliding_window", _WINDOW, None)
  read.ignore("sliding_window", "max_window_layers")
  windows, rotation = _windows(read, lambda i: not rotates[i], window), _rotation(read)
  return {
    **_with_rms_norm(read),
    **_attention_biases(read),
    **_layers(read, lambda i: LayerKind(rotation if rotates[i] else None, windows[i])),
    "mlp_bias": read("mlp_bias", _BOOL, False),
  }


def _gemma(read: Fields) -> dict[str, Any]:
  read.ignore("hidden_activation")
  # Its old configs say "gelu" and mean the approximation.
  activations = _ACTIVATIONS | {"gelu": "gelu_tanh"}
  return {
    **_with_rms_norm(read, activations=activations),
    **_of_every_gemma(read),
    "kinds": (LayerKind(_rotation(read)),),
  }


def _gemma2(read: Fields) -> dict[str, Any]:
  rotation = _rotation(read)
  windows = _windows(read, lambda i: i % 2 == 0, read("sliding_window", schema.integer(1)))
  return {
    **_of_later_gemmas(read),
    **_layers(read, lambda i: LayerKind(rotation, windows[i])),
    "attention_cap": read("attn_logit_softcapping", _MAYBE_POSITIVE) or 0.0,
  }


def _gemma3(read: Fields) -> dict[str, Any]:
  period = read("sliding_window_pattern", schema.integer(1), 6)
  read.ignore("_sliding_window_pattern")  # what transformers writes, and does not read
  windows = _windows(
    read, lambda i: (i + 1) % period != 0, read("sliding_window", schema.integer(1))
  )
  full, local = rotations_of_gemma3(
    read, head_dim=_head_dim(read), max_len=read("max_position_embeddings", _SIZE)
  )
  return {
    **_of_later_gemmas(read),
    **_layers(read, lambda i: LayerKind(local if windows[i] else full, windows[i])),
    "qk_norm": "head",
  }


def _of_later_gemmas(read):
  read.ignore("hidden_act")
  return {
    **_with_rms_norm(read, activation="hidden_activation"),
    **_of_every_gemma(read),
    "norm_place": "both",
    "attention_scale": read("query_pre_attn_scalar", _POSITIVE) ** -0.5,
    "logits_cap": read("final_logit_softcapping", _MAYBE_POSITIVE) or 0.0,
  }


def _of_every_gemma(read):
  return {
    **_attention_biases(read),
    "norm": "rms_plus_1",
    "embedding_scale": read("hidden_size", _SIZE) ** 0.5,
  }


def _phi3(read: Fields) -> dict[str, Any]:
  share = read("partial_rotary_factor", schema.optional(schema.number(0, 1)), None)
  rotation = _rotation(
    read,
    share=1.0 if share is None else share,
    kinds={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
  )
  return _with_rms_norm(read) | {"kinds": (LayerKind(rotation, _window_of_all(read)),)}


def _olmo2(read: Fields) -> dict[str, Any]:
  return {
    **_with_rms_norm(read),
    **_attention_biases(read),
    "kinds": (LayerKind(_rotation(read)),),
    "norm_place": "post",
    "qk_norm": "all",
  }


def _granite(read: Fields) -> dict[str, Any]:
  return _llama(read) | {
    "embedding_scale": float(read("embedding_multiplier", _POSITIVE)),
    "residual_scale": float(read("residual_multiplier", _POSITIVE)),
    "attention_scale": float(read("attention_multiplier", _POSITIVE)),
    "logits_divisor": float(read("logits_scaling", _POSITIVE)),
  }


_PLAIN = {"norm": "layer", "gated_mlp": False, "mlp_bias": True}


def _gpt_neox(read: Fields) -> dict[str, Any]:
  share = read("rotary_pct", schema.optional(schema.number(0, 1)), 0.25)
  rotation = _rotation(read, share=share, theta_name="rotary_emb_base")
  return {
    **_common(read),
    **_attention_biases(read),
    **_PLAIN,
    "norm_eps": float(read("layer_norm_eps", schema.number(0, 1), 1e-5)),
    "kinds": (LayerKind(rotation),),
    "parallel_residual": read("use_parallel_residual", _BOOL),
  }


def _gpt2(read: Fields) -> dict[str, Any]:
  # The first is a question of rounding; the others belong to another head and to older versions.
  read.ignore("reorder_and_upcast_attn", "n_ctx", *(n for n in read.values if "summary" in n))
  width, num_heads = read("n_embd", _SIZE), read("n_head", _SIZE)
  if width % num_heads:
    raise ValueError(f"n_embd={width} is no multiple of n_head={num_heads}.")
  return {
    **_PLAIN,
    "vocab_size": read("vocab_size", schema.integer(1, MAX_TOKENS)),
    "width": width,
    "num_layers": read("n_layer", _COUNT),
    "num_heads": num_heads,
    "num_kv_heads": num_heads,
    "head_dim": width // num_heads,
    "mlp_dim": read("n_inner", schema.optional(_SIZE), None) or 4 * width,
    "max_len": read("n_positions", schema.integer(2, 2**24)),
    "activation": read.choice("activation_function", _ACTIVATIONS, "gelu_new"),
    "norm_eps": float(read("layer_norm_epsilon", schema.number(0, 1), 1e-5)),
    "kinds": (LayerKind(rotation=None),),
    "learned_positions": True,
    "attention_bias": True,
    "output_bias": True,
    "attention_scale": None if read("scale_attn_weights", _BOOL, True) else 1.0,
    "tie_embeddings": read("tie_word_embeddings", _BOOL),
  }


# Names of tensors.


def _tensors(ends: Mapping[Path, str], layers: Mapping[Path, str | Stored]) -> dict[Path, Stored]:
  heads = {("head",): "score.weight", ("unembedding",): "lm_head.weight"}
  ends = {path if path in heads else ("decoder", *path): x for path, x in (heads | ends).items()}
  named = ends | {("decoder", "layers", *path): x for path, x in layers.items()}
  return {path: x if isinstance(x, Stored) else Stored(x) for path, x in named.items()}


def _linear(path: Path, name: str, rows=None) -> dict[Path, Stored]:
  """Returns where the kernel of a linear map and its bias, if it has one, are."""
  return {
    (*path, "kernel"): Stored(f"{name}.weight", rows),
    (*path, "bias"): Stored(f"{name}.bias", rows),
  }


def _norm(name: str, tensor: str) -> dict[Path, str]:
  return {(name, "scale"): f"{tensor}.weight", (name, "bias"): f"{tensor}.bias"}


def _part_of_qkv(part: int):
  """Returns the rows of queries (0), keys (1) or values (2) in one block behind the other."""

  def rows(config):
    sizes = [n * config.head_dim for n in (config.num_heads, *2 * [config.num_kv_heads])]
    return slice(sum(sizes[:part]), sum(sizes[: part + 1]))

  return rows


def _part_of_each_head(part: int):
  """Returns the rows of queries, keys or values where each head has the three together."""

  def rows(config):
    index = np.arange(3 * config.num_heads * config.head_dim)
    return index.reshape(config.num_heads, 3, config.head_dim)[:, part].reshape(-1)

  return rows


_LLAMA_ENDS = {
  ("embed", "embedding"): "model.embed_tokens.weight",
  ("final_norm", "scale"): "model.norm.weight",
}
_LLAMA_LAYER = {
  **_norm("attention_norm", "input_layernorm"),
  **_linear(("attention", "query"), "self_attn.q_proj"),
  **_linear(("attention", "key"), "self_attn.k_proj"),
  **_linear(("attention", "value"), "self_attn.v_proj"),
  **_linear(("attention", "output"), "self_attn.o_proj"),
  ("attention", "query_norm", "scale"): "self_attn.q_norm.weight",
  ("attention", "key_norm", "scale"): "self_attn.k_norm.weight",
  **_norm("mlp_norm", "post_attention_layernorm"),
  **_linear(("mlp", "gate"), "mlp.gate_proj"),
  **_linear(("mlp", "up"), "mlp.up_proj"),
  **_linear(("mlp", "down"), "mlp.down_proj"),
}
_LLAMA = _tensors(_LLAMA_ENDS, _LLAMA_LAYER)
_WITH_POST_NORMS = _tensors(
  _LLAMA_ENDS,
  {
    **_LLAMA_LAYER,
    **_norm("attention_post_norm", "post_attention_layernorm"),
    **_norm("mlp_norm", "pre_feedforward_layernorm"),
    **_norm("mlp_post_norm", "post_feedforward_layernorm"),
  },
)
_PHI3 = _tensors(
  _LLAMA_ENDS,
  {
    **_LLAMA_LAYER,
    **_linear(("attention", "query"), "self_attn.qkv_proj", _part_of_qkv(0)),
    **_linear(("attention", "key"), "self_attn.qkv_proj", _part_of_qkv(1)),
    **_linear(("attention", "value"), "self_attn.qkv_proj", _part_of_qkv(2)),
    **_linear(("mlp", "gate"), "mlp.gate_up_proj", lambda config: slice(0, config.mlp_dim)),
    **_linear(("mlp", "up"), "mlp.gate_up_proj", lambda config: slice(config.mlp_dim, None)),
  },
)
_GPT_NEOX = _tensors(
  {
    ("embed", "embedding"): "gpt_neox.embed_in.weight",
    **_norm("final_norm", "gpt_neox.final_layer_norm"),
    ("unembedding",): "embed_out.weight",
  },
  {
    **_norm("attention_norm", "input_layernorm"),
    **_linear(("attention", "query"), "attention.query_key_value", _part_of_each_head(0)),
    **_linear(("attention", "key"), "attention.query_key_value", _part_of_each_head(1)),
    **_linear(("attention", "value"), "attention.query_key_value", _part_of_each_head(2)),
    **_linear(("attention", "output"), "attention.dense"),
    **_norm("mlp_norm", "post_attention_layernorm"),
    **_linear(("mlp", "up"), "mlp.dense_h_to_4h"),
    **_linear(("mlp", "down"), "mlp.dense_4h_to_h"),
  },
)
_GPT2 = _tensors(
  {
    ("embed", "embedding"): "transformer.wte.weight",
    ("positions", "embedding"): "transformer.wpe.weight",
    **_norm("final_norm", "transformer.ln_f"),
  },
  {
    **_norm("attention_norm", "ln_1"),
    **_linear(("attention", "query"), "attn.c_attn", _part_of_qkv(0)),
    **_linear(("attention", "key"), "attn.c_attn", _part_of_qkv(1)),
    **_linear(("attention", "value"), "attn.c_attn", _part_of_qkv(2)),
    **_linear(("attention", "output"), "attn.c_proj"),
    **_norm("mlp_norm", "ln_2"),
    **_linear(("mlp", "up"), "mlp.c_fc"),
    **_linear(("mlp", "down"), "mlp.c_proj"),
  },
)
_WITH_A_VISION_TOWER = (
  (r"(model\.)?(vision_tower|multi_modal_projector)\..*", None),
  (r"language_model\.(lm_head\..*)", r"\1"),
  (r"(?:model\.language_model|language_model\.model)\.(.*)", r"model.\1"),
)
_TANH = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}

FAMILIES = {
  "llama": Family("Llama", _llama, _LLAMA),
  "mistral": Family(
    "Mistral", _mistral, _LLAMA, defaults={"num_key_value_heads": 8, "sliding_window": 4096}
  ),
  "qwen2": Family(
    "Qwen2",
    _qwen2,
    _LLAMA,
    defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
  ),
  "qwen3": Family(
    "Qwen3",
    _qwen3,
    _LLAMA,
    defaults={
      "num_key_value_heads": 32,
      "head_dim": 128,
      "sliding_window": 4096,
      "max_window_layers": 28,
    },
  ),
  "smollm3": Family(
    "SmolLM3",
    _smollm3,
    _LLAMA,
    defaults={
      "num_key_value_heads": 4,
      "rope_theta": 2e6,
      "no_rope_layer_interval": 4,
      "tie_word_embeddings": True,
    },
  ),
  "gemma": Family(
    "Gemma",
    _gemma,
    _LLAMA,
    defaults={
      "hidden_act": "gelu_pytorch_tanh",
      "tie_word_embeddings": True,
      "num_key_value_heads": 16,
      "head_dim": 256,
    },
  ),
  "gemma2": Family(
    "Gemma2",
    _gemma2,
    _WITH_POST_NORMS,
    defaults={
      **_TANH,
      "num_key_value_heads": 4,
      "head_dim": 256,
      "query_pre_attn_scalar": 256,
      "sliding_window": 4096,
      "attn_logit_softcapping": 50.0,
      "final_logit_softcapping": 30.0,
    },
  ),
  "gemma3_text": Family(
    "Gemma3",
    _gemma3,
    _WITH_POST_NORMS,
    renamed=_WITH_A_VISION_TOWER,
    # The text_config of a gemma3 leaves out more than others do.
    defaults={
      **_TANH,
      "vocab_size": 262208,
      "max_position_embeddings": 131072,
      "num_attention_heads": 8,
      "num_key_value_heads": 4,
      "head_dim": 256,
      "query_pre_attn_scalar": 256,
      "sliding_window": 4096,
      "final_logit_softcapping": None,
    },
  ),
  "phi3": Family(
    "Phi3",
    _phi3,
    _PHI3,
    defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
  ),
  "olmo2": Family("Olmo2", _olmo2, _WITH_POST_NORMS, defaults={"rms_norm_eps": 1e-5}),
  "granite": Family(
    "Granite",
    _granite,
    _LLAMA,
    defaults={
      "embedding_multiplier": 1.0,
      "residual_multiplier": 1.0,
      "attention_multiplier": 1.0,
      "logits_scaling": 1.0,
    },
  ),
  "gpt_neox": Family(
    "GPTNeoX",
    _gpt_neox,
    _GPT_NEOX,
    layers="gpt_neox.layers.{}.",
    renamed=(
      (r".*\.attention\.(masked_)?bias", None),
      (r"lm_head\.weight", "embed_out.weight"),
    ),
    defaults={"hidden_act": "gelu", "attention_bias": True, "use_parallel_residual": True},
  ),
  "gpt2": Family(
    "GPT2",
    _gpt2,
    _GPT2,
    layers="transformer.h.{}.",
    out_in=False,
    renamed=(
      (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", None),
      (r"(?:h\.\d+|wte|wpe|ln_f)\..*", r"transformer.\g<0>"),
    ),
    defaults={"tie_word_embeddings": True},
  ),
}
# model_type of a model with several parts -> the field with its language model, and its type.
_LANGUAGE_PARTS = {"gemma3": ("text_config", "gemma3_text")}


def family_of(config: DecoderConfig) -> tuple[str, Family]:
  """Returns the model_type and the family of a model; a fresh one is written as Llama or Qwen2."""
  model_type = config.model_type or ("qwen2" if config.attention_bias else "llama")
  return model_type, FAMILIES[model_type]


def config_json(config: DecoderConfig) -> dict[str, Any]:
  """Returns the config.json of a model: the one that it was read from, or that of a fresh model.

  Raises:
    ValueError: a fresh model has a feature that neither Llama nor Qwen2 has.
  """
  if config.hf_config:
    return json.loads(config.hf_config)
  model_type, family = family_of(config)
  rotation = config.kinds[0].rotation or Rotation()
  raw = {
    "model_type": model_type,
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.mlp_dim,
    "max_position_embeddings": config.max_len,
    "rope_theta": rotation.theta,
    "rms_norm_eps": config.norm_eps,
    "hidden_act": "silu",
    "tie_word_embeddings": config.tie_embeddings,
  }
  plain = DecoderConfig(**family.config(Fields({**family.defaults, **raw}, CONFIG)))
  features = [field.name for field in dataclasses.fields(config) if field.name not in _SETTINGS]
  lost = [name for name in features if getattr(plain, name) != getattr(config, name)]
  if lost:
    raise ValueError(f"a fresh model is written as {model_type}, which has no such {lost[0]}.")
  return raw


def language_config(raw: dict[str, Any], file: pathlib.Path) -> dict[str, Any]:
  """Returns the config.json of the language model in `raw`: `raw` itself, where it is one.

  Raises:
    UserError: the model has other parts too, and no config of its language model.
  """
  model_type = raw.get("model_type")
  if model_type not in _LANGUAGE_PARTS:
    return raw
  name, part_type = _LANGUAGE_PARTS[model_type]
  schema.check(raw, {name: schema.object_of(ANYTHING)}, file, required=(name,))
  of_all = {
    field: value
    for field, value in raw.items()
    if field.endswith("token_id") or field in ("dtype", "torch_dtype")
  }
  return {**FAMILIES[part_type].defaults, **raw[name], **of_all, "model_type": part_type}


def decoder_config(directory: pathlib.Path) -> DecoderConfig:
  """Returns the decoder's config of a model directory.

  Raises:
    UserError: a field of config.json is missing or of another type, or it names something that the
      decoder does not compute.
  """
  file = directory / CONFIG
  raw = schema.check(schema.read(file), {"model_type": schema.text(100)}, file)
  model_type = raw["model_type"]
  if model_type in _LANGUAGE_PARTS:
    raw = language_config(raw, file)
    progress.warn_once(
      f"{file}: the language model of this {model_type} is taken; its other parts are left aside."
    )
  elif model_type not in FAMILIES:
    raise UserError(
      f"{file}: model_type {model_type!r} is not supported; supported are the language models of"
      f" {', '.join([*FAMILIES, *_LANGUAGE_PARTS])}, without experts, images or audio."
    )
  family = FAMILIES[raw["model_type"]]
  read = Fields({**family.defaults, **raw}, file)
  try:
    fields = family.config(read)
    read.refuse_uncomputed()
    return DecoderConfig(**fields, model_type=raw["model_type"], hf_config=json.dumps(raw))
  except UserError:
    raise  # It names the file.
  except ValueError as error:
    raise UserError(f"{file}: {error}") from None
