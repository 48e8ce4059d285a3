"""No device and no process ever holds a model: bytes are counted while it is read and saved."""

import functools
import gc
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from klrl.devices import parallel
from klrl.models import DecoderConfig, hf, policy_model, save_policy, save_scalar, scalar_model
from klrl.run import loop
from klrl.run.checkpoint import Checkpoints
from klrl.tasks import arithmetic

DECODER = DecoderConfig(
  vocab_size=256,
  width=128,
  num_layers=12,  # So that one is a small part of all.
  num_heads=4,
  num_kv_heads=4,
  head_dim=32,
  mlp_dim=512,
  max_len=32,
  tie_embeddings=False,
)


def live_bytes() -> int:
  """Returns the most bytes of arrays that any device holds now."""
  held = dict.fromkeys(jax.devices(), 0)
  for array in jax.live_arrays():
    size = np.prod(array.sharding.shard_shape(array.shape), dtype=int) * array.dtype.itemsize
    for device in array.sharding.device_set:
      held[device] += size
  return max(held.values())


@pytest.fixture
def model(tmp_path):
  """Returns the directory of a model that no device holds."""
  params = jax.device_get(jax.jit(policy_model(DECODER).init)(jax.random.key(0)))
  save_policy(tmp_path / "old", DECODER, params, arithmetic.make_tokenizer())
  return tmp_path / "old"


@pytest.fixture
def peak(model, monkeypatch):
  """Returns peak(), the most that a device held when something was put on it or read from it."""
  del model  # It is made before anything is counted.
  before, most = live_bytes(), 0

  def counted(fn):
    def counting(*arguments, **options):
      nonlocal most
      found = fn(*arguments, **options)
      most = max(most, live_bytes() - before)
      return found

    return counting

  monkeypatch.setattr(jax, "device_put", counted(jax.device_put))
  monkeypatch.setattr(jax, "device_get", counted(jax.device_get))
  monkeypatch.setattr(hf, "_BLOCK_BYTES", 2**12)
  return lambda: most


def test_a_device_holds_its_shards_and_no_more_while_a_model_is_read_and_saved(model, peak):
  config, unread = hf.open_policy(model)
  placed = parallel.put_own(parallel.make_mesh("fsdp=4"), unread)
  shards = sum(
    np.prod(x.sharding.shard_shape(x.shape), dtype=int) * x.dtype.itemsize
    for x in jax.tree.leaves(placed)
  )
  saved = model.with_name("new")
  save_policy(saved, config, placed, arithmetic.make_tokenizer())
  assert shards <= peak() < 1.25 * shards
  files = [directory / "model.safetensors" for directory in (model, saved)]
  assert files[0].read_bytes() == files[1].read_bytes()


def test_a_device_never_holds_two_states_while_a_run_goes_on(tmp_path, peak):
  sharding = jax.NamedSharding(parallel.make_mesh("fsdp=4"), jax.P("fsdp"))
  state = {"table": jax.device_put(np.ones((4096, 8), np.float32), sharding)}
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
  checkpoints.save(5, state)
  checkpoints.close()
  done, restored = loop.restore_or_init(tmp_path, state, keep=1)
  assert done == 5 and not np.any(restored["table"] - 1)
  assert peak() < 1.25 * 4096 * 8


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_block_of_a_split_axis_is_sent_without_the_rest(dtype):
  array = np.random.default_rng(0).normal(size=(4096, 8)).astype(dtype)
  array[5] = -0.0
  mesh = parallel.make_mesh("fsdp=4")
  placed = jax.device_put(array, jax.NamedSharding(mesh, jax.P("fsdp")))
  blocks = list(parallel.fetch_blocks(placed, 0, 100))
  assert np.concatenate(blocks).tobytes() == array.tobytes()
  program = parallel._block_of_parts(mesh, ("fsdp", None), 0, 100)
  text = program.lower(placed, 0).compile().as_text()
  assert "all-gather" not in text and "4096" not in text


def test_the_host_holds_a_part_of_a_model_while_it_is_read_and_saved(model, monkeypatch):
  monkeypatch.setattr(hf, "_BLOCK_BYTES", 2**16)
  params = jax.device_get(jax.jit(scalar_model(DECODER).init)(jax.random.key(0)))
  save_scalar(model.with_name("scalar"), DECODER, params, arithmetic.make_tokenizer())
  del params
  mesh = parallel.make_mesh("fsdp=4")
  for name, opened, save in (
    ("old", hf.open_policy, save_policy),
    ("scalar", hf.open_scalar, save_scalar),
  ):
    config, unread = opened(model.with_name(name))
    placed, read = on_host(lambda unread=unread: parallel.put_own(mesh, unread))
    size = sum(x.nbytes for x in jax.tree.leaves(placed))
    assert read < size / 8
    saving = functools.partial(save, model.with_name("new"), config, placed)
    _, written = on_host(lambda saving=saving: saving(arithmetic.make_tokenizer()))
    assert written < size / 8


def on_host(fn):
  """Returns (what fn() returns, the most bytes that Python and NumPy took when it ran again).

  The first time compiles, and what that keeps is no part of a model.
  """
  fn()
  gc.collect()
  tracemalloc.start()
  try:
    found = fn()
    return found, tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
