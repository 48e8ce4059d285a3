"""Tests of the kernel of attention: interpreted, against `attention.attend`, and compiled."""

import importlib.util
import os
import pathlib

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl.cost import hlo, program
from klrl.devices import parallel
from klrl.models import attention, decoder, kernel
from klrl.models.attention import Fork, Packed
from klrl.models.blocks import DecoderConfig, LayerKind

CASES = {
  "padding with holes and wide heads": {"width": 128, "holes": True},
  "several texts and a cap": {"width": 64, "texts": True, "cap": 2.0},
  "a window in several texts": {"width": 64, "texts": True, "window": 90},
  "branches": {"width": 64, "fork": Fork(100, 4)},
  "a window and holes in branches": {
    "width": 64,
    "fork": Fork(100, 4),
    "holes": True,
    "window": 90,
  },
}
# Two blocks, of which the second one is padded.
ROWS, LEN, HEADS, KV_HEADS = 2, 600, 4, 2


def both_ways(dtype, *, width, holes=False, texts=False, window=0, fork=None, cap=0.0):
  """Returns (outputs, gradients) of real tokens, by products and by the kernel."""
  mask = np.ones((ROWS, LEN), bool)
  mask[0, :40], mask[1, 550:] = False, False
  if holes:
    mask[0, 130:170], mask[1, 7] = False, False
  segment_ids = jnp.asarray(np.where(mask, np.arange(LEN) // 250, 0)) if texts else None
  mask = jnp.asarray(mask)
  fork = Packed(segment_ids) if texts else fork
  sight = decoder._forked(mask, fork) if isinstance(fork, Fork) else decoder._causal(mask, fork)
  seen = sight.seen
  if window:
    seen = decoder._seen_within(sight, window)
  by_places = kernel.places(mask, fork, seen if window else None)
  rng = np.random.default_rng(0)
  shapes = [(ROWS, LEN, HEADS, width), *[(ROWS, KV_HEADS, LEN, width)] * 2]
  arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
  weights = rng.normal(size=(ROWS, LEN, HEADS * width)) * mask[..., None]

  def read(attend, seen):
    def loss(query, key, value):
      y = attend(query, key, value, seen, scale=0.3, cap=cap)
      return (weights * y).sum(), jnp.where(mask[..., None], y, jnp.where(jnp.isfinite(y), 0, y))

    gradient, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)
    return jax.tree.map(lambda x: np.asarray(x, np.float32), (y, *gradient))

  return mask, read(attention.attend, seen), read(kernel.attend, by_places)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_reads_what_the_products_read(case):
  mask, expected, found = both_ways(jnp.float32, **CASES[case])
  for x, y in zip(expected, found, strict=True):
    np.testing.assert_allclose(y, x, atol=3e-5)
  # The gradients of padding: exactly nothing.
  for x in found[1:]:
    places = 1 if x.shape[1] == LEN else 2
    assert not np.moveaxis(x, places, 1)[~mask].any()


def test_the_kernel_reads_in_bfloat16():
  _, exact, _ = both_ways(jnp.float32, **CASES["branches"])
  _, expected, found = both_ways(jnp.bfloat16, **CASES["branches"])
  for x, y, z in zip(exact, expected, found, strict=True):
    assert np.abs(z - x).mean() < 1.5 * np.abs(y - x).mean() < 0.01


def write_compiled(path: str, row_len: int) -> None:
  """Writes the text of a gradient in a sweep on v5e:2x4, of rows with branches, with a window."""
  mesh = parallel.make_mesh("sweep=2,data=2,fsdp=2", parallel.topology_devices("v5e:2x4"))
  config = DecoderConfig(
    vocab_size=256,
    width=128,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=256,
    max_len=row_len,
    kinds=(LayerKind(window=100),),
    dtype="bfloat16",
  )
  policy = decoder.policy_model(config)

  def gradient(params, tokens, mask):
    def loss(params):
      rows = parallel.split_rows((tokens, mask))
      hidden = policy.hidden(params, *rows, fork=Fork(row_len // 3, 2))
      return (hidden.astype(jnp.float32) ** 2).sum()

    return jax.grad(loss)(params)

  fn = parallel.map_members(mesh, gradient, (0, None, None), members_per_batch=1)
  params = jax.eval_shape(jax.vmap(policy.init), jax.random.split(jax.random.key(0), 2))
  shardings = parallel.state_shardings(mesh, params, members=True)
  params = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), params, shardings)
  rows = [
    jax.ShapeDtypeStruct((4, row_len), dtype, sharding=parallel.replicated(mesh))
    for dtype in (jnp.int32, bool)
  ]
  compiled = jax.jit(parallel.on_mesh(mesh, fn)).lower(params, *rows).compile()
  pathlib.Path(path).write_text(compiled.as_text())


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs TPUs' compiler")
def test_no_tpu_holds_pairs_of_tokens(tmp_path):
  """The compiler for TPUs ends a process that has the suite's flags, which it does not know."""
  row_len = 1152
  code = f"import kernel_test; kernel_test.write_compiled('text', {row_len})"
  environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
  status, said = forked.Process(["-c", code], tmp_path, environment).finished()
  assert status == 0, said
  text = (tmp_path / "text").read_text()
  assert not pairs_of_tokens(text, row_len // 3)
  # A device has one row of a member. Of 9 blocks of its pairs 5 have any that are seen, each of
  # which is multiplied twice forward, and seven times backward. The weights are multiplied thrice.
  found = hlo.costs(text, {"sweep": 2, "data": 2, "fsdp": 2})
  of_pairs = 2 * 9 * 5 * (row_len // 3) ** 2 * 4 * 64
  weights = 128 * 64 * (4 + 2 + 2 + 4) + 3 * 128 * 256
  assert found.flops == of_pairs + 2 * 3 * row_len * weights


def pairs_of_tokens(text: str, num: int) -> list[str]:
  """Returns the instructions that make `num` by `num` numbers or more of each row or head."""
  computations, _ = program.parse(text)
  return [
    instruction.name
    for name, instructions in computations.items()
    if "fused" not in name
    for instruction in instructions.values()
    for buffer in instruction.buffers
    if len(buffer.dims) > 2 and sum(size >= num for size in buffer.dims) > 1
  ]


KERNEL = """ENTRY %main (p: s8[1,2,2]) -> bf16[2,1024,64] {
  %t = s8[1,2,2]{2,1,0:S(1)} parameter(0)
  %q = bf16[2,1024,64]{2,1,0} parameter(1)
  %k = bf16[1,1024,64]{2,1,0} parameter(2)
  %rows = s32[1024,128]{1,0:S(1)} parameter(3)
  %columns = s32[8,1024]{1,0} parameter(4)
  %splash_mha_PART.1 = bf16[2,1024,64]{2,1,0} custom-call(%t, %t, %q, %k, %k, %rows, %columns), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/blocks(3x512)/vmap(splash)/pallas_call"}
}
"""


@pytest.mark.parametrize(("part", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_the_costs_of_a_kernel_are_those_of_its_blocks(part, products):
  found = hlo.costs(KERNEL.replace("PART", part), {"data": 1})
  assert found.flops == products * 2 * 2 * 3 * 512**2 * 64
  queries, keys, written = 2 * 1024 * 64 * 2, 1024 * 64 * 2, 2 * 1024 * 64 * 2
  if part == "dkv":  # Three blocks of queries are read, and all keys, values and columns once.
    assert found.bytes == written + 1.5 * queries + 2 * keys + 8 * 1024 * 4
  else:  # Three blocks of keys, values and columns for each of two heads, and all queries once.
    assert found.bytes == written + queries + 2 * 1.5 * (2 * keys + 8 * 1024 * 4)
