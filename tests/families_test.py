"""Every family of models against transformers, on tiny random models that transformers makes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_test import tiny_tokenizer

from klrl.models import hf
from klrl.models.decoder import policy_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
  "vocab_size": 61,
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "pad_token_id": 0,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
WIDE = SIZES | {"head_dim": 8}  # 4 heads of 8 are wider than 24
BY_HEAD = {"rms_norm_eps": 1e-3, "tie_word_embeddings": False}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
YARN = {
  "rope_type": "yarn",
  "rope_theta": 500.0,
  "factor": 4.0,
  "original_max_position_embeddings": 16,
  "beta_fast": 4.0,
}
LONGROPE = {
  "rope_type": "longrope",
  "short_factor": [1.0, 1.25, 1.5],
  "long_factor": [1.5, 3.0, 9.0],
}
GEMMA = WIDE | {"query_pre_attn_scalar": 12, "sliding_window": 5, "attention_bias": True}
GPT2 = {"vocab_size": 61, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 40}
ROWS = 24  # longer than every window, and than what the rotations were made for

# Name of the case -> (model_type, fields of config.json).
CASES = {
  "llama": ("llama", WIDE | BY_HEAD | {"attention_bias": True, "mlp_bias": True}),
  "llama-linear": ("llama", WIDE | {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
  "llama-dynamic": ("llama", WIDE | {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}}),
  "llama3": ("llama", WIDE | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
  "llama-yarn": ("llama", WIDE | {"rope_parameters": YARN}),
  "llama-yarn-mscale": (
    "llama",
    WIDE | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False}},
  ),
  "mistral": ("mistral", WIDE | {"sliding_window": 5}),
  "qwen2": ("qwen2", SIZES),
  "qwen2-window": (
    "qwen2",
    SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
  ),
  "qwen3": ("qwen3", WIDE | {"attention_bias": True, "tie_word_embeddings": True}),
  "gemma": ("gemma", WIDE),
  "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
  "gemma3": (
    "gemma3_text",
    GEMMA
    | {
      "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
      "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
      },
    },
  ),
  "phi3-short": ("phi3", SIZES | {"rope_parameters": LONGROPE} | {"sliding_window": 7}),
  "phi3-long": (
    "phi3",
    SIZES | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
  ),
  "phi3-partial": (
    "phi3",
    SIZES | {"num_attention_heads": 2, "partial_rotary_factor": 0.5, "rope_parameters": LONGROPE},
  ),
  "olmo2": ("olmo2", SIZES | {"attention_bias": True}),
  "smollm3": ("smollm3", SIZES | {"no_rope_layer_interval": 2}),
  "smollm3-window": (
    "smollm3",
    SIZES | {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 5},
  ),
  "granite": (
    "granite",
    SIZES
    | {
      "embedding_multiplier": 3.0,
      "logits_scaling": 1.7,
      "residual_multiplier": 0.4,
      "attention_multiplier": 0.3,
      "attention_bias": True,
    },
  ),
  "gpt_neox": ("gpt_neox", SIZES | {"num_attention_heads": 2, "rotary_pct": 0.5}),
  "gpt_neox-sequential": (
    "gpt_neox",
    SIZES | {"num_attention_heads": 2, "rotary_pct": 0.5, "use_parallel_residual": False},
  ),
  "gpt2": ("gpt2", GPT2),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Returns the function `case -> (directory, model of transformers)`, which makes each once."""

  @functools.cache
  def make(case):
    model_type, fields = CASES[case]
    fields = json.loads(json.dumps(fields))  # transformers writes into it
    config = transformers.AutoConfig.for_model(model_type, **fields)
    config._attn_implementation = "eager"  # the one that knows soft caps
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
      for name, parameter in model.named_parameters():
        around = 1.0 if parameter.ndim == 1 and "weight" in name and "gemma" not in case else 0.0
        parameter.copy_(around + 0.2 * torch.randn(parameter.shape, generator=generator))
    directory = tmp_path_factory.mktemp(case)
    model.save_pretrained(directory)
    return directory, model

  return make


def rows():
  """Returns tokens [3, ROWS] and a mask with ragged left padding; the first row has none."""
  tokens = np.random.default_rng(0).integers(3, 61, (3, ROWS))
  return tokens, np.arange(ROWS) >= np.array([[0], [4], [11]])


def expected_logits(model, tokens, mask):
  positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
  with torch.no_grad():
    return model(
      torch.tensor(tokens),
      attention_mask=torch.tensor(mask.astype(int)),
      position_ids=torch.tensor(positions),
    ).logits.numpy()


PROMPT = 9


@functools.cache
def compiled(config):
  """Returns logits(params, tokens, mask) -> those of a full pass, and of a prompt and steps."""
  policy = policy_model(config)

  def both(params, tokens, mask):
    unembedding = policy.unembedding(params)
    hidden = policy.hidden(params, tokens, mask)
    first, cache = policy.prefill(params, tokens[:, :PROMPT], mask[:, :PROMPT], ROWS - 1)
    params = policy.unstack(params)

    def step(cache, slot):
      cache_mask = mask[:, :-1] & (jnp.arange(ROWS - 1) <= slot)[None]
      positions = jnp.sum(cache_mask, axis=1) - 1
      hidden, cache = policy.decode(params, tokens[:, slot], positions, cache, slot, cache_mask)
      return cache, hidden

    rest = jax.lax.scan(step, cache, jnp.arange(PROMPT, ROWS - 1))[1]
    steps = jnp.concatenate([first[:, None], rest.swapaxes(0, 1)], axis=1)
    return hidden @ unembedding, steps @ unembedding

  return jax.jit(both)


DIFFERENCES = {}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, made):
  directory, model = made(case)
  config, params = hf.load_policy(directory)
  tokens, mask = rows()
  expected = expected_logits(model, tokens, mask)
  full, steps = compiled(config)(params, tokens, mask)
  assert np.std(expected[mask]) > 0.3
  DIFFERENCES[case] = np.abs(full - expected)[mask].max()
  np.testing.assert_allclose(full[mask], expected[mask], atol=1e-4)
  np.testing.assert_allclose(steps[0], full[0, PROMPT - 1 : -1], atol=1e-4)
  ragged = mask[:, PROMPT - 1 : -1]
  np.testing.assert_allclose(steps[ragged], full[:, PROMPT - 1 : -1][ragged], atol=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if "-" not in case or "long" in case])
def test_a_saved_model_opens_in_transformers_with_the_same_logits(case, made, tmp_path):
  directory, model = made(case)
  config, params = hf.load_policy(directory)
  hf.save_policy(tmp_path, config, params, dataclasses.replace(tiny_tokenizer(), config_ids={}))
  written, before = (json.loads((x / "config.json").read_text()) for x in (tmp_path, directory))
  assert {**before, "architectures": 0} == {**before, **written, "architectures": 0}
  assert written["architectures"] == before["architectures"]
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, attn_implementation="eager", dtype=torch.float32
  )
  np.testing.assert_array_equal(expected_logits(again, *rows()), expected_logits(model, *rows()))
