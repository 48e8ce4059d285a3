"""Tests of meshes and of where the arrays of a decoder and its optimizer are put."""

import os
import pathlib

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl.algorithm.optimizer import init_optimizer
from klrl.devices import parallel
from klrl.errors import UserError
from klrl.models import DecoderConfig, policy_model, scalar_model

ROOT = pathlib.Path(__file__).parents[1]
DECODER = DecoderConfig(
  vocab_size=10,
  width=8,
  num_layers=4,  # Divisible by every axis of a mesh: were it not for its name, it would be split.
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=12,
  max_len=16,
  tie_embeddings=False,
  attention_bias=True,
)


def specs(mesh_spec, tree):
  """Returns {path: partition of each axis} for the state `tree`."""
  shardings = parallel.state_shardings(parallel.make_mesh(mesh_spec), tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(sharding.spec)
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
  }


def params():
  return jax.eval_shape(policy_model(DECODER).init, jax.random.key(0))


@pytest.mark.parametrize(
  ("spec", "sizes"),
  [
    ("", (1, 4, 1, 1)),
    ("data=1", (1, 1, 1, 1)),
    ("data=2,fsdp=2", (1, 2, 2, 1)),
    ("tensor=2,data=2", (1, 2, 1, 2)),
    ("sweep=3", (3, 1, 1, 1)),
  ],
)
def test_a_mesh_has_the_sizes_asked_for(spec, sizes):
  mesh = parallel.make_mesh(spec)
  assert dict(mesh.shape) == dict(zip(parallel.AXES, sizes, strict=True))


def test_no_mesh_is_the_default_device_where_one_is_set():
  device = jax.devices()[2]
  with jax.default_device(device):
    assert parallel.make_mesh("").devices.ravel().tolist() == [device]
    assert parallel.make_mesh("data=2").size == 2
  with jax.default_device("cpu"):
    assert parallel.make_mesh("").size == 4


@pytest.mark.parametrize(
  ("num_members", "size"), [(1, 1), (3, 3), (4, 4), (5, 3), (6, 3), (8, 4), (9, 3), (100, 4)]
)
def test_members_take_no_more_devices_than_make_them_faster(num_members, size):
  assert parallel.sweep_mesh("", num_members).size == size


@pytest.mark.parametrize(("num_places", "size"), [(1, 1), (4, 4), (5, 1), (6, 3), (10, 2)])
def test_what_has_begun_keeps_its_places(num_places, size):
  mesh = parallel.mesh_of_places("", num_places)
  assert mesh.shape["sweep"] == size
  assert parallel.places(mesh, num_places, members_per_batch=1) == num_places


@pytest.mark.parametrize(
  "part",
  ["model=2", "data", "data=", "data=0", "data=-1", "data=two", "data=1.5", "=2", "2", "data=²"],
)
def test_a_part_that_is_no_size_of_an_axis_is_named(part):
  with pytest.raises(UserError, match=f"--mesh=fsdp=2,{part}: '{part}' is not AXIS=SIZE"):
    parallel.make_mesh(f"fsdp=2,{part}")


def test_more_devices_than_there_are_is_refused():
  with pytest.raises(UserError, match=r"--mesh=data=4,fsdp=2 needs 8 devices, JAX sees 4"):
    parallel.make_mesh("data=4,fsdp=2")


def test_batches_must_split_evenly_over_data_and_fsdp():
  mesh = parallel.make_mesh("data=2,fsdp=2")
  parallel.check_batch_size(mesh, 8)
  with pytest.raises(UserError, match="--batch_size=6 cannot be split over 4 devices; use"):
    parallel.check_batch_size(mesh, 6)
  parallel.check_batch_size(parallel.make_mesh("tensor=4"), 7)


def test_rows_are_split_and_replicas_are_whole():
  mesh = parallel.make_mesh("data=2,fsdp=2")
  x = np.arange(8).reshape(4, 2)
  rows = jax.device_put(x, parallel.by_rows(mesh))
  assert sorted(shard.data[0, 0].item() for shard in rows.addressable_shards) == [0, 2, 4, 6]
  whole = jax.device_put(x, parallel.replicated(mesh))
  assert all(shard.data.shape == (4, 2) for shard in whole.addressable_shards)


def test_tensor_splits_heads_hidden_units_and_vocabulary():
  found = specs("tensor=2", params())
  layers = {
    name.removeprefix("decoder/layers/"): spec for name, spec in found.items() if "layers" in name
  }
  opening, closing = (None, None, "tensor"), (None, "tensor", None)
  for name in ("attention/query", "attention/key", "attention/value", "mlp/gate", "mlp/up"):
    assert layers[f"{name}/kernel"] == opening, name
  for name in ("attention/output", "mlp/down"):
    assert layers[f"{name}/kernel"] == closing, name
  assert found["decoder/embed/embedding"] == ("tensor", None)
  assert found["unembedding"] == (None, "tensor")


def test_fsdp_splits_what_tensor_would_and_else_the_largest_axis_that_divides():
  found = specs("fsdp=4", params())
  opening, closing = (None, None, "fsdp"), (None, "fsdp", None)
  for name in ("attention/query", "attention/key", "attention/value", "mlp/gate", "mlp/up"):
    assert found[f"decoder/layers/{name}/kernel"] == opening, name
  for name in ("attention/output", "mlp/down"):
    assert found[f"decoder/layers/{name}/kernel"] == closing, name
  # 10 does not divide by 4, so the width does the splitting.
  assert found["decoder/embed/embedding"] == (None, "fsdp")
  assert found["unembedding"] == ("fsdp", None)


def test_tensor_and_fsdp_take_different_axes():
  found = specs("fsdp=2,tensor=2", params())
  assert found["decoder/layers/attention/query/kernel"] == (None, "fsdp", "tensor")
  assert found["decoder/layers/attention/output/kernel"] == (None, "tensor", "fsdp")
  assert found["decoder/embed/embedding"] == ("tensor", "fsdp")


@pytest.mark.parametrize("spec", ["fsdp=4", "tensor=4", "fsdp=2,tensor=2", "data=4"])
def test_layer_axis_and_small_arrays_are_never_split(spec):
  for name, axes in specs(spec, params()).items():
    if "layers" in name:
      assert axes[0] is None, name
    if name.endswith(("bias", "scale")):
      assert not any(axes), name
    if spec == "data=4":
      assert not any(axes), name


def test_sizes_that_do_not_divide_stay_whole():
  found = specs("tensor=4", params())
  assert found["decoder/embed/embedding"] == (None, None)  # 10 words
  assert found["decoder/layers/mlp/gate/kernel"] == (None, None, "tensor")
  assert specs("fsdp=3", {"a": jnp.zeros((4, 8)), "b": jnp.zeros((4, 9))}) == {
    "a": (None, None),
    "b": (None, "fsdp"),
  }
  head = jax.eval_shape(scalar_model(DECODER).init, jax.random.key(0))["head"]
  assert specs("fsdp=2,tensor=2", {"head": head})["head"] == ("fsdp", None)  # [8, 1]


def test_moments_lie_where_their_parameters_lie_and_scalars_are_whole():
  tree = params()
  state = {"params": tree, "opt_state": jax.eval_shape(init_optimizer, tree), "x": jnp.zeros(())}
  found = specs("fsdp=2,tensor=2", state)
  kernel = "decoder/layers/mlp/down/kernel"
  moments = [spec for name, spec in found.items() if "opt_state" in name and name.endswith(kernel)]
  assert moments == [found[f"params/{kernel}"]] * 2
  assert found["x"] == ()


def test_a_real_state_can_be_put_there():
  mesh = parallel.make_mesh("fsdp=2,tensor=2")
  kernel = {"layers": {"mlp": {"down": {"kernel": np.arange(4 * 12 * 8.0).reshape(4, 12, 8)}}}}
  placed = jax.device_put(kernel, parallel.state_shardings(mesh, kernel))
  (leaf,) = jax.tree.leaves(placed)
  assert {shard.data.shape for shard in leaf.addressable_shards} == {(4, 6, 4)}
  np.testing.assert_array_equal(leaf, kernel["layers"]["mlp"]["down"]["kernel"])


def test_own_arrays_survive_the_donation_of_those_they_were_made_of():
  mesh = parallel.make_mesh("fsdp=2")
  theirs = parallel.put_once(mesh, {"a": jnp.arange(8.0).reshape(4, 2), "b": np.arange(3.0)})
  own = parallel.put_own(mesh, theirs)
  jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(theirs)
  assert theirs["a"].is_deleted()
  np.testing.assert_array_equal(own["a"], np.arange(8.0).reshape(4, 2))
  assert own["a"].sharding == parallel.state_shardings(mesh, own)["a"]
  assert {shard.data.shape for shard in own["a"].addressable_shards} == {(4, 1)}


def test_rows_are_split_by_the_mesh_in_scope_alone():
  x = jnp.arange(6.0)
  assert parallel.split_rows(x) is x
  one, mesh = parallel.make_mesh("data=1"), parallel.make_mesh("data=2,fsdp=2")
  program = jax.jit(parallel.on_mesh(one, parallel.split_rows))
  assert "sharding_constraint" not in program.lower(x).as_text()
  # Four devices do not divide six rows: two devices have two, and values are those of one.
  program = jax.jit(parallel.on_mesh(mesh, lambda x: (parallel.split_rows(x) ** 2).sum()))
  assert "sharding_constraint" in program.lower(x).as_text()
  assert program(x) == (np.arange(6.0) ** 2).sum()


def test_an_axis_named_twice_is_refused():
  with pytest.raises(UserError, match="at most once"):
    parallel.make_mesh("data=2,data=1")


@pytest.mark.parametrize(
  ("environment", "num_devices", "on_data"),
  [({}, None, 1), ({"JAX_NUM_CPU_DEVICES": "3"}, 3, 3)],
)
def test_members_are_put_on_every_core_and_what_is_no_member_on_one(
  tmp_path, environment, num_devices, on_data
):
  num_devices = num_devices or len(os.sched_getaffinity(0))
  mesh = (
    "from klrl.devices import parallel; parallel.use_every_core();"
    "print(parallel.make_mesh('').shape['data'], parallel.sweep_mesh('', 1000).shape['sweep'])"
  )
  sweep = ["-m", "experiments.sweep", "--sweep=beta=1", "--mesh=sweep=5000"]
  inherited = {name: x for name, x in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
  outputs = [
    forked.Process(
      arguments, tmp_path, inherited | {"JAX_PLATFORMS": "cpu"} | environment
    ).finished()[1]
    for arguments in (["-c", mesh], sweep)
  ]
  assert outputs[0].split() == [str(on_data), str(num_devices)]
  assert f"needs 5000 devices, JAX sees {num_devices}." in outputs[1]


@pytest.mark.parametrize("split", [(), ("fsdp",), (None, "tensor"), ("fsdp", "tensor")])
@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_of_an_array_are_fetched_from_the_devices_that_hold_them(split, axis):
  array = np.arange(8 * 12, dtype=np.float32).reshape(8, 12)
  mesh = parallel.make_mesh("fsdp=2,tensor=2")
  placed = jax.device_put(array, jax.NamedSharding(mesh, jax.P(*split)))
  blocks = list(parallel.fetch_blocks(placed, axis, 3))
  assert all(block.shape[axis] <= 3 for block in blocks)
  np.testing.assert_array_equal(np.concatenate(blocks, axis), array)
  (whole,) = parallel.fetch_blocks(placed, axis, 12)
  np.testing.assert_array_equal(whole, array)


@pytest.mark.parametrize(("num_members", "loops"), [(2, 0), (4, 1)])
def test_a_member_that_is_alone_on_its_device_runs_in_no_loop(num_members, loops):
  fn = parallel.map_members(parallel.make_mesh("sweep=2"), jnp.sin, (0,), members_per_batch=1)
  x = jnp.arange(2.0 * num_members).reshape(num_members, 2)
  np.testing.assert_allclose(jax.jit(fn)(x), jnp.sin(x))
  assert str(jax.make_jaxpr(fn)(x)).count("scan[") == loops
