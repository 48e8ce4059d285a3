"""Tests that figures of distributions are the same where the vocabulary is split over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl import ops
from klrl.algorithm import distributions
from klrl.cost import hlo
from klrl.devices import parallel

NUM_ROWS, WIDTH = 512, 64


def summed(hidden, table, tokens):
  fn = distributions.log_probs_and_entropy_of
  log_probs, entropy = distributions.over_vocabulary(fn, [(hidden, table)], [tokens])
  return log_probs.sum() + 0.1 * entropy.sum(), (log_probs, entropy)


# Devices share 4096 words evenly, so that `fsdp` splits them; of 4098 it splits the width.
@pytest.mark.parametrize(
  ("devices", "vocab_size"),
  [("fsdp=4", 4096), ("fsdp=4", 4098), ("data=4", 4096), ("data=2,fsdp=2", 4096)],
)
def test_no_table_is_sent_for_a_chunk_of_rows(devices, vocab_size, monkeypatch):
  monkeypatch.setattr(distributions, "LOGITS_PER_CHUNK", vocab_size * 4)  # 32 chunks of a device
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = jax.random.normal(keys[0], (8, NUM_ROWS // 8, WIDTH))
  params = {"unembedding": jax.random.normal(keys[1], (WIDTH, vocab_size))}
  tokens = jax.random.randint(keys[2], hidden.shape[:2], 0, vocab_size)
  mesh = parallel.make_mesh(devices)
  rows = parallel.by_rows(mesh)
  shardings = parallel.state_shardings(mesh, params)

  def gradients(params, hidden, tokens):
    return jax.value_and_grad(
      lambda params, hidden: summed(hidden, params["unembedding"], tokens), (0, 1), has_aux=True
    )(params, hidden)

  on_devices = jax.jit(
    parallel.on_mesh(mesh, gradients), out_shardings=((None, rows), (shardings, rows))
  )
  arguments = jax.device_put((params, hidden, tokens), (shardings, rows, rows))
  compiled = on_devices.lower(*arguments).compile()
  found = compiled(*arguments)
  expected = jax.jit(gradients)(params, hidden, tokens)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
  costs = hlo.costs(compiled.as_text(), dict(mesh.shape))
  # Devices of `data` add up the gradient of what each has of the table, once for all chunks.
  size = params["unembedding"].nbytes / mesh.shape["fsdp"]
  added_up = 2 * size * (1 - 1 / mesh.shape["data"])
  assert added_up <= sum(costs.collectives.values()) < added_up + params["unembedding"].nbytes
  # Each device does its share of four products: none but its own rows, or its own words.
  share = 4 * 2 * NUM_ROWS * WIDTH * vocab_size / 4
  assert share <= costs.flops < 1.1 * share


def test_alone_figures_are_those_of_ops():
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = jax.random.normal(keys[0], (4, 8))
  table = jax.random.normal(keys[1], (8, 16))
  tokens = jax.random.randint(keys[2], (4,), 0, 16)
  found = functools.partial(distributions.over_vocabulary, ops.taken)([(hidden, table)], [tokens])
  expected = ops.token_log_probs(jnp.matmul(hidden, table), tokens)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
