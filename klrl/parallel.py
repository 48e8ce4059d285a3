"""Devices and mesh axes; the only file that names them.

One mesh with the axes `sweep`, `data`, `fsdp` and `tensor`. Programs are plain `jax.jit` over
global arrays whose `NamedSharding` says where they live; that is what `pjit` became.

* `data`: rows of a batch.
* `fsdp`: rows of a batch, and every parameter's largest divisible axis.
* `tensor`: heads and hidden units: the output axis of the projections that open a block, the input
  axis of those that close it, and the vocabulary.
* `sweep`: members of a sweep; nothing in a single run.
"""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from klrl.errors import UserError

AXES = ("sweep", "data", "fsdp", "tensor")

# Projections whose input axis, not output axis, is split by `tensor`.
_CLOSING = ("output", "down")


def make_mesh(spec: str) -> Mesh:
  """Returns the mesh that `spec` asks for, e.g. "data=4,fsdp=2"; "" puts all devices on `data`.

  Axes that are not named have size 1.

  Raises:
    UserError: unknown axis, a size that is not a positive integer, or more devices than there are.
  """
  sizes: dict[str, int] = {}
  if not spec:
    sizes["data"] = jax.device_count()
  for part in filter(None, spec.split(",")):
    axis, _, size = part.partition("=")
    if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
      raise UserError(
        f"--mesh={spec}: {part!r} is not AXIS=SIZE with SIZE >= 1 and AXIS one of "
        f"{', '.join(AXES)}, each at most once."
      )
    sizes[axis] = int(size)
  shape = tuple(sizes.get(axis, 1) for axis in AXES)
  needed = math.prod(shape)
  if needed > jax.device_count():
    raise UserError(
      f"--mesh={spec} needs {needed} devices, JAX sees {jax.device_count()}. Use a smaller mesh."
    )
  return jax.make_mesh(
    shape,
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=jax.devices()[:needed],
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that keeps a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that splits the first axis over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
  """Raises UserError where `by_rows` cannot split `batch_size` rows evenly."""
  num_shards = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size % num_shards:
    raise UserError(
      f"--batch_size={batch_size} cannot be split over {num_shards} devices; use a multiple of "
      f"{num_shards}, or --mesh with fewer devices on data and fsdp."
    )


def state_shardings(mesh: Mesh, state):
  """Returns a tree of shardings for parameters, optimizer moments and scalars.

  Moments follow the parameter they belong to, since they have its name and shape.
  """

  def sharding(path, leaf):
    names = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]
    return NamedSharding(mesh, _partition_spec(mesh, names, leaf.shape))

  return jax.tree_util.tree_map_with_path(sharding, state)


def _partition_spec(mesh: Mesh, names, shape) -> PartitionSpec:
  spec: list = [None] * len(shape)
  # A stacked layer axis is scanned over, never split.
  axes = range(1 if "layers" in names else 0, len(shape))
  if len(axes) >= 2:
    closing = any(name in _CLOSING for name in names)
    tensor_axis = len(shape) - (2 if closing else 1)
    if "embedding" in names:  # [vocabulary, width]
      tensor_axis = len(shape) - 2
    if mesh.shape["tensor"] > 1 and shape[tensor_axis] % mesh.shape["tensor"] == 0:
      spec[tensor_axis] = "tensor"
    free = [axis for axis in axes if spec[axis] is None and shape[axis] % mesh.shape["fsdp"] == 0]
    if mesh.shape["fsdp"] > 1 and free:
      spec[max(free, key=lambda axis: shape[axis])] = "fsdp"
  return PartitionSpec(*spec)
