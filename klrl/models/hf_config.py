"""Reads and checks the config.json of a model.

A field that changes the logits is either computed, or must have the value at which it changes
nothing. All other fields are known to be harmless, or are named on the console and ignored, as
`transformers` does.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from klrl import schema
from klrl.errors import UserError
from klrl.models.blocks import DecoderConfig
from klrl.models.directory import CONFIG
from klrl.run import progress

MAX_TOKENS = 10**7
_ROPE = schema.object_of(schema.Rule("anything", lambda value: True))
_RULES = {
  "vocab_size": schema.integer(1, MAX_TOKENS),
  "hidden_size": schema.integer(1, 10**6),
  "intermediate_size": schema.integer(1, 10**7),
  "num_hidden_layers": schema.integer(1, 10**4),
  "num_attention_heads": schema.integer(1, 10**5),
  "num_key_value_heads": schema.optional(schema.integer(1, 10**5)),
  "head_dim": schema.optional(schema.integer(2, 10**5)),
  "max_position_embeddings": schema.integer(2, 2**24),
  "rms_norm_eps": schema.number(0, 1),
  "rope_theta": schema.optional(schema.number(1, 1e30)),
  "rope_parameters": schema.optional(_ROPE),
  "rope_scaling": schema.optional(_ROPE),
  "tie_word_embeddings": schema.boolean(),
  "hidden_act": schema.text(),
}
_REQUIRED = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "max_position_embeddings",
)
# The values, besides null, at which a field of Llama, Qwen2 or a related model changes nothing. A
# related model gets here if somebody has edited its model_type.
_NEUTRAL = {
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
  initializer_range pretraining_tp attention_dropout attention_bias max_window_layers id2label
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
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def decoder_config(directory: pathlib.Path) -> DecoderConfig:
  """Returns the decoder's config of a model directory.

  Raises:
    UserError: a field of config.json is missing or of another type, or it names something that the
      decoder does not compute.
  """
  file = directory / CONFIG
  raw = schema.check(schema.read(file), {"model_type": schema.text(100)}, file)
  if raw["model_type"] not in ("llama", "qwen2"):
    raise UserError(
      f"{file}: model_type {raw['model_type']!r} is not supported; llama and qwen2 are."
    )
  schema.check(raw, _RULES, file, required=_REQUIRED)
  is_qwen2 = raw["model_type"] == "qwen2"
  _refuse_what_is_not_computed(raw, file, is_qwen2)
  width, num_heads = raw["hidden_size"], raw["num_attention_heads"]
  if raw.get("head_dim") is None and width % num_heads:
    raise UserError(
      f"{file}: hidden_size={width} is no multiple of num_attention_heads={num_heads}, and there is"
      " no head_dim."
    )
  rope_theta = _rope_theta(raw, file)
  try:
    return DecoderConfig(
      vocab_size=raw["vocab_size"],
      width=width,
      num_layers=raw["num_hidden_layers"],
      num_heads=num_heads,
      num_kv_heads=raw.get("num_key_value_heads") or num_heads,
      head_dim=raw.get("head_dim") or width // num_heads,
      mlp_dim=raw["intermediate_size"],
      max_len=raw["max_position_embeddings"],
      rope_theta=rope_theta,
      norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
      tie_embeddings=raw.get("tie_word_embeddings", False),
      attention_bias=is_qwen2,
    )
  except ValueError as error:
    raise UserError(f"{file}: {error}") from None


def _rope_theta(raw, file) -> float:
  """Returns the base of the rotation's frequencies; every scaled rotation is refused."""
  # The first of the two fields that holds anything counts, as in transformers.
  name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
  rope = raw.get(name) or {}
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind != "default":
    raise UserError(
      f"{file}: rope_scaling of type {str(kind)[:100]!r} is not supported, in {name}."
    )
  where = f"{file}, {name}"
  _refuse(rope, {key: () for key in rope if key not in _ROPE_KEYS}, where)
  _refuse(rope, {"partial_rotary_factor": (1.0,)}, where)
  schema.check(rope, {"rope_theta": _RULES["rope_theta"]}, where)
  theta = rope.get("rope_theta") or raw.get("rope_theta")
  return 10000.0 if theta is None else float(theta)


def _refuse_what_is_not_computed(raw, file, is_qwen2):
  neutral = _NEUTRAL | {
    "hidden_act": ("silu", "swish"),
    # Llama puts this bias on the output projection too; Qwen2 has it without being told.
    "attention_bias": (True, False) if is_qwen2 else (False,),
    "layer_types": (["full_attention"] * raw["num_hidden_layers"],),
  }
  if not is_qwen2:  # Qwen2 has a switch beside it.
    neutral["sliding_window"] = ()
  _refuse(raw, neutral, file)
  known = {*neutral, *_RULES, *_HARMLESS.split(), "sliding_window"}
  unknown = [name for name in raw if name not in known and not re.fullmatch(r".*token_id", name)]
  if unknown:
    progress.warn_once(
      f"{file}: {', '.join(unknown)[:200]}: not known to klrl, and left aside, as by transformers"
      f" in a {raw['model_type']}."
    )


def _refuse(values: Mapping[str, Any], neutral: Mapping[str, tuple], where) -> None:
  """Raises UserError if a field is neither null nor one of the values that change nothing."""
  for name, allowed in neutral.items():
    value = values.get(name)
    # 0 == False, which must not let a field of another type pass.
    if value is not None and not any(
      value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed
    ):
      raise UserError(f"{where}: {name}={repr(value)[:100]} is not supported.")
