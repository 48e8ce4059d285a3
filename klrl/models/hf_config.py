"""Reads and checks the config.json of a model.

A field that changes the logits is either computed, or must have the value at which it changes
nothing. All other fields are known to be harmless, or are named on the console and ignored, as
`transformers` does.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from klrl import schema
from klrl.errors import UserError
from klrl.run import progress

MAX_TOKENS = 10**7
_ANYTHING = schema.object_of(schema.Rule("anything", lambda value: True))
_REQUIRED: Any = object()
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
  "layer_types": (),
  "attn_temperature_tuning": (False,),
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
  "quantization_config": (),
  "compression_config": (),
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
  original_max_position_embeddings embd_pdrop resid_pdrop hidden_dropout dropout
  classifier_dropout max_length min_length do_sample early_stopping num_beams num_beam_groups
  diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
  no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
  forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
  suppress_tokens begin_suppress_tokens unsloth_fixed unsloth_version
"""
_THETA = schema.number(1, 1e30)
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


class Fields:
  """The fields of a config.json, read one by one.

  A field that is read is computed. `refuse_the_others` then refuses each of the others that would
  change the logits.
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

  def refuse_the_others(self) -> None:
    """Raises UserError if a field that was not read could change the logits; names unknown ones."""
    num_layers = self.values.get("num_hidden_layers")
    neutral = _NEUTRAL | {"layer_types": (["full_attention"] * num_layers,) if num_layers else ()}
    neutral = {name: allowed for name, allowed in neutral.items() if name not in self._read}
    _refuse(self.values, neutral, self.where)
    known = {*neutral, *self._read, *_HARMLESS.split()}
    unknown = [name for name in self.values if name not in known and not _is_id(name)]
    if unknown:
      progress.warn_once(
        f"{self.where}: {', '.join(unknown)[:200]}: not known to klrl, and left aside, as by"
        f" transformers in a {self.values['model_type']}."
      )


def rope_theta(read: Fields) -> float:
  """Returns the base of the rotation's frequencies; every scaled rotation is refused."""
  theta = read("rope_theta", schema.optional(_THETA), None)
  # The first of the two fields that holds anything counts, as in transformers.
  ropes = {
    name: read(name, schema.optional(_ANYTHING), None)
    for name in ("rope_scaling", "rope_parameters")
  }
  name = "rope_scaling" if ropes["rope_scaling"] else "rope_parameters"
  rope = ropes[name] or {}
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind != "default":
    raise UserError(
      f"{read.where}: rope_scaling of type {str(kind)[:100]!r} is not supported, in {name}."
    )
  where = f"{read.where}, {name}"
  _refuse(rope, {key: () for key in rope if key not in _ROPE_KEYS}, where)
  _refuse(rope, {"partial_rotary_factor": (1.0,)}, where)
  schema.check(rope, {"rope_theta": schema.optional(_THETA)}, where)
  theta = rope.get("rope_theta") or theta
  return 10000.0 if theta is None else float(theta)


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
      raise UserError(f"{where}: {name}={repr(value)[:100]} is not supported.")
