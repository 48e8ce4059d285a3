"""Every family of models against transformers, on tiny random models that transformers makes."""

import dataclasses
import functools
import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from hf_test import LLAMA, edit_config, random_params, tiny_tokenizer

from klrl import ops, sampling
from klrl.algorithm import completions
from klrl.devices import parallel
from klrl.errors import UserError
from klrl.models import add_lora, families, hf, join, load_tokenizer, merge_lora, peft
from klrl.models.blocks import LayerKind
from klrl.models.decoder import policy_model, scalar_model, scalar_params_from
from klrl.models.rotations import Rotation, cos_sin
from klrl.sampling import make_greedy_fn, make_sample_fn

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
  "vocab_size": 62,
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
LONGROPE4 = LONGROPE | {name: [*LONGROPE[name], 11.0] for name in ("short_factor", "long_factor")}
GEMMA = WIDE | {"query_pre_attn_scalar": 12, "sliding_window": 5, "attention_bias": True}
GPT2 = {"vocab_size": 62, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 40}
ROWS = 24  # longer than every window, and than what the rotations were made for

# Name of the case -> (model_type, fields of config.json).
CASES = {
  "llama": ("llama", WIDE | BY_HEAD | {"attention_bias": True, "mlp_bias": True}),
  "llama3": ("llama", WIDE | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
  "llama-yarn": ("llama", WIDE | {"rope_parameters": YARN}),
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
  # So many layers are one loop, and not unrolled.
  "smollm3-deep": ("smollm3", SIZES | {"num_hidden_layers": 9}),
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


PROMPT = 12  # Each row has a real token in it.


@functools.cache
def whole(config):
  """Returns logits(params, tokens, mask) of a full pass."""
  policy = policy_model(config)
  return jax.jit(
    lambda params, tokens, mask: policy.hidden(params, tokens, mask) @ policy.unembedding(params)
  )


@functools.cache
def stepwise(config):
  """Returns logits(params, tokens, mask) of a prompt's last token and of the steps behind it."""
  policy = policy_model(config)

  def logits(params, tokens, mask):
    first, prompts = policy.prefill(params, tokens[:, :PROMPT], mask[:, :PROMPT], ROWS)
    unstacked = policy.unstack(params)

    def step(cache, t):
      hidden, cache = policy.decode(unstacked, tokens[:, PROMPT + t], t, prompts, cache)
      return cache, hidden

    cache = policy.grow(policy.empty_cache(prompts, 1), ROWS - 1 - PROMPT)
    rest = jax.lax.scan(step, cache, jnp.arange(ROWS - 1 - PROMPT))[1]
    hidden = jnp.concatenate([first[:, None], rest.swapaxes(0, 1)], axis=1)
    return hidden @ policy.unembedding(params)

  return jax.jit(logits)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, made):
  directory, model = made(case)
  config, params = hf.load_policy(directory)
  tokens, mask = rows()
  expected = expected_logits(model, tokens, mask)
  found = whole(config)(params, tokens, mask)
  assert np.std(expected[mask]) > 0.3
  np.testing.assert_allclose(found[mask], expected[mask], rtol=0, atol=2e-5)
  if case == "smollm3-deep":
    return  # Steps are the same for few layers and many.
  steps = stepwise(config)(params, tokens, mask)
  ragged = mask[:, PROMPT - 1 : -1]
  np.testing.assert_allclose(steps[0], found[0, PROMPT - 1 : -1], rtol=0, atol=2e-5)
  np.testing.assert_allclose(steps[ragged], found[:, PROMPT - 1 : -1][ragged], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
  "rope",
  [
    {"type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {name: value for name, value in LLAMA3.items() if "original" not in name},
    YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False},
    YARN | {"mscale": 0.7},
    YARN | {"attention_factor": 1.3, "mscale": 0.7, "mscale_all_dim": 0.4},
    YARN | {"type": "dynamic", "beta_slow": 0.5, "beta_fast": None},
    LONGROPE4 | {"original_max_position_embeddings": 16, "attention_factor": 1.3},
    LONGROPE4 | {"original_max_position_embeddings": 32, "factor": 5.0},
  ],
  ids=lambda rope: "-".join([rope.get("rope_type", "old"), *map(str, list(rope)[-2:])]),
)
def test_rotations_are_those_of_transformers(rope, tmp_path):
  fields = WIDE | {"model_type": "llama", "rope_theta": 300.0, "rope_scaling": rope}
  (tmp_path / "config.json").write_text(json.dumps(fields))
  config = hf.load_config(tmp_path)
  peer = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
    transformers.AutoConfig.for_model(**json.loads(json.dumps(fields)))
  )
  positions = np.arange(ROWS)[None]
  found = cos_sin(config.kinds[0].rotation, positions, head_dim=8, dtype="float32", row_len=ROWS)
  expected = peer(torch.zeros(1), torch.tensor(positions))
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours[0, :, 0], theirs[0, :, :4], atol=1e-5)


def test_the_table_of_families_has_all_of_them_and_no_others():
  document = pathlib.Path(__file__).parents[1] / "docs" / "models.md"
  table = document.read_text().split("## Families")[1].split("## ")[0]
  named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
  assert sorted(named) == sorted(["model_type", "gemma3", *families.FAMILIES])


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


# Three that between them have every feature that more than the decoder must respect: scaled
# rotations and tied embeddings; windows, norms everywhere and scaled embeddings; learned positions,
# biases everywhere and layer norms.
THREE = ("llama3", "gemma3", "gpt2")


def loaded(case, made, **settings):
  config, params = hf.load_policy(made(case)[0])
  return dataclasses.replace(config, **settings), params


@pytest.mark.parametrize("case", THREE)
def test_gradients_with_remat_on_a_mesh_are_those_of_torch(case, made):
  model = made(case)[1]
  tokens, mask = rows()
  tokens, mask = tokens[:2], mask[:2]
  config, params = loaded(case, made, remat="full")
  policy = policy_model(config)

  def loss(params, tokens, mask):
    log_probs = ops.token_log_probs_from_hidden(
      policy.hidden(params, tokens, mask)[:, :-1], policy.unembedding(params), tokens[:, 1:]
    )
    return -jnp.sum(log_probs * (mask[:, 1:] & mask[:, :-1]))

  mesh = parallel.make_mesh("fsdp=2,tensor=2")
  shardings = parallel.state_shardings(mesh, params)
  # Each linear map and embedding is split; what is not are vectors.
  flat = traverse_util.flatten_dict(jax.tree.map(lambda x: tuple(x.spec), shardings))
  for path, spec in flat.items():
    is_vector = path[-1] in ("scale", "bias")
    assert is_vector != ("fsdp" in spec and "tensor" in spec), path
  gradient = jax.jit(parallel.on_mesh(mesh, jax.value_and_grad(loss)))
  value, gradients = jax.device_get(
    gradient(
      jax.device_put(params, shardings), *jax.device_put((tokens, mask), parallel.by_rows(mesh))
    )
  )

  model.zero_grad()
  logits = model(
    torch.tensor(tokens),
    attention_mask=torch.tensor(mask.astype(int)),
    position_ids=torch.tensor(np.maximum(mask.cumsum(axis=1) - 1, 0)),
  ).logits
  log_probs = logits.log_softmax(dim=-1)[:, :-1].gather(-1, torch.tensor(tokens)[:, 1:, None])
  expected = -(log_probs[..., 0] * torch.tensor(mask[:, 1:] & mask[:, :-1])).sum()
  expected.backward()
  np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
  # Names and parts of tensors are those that the model was read by.
  family, of_torch = families.FAMILIES[config.model_type], dict(model.named_parameters())
  for path, leaf in traverse_util.flatten_dict(gradients).items():
    stored = family.tensors[path]
    names = [stored.name]
    if families.is_stacked(path):
      names = [family.layers.format(i) + stored.name for i in range(config.num_layers)]
    for i, name in enumerate(names):
      theirs = of_torch[name].grad.numpy()
      theirs = theirs.T if path[-1] == "kernel" and family.out_in else theirs
      theirs = theirs[..., stored.rows(config)] if stored.rows else theirs
      ours = leaf[i] if families.is_stacked(path) else leaf
      np.testing.assert_allclose(
        ours, theirs, atol=2e-5 * np.abs(theirs).max() + 1e-5, err_msg=name
      )


@pytest.mark.parametrize("case", [*THREE, "gemma2", "phi3-long"])
def test_the_sampler_and_a_full_pass_give_the_same_log_probs_and_kl(case, made, monkeypatch):
  # The cache grows, beyond the length from which phi3 turns its keys in another way too.
  monkeypatch.setattr(sampling, "_FIRST_SLOTS", 5)
  config, params = loaded(case, made)
  policy = policy_model(config)
  other = jax.tree.map(lambda x: 0.9 * x, params)
  tokens, mask = rows()
  prompts, prompt_mask = tokens[:, :PROMPT], np.roll(mask, 3)[:, :PROMPT]
  prompt_mask[:, -1] = True
  sample = make_sample_fn(policy, max_completion_len=ROWS - PROMPT, eos_id=2, pad_id=0)

  @jax.jit
  def run(params, other):
    rollout = sample(params, prompts, prompt_mask, jax.random.key(0), temperature=0.9)
    row_mask = jnp.concatenate([prompt_mask, rollout.completion_mask], axis=1)
    ours, theirs = (
      (policy.hidden(p, rollout.tokens, row_mask)[:, PROMPT - 1 : -1], policy.unembedding(p))
      for p in (params, other)
    )
    log_probs = ops.token_log_probs_from_hidden(
      *ours, rollout.tokens[:, PROMPT:], temperature=0.9, chunk_size=5
    )
    kl = ops.exact_kl_from_hidden(*ours, *theirs, temperature=0.9, chunk_size=5)
    dense = ops.exact_kl(ours[0] @ ours[1], theirs[0] @ theirs[1], temperature=0.9)
    return rollout, log_probs, kl, dense

  rollout, log_probs, kl, dense = run(params, other)
  real = np.asarray(rollout.completion_mask)
  assert real.sum() > 2 * ROWS // 3
  np.testing.assert_allclose(rollout.old_log_probs[real], log_probs[real], atol=1e-4)
  np.testing.assert_allclose(kl[real], dense[real], atol=1e-5)
  assert kl[real].min() > 1e-5


@pytest.mark.parametrize("case", THREE)
def test_packed_texts_and_rows_with_holes_are_as_those_alone(case, made):
  config, params = loaded(case, made)
  policy = policy_model(config)
  tokens, _ = rows()
  hidden = jax.jit(policy.hidden)
  every = np.ones((3, ROWS), bool)
  alone = np.asarray(hidden(params, tokens, every, np.zeros((3, ROWS), np.int32)))
  # Row 0 holds the first 10 tokens of row 1 and the first 14 of row 2.
  packed = tokens.copy()
  packed[0] = [*tokens[1, :10], *tokens[2, :14]]
  segments = np.zeros((3, ROWS), np.int32)
  segments[0, 10:] = 1
  together = np.asarray(hidden(params, packed, every, segments))
  np.testing.assert_allclose(together[0, :10], alone[1, :10], atol=2e-5)
  np.testing.assert_allclose(together[0, 10:], alone[2, :14], atol=2e-5)
  # Row 0 holds the first tokens of row 1 between padding at both ends and in the middle.
  holes = every.copy()
  holes[0, [0, 1, 6, 9, 10, 15, 23]] = False
  packed[0, holes[0]] = tokens[1, : holes[0].sum()]
  apart = np.asarray(hidden(params, packed, holes, np.zeros((3, ROWS), np.int32)))
  np.testing.assert_allclose(apart[0, holes[0]], alone[1, : holes[0].sum()], atol=2e-5)


@pytest.mark.parametrize("case", [*THREE, "gemma2", "phi3-long"])
def test_completions_of_one_prompt_are_as_those_alone(case, made):
  config, params = loaded(case, made)
  policy = policy_model(config)
  tokens, _ = rows()
  num_completions, length = 3, ROWS - PROMPT
  prompts = tokens[:2, :PROMPT].repeat(num_completions, axis=0)
  continued = np.random.default_rng(1).integers(3, 61, (2 * num_completions, length))
  prompt_mask = np.arange(PROMPT) >= np.array([0, 2]).repeat(num_completions)[:, None]
  mask = np.arange(length) < np.array([length, 1, 0, 4, length, length - 1])[:, None]
  both = np.concatenate([prompts, continued], axis=1)
  nothing = np.zeros(mask.shape, np.float32)
  rollout = sampling.Rollout(both, prompt_mask, mask, mask[:, 0], nothing, nothing)
  weights = np.random.default_rng(2).normal(size=(*mask.shape, config.width)) * mask[..., None]

  @functools.partial(jax.jit, static_argnums=1)
  def hidden_and_gradient(params, group_size):
    def loss(params):
      hidden = completions.completion_hidden(policy, params, rollout, group_size=group_size)
      return (hidden * weights).sum(), hidden

    (_, hidden), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return hidden, gradient

  alone, together = (hidden_and_gradient(params, size) for size in (1, num_completions))
  np.testing.assert_allclose(together[0][mask], alone[0][mask], atol=2e-5)
  for ours, theirs in zip(*map(jax.tree.leaves, (together[1], alone[1])), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * (1 + np.abs(theirs).max()))


@pytest.mark.parametrize("case", THREE)
def test_adapters_merge_into_the_same_logits(case, made):
  config, params = loaded(case, made)
  tokens, mask = rows()
  lora_config, trainable, frozen = add_lora(config, params, jax.random.key(0), rank=2)
  trainable = jax.tree.map(lambda x: x + 0.1, trainable)
  before = whole(config)(params, tokens, mask)
  adapted, steps = (
    logits(lora_config)(join(frozen, trainable), tokens, mask) for logits in (whole, stepwise)
  )
  merged = whole(config)(merge_lora(lora_config, join(frozen, trainable))[1], tokens, mask)
  np.testing.assert_allclose(adapted[mask], merged[mask], atol=2e-3)
  np.testing.assert_allclose(steps[0], adapted[0, PROMPT - 1 : -1], atol=2e-3)
  assert np.abs(adapted - before)[mask].max() > 0.1


@pytest.mark.parametrize("case", THREE)
def test_a_reward_model_scores_as_in_transformers_and_its_values_are_read_off(case, made, tmp_path):
  config, params = loaded(case, made)
  model = scalar_model(config)
  params = scalar_params_from(params)
  params["head"] = np.random.default_rng(1).normal(size=(24, 1)).astype(np.float32)
  tokens, mask = rows()
  tokens, mask = np.where(mask, tokens, 0)[:, ::-1], mask[:, ::-1]  # padded on the right
  values, scores = jax.device_get(
    jax.jit(lambda *x: (model.values(*x), model.scores(*x)))(params, tokens, mask)
  )
  np.testing.assert_array_equal(scores, values[np.arange(3), mask.sum(axis=1) - 1])
  hf.save_scalar(tmp_path, config, params, tiny_tokenizer())
  peer = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path, attn_implementation="eager"
  )
  with torch.no_grad():
    attention_mask = torch.tensor(mask.astype(int))
    expected = peer(torch.tensor(tokens.copy()), attention_mask=attention_mask).logits[:, 0]
  np.testing.assert_allclose(scores, expected.numpy(), atol=1e-4)
  again = hf.load_scalar(tmp_path)
  assert again[0] == config
  jax.tree.map(np.testing.assert_array_equal, again[1], params)


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_a_classifier_of_transformers_scores_as_there(model_type, tmp_path):
  fields = next(dict(fields) for kind, fields in CASES.values() if kind == model_type)
  config = transformers.AutoConfig.for_model(
    model_type, **json.loads(json.dumps(fields)), num_labels=1
  )
  config.pad_token_id = 0
  config._attn_implementation = "eager"
  if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
    pytest.skip(f"transformers has no classifier of {model_type}")
  peer = transformers.AutoModelForSequenceClassification.from_config(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in peer.parameters():
      parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
  peer.save_pretrained(tmp_path)
  config, params = hf.load_scalar(tmp_path)
  tokens = np.random.default_rng(0).integers(3, 61, (2, 9))
  mask = np.arange(9) < np.array([[9], [6]])  # padded on the right
  tokens = np.where(mask, tokens, 0)
  with torch.no_grad():
    attention_mask = torch.tensor(mask.astype(int))
    expected = peer(torch.tensor(tokens), attention_mask=attention_mask).logits[:, 0].numpy()
  assert np.std(expected) > 1e-3
  scores = jax.jit(scalar_model(config).scores)
  np.testing.assert_allclose(scores(params, tokens, mask), expected, atol=1e-4)
  tokens[1], mask[1] = np.roll(tokens[1], 3), np.roll(mask[1], 3)  # and on the left
  np.testing.assert_allclose(scores(params, tokens, mask), expected, atol=1e-4)


def test_bfloat16_is_near_float32_in_every_part_of_gemma(made):
  config, params = loaded("gemma3", made)
  tokens, mask = rows()
  expected = whole(config)(params, tokens, mask)
  half = whole(dataclasses.replace(config, dtype="bfloat16"))
  full = half(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), tokens, mask)
  # 8 bits of mantissa, through three layers with logits of about one.
  assert np.mean(np.abs(full - expected)[mask]) < 0.1 * np.std(expected[mask])


MINIMAL = {name: value for name, value in SIZES.items() if "token_id" not in name} | {
  "num_attention_heads": 32,
  "hidden_size": 256,
}
MINIMAL.pop("num_key_value_heads")


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_absent_and_null_fields_mean_what_they_mean_to_transformers(model_type, tmp_path, capsys):
  fields = GPT2 if model_type == "gpt2" else MINIMAL
  of_transformers = functools.partial(transformers.AutoConfig.for_model, model_type)

  def loaded_config(raw):
    (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": model_type}))
    return hf.load_config(tmp_path)

  whole = of_transformers(**fields).to_dict()
  assert loaded_config(fields) == loaded_config(whole)
  assert "left aside" not in capsys.readouterr().out
  for name in ("sliding_window", "final_logit_softcapping"):
    null = fields | {name: None}
    if whole.get(name) is None:
      continue
    if name == "sliding_window" and "gemma" in model_type:
      with pytest.raises(UserError, match=name):  # transformers fails in the forward pass
        loaded_config(null)
    else:
      assert loaded_config(null) == loaded_config(of_transformers(**null).to_dict()), name


# Fields of configs as they were published, by older versions of transformers too.
PUBLISHED = {
  "Llama-3.2-1B-Instruct": {
    "model_type": "llama",
    "head_dim": 64,
    "num_key_value_heads": 8,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_scaling": {
      "factor": 32.0,
      "high_freq_factor": 4.0,
      "low_freq_factor": 1.0,
      "original_max_position_embeddings": 8192,
      "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
  },
  "Qwen2.5-0.5B": {
    "model_type": "qwen2",
    "max_window_layers": 24,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_mrope": False,
    "use_sliding_window": False,
  },
  "Qwen3-0.6B": {
    "model_type": "qwen3",
    "head_dim": 128,
    "max_window_layers": 28,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
  },
  "Qwen3 with the YaRN of its model card": {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rope_scaling": {
      "rope_type": "yarn",
      "factor": 4.0,
      "original_max_position_embeddings": 32768,
    },
  },
  "gemma-3-270m-it": {
    "model_type": "gemma3_text",
    "_sliding_window_pattern": 6,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "use_bidirectional_attention": False,
  },
  "gemma-3-12b": {
    "model_type": "gemma3_text",
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
    "sliding_window_pattern": 2,
  },
  "Phi-4-mini-instruct": {
    "model_type": "phi3",
    "num_key_value_heads": 8,
    "num_attention_heads": 8,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 4096,
    "max_position_embeddings": 131072,
    "rope_scaling": {
      "long_factor": [1.0 + i for i in range(12)],
      "short_factor": [1.0] * 12,
      "type": "longrope",
    },
    "sliding_window": 262144,
    "mlp_bias": False,
    "resid_pdrop": 0.0,
  },
  "pythia-70m": {"model_type": "gpt_neox", "rotary_emb_base": 20000, "rotary_pct": 0.5},
  "SmolLM3-3B": {
    "model_type": "smollm3",
    "no_rope_layers": [1, 1, 0],
    "max_window_layers": 28,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "layer_types": ["full_attention"] * 3,
  },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_mean_what_they_mean_to_transformers(name, tmp_path, capsys):
  raw = MINIMAL | PUBLISHED[name]
  of_transformers = transformers.AutoConfig.for_model(**json.loads(json.dumps(raw))).to_dict()
  found = []
  for fields in (raw, of_transformers):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found.append(hf.load_config(tmp_path))
  assert found[0] == found[1]
  assert "left aside" not in capsys.readouterr().out


def copied(directory, to, change_name=lambda name: name, **changes):
  """Copies a model, with its tensors under other names and other fields in its config.json."""
  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  tensors = {change_name(name): tensor for name, tensor in tensors.items()}
  safetensors.numpy.save_file(tensors, to / "model.safetensors")
  (to / "config.json").write_text((directory / "config.json").read_text())
  edit_config(to, **changes)


def test_the_language_model_of_a_gemma_with_a_vision_tower_is_taken(tmp_path, capsys):
  vision = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
  }
  config = transformers.Gemma3Config(
    text_config=json.loads(json.dumps(CASES["gemma3"][1])),
    vision_config=vision,
    mm_tokens_per_image=4,
    eos_token_id=[2, 7],
    attn_implementation="eager",
  )
  model = transformers.Gemma3ForConditionalGeneration(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(std=0.2)
  model.save_pretrained(tmp_path)
  config, params = hf.load_policy(tmp_path)
  hf.load_policy(tmp_path)
  assert capsys.readouterr().out.count("the language model of this gemma3 is taken") == 1
  assert config.model_type == "gemma3_text"
  assert not peft.base_name(str(tmp_path))  # peft would find none of the layers by our names
  assert json.loads(config.hf_config)["eos_token_id"] == [2, 7]
  tokens, mask = rows()
  full = whole(config)(params, tokens, mask)
  np.testing.assert_allclose(full[mask], expected_logits(model, tokens, mask)[mask], atol=1e-4)
  # What this transformers writes, what others write, and what newer models hold.
  raw = json.loads((tmp_path / "config.json").read_text())
  for old, new in (
    (r"^(model\.)?language_model\.(model\.)?", "language_model.model."),
    (r"^(model\.)?language_model\.(model\.)?", "model.language_model."),
  ):
    other = tmp_path / new
    other.mkdir()
    text = {name: value for name, value in raw["text_config"].items() if name != "dtype"}
    copied(
      tmp_path,
      other,
      lambda name, old=old, new=new: re.sub(old, new, name),
      text_config=text,
      dtype="bfloat16",
    )
    assert hf.file_dtype(hf.load_config(other)) == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, hf.load_policy(other)[1], params)
  hf.save_policy(tmp_path / "text", config, params, tiny_tokenizer())
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "text", attn_implementation="eager"
  )
  assert type(again).__name__ == "Gemma3ForCausalLM"
  np.testing.assert_allclose(
    expected_logits(again, tokens, mask)[mask], np.asarray(full)[mask], atol=1e-4
  )


def test_older_names_and_buffers_of_tensors_are_known(made, tmp_path):
  for case, old, new, buffers, name in (
    (
      "gpt2",
      "transformer.",
      "",
      ["h.0.attn.bias", "h.1.attn.masked_bias"],
      "transformer.wte.weight",
    ),
    (
      "gpt_neox",
      "embed_out",
      "lm_head",
      [
        "gpt_neox.layers.0.attention.bias",
        "gpt_neox.layers.1.attention.masked_bias",
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq",
      ],
      "embed_out.weight",
    ),
  ):
    directory = made(case)[0]
    expected = hf.load_policy(directory)[1]
    copied(directory, tmp_path, lambda name, old=old, new=new: name.replace(old, new))
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert not any(old in name for name in tensors)
    tensors |= {name: np.ones(3, np.float32) for name in buffers}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, hf.load_policy(tmp_path)[1], expected)
    tensors[name] = np.ones(3, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} are the same part of the model"):
      hf.load_policy(tmp_path)


@pytest.mark.parametrize(
  ("case", "changes", "words"),
  [
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
    ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ("llama", {"query_pre_attn_scalar": 64}, ["query_pre_attn_scalar"]),
    ("llama", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping"]),
    ("llama", {"rope_parameters": YARN | {"factor": 0.5}}, ["rope_parameters", "factor"]),
    ("llama", {"rope_parameters": YARN | {"mrope_section": [1]}}, ["mrope_section"]),
    ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, ["low_freq_factor"]),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, ["rope_parameters has no factor"]),
    ("llama", {"rope_parameters": {"full_attention": {}}}, ["full_attention"]),
    (
      "llama3",
      {"original_max_position_embeddings": 32},
      ["original_max_position_embeddings is 16 there and 32 beside it"],
    ),
    ("mistral", {"attention_bias": True}, ["attention_bias"]),
    ("mistral", {"sliding_window": 0}, ["sliding_window"]),
    ("mistral", {"layer_types": ["sliding_attention"] * 3}, ["layer_types"]),
    (
      "qwen2",
      {"layer_types": ["sliding_attention"] * 3},
      ["layer_types", "sliding_window is None"],
    ),
    ("qwen2", {"layer_types": ["full_attention"] * 2}, ["layer_types", "3 entries"]),
    ("qwen3", {"qk_norm": True}, ["qk_norm"]),
    ("gemma", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
    ("gemma", {"final_logit_softcapping": 30.0}, ["final_logit_softcapping"]),
    ("gemma2", {"layer_types": ["chunked_attention"] * 3}, ["layer_types", "chunked"]),
    ("gemma2", {"final_logit_softcapping": 0}, ["final_logit_softcapping"]),
    ("gemma2", {"hidden_activation": "relu2"}, ["hidden_activation"]),
    ("gemma3", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping"]),
    ("gemma3", {"rope_parameters": LLAMA3}, ["rope_parameters", "rope_type"]),
    ("phi3-short", {"rope_parameters": LLAMA3}, ["rope_type 'llama3'"]),
    ("phi3-long", {"original_max_position_embeddings": 1}, ["original_max_position_embeddings"]),
    ("phi3-short", {"partial_rotary_factor": 1.5}, ["partial_rotary_factor"]),
    (
      "phi3-short",
      {"rope_parameters": LONGROPE | {"long_factor": [1.0]}},
      ["long_factor has 1 numbers, not 3"],
    ),
    ("phi3-short", {"rope_parameters": LONGROPE | {"short_mscale": 1.2}}, ["short_mscale"]),
    ("smollm3", {"no_rope_layers": [1]}, ["no_rope_layers has 1 entries for 3 layers"]),
    ("smollm3", {"no_rope_layers": [1, 2, 3]}, ["no_rope_layers"]),
    ("granite", {"residual_multiplier": 0}, ["residual_multiplier"]),
    ("granite", {"num_local_experts": 8}, ["num_local_experts"]),
    ("gpt_neox", {"rotary_pct": "0.5", "rope_parameters": {}}, ["rotary_pct"]),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
    (
      "gpt2",
      {"num_hidden_layers": "3", "layer_types": ["sliding_attention"] * 3},  # The first is unknown.
      ["layer_types"],
    ),
    ("gpt2", {"add_cross_attention": True}, ["add_cross_attention"]),
    ("gpt2", {"n_head": 5}, ["n_embd=24", "n_head=5"]),
    ("gpt2", {"model_type": "mixtral"}, ["model_type 'mixtral' is not supported", "gemma3"]),
    ("llama", {"model_type": "gemma3"}, ["has no text_config"]),
    ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config", "unquantized"]),
    # transformers would not read this type: it takes the rotation for an unscaled one.
    (
      "gemma3",
      {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 8.0}},
      ["rope_scaling", "factor=8.0"],
    ),
  ],
)
def test_what_is_not_computed_is_refused_by_its_name(case, changes, words, made, tmp_path):
  (tmp_path / "config.json").write_text((made(case)[0] / "config.json").read_text())
  hf.load_config(tmp_path)
  edit_config(tmp_path, **changes)
  with pytest.raises(UserError) as found:
    hf.load_config(tmp_path)
  message = str(found.value)
  assert len(message) < 1000
  assert message.count("config.json") == 1
  for word in ["config.json", *words]:
    assert word in message


def test_a_fresh_model_that_no_file_could_describe_is_not_saved(tmp_path):
  config = dataclasses.replace(LLAMA, kinds=(LayerKind(window=4),))
  with pytest.raises(ValueError, match="written as llama, which has no such kinds"):
    hf.save_policy(tmp_path, config, random_params(policy_model(config)), tiny_tokenizer())
  assert not (tmp_path / "config.json").exists()


def test_the_kinds_of_layers_fit_the_decoder():
  for changes, message in (
    ({"kind_of_layer": (0,)}, "kind_of_layer has 1 entries"),
    ({"kinds": (LayerKind(), LayerKind(Rotation(share=0.5)))}, "it must be one"),
    ({"kinds": (LayerKind(Rotation(share=0.3)),)}, "must be even"),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(LLAMA, **changes)


GEMMA_DIR = os.environ.get("KLRL_GEMMA_DIR", "")


@pytest.mark.skipif(not GEMMA_DIR, reason="needs KLRL_GEMMA_DIR, a folder with Gemma 3 270M")
def test_greedy_decoding_of_a_pretrained_model_is_that_of_transformers():
  config, params = hf.load_policy(GEMMA_DIR)
  tokenizer = load_tokenizer(GEMMA_DIR)
  greedy = make_greedy_fn(policy_model(config), max_completion_len=48, eos_id=None, pad_id=0)
  model = transformers.AutoModelForCausalLM.from_pretrained(GEMMA_DIR, dtype=torch.float32)
  model.generation_config.eos_token_id = None
  long = "The river was slow in summer, and the boats went down to the sea in the evening. " * 32
  short = [
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):",
    "Q: A train goes 60 km in 45 minutes. How fast is it?\nA:",
  ]
  for prompts, least in ((short, 0), ([f"{long}In the end"], 512)):  # the window is 512
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    width = max(map(len, ids))
    assert width > least
    tokens = np.array([[0] * (width - len(row)) + row for row in ids])
    mask = np.arange(width) >= np.array([[width - len(row)] for row in ids])
    ours = np.asarray(jax.jit(greedy)(params, tokens, mask).tokens)
    theirs = model.generate(
      torch.tensor(tokens),
      attention_mask=torch.tensor(mask.astype(int)),
      max_new_tokens=48,
      do_sample=False,
    ).numpy()
    for row, peer in zip(ours[:, width:], theirs[:, width:], strict=True):
      assert tokenizer.decode(row.tolist()) == tokenizer.decode(peer.tolist())
    np.testing.assert_array_equal(ours, theirs)
