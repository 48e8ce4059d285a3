"""The decoder against an independent numpy forward pass, and against itself where it must agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl.cost import hlo
from klrl.models.decoder import (
  REMAT,
  DecoderConfig,
  policy_model,
  scalar_model,
  scalar_params_from,
)

TINY = DecoderConfig(
  vocab_size=13,
  width=16,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_dim=20,
  max_len=32,
)
UNTIED_BIASED = dataclasses.replace(TINY, tie_embeddings=False, attention_bias=True)


@jax.jit
def noisy(params):
  """Returns params far from their small initial values, so that every part of the model shows."""
  leaves, tree = jax.tree.flatten(params)
  sizes = np.cumsum([leaf.size for leaf in leaves])
  noise = jnp.split(0.3 * jax.random.normal(jax.random.key(1), sizes[-1:]), sizes[:-1])
  leaves = [x + n.reshape(x.shape) for x, n in zip(leaves, noise, strict=True)]
  return jax.tree.unflatten(tree, leaves)


@functools.cache
def policy_and_params(config):
  """Returns the policy with its functions compiled, and noisy params."""
  policy = policy_model(config)
  policy = dataclasses.replace(
    policy,
    init=jax.jit(policy.init),
    hidden=jax.jit(policy.hidden),
    prefill=jax.jit(policy.prefill, static_argnums=3),
    decode=jax.jit(policy.decode),
  )
  return policy, noisy(policy.init(jax.random.key(0)))


def tokens_like(shape):
  return np.random.default_rng(2).integers(0, TINY.vocab_size, shape)


def numpy_logits(config, params, tokens):
  """Returns logits [S, V] of one unpadded row in float64, one position and head at a time."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  decoder, layers = p["decoder"], p["decoder"]["layers"]

  def norm(x, scale):
    return x / np.sqrt(np.mean(x**2) + config.norm_eps) * scale

  def linear(x, leaf, i):
    return x @ leaf["kernel"][i] + (leaf["bias"][i] if "bias" in leaf else 0.0)

  def rotate(x, t):
    half = config.head_dim // 2
    out = np.empty_like(x)
    for i in range(half):
      angle = t * config.kinds[0].rotation.theta ** (-2 * i / config.head_dim)
      turned = complex(x[i], x[i + half]) * np.exp(1j * angle)
      out[i], out[i + half] = turned.real, turned.imag
    return out

  xs = [decoder["embed"]["embedding"][token] for token in np.asarray(tokens)]
  for i in range(config.num_layers):
    attention, mlp = layers["attention"], layers["mlp"]
    keys, values, new_xs = [], [], []
    for t, x in enumerate(xs):
      y = norm(x, layers["attention_norm"]["scale"][i])
      q = linear(y, attention["query"], i).reshape(config.num_heads, -1)
      k = linear(y, attention["key"], i).reshape(config.num_kv_heads, -1)
      keys.append([rotate(head, t) for head in k])
      values.append(linear(y, attention["value"], i).reshape(config.num_kv_heads, -1))
      outs = []
      for n in range(config.num_heads):
        shared = n * config.num_kv_heads // config.num_heads
        query = rotate(q[n], t)
        weights = np.exp([query @ key[shared] / config.head_dim**0.5 for key in keys])
        outs.append(sum(w * v[shared] for w, v in zip(weights, values, strict=True)) / sum(weights))
      x = x + linear(np.concatenate(outs), attention["output"], i)
      y = norm(x, layers["mlp_norm"]["scale"][i])
      gate = linear(y, mlp["gate"], i)
      new_xs.append(
        x + linear(gate / (1 + np.exp(-gate)) * linear(y, mlp["up"], i), mlp["down"], i)
      )
    xs = new_xs
  hidden = np.stack([norm(x, decoder["final_norm"]["scale"]) for x in xs])
  return hidden @ (decoder["embed"]["embedding"].T if config.tie_embeddings else p["unembedding"])


DEEP = dataclasses.replace(TINY, num_layers=9)


@pytest.mark.parametrize("config", [TINY, UNTIED_BIASED, DEEP])
def test_logits_equal_a_numpy_forward_pass(config):
  policy, params = policy_and_params(config)
  tokens = tokens_like((1, 9))
  hidden = policy.hidden(params, tokens, tokens >= 0)
  logits = np.asarray(hidden) @ np.asarray(policy.unembedding(params))
  np.testing.assert_allclose(logits[0], numpy_logits(config, params, tokens[0]), atol=2e-5)


@pytest.mark.parametrize(
  "mask",
  [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0], [1, 0, 1, 1, 0, 1, 1]],
  ids=["left", "right", "both", "holes"],
)
def test_padding_changes_no_real_position(mask):
  policy, params = policy_and_params(TINY)
  real = tokens_like((1, 5))
  mask = jnp.array([mask], bool)
  expected = policy.hidden(params, real, real >= 0)[0]
  for pad_id in (0, 7):
    tokens = jnp.full((1, 7), pad_id).at[0, jnp.flatnonzero(mask[0])].set(real[0])
    np.testing.assert_allclose(policy.hidden(params, tokens, mask)[0][mask[0]], expected, atol=1e-5)


def test_a_row_of_padding_has_finite_output_and_gradient():
  policy, params = policy_and_params(TINY)
  tokens, mask = tokens_like((2, 4)), np.array([[0, 0, 0, 0], [0, 0, 1, 1]], bool)

  def loss(params):
    return jnp.sum(policy.hidden(params, tokens, mask) ** 2)

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  assert np.isfinite(value)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("unstacked", [False, True])
def test_cached_decoding_equals_the_full_forward(unstacked):
  policy, params = policy_and_params(UNTIED_BIASED)
  tokens = tokens_like((6, 8))
  tokens[:, :4] = np.repeat(tokens[::3, :4], 3, axis=0)  # Two prompts with three branches each.
  mask = np.repeat([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]], 3, axis=0).astype(bool)
  expected = np.asarray(policy.hidden(params, tokens, mask))
  hidden, prompts = policy.prefill(params, tokens[::3, :4], mask[::3, :4], 9)
  np.testing.assert_allclose(hidden, expected[::3, 3], atol=1e-5)
  cache = policy.grow(policy.empty_cache(prompts, 3), 2)
  step_params = policy.unstack(params) if unstacked else params
  for t in range(4):
    cache = policy.grow(cache, 3) if t == 2 else cache
    hidden, cache = policy.decode(step_params, tokens[:, 4 + t], t, prompts, cache)
    np.testing.assert_allclose(hidden, expected[:, 4 + t], atol=1e-5)


def test_prefill_reads_the_last_real_token_of_a_right_padded_prompt():
  policy, params = policy_and_params(TINY)
  tokens, mask = tokens_like((1, 5)), np.array([[1, 1, 1, 0, 0]], bool)
  hidden, _ = policy.prefill(params, tokens, mask, 5)
  expected = policy.hidden(params, tokens[:, :3], mask[:, :3])[:, -1]
  np.testing.assert_allclose(hidden, expected, atol=1e-5)


def test_remat_changes_neither_value_nor_gradient_and_gives_memory_for_work():
  config = dataclasses.replace(TINY, num_layers=4)
  tokens = tokens_like((8, 32))
  _, params = policy_and_params(config)
  found, memory, flops = {}, {}, {}
  for name in REMAT:
    policy = policy_model(dataclasses.replace(config, remat=name))

    def loss(params, policy=policy):
      return jnp.mean(jnp.tanh(policy.hidden(params, tokens, tokens >= 0)))

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    found[name] = compiled(params)
    memory[name] = compiled.memory_analysis().temp_size_in_bytes
    flops[name] = hlo.costs(compiled.as_text(), {}).flops
  for name in ("dots", "full"):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
      found[name],
      found["none"],
    )
  assert memory["none"] > 1.3 * memory["dots"] > 1.5 * memory["full"], memory
  assert flops["none"] < flops["dots"] < flops["full"]


def test_many_layers_are_one_program_in_a_loop():
  def length_of_text(config):
    policy, params = policy_and_params(config)
    tokens = tokens_like((2, 6))
    return len(jax.jit(policy.hidden).lower(params, tokens, tokens >= 0).as_text())

  deeper = dataclasses.replace(DEEP, num_layers=18)
  assert length_of_text(deeper) < 1.1 * length_of_text(DEEP)


# 8 and 11 bits of mantissa: relative steps of 2^-8 and 2^-11, through two layers.
@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.02), ("float16", 0.0025)])
def test_half_precision_computes_close_to_float32(dtype, error):
  policy, params = policy_and_params(TINY)
  half, half_params = policy_and_params(dataclasses.replace(TINY, dtype=dtype))
  tokens = tokens_like((2, 6))
  expected = policy.hidden(params, tokens, tokens >= 0)
  hidden = half.hidden(params, tokens, tokens >= 0)
  assert hidden.dtype == half.unembedding(params).dtype == dtype
  assert np.mean(np.abs(np.asarray(hidden, np.float32) - expected)) < error
  assert {leaf.dtype for leaf in jax.tree.leaves(half_params)} == {np.dtype("float32")}


def test_init_is_small_reproducible_and_scales_residual_outputs_by_depth():
  config = dataclasses.replace(UNTIED_BIASED, width=64, num_layers=8)
  init = jax.jit(policy_model(config).init)
  params, again, other = init(jax.random.key(3)), init(jax.random.key(3)), init(jax.random.key(4))
  jax.tree.map(np.testing.assert_array_equal, params, again)
  assert not np.array_equal(params["unembedding"], other["unembedding"])
  layers = params["decoder"]["layers"]
  np.testing.assert_allclose(np.std(params["unembedding"]), 0.02, rtol=0.1)
  np.testing.assert_allclose(np.std(layers["attention"]["query"]["kernel"]), 0.02, rtol=0.1)
  for out in (layers["attention"]["output"], layers["mlp"]["down"]):
    np.testing.assert_allclose(np.std(out["kernel"]), 0.02 / 4, rtol=0.1)
  assert not np.array_equal(layers["mlp"]["up"]["kernel"][0], layers["mlp"]["up"]["kernel"][1])


def test_values_are_float32_and_scores_are_those_of_the_last_real_token():
  config = dataclasses.replace(TINY, dtype="bfloat16")
  model = scalar_model(config)
  fresh = jax.jit(model.init)(jax.random.key(0))
  tokens, mask = tokens_like((2, 5)), np.array([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]], bool)
  np.testing.assert_array_equal(fresh["head"], np.zeros((TINY.width, 1)))
  params = noisy(fresh)
  values = np.asarray(jax.jit(model.values)(params, tokens, mask))
  assert values.dtype == jnp.float32
  np.testing.assert_array_equal(
    jax.jit(model.scores)(params, tokens, mask), [values[0, 3], values[1, 4]]
  )
  hidden = np.asarray(policy_and_params(config)[0].hidden(params, tokens, mask), np.float32)
  np.testing.assert_allclose(values, (hidden @ np.asarray(params["head"]))[..., 0], rtol=1e-5)


def test_scalar_params_are_the_same_arrays_with_the_head_kept_or_zero():
  _, policy_params = policy_and_params(UNTIED_BIASED)
  first = scalar_params_from(policy_params)
  assert set(first) == {"decoder", "head"}
  np.testing.assert_array_equal(first["head"], np.zeros((TINY.width, 1)))
  scalar_params = noisy(first)
  second = scalar_params_from(scalar_params)
  assert jax.tree.structure(scalar_params) == jax.tree.structure(second)
  for old, new in zip(jax.tree.leaves(scalar_params), jax.tree.leaves(second), strict=True):
    assert old is new


@pytest.mark.parametrize(
  ("change", "message"), [({"num_kv_heads": 3}, "num_kv_heads=3"), ({"head_dim": 5}, "head_dim=5")]
)
def test_impossible_shapes_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **change)
