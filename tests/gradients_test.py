"""Tests of gradients in parts: the whole is the sum, whatever falls on which part."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl import ops
from klrl.algorithm.gradients import TOKENS_PER_PART, enough_parts, gradients_of, scalar
from klrl.cost import hlo
from klrl.devices import parallel

PARAMS = {"w": jnp.array([0.5, -1.0, 2.0]), "unused": jnp.ones(2)}
# Rows with one to four real tokens, so that parts have unequal counts.
LENGTHS = np.array([4, 1, 1, 3, 2, 1, 4, 1])


def make_batch():
  x = jax.random.normal(jax.random.key(0), (8, 4, 3))
  mask = jnp.arange(4)[None] < LENGTHS[:, None]
  return x, mask


def loss_fn(params, batch, aggregation):
  x, mask = batch
  per_token = jnp.tanh(x @ params["w"])
  loss = ops.AGGREGATIONS[aggregation](per_token, mask)
  other = ((per_token[:, 0] ** 2).sum(), jnp.float32(len(x)))
  return {"loss": 1.0, "other": -0.3}, {"loss": loss, "other": other, "seen": (1, 1)}


@pytest.mark.parametrize("aggregation", ops.AGGREGATIONS)
def test_parts_add_up_to_the_whole(aggregation):
  loss = functools.partial(loss_fn, aggregation=aggregation)
  whole, metrics = jax.jit(functools.partial(gradients_of, loss))(PARAMS, make_batch())
  chex.assert_trees_all_close(
    whole, jax.grad(scalar(loss), has_aux=True)(PARAMS, make_batch())[0], rtol=1e-5, atol=1e-7
  )
  assert float(jnp.abs(whole["w"]).max()) > 0.01 and not whole["unused"].any()
  for num_parts in (2, 4, 8):
    in_parts = jax.jit(functools.partial(gradients_of, loss, num_parts=num_parts))
    gradients, sums = in_parts(PARAMS, make_batch())
    chex.assert_trees_all_close(gradients, whole, rtol=1e-5, atol=1e-7)
    for name in ("loss", "other"):
      np.testing.assert_allclose(ops.divide(*sums[name]), ops.divide(*metrics[name]), rtol=1e-5)
    assert float(sums["seen"][0]) == num_parts


def test_the_devices_of_data_meet_once_for_all_parts_of_a_gradient():
  mesh = parallel.make_mesh("data=4")
  key = jax.random.key(1)
  params = {"w": jax.random.normal(key, (1000,)) / 30, "unused": jnp.ones(2)}
  x, mask = jax.random.normal(key, (8, 4, 1000)), make_batch()[1]
  batch = jax.device_put((x, mask), parallel.by_rows(mesh))
  params = jax.device_put(params, parallel.replicated(mesh))
  sent, found = [], []
  for num_parts in (1, 2):
    loss = functools.partial(loss_fn, aggregation="token_mean")
    fn = functools.partial(gradients_of, loss, num_parts=num_parts)
    whole = parallel.replicated(mesh)
    compiled = jax.jit(parallel.on_mesh(mesh, fn), out_shardings=whole).lower(params, batch)
    compiled = compiled.compile()
    sent.append(hlo.costs(compiled.as_text(), dict(mesh.shape)).collectives["all-reduce", "data"])
    found.append(compiled(params, batch)[0])
  chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-6)
  assert 4000 < sent[1] < 1.1 * sent[0], sent  # 4 bytes for each parameter, and figures


@pytest.mark.parametrize("num_parts", [1, 4])
def test_over_data_goes_what_a_device_has_of_a_gradient(num_parts):
  mesh = parallel.make_mesh("data=2,fsdp=2")
  keys = jax.random.split(jax.random.key(0))
  weights, rows = jax.random.normal(keys[0], (64, 512)), jax.random.normal(keys[1], (64, 64))

  def loss(weights, x):
    return {"loss": 1.0}, {"loss": (jnp.tanh(x @ weights).sum(), jnp.float32(len(x)))}

  fn = functools.partial(gradients_of, loss, num_parts=num_parts)
  placed = parallel.put_own(mesh, weights), jax.device_put(rows, parallel.by_rows(mesh))
  shardings = parallel.state_shardings(mesh, weights), None
  program = jax.jit(parallel.on_mesh(mesh, fn), out_shardings=shardings).lower(*placed).compile()
  sent = hlo.costs(program.as_text(), dict(mesh.shape)).collectives
  of_two = sum(num for (_, axes), num in sent.items() if axes == "data")
  assert weights.nbytes / 2 <= of_two < 0.55 * weights.nbytes, sent
  # The figures go over all devices.
  assert sum(num for (_, axes), num in sent.items() if axes == "data,fsdp") < 100
  chex.assert_trees_all_close(
    program(*placed)[0], gradients_of(loss, weights, rows)[0], rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("members_per_batch", [1, 2])
def test_so_do_those_of_a_member_of_a_sweep(members_per_batch):
  mesh = parallel.make_mesh("sweep=2,data=2")
  num_members = 2 * members_per_batch
  key = jax.random.key(1)
  w = jax.random.normal(key, (num_members, 1000)) / 30
  members = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("sweep"))
  own = jax.device_put(({"w": w, "unused": w[:, :2]}, jnp.arange(1.0, num_members + 1)), members)
  batch = jax.random.normal(key, (8, 4, 1000)), make_batch()[1]
  placed = jax.device_put(batch, parallel.by_rows(mesh))

  def loss(params, batch, scale):
    weights, metrics = loss_fn(params, batch, "token_mean")
    return {name: weight * scale for name, weight in weights.items()}, metrics

  sent, found = [], []
  for num_parts in (1, 2):

    def fn(own, batch, num_parts=num_parts):
      params, scale = own
      return gradients_of(loss, params, batch, scale, num_parts=num_parts)[0]

    lifted = parallel.map_members(mesh, fn, (0, None), members_per_batch=members_per_batch)
    compiled = jax.jit(parallel.on_mesh(mesh, lifted), out_shardings=members).lower(own, placed)
    compiled = compiled.compile()
    collectives = hlo.costs(compiled.as_text(), dict(mesh.shape)).collectives
    assert all(axes == "data" for _, axes in collectives)
    sent.append(collectives["all-reduce", "data"] / members_per_batch)
    found.append(compiled(own, placed))
  chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-6)
  alone = gradients_of(loss, jax.tree.map(lambda x: x[1], own[0]), batch, own[1][1])[0]
  chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], found[1]), alone, rtol=1e-4, atol=1e-6)
  assert 4000 < sent[1] < 1.1 * sent[0], sent


@pytest.mark.parametrize(
  ("rows_of_parts", "num_parts", "group_size", "expected"),
  [
    (4.9, 1, 1, 4),
    (4.9, 1, 16, 4),
    (4.9, 1, 32, 2),
    (4.9, 1, 64, 1),
    (4.9, 2, 1, 4),
    (0.9, 1, 1, 1),
    (0.9, 8, 1, 8),
  ],
)
def test_a_cpu_takes_parts_that_have_enough_tokens_and_whole_groups(
  rows_of_parts, num_parts, group_size, expected, monkeypatch
):
  tokens = jax.ShapeDtypeStruct((64, int(rows_of_parts * TOKENS_PER_PART) // 64), jnp.int32)
  batch = {"scores": jax.ShapeDtypeStruct((64,), jnp.float32), "tokens": tokens}
  assert enough_parts(batch, num_parts, group_size=group_size) == expected
  pairs = {"tokens": tokens.update(shape=(64, 2, tokens.shape[1] // 2)), "each": jnp.zeros((64, 2))}
  assert enough_parts(pairs, num_parts, group_size=group_size) == expected
  mesh = parallel.make_mesh("data=2")
  on_mesh = parallel.on_mesh(mesh, enough_parts)
  assert on_mesh(batch, num_parts) == max(num_parts, 2 if rows_of_parts > 2 else 1)
  monkeypatch.setattr(parallel, "compiles_for_cpu", lambda: False)
  assert enough_parts(batch, num_parts, group_size=group_size) == num_parts


def test_devices_share_the_rows_of_a_part_that_they_do_not_divide():
  mesh = parallel.make_mesh("data=4")
  keys = jax.random.split(jax.random.key(0))
  weights, rows = jax.random.normal(keys[0], (16, 16)), jax.random.normal(keys[1], (24, 16))

  def mean(weights, x):
    return {"loss": 1.0}, {"loss": (jnp.tanh(x @ weights).sum(), jnp.float32(len(x)))}

  fn = functools.partial(gradients_of, mean, num_parts=4)
  placed = parallel.put_own(mesh, weights), jax.device_put(rows, parallel.by_rows(mesh))
  program = jax.jit(parallel.on_mesh(mesh, fn)).lower(*placed).compile()
  # Of a part's six rows two devices have two, and the others one; padded to two.
  one_row = 2 * 16 * 16  # of each product, forward and backward
  assert hlo.costs(program.as_text(), dict(mesh.shape)).flops == 4 * 2 * 2 * one_row
  chex.assert_trees_all_close(program(*placed)[0], fn(weights, rows)[0], rtol=1e-5, atol=1e-7)


def test_a_mean_of_means_is_another_gradient():
  """What the parts guard against: with token means, equal weights of unequal parts are wrong."""
  loss = functools.partial(loss_fn, aggregation="token_mean")
  batch = make_batch()
  whole = gradients_of(loss, PARAMS, batch)[0]["w"]
  halves = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
  mean = sum(gradients_of(loss, PARAMS, half)[0]["w"] for half in halves) / 2
  assert float(jnp.abs(mean - whole).max()) > 1e-3


def test_a_part_without_tokens_adds_nothing():
  x, mask = make_batch()
  batch = x, mask.at[1::2].set(False)
  loss = functools.partial(loss_fn, aggregation="token_mean")
  chex.assert_trees_all_close(
    gradients_of(loss, PARAMS, batch, num_parts=2)[0], gradients_of(loss, PARAMS, batch)[0],
    rtol=1e-5, atol=1e-7,
  )  # fmt: skip


def test_activations_of_one_part_are_held_at_a_time():
  """Temporary memory falls with the number of parts where rows, not parameters, take it."""
  x = jnp.ones((4096, 64))

  def wide(params, x):
    y = x
    for _ in range(4):
      y = jnp.tanh(y @ params)
    return {"y": 1.0}, {"y": ((y**2).sum(), jnp.float32(len(x)))}

  params = jnp.full((64, 64), 0.01)
  temporary = [
    jax.jit(functools.partial(gradients_of, wide, num_parts=num_parts))
    .lower(params, x)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for num_parts in (1, 8)
  ]
  # Of all rows the parts still need a copy in another order.
  assert temporary[1] < temporary[0] / 2, temporary
