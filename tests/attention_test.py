"""Tests of attention against sums over pairs of tokens, and of rows that share their beginning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl.cost import hlo
from klrl.devices import parallel
from klrl.models import attention
from klrl.models.attention import Forked, attend

ROWS, LEN, HEADS, KV_HEADS, WIDTH = 2, 7, 4, 2, 3


def random(shape, seed):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_pairs(query, key, value, seen, scale, cap):
  """Returns [B, S, N H] in float64."""
  out = np.zeros(query.shape)
  for b, s, n in np.ndindex(query.shape[:3]):
    shared = n * key.shape[1] // query.shape[2]
    logits = scale * (np.float64(key[b, shared]) @ query[b, s, n])
    logits = cap * np.tanh(logits / cap) if cap else logits
    weights = np.where(seen[b, s], np.exp(logits), 0)
    out[b, s, n] = weights @ value[b, shared] / weights.sum()
  return out.reshape(*query.shape[:2], -1)


@pytest.mark.parametrize("cap", [0.0, 0.7])
def test_a_query_reads_the_mean_of_what_it_sees(cap):
  query = random((ROWS, LEN, HEADS, WIDTH), 0)
  key, value = random((2, ROWS, KV_HEADS, LEN, WIDTH), 1)
  seen = np.random.default_rng(2).random((ROWS, LEN, LEN)) < 0.5
  seen |= np.eye(LEN, dtype=bool)
  found = attend(query, key, value, seen, scale=0.6, cap=cap)
  np.testing.assert_allclose(found, by_pairs(query, key, value, seen, 0.6, cap), atol=1e-6)


def test_a_query_that_sees_nothing_reads_a_finite_mean():
  query, key = random((1, 2, 1, WIDTH), 0), random((1, 1, 2, WIDTH), 1)
  nothing = jnp.zeros((1, 2, 2), bool)

  def read(query):
    return attend(query, key, key, nothing, scale=1.0, cap=0.0).sum()

  value, gradient = jax.value_and_grad(read)(query)
  np.testing.assert_allclose(value, key.sum(), rtol=1e-6)
  np.testing.assert_array_equal(gradient, 0)


def test_large_logits_overflow_nothing():
  query = jnp.full((1, 1, 1, 1), 1e4)
  key = jnp.array([1.0, 2.0, -1.0]).reshape(1, 1, 3, 1)
  found = attend(query, key, key, jnp.array([[[True, True, True]]]), scale=1.0, cap=0.0)
  np.testing.assert_array_equal(found, [[[2.0]]])


def test_branches_read_their_beginning_and_themselves():
  before, num, own = 2, 3, 2
  length = before + num * own
  query = random((ROWS, length, HEADS, WIDTH), 0)
  key, value = random((2, ROWS, KV_HEADS, length, WIDTH), 1)
  rng = np.random.default_rng(2)
  seen = np.zeros((ROWS, length, length), bool)
  seen[:, :before, :before] = np.tri(before, dtype=bool)
  for start in range(before, length, own):
    branch = slice(start, start + own)
    seen[:, branch, :before] = rng.random((ROWS, own, before)) < 0.5
    seen[:, branch, branch] = np.tri(own, dtype=bool)
  branches = seen[:, before:].reshape(ROWS, num, own, length)
  forked = Forked(
    seen[:, :before, :before],
    branches[..., :before],
    np.stack([seen[:, i : i + own, i : i + own] for i in range(before, length, own)], axis=1),
  )
  found = attend(query, key, value, forked, scale=0.6, cap=0.0)
  np.testing.assert_allclose(found, by_pairs(query, key, value, seen, 0.6, 0.0), atol=1e-6)


def causal(length):
  return jnp.broadcast_to(jnp.tri(length, dtype=bool), (ROWS, length, length))


def branched(before, num, own):
  to_prefix = jnp.ones((ROWS, num, own, before), bool)
  within = jnp.broadcast_to(jnp.tri(own, dtype=bool), (ROWS, num, own, own))
  return Forked(causal(before), to_prefix, within)


@pytest.mark.parametrize("seen", [causal(13), branched(5, 2, 4)], ids=["one text", "branches"])
def test_a_long_row_is_read_in_blocks_of_queries(seen, monkeypatch):
  query = random((ROWS, 13, HEADS, WIDTH), 0)
  key, value = random((2, ROWS, KV_HEADS, 13, WIDTH), 1)
  weights = random((ROWS, 13, HEADS * WIDTH), 2)

  def total(*arrays):
    return (weights * attend(*arrays, seen, scale=0.6, cap=0.7)).sum()

  def outputs():
    return jax.jit(jax.value_and_grad(lambda *x: total(*x), (0, 1, 2)))(query, key, value)

  whole = outputs()
  monkeypatch.setattr(attention, "QUERIES_PER_BLOCK", 3)
  for found, expected in zip(*map(jax.tree.leaves, (outputs(), whole)), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_logits_of_a_long_row_are_never_held():
  length, heads = 4 * attention.QUERIES_PER_BLOCK, 2
  shape = jax.ShapeDtypeStruct((1, length, heads, 4), jnp.float32)
  keys = jax.ShapeDtypeStruct((1, heads, length, 4), jnp.float32)
  seen = jax.ShapeDtypeStruct((1, length, length), bool)

  def total(query, key, value, seen):
    return attend(query, key, value, seen, scale=1.0, cap=0.0).sum()

  gradient = jax.jit(jax.grad(total, (0, 1, 2))).lower(shape, keys, keys, seen).compile()
  # Two blocks of logits and the mask, which has no heads, where all logits would be four blocks.
  block = 4 * heads * attention.QUERIES_PER_BLOCK * length
  assert gradient.memory_analysis().temp_size_in_bytes < 3 * block + length**2


def test_devices_share_the_blocks_of_a_long_row(monkeypatch):
  monkeypatch.setattr(attention, "QUERIES_PER_BLOCK", 8)
  rows, length, heads, width = 8, 32, 2, 16
  shapes = (rows, length, heads, width), *[(rows, heads, length, width)] * 2
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

  def total(query, key, value, seen):
    return attend(query, key, value, seen, scale=1.0, cap=0.0).sum()

  def costs(spec):
    mesh = parallel.make_mesh(spec)
    sharding = parallel.by_rows(mesh)
    gradient = jax.jit(
      parallel.on_mesh(mesh, jax.grad(total, (0, 1, 2))),
      in_shardings=sharding,
      out_shardings=sharding,
    )
    seen = jax.ShapeDtypeStruct((rows, length, length), bool)
    return hlo.costs(gradient.lower(*arrays, seen).compile().as_text(), mesh.shape)

  whole, share = costs("data=1"), costs("data=4")
  # Two products forwards; backwards the logits once more, and the gradients of two products.
  assert whole.flops == pytest.approx(2 * rows * heads * length**2 * width * (2 + 1 + 4), rel=0.2)
  assert share.flops == pytest.approx(whole.flops / 4, rel=0.02)
  assert not share.collectives


def test_narrow_numbers_stay_narrow_and_are_summed_in_wide_ones():
  query, key = random((1, 1, 1, WIDTH), 0), random((1, 1, 600, WIDTH), 1)
  half = [jnp.asarray(x, jnp.bfloat16) for x in (query, key)]
  found = attend(*half, half[1], jnp.ones((1, 1, 600), bool), scale=1.0, cap=0.0)
  assert found.dtype == jnp.bfloat16
  wide = [np.asarray(x, np.float32) for x in half]
  expected = by_pairs(*wide, wide[1], np.ones((1, 1, 600), bool), 1.0, 0.0)
  np.testing.assert_allclose(np.float32(found), expected, rtol=0.02, atol=2e-3)
