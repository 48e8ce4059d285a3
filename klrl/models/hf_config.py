"""Reads and checks the config.json of a model.

A field that changes the logits is either computed, or must have the value at which it changes
nothing. All other fields are known to be harmless, or are named on the console and ignored, as
`transformers` does.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from klrl import schema
from klrl.errors import UserError
from klrl.models import rotations
from klrl.models.rotations import Rotation
from klrl.run import progress

MAX_TOKENS = 10**7
ANYTHING = schema.Rule("anything", lambda value: True)
_REQUIRED: Any = object()
_QUANTIZED = ("quantization_config", "compression_config")
# The values, besides null, at which a field of Llama, Qwen2 or a related model changes nothing. A
# related model gets here if somebody has edited its model_type.
_NEUTRAL = {
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "use_sliding_window": (False,),
  "partial_rotary_factor": (1.0,),
  "rotary_pct": (1.0,),
  "rope_interleaved": (False,),
  "attention_out_bias": (False,),
  "attention_multiplier": (),
  "embedding_multiplier": (1.0,),
  "residual_multiplier": (1.0,),
  "logits_scaling": (1.0,),
  "logit_scale": (1.0,),
  "scale_emb": (1.0,),
  "scale_depth": (),
  "query_pre_attn_scalar": (),
  "attn_logit_softcapping": (),
  "final_logit_softcapping": (),
  "logits_soft_cap": (),
  "sliding_window": (),
  "attn_temperature_tuning": (False,),
  "scale_attn_by_inverse_layer_idx": (False,),
  "use_mrope": (False,),
  "clip_qkv": (),
  "qk_norm": (False,),
  "use_qk_norm": (False,),
  "qk_layernorm": (False,),
  "use_parallel_residual": (False,),
  "parallel_attn": (False,),
  "alibi": (False,),
  "no_rope_layers": (),
  "num_experts": (0, 1),
  "num_local_experts": (0, 1),
  "n_routed_experts": (0,),
  "kv_lora_rank": (),
  "add_cross_attention": (False,),
  "is_encoder_decoder": (False,),
  "use_bidirectional_attention": (False,),
  "is_causal": (True,),
  **dict.fromkeys(_QUANTIZED, ()),
}
# Fields that only training, generation and bookkeeping read.
_HARMLESS = """
  model_type architectures torch_dtype dtype transformers_version _name_or_path use_cache
  initializer_range pretraining_tp attention_dropout max_window_layers id2label
  label2id num_labels problem_type output_attentions output_hidden_states return_dict
  return_dict_in_generate output_scores torchscript tf_legacy_loss use_bfloat16 pruned_heads
  chunk_size_feed_forward is_decoder cross_attention_hidden_size tie_encoder_decoder
  finetuning_task task_specific_params tokenizer_class prefix auto_map attn_implementation
  _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
  _model_name_or_path attn_pdrop embd_pdrop resid_pdrop hidden_dropout dropout
  classifier_dropout max_length min_length do_sample early_stopping num_beams num_beam_groups
  diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
  no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
  forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
  suppress_tokens begin_suppress_tokens unsloth_fixed unsloth_version
"""
_THETA = schema.number(1, 1e30)
_NUMBER = schema.number(1e-6, 1e6)
_FACTOR = schema.number(1, 1e6)
_LEN = schema.optional(schema.integer(2, 2**24))


class Fields:
  """The fields of a config.json, read one by one.

  A field that is read is computed. At the end one of two methods looks at those that were not:
  `refuse_uncomputed` takes all that change nothing, and `refuse_unread` takes none.
  """

  def __init__(self, values: Mapping[str, Any], where: pathlib.Path | str):
    self.values, self.where = values, where
    self._read = set()

  def __call__(self, name: str, rule: schema.Rule, default: Any = _REQUIRED) -> Any:
    """Returns the value of a field, and `default` where the file has no such field.

    Raises UserError if `rule` does not hold, or if there is neither value nor default.
    """
    self._read.add(name)
    required = (name,) if default is _REQUIRED else ()
    schema.check(self.values, {name: rule}, self.where, required=required)
    return self.values.get(name, default)

  def choice(self, name: str, choices: Mapping[str, Any], default: str) -> Any:
    """Returns what `choices` makes of a field; UserError where it is none of the choices."""
    value = self(name, schema.text(), default)
    if value not in choices:
      raise UserError(f"{self.where}: {name}={repr(value)[:100]} is not supported.")
    return choices[value]

  def ignore(self, *names: str) -> None:
    """Notes that fields change nothing in this family, whatever they hold."""
    self._read |= set(names)

  def refuse_unread(self) -> None:
    """Raises UserError if a field that was not read holds anything."""
    _refuse(self.values, {name: () for name in self.values if name not in self._read}, self.where)

  def refuse_uncomputed(self) -> None:
    """Raises UserError if a field that was not read could change the logits; names unknown ones."""
    types = self.values.get("layer_types")
    full = ["full_attention"] * len(types) if isinstance(types, list) else ()
    neutral = _NEUTRAL | {"layer_types": (full,)}
    neutral = {name: allowed for name, allowed in neutral.items() if name not in self._read}
    _refuse(self.values, neutral, self.where)
    known = {*neutral, *self._read, *_HARMLESS.split()}
    unknown = [name for name in self.values if name not in known and not _is_id(name)]
    if unknown:
      progress.warn_once(
        f"{self.where}: {', '.join(unknown)[:200]}: not known to klrl, and left aside, as by"
        f" transformers in a {self.values['model_type']}."
      )


def rotation_of(
  read: Fields,
  *,
  head_dim: int,
  max_len: int,
  theta_name: str = "rope_theta",
  share: float | None = None,
  kinds: Mapping[str, str] | None = None,
) -> Rotation:
  """Returns the rotation of all layers of a model.

  Args:
    read: its config.json.
    head_dim: width of a head.
    max_len: its max_position_embeddings.
    theta_name: the field of the base of the frequencies, where the rotation's own has none.
    share: the share of a head that is rotated, where the rotation's own fields do not say so; None
      if this family always rotates whole heads.
    kinds: `rope_type` as it is written -> as it is meant; None: all that are known.

  Raises:
    UserError: the type of rotation is not known, or one of its fields is missing, of another type,
      or not computed.
  """
  theta = read(theta_name, schema.optional(_THETA), None)
  # The first of the two fields that holds anything counts, as in transformers.
  ropes = {
    name: read(name, schema.optional(schema.object_of(ANYTHING)), None)
    for name in ("rope_scaling", "rope_parameters")
  }
  name = "rope_scaling" if ropes["rope_scaling"] else "rope_parameters"
  original_len = read("original_max_position_embeddings", _LEN, None)
  return _rotation(
    Fields(ropes[name] or {}, f"{read.where}, {name}"),
    theta=10000.0 if theta is None else theta,
    head_dim=head_dim,
    max_len=max_len,
    share=share,
    kinds=kinds or {kind: kind for kind in _KINDS},
    original_len=original_len,
  )


def rotations_of_gemma3(read: Fields, *, head_dim: int, max_len: int) -> tuple[Rotation, Rotation]:
  """Returns the rotations of the layers without and with a window; see `rotation_of`."""
  types = ("full_attention", "sliding_attention")
  thetas = [
    read("rope_theta", schema.optional(_THETA), None) or 1e6,
    read("rope_local_base_freq", schema.optional(_THETA), None) or 1e4,
  ]
  anything = schema.optional(schema.object_of(ANYTHING))
  by_type = read("rope_parameters", anything, None) or {}
  where = f"{read.where}, rope_parameters"
  _refuse(by_type, {name: () for name in by_type if name not in types}, where)
  ropes = [schema.check(by_type, {name: anything}, where).get(name) or {} for name in types]
  # transformers sets the type before it adds the older field, whose `type` then says nothing.
  ropes[0] = {"rope_type": "default"} | ropes[0] | (read("rope_scaling", anything, None) or {})
  full, local = (
    _rotation(
      Fields(rope, f"{where} or rope_scaling, {name}"),
      theta=theta,
      head_dim=head_dim,
      max_len=max_len,
      kinds={kind: kind for kind in _KINDS},
    )
    for rope, name, theta in zip(ropes, types, thetas, strict=True)
  )
  return full, local


def _rotation(read, *, theta, head_dim, max_len, kinds, share=None, original_len=None) -> Rotation:
  written = read("rope_type", schema.optional(schema.text(100)), None)
  written = written or read("type", schema.optional(schema.text(100)), None) or "default"
  read.ignore("type")
  if written not in kinds:
    raise UserError(
      f"{read.where}: rope_type {written!r} is not supported; {', '.join(kinds)} are."
    )
  theta = float(read("rope_theta", schema.optional(_THETA), None) or theta)
  if share is None:
    _refuse(read.values, {"partial_rotary_factor": (1.0,)}, read.where)
    read.ignore("partial_rotary_factor")
    share = 1.0
  else:
    own = read("partial_rotary_factor", schema.optional(schema.number(0, 1)), None)
    share = share if own is None else own
  base = Rotation(theta, float(share))
  kind = kinds[written]
  if kind in ("llama3", "yarn", "longrope"):
    own = read("original_max_position_embeddings", _LEN, None)
    if None not in (own, original_len) and own != original_len:
      raise UserError(
        f"{read.where}: original_max_position_embeddings is {own} there and {original_len} beside"
        " it; make them equal."
      )
    original_len = original_len or own or max_len
  rotation = _KINDS[kind](read, base, base.rotated_dim(head_dim), max_len, original_len)
  read.refuse_unread()
  return rotation


def _linear(read, base, dim, max_len, original_len):
  return dataclasses.replace(base, divisors=(float(read("factor", _FACTOR)),) * (dim // 2))


def _dynamic(read, base, dim, max_len, original_len):
  read("factor", _FACTOR)  # It acts beyond `max_len`, where no row ends.
  return base


def _llama3(read, base, dim, max_len, original_len):
  low, high = read("low_freq_factor", _FACTOR), read("high_freq_factor", _FACTOR)
  if low >= high:
    raise UserError(f"{read.where}: low_freq_factor={low} must be below high_freq_factor={high}.")
  divisors = rotations.llama3_divisors(
    base.theta,
    dim,
    factor=read("factor", _FACTOR),
    low_freq_factor=low,
    high_freq_factor=high,
    original_max_position_embeddings=original_len,
  )
  return dataclasses.replace(base, divisors=divisors)


def _yarn(read, base, dim, max_len, original_len):
  factor = read("factor", schema.optional(_FACTOR), None) or max_len / original_len
  amplitude = read("attention_factor", schema.optional(_NUMBER), None)
  scales = [
    read(name, schema.optional(schema.number(0, 1e6)), None) or 0.0
    for name in ("mscale", "mscale_all_dim")
  ]
  if amplitude is None:
    amplitude = rotations.yarn_amplitude(factor, *scales)
  if base.theta <= 1:
    raise UserError(f"{read.where}: yarn needs a rope_theta above 1.")
  divisors = rotations.yarn_divisors(
    base.theta,
    dim,
    factor=factor,
    original_max_position_embeddings=original_len,
    beta_fast=read("beta_fast", schema.optional(_NUMBER), None) or 32.0,
    beta_slow=read("beta_slow", schema.optional(_NUMBER), None) or 1.0,
    truncate=read("truncate", schema.boolean(), True),
  )
  return dataclasses.replace(base, divisors=divisors, amplitude=float(amplitude))


def _longrope(read, base, dim, max_len, original_len):
  factor = read("factor", schema.optional(_FACTOR), None) or max_len / original_len
  amplitude = read("attention_factor", schema.optional(_NUMBER), None)
  if amplitude is None:
    amplitude = rotations.longrope_amplitude(factor, original_len)
  short, long = (
    tuple(map(float, read(name, schema.list_of(_NUMBER))))
    for name in ("short_factor", "long_factor")
  )
  for name, divisors in (("short_factor", short), ("long_factor", long)):
    if len(divisors) != dim // 2:
      raise UserError(f"{read.where}: {name} has {len(divisors)} numbers, not {dim // 2}.")
  return dataclasses.replace(
    base,
    divisors=short,
    long_divisors=long,
    short_len=original_len,
    amplitude=float(amplitude),
  )


_KINDS = {
  "default": lambda read, base, *_: base,
  "linear": _linear,
  "dynamic": _dynamic,
  "llama3": _llama3,
  "yarn": _yarn,
  "longrope": _longrope,
}


def _is_id(name):
  return name.endswith("token_id")


def _refuse(values: Mapping[str, Any], neutral: Mapping[str, tuple], where) -> None:
  """Raises UserError if a field is neither null nor one of the values that change nothing."""
  for name, allowed in neutral.items():
    value = values.get(name)
    # 0 == False, which must not let a field of another type pass.
    if value is not None and not any(
      value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed
    ):
      advice = " Save the model's weights unquantized." if name in _QUANTIZED else ""
      raise UserError(f"{where}: {name}={repr(value)[:100]} is not supported.{advice}")
