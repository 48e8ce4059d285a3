"""Adapters: what they compute, what is trained, and what they leave alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl import models
from klrl.algorithm import completions
from klrl.devices import parallel
from klrl.sampling import Rollout

RANK = 4
CONFIG = models.DecoderConfig(
  vocab_size=11,
  width=12,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_dim=20,
  max_len=32,
  tie_embeddings=False,
  attention_bias=True,
)
ADAPTED = dataclasses.replace(CONFIG, lora_rank=RANK)
TOKENS = np.random.default_rng(2).integers(0, CONFIG.vocab_size, (2, 8))
MASK = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]], bool)
LINEAR_MAPS = {
  "attention": {"query", "key", "value", "output"},
  "mlp": {"gate", "up", "down"},
}


def random_like(tree, seed=0, scale=0.5):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(0, scale, x.shape).astype(np.float32), tree)


@functools.cache
def base():
  """Returns numpy params of the base, as loaded from a file."""
  shapes = jax.eval_shape(models.policy_model(CONFIG).init, jax.random.key(0))
  return random_like(shapes, scale=0.3)


@functools.cache
def fresh():
  return models.add_lora(CONFIG, base(), jax.random.key(1), rank=RANK)


@functools.cache
def trained():
  """Returns the params of a policy whose adapters are far from zero."""
  _, trainable, frozen = fresh()
  return models.join(frozen, random_like(trainable, 1, 0.2))


@functools.cache
def hidden_fn(config):
  return jax.jit(models.policy_model(config).hidden)


def names(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_every_linear_map_of_a_layer_gets_two_factors_and_nothing_else_does():
  config, trainable, frozen = fresh()
  assert config == ADAPTED
  assert set(trainable) == {"decoder"}
  assert set(trainable["decoder"]) == {"layers"}
  layers = trainable["decoder"]["layers"]
  assert {part: set(maps) for part, maps in layers.items()} == LINEAR_MAPS
  for part, maps in layers.items():
    for name, leaf in maps.items():
      num_layers, fan_in, fan_out = base()["decoder"]["layers"][part][name]["kernel"].shape
      assert leaf["lora"]["lora_a"].shape == (num_layers, fan_in, RANK)
      assert leaf["lora"]["lora_b"].shape == (num_layers, RANK, fan_out)
      assert not np.any(leaf["lora"]["lora_b"])
  assert names(frozen).keys() == names(base()).keys()
  assert all(leaf is names(base())[name] for name, leaf in names(frozen).items())


def test_a_is_normal_and_differs_between_maps_layers_and_keys():
  config = dataclasses.replace(CONFIG, width=64, mlp_dim=256)
  shapes = jax.eval_shape(models.policy_model(config).init, jax.random.key(0))
  _, one, _ = models.add_lora(config, shapes, jax.random.key(1), rank=16)
  _, other, _ = models.add_lora(config, shapes, jax.random.key(2), rank=16)
  mlp = one["decoder"]["layers"]["mlp"]
  up, gate, down = (np.asarray(mlp[name]["lora"]["lora_a"]) for name in ("up", "gate", "down"))
  np.testing.assert_allclose([np.std(up), np.std(down)], [1 / 8, 1 / 16], rtol=0.05)
  # A uniform distribution has 1.8 here.
  np.testing.assert_allclose(np.mean(down**4) / np.mean(down**2) ** 2, 3, rtol=0.1)
  assert not np.array_equal(up, gate)
  assert not np.array_equal(up[0], up[1])
  assert not np.array_equal(up, other["decoder"]["layers"]["mlp"]["up"]["lora"]["lora_a"])


def test_fresh_adapters_change_nothing_and_the_base_is_the_reference_in_the_same_memory():
  on_device = jax.tree.map(jnp.asarray, base())
  config, trainable, frozen = models.add_lora(CONFIG, on_device, jax.random.key(1), rank=RANK)
  params = models.join(frozen, trainable)
  joined, reference = names(params), names(on_device)
  assert all(joined[name] is leaf for name, leaf in reference.items())
  np.testing.assert_array_equal(
    hidden_fn(config)(params, TOKENS, MASK), hidden_fn(CONFIG)(frozen, TOKENS, MASK)
  )
  zeros = jnp.zeros((2, 5))
  rollout = Rollout(TOKENS, MASK[:, :3], MASK[:, 3:], MASK[:, -1], zeros, zeros)
  kl = jax.jit(
    lambda params, reference: completions.exact_kl(
      models.policy_model(config),
      params,
      models.policy_model(CONFIG),
      reference,
      rollout,
      temperature=0.7,
    )
  )
  # Zero but for rounding: the compiler need not round two equal decoders alike.
  np.testing.assert_allclose(kl(params, frozen), zeros, atol=1e-7)
  assert np.all(np.asarray(kl(trained(), frozen)) > 1e-4)


def test_the_low_rank_path_equals_merged_weights():
  config, merged = models.merge_lora(ADAPTED, trained())
  assert config == CONFIG
  assert jax.tree.structure(merged) == jax.tree.structure(base())
  up = trained()["decoder"]["layers"]["mlp"]["up"]
  for i in range(CONFIG.num_layers):
    product = up["lora"]["lora_a"][i].astype(float) @ up["lora"]["lora_b"][i].astype(float)
    expected = up["kernel"][i] + 16 / RANK * product
    np.testing.assert_allclose(
      merged["decoder"]["layers"]["mlp"]["up"]["kernel"][i], expected, atol=1e-5
    )
  actual = hidden_fn(ADAPTED)(trained(), TOKENS, MASK)
  np.testing.assert_allclose(actual, hidden_fn(CONFIG)(merged, TOKENS, MASK), atol=1e-5)
  assert np.abs(actual - hidden_fn(CONFIG)(base(), TOKENS, MASK)).max() > 0.1


def test_no_merged_weight_is_built():
  def kernels_multiplied(config, params_of):
    """Returns the products whose outcome has the shape of a kernel."""
    hidden = models.policy_model(config).hidden
    text = str(jax.make_jaxpr(lambda x: hidden(params_of(x), TOKENS, MASK))(trained()))
    products = [line.split("=")[0].rstrip() for line in text.splitlines() if "dot_general" in line]
    assert products
    return [name for name in products if name.endswith(f"{CONFIG.width},{CONFIG.mlp_dim}]")]

  assert not kernels_multiplied(ADAPTED, lambda params: params)
  assert kernels_multiplied(CONFIG, lambda params: models.merge_lora(ADAPTED, params)[1])


def test_cached_decoding_equals_the_full_forward():
  policy = models.policy_model(ADAPTED)
  expected = np.asarray(hidden_fn(ADAPTED)(trained(), TOKENS, MASK))
  hidden, prompts = jax.jit(policy.prefill, static_argnums=3)(
    trained(), TOKENS[:, :6], MASK[:, :6], 8
  )
  np.testing.assert_allclose(hidden, expected[:, 5], atol=1e-5)
  cache, step_params = policy.grow(policy.empty_cache(prompts, 1), 2), policy.unstack(trained())
  decode = jax.jit(policy.decode)
  for t in (0, 1):
    hidden, cache = decode(step_params, TOKENS[:, 6 + t], t, prompts, cache)
    np.testing.assert_allclose(hidden, expected[:, 6 + t], atol=1e-5)


def loss_of(config):
  policy = models.policy_model(config)
  return lambda params: jnp.sin(policy.hidden(params, TOKENS, MASK)).mean()


def test_gradient_reaches_the_adapters_alone_and_is_that_of_the_dense_formula():
  _, trainable, frozen = fresh()
  trainable = random_like(trainable, 1, 0.2)
  loss, dense_loss = loss_of(ADAPTED), loss_of(CONFIG)

  @jax.jit
  def low_rank(trainable):
    return jax.grad(lambda trainable: loss(models.join(frozen, trainable)))(trainable)

  @jax.jit
  def dense(trainable):
    merged = lambda trainable: models.merge_lora(ADAPTED, models.join(frozen, trainable))[1]  # noqa: E731
    return jax.grad(lambda trainable: dense_loss(merged(trainable)))(trainable)

  gradient = low_rank(trainable)
  assert jax.tree.structure(gradient) == jax.tree.structure(trainable)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), gradient, dense(trainable)
  )
  assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-5


def test_the_first_step_moves_b_alone():
  _, trainable, frozen = fresh()
  gradient = jax.jit(jax.grad(lambda trainable: loss_of(ADAPTED)(models.join(frozen, trainable))))(
    trainable
  )
  for name, leaf in names(gradient).items():
    assert np.any(leaf) == name.endswith("lora_b"), name


def test_what_is_trained_is_small():
  _, trainable, _ = fresh()
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
  width, query, kv, mlp = 12, 24, 12, 20
  fans = [(width, query), (width, kv), (width, kv), (query, width), *[(width, mlp)] * 3]
  assert size(trainable) == 4 * CONFIG.num_layers * RANK * sum(map(sum, fans))
  wide = dataclasses.replace(CONFIG, width=256, head_dim=64, mlp_dim=512)
  shapes = jax.eval_shape(models.policy_model(wide).init, jax.random.key(0))
  _, trainable, _ = models.add_lora(wide, shapes, jax.random.key(0), rank=4)
  assert size(trainable) < 0.05 * sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))


def test_fresh_adapters_are_made_without_a_second_base():
  wide = dataclasses.replace(CONFIG, width=256, head_dim=64, mlp_dim=512)
  shapes = jax.eval_shape(models.policy_model(wide).init, jax.random.key(0))
  make = lambda key: models.add_lora(wide, shapes, key, rank=4)[1]  # noqa: E731
  memory = jax.jit(make).lower(jax.random.key(0)).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * wide.width * wide.mlp_dim
  # One compiled call, also where the caller compiles nothing.
  assert len(jax.make_jaxpr(make)(jax.random.key(0)).eqns) == 1


def test_the_frozen_weights_gradient_costs_nothing():
  deep = dataclasses.replace(CONFIG, num_layers=9)
  params = models.policy_model(deep).init(jax.random.key(0))
  deep, trainable, frozen = models.add_lora(deep, params, jax.random.key(1), rank=RANK)
  loss = lambda frozen, trainable: loss_of(deep)(models.join(frozen, trainable))  # noqa: E731

  def products(argnums):
    gradient = jax.jit(jax.grad(loss, argnums=argnums))
    return gradient.lower(frozen, trainable).compile().as_text().count(" dot(")

  # Of seven linear maps, each in the one body of the loop over many layers.
  assert products((0, 1)) - products(1) == 7


def test_rank_zero_trains_everything():
  assert models.add_lora(CONFIG, base(), jax.random.key(0), rank=0) == (CONFIG, base(), {})
  assert models.merge_lora(CONFIG, base()) == (CONFIG, base())


def test_impossible_ranks_and_second_adapters_are_refused():
  with pytest.raises(ValueError, match="lora_rank=-1 must not be negative"):
    models.add_lora(CONFIG, base(), jax.random.key(0), rank=-1)
  with pytest.raises(ValueError, match="lora_rank=4: these params have adapters; merge_lora"):
    models.add_lora(ADAPTED, trained(), jax.random.key(0), rank=RANK)


def test_join_is_the_union_of_disjoint_leaves():
  params = {"a": {"b": 1}}
  assert models.join({}, params) is params
  assert models.join(params, {}) == params
  assert models.join({"a": {"c": 2}, "d": 3}, params) == {"a": {"b": 1, "c": 2}, "d": 3}
  for both in ({"a": {"b": 2}}, {"a": {"b": {"c": 2}}}, {"a": 2}):
    with pytest.raises(ValueError, match=r"'[ab]' is in both"):
      models.join(both, params)


def test_a_scalar_model_trains_its_head():
  model = models.scalar_model(CONFIG)
  params = random_like(jax.eval_shape(model.init, jax.random.key(0)), scale=0.3)
  config, trainable, frozen = models.add_lora(CONFIG, params, jax.random.key(1), rank=RANK)
  assert set(trainable) == {"decoder", "head"}
  assert set(frozen) == {"decoder"}
  assert trainable["head"] is params["head"]
  adapted, full = models.scalar_model(config), models.join(frozen, trainable)
  expected = jax.jit(model.scores)(params, TOKENS, MASK)
  np.testing.assert_array_equal(jax.jit(adapted.scores)(full, TOKENS, MASK), expected)

  def loss(trainable):
    return adapted.values(models.join(frozen, trainable), TOKENS, MASK).sum()

  gradient = jax.jit(jax.grad(loss))(trainable)
  assert np.all(gradient["head"])
  copy = models.scalar_params_from(full)
  np.testing.assert_array_equal(jax.jit(adapted.scores)(copy, TOKENS, MASK), expected)


def test_bfloat16_activations_stay_narrow_and_adapters_stay_wide():
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  adapted, trainable, frozen = models.add_lora(config, base(), jax.random.key(1), rank=RANK)
  params = models.join(frozen, random_like(trainable, 1, 0.2))
  assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
  hidden = hidden_fn(adapted)(params, TOKENS, MASK)
  assert hidden.dtype == jnp.bfloat16
  exact = hidden_fn(ADAPTED)(params, TOKENS, MASK)
  assert np.mean(np.abs(np.asarray(hidden, np.float32) - exact)[MASK]) < 0.1


@pytest.mark.parametrize("spec", ["tensor=2,fsdp=2", "tensor=4", "fsdp=4"])
def test_adapters_on_a_mesh_compute_the_same(spec):
  mesh = parallel.make_mesh(spec)
  shardings = parallel.state_shardings(mesh, trained())
  placed = jax.device_put(trained(), shardings)
  expected = hidden_fn(ADAPTED)(trained(), TOKENS, MASK)
  np.testing.assert_allclose(hidden_fn(ADAPTED)(placed, TOKENS, MASK), expected, atol=1e-4)
  layers = shardings["decoder"]["layers"]
  tensor = "tensor" if mesh.shape["tensor"] > 1 else None
  fsdp = "fsdp" if mesh.shape["fsdp"] > 1 else None
  # [L, in, rank] and [L, rank, out]; neither layers nor ranks are split.
  gate, down = (layers["mlp"][name]["lora"] for name in ("gate", "down"))
  assert tuple(gate["lora_a"].spec) == (None, fsdp, None)
  assert tuple(gate["lora_b"].spec) == (None, None, tensor or fsdp)
  assert tuple(down["lora_a"].spec) == (None, tensor or fsdp, None)
  assert tuple(down["lora_b"].spec) == (None, None, fsdp)
