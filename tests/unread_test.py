"""Arrays that are read where they are put: parts, dtypes, and numbers that are refused."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from klrl.devices import parallel, unread
from klrl.devices.unread import Block, Unread
from klrl.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def unread_of(array, asked=None):
  """Returns `array` as one that is read row by row, and notes what is asked for."""

  def blocks(index):
    for place, row in enumerate(range(index[0].start, index[0].stop)):
      part = array[(row, *index[1:])]
      if asked is not None:
        asked.append(part.size)
      yield Block(f"row {row}", place, part)

  return Unread(array.shape, array.dtype, blocks)


def test_each_device_gets_its_part_and_no_part_is_read_twice():
  array = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
  asked = []
  mesh = parallel.make_mesh("data=2,fsdp=2")
  placed = parallel.put_once(mesh, {"kernel": unread_of(array, asked)})["kernel"]
  np.testing.assert_array_equal(placed, array)
  assert placed.sharding.shard_shape(placed.shape) == (8, 3)
  assert sum(asked) == array.size


def test_what_two_models_share_is_read_once_and_what_is_trained_has_buffers_of_its_own():
  asked = []
  leaf = unread_of(np.ones((4, 2), np.float32), asked)
  mesh = parallel.make_mesh("data=1")
  placed = parallel.put_once(mesh, {"base": leaf, "reference": leaf})
  assert placed["base"] is placed["reference"] and sum(asked) == 8
  own = parallel.put_own(mesh, {"policy": leaf})["policy"]
  pointers = [x.addressable_shards[0].data.unsafe_buffer_pointer() for x in (own, placed["base"])]
  assert pointers[0] != pointers[1]


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_a_device_does_not_take_what_was_read_for_its_own_memory(dtype, monkeypatch):
  def aligned(size, dtype):
    """Returns an array that begins where such a device would take it."""
    dtype, room = np.dtype(dtype), np.zeros(size * np.dtype(dtype).itemsize + 64, np.uint8)
    return room[-room.ctypes.data % 64 :][: size * dtype.itemsize].view(dtype)

  monkeypatch.setattr(np, "empty", aligned)
  rows = np.arange(4096 * 8, dtype=np.float32).astype(dtype).reshape(4096, 8)
  array = unread_of(rows).read()
  np.testing.assert_array_equal(array, rows)
  placed = jax.device_put(array, jax.devices()[0], may_alias=False)
  assert placed.unsafe_buffer_pointer() != array.ctypes.data


def test_a_dtype_is_that_of_numpy_and_roundings_follow_one_another():
  array = np.float32([[1 / 3, 1e-3]])
  leaf = unread_of(array)
  assert leaf.astype("float32") is leaf
  half = array.astype(BFLOAT16)
  np.testing.assert_array_equal(leaf.astype("bfloat16").read(), half)
  rounded = unread.stored_as({"x": leaf.astype("bfloat16")}, "float32")["x"]
  assert rounded.dtype == np.float32
  np.testing.assert_array_equal(rounded.read(), half.astype(np.float32))
  assert unread.stored_as({"x": leaf}, "file")["x"] is leaf
  np.testing.assert_array_equal(np.asarray(leaf), array)
  np.testing.assert_array_equal(jnp.asarray(leaf), array)
  assert jax.eval_shape(lambda x: x.T, leaf).shape == (2, 1)


@pytest.mark.parametrize(
  ("value", "dtype"), [(np.nan, "float32"), (-np.inf, "bfloat16"), (1e39, "float32")]
)
def test_numbers_that_are_not_finite_are_refused_by_the_name_of_their_tensor(value, dtype):
  array = np.ones((4, 2))
  array[2, 1] = value
  leaf = unread_of(array).astype(dtype)
  with pytest.raises(UserError, match=f"row 2 holds NaN, infinity, or numbers beyond {dtype}"):
    parallel.put_once(parallel.make_mesh("fsdp=2"), {"kernel": leaf})
  assert leaf.read((slice(0, 2), slice(0, 2))).shape == (2, 2)
