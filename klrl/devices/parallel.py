"""Devices and mesh axes; the only file that names them.

One mesh with the axes `sweep`, `data`, `fsdp` and `tensor`. Programs are plain `jax.jit` over
global arrays whose `NamedSharding` says where they live; that is what `pjit` became.

* `data`: rows of a batch.
* `tensor`: heads and hidden units. These are the output axis of the projections that open a block,
  the input axis of those that close it, and the vocabulary; of the two factors of an adapter, the
  one that has such an axis is split (M. Shoeybi et al., "Megatron-LM", 2019, section 3).
* `fsdp`: rows of a batch, and of every parameter the same axis as `tensor`. Where that is taken, or
  the devices do not divide it, it is the largest axis that they do.
* `sweep`: members of a sweep; nothing in a single run.

The arrays of a sweep have a leading axis of members. Programs split it over `sweep` by hand, so
that no collective ever crosses members, and leave the other axes to the compiler (`map_members`).
"""

import contextlib
import contextvars
import functools
import gc
import importlib.util
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from klrl.devices import processes
from klrl.devices.unread import Unread, is_unread
from klrl.errors import UserError

AXES = ("sweep", "data", "fsdp", "tensor")

_MOST_WAITS = 100  # for memory of the host, of a millisecond each

# Projections whose input axis, not output axis, is split by `tensor`.
_CLOSING = ("output", "down")
_MEMBERS = PartitionSpec("sweep")
_ROWS = ("sweep", "data", "fsdp")


def fetch(tree):
  """Returns the whole `tree` on the host, even where other processes hold parts of it.

  All processes must call it at the same place.
  """

  def whole(leaf):
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
      return jax.device_get(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)

  return jax.tree.map(whole, tree)


def fetch_layer(leaf, layer: int) -> np.ndarray:
  """Returns `leaf[layer]` on the host, wherever the leaf is; see `fetch`."""
  if is_unread(leaf):
    return leaf.read((slice(layer, layer + 1), *[slice(None)] * (leaf.ndim - 1)))[0]
  return fetch(_layer_on_devices(leaf, layer)) if isinstance(leaf, jax.Array) else leaf[layer]


def layer_of(leaf: jax.Array, layer) -> jax.Array:
  """Returns `leaf[layer]`, where `layer` may be traced."""
  return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


_layer_on_devices = jax.jit(layer_of)  # One program serves all layers.


def fetch_blocks(leaf, axis: int, size: int) -> Iterator[np.ndarray]:
  """Yields `leaf` on the host in blocks of at most `size` along an axis; see `fetch`."""
  num = leaf.shape[axis]
  for start in range(0, num, size):
    index = [slice(None)] * leaf.ndim
    index[axis] = slice(start, min(start + size, num))
    if isinstance(leaf, jax.Array):
      yield fetch(_block_on_devices(leaf, axis, start, min(size, num - start)))
    else:
      yield leaf.read(tuple(index)) if is_unread(leaf) else leaf[tuple(index)]


def _block_on_devices(leaf, axis, start, size):
  """Returns some rows of an array on the devices; XLA would gather the whole of a split axis."""
  if isinstance(leaf.sharding, NamedSharding):
    spec = (*leaf.sharding.spec, *[None] * leaf.ndim)[: leaf.ndim]
    if spec[axis] is not None:
      return _block_of_parts(leaf.sharding.mesh, spec, axis, size)(leaf, start)
  return _slice_on_devices(leaf, start, size, axis)


_slice_on_devices = jax.jit(jax.lax.dynamic_slice_in_dim, static_argnums=(2, 3))


@functools.cache
def _block_of_parts(mesh, spec, axis, size):
  """Returns block(leaf, start), where each device gives what it has of the rows, and 0 elsewhere.

  Their bits are added up, so that every number arrives as it is.
  """

  def block(part, start):
    words = jnp.dtype(f"uint{8 * part.dtype.itemsize}")
    places = start + jnp.arange(size) - jax.lax.axis_index(spec[axis]) * part.shape[axis]
    own = (places >= 0) & (places < part.shape[axis])
    rows = jnp.take(part, places, axis, mode="clip")
    own = own.reshape([-1 if i == axis else 1 for i in range(part.ndim)])
    bits = jnp.where(own, jax.lax.bitcast_convert_type(rows, words), 0)
    # Not every network of processes adds words of 16 bits.
    bits = jax.lax.psum(bits.astype(jnp.promote_types(words, jnp.uint32)), spec[axis])
    return jax.lax.bitcast_convert_type(bits.astype(words), part.dtype)

  others = PartitionSpec(*(None if i == axis else name for i, name in enumerate(spec)))
  in_specs = PartitionSpec(*spec), PartitionSpec()
  return jax.jit(jax.shard_map(block, mesh=mesh, in_specs=in_specs, out_specs=others))


def topology_devices(name: str) -> list:
  """Returns the devices of a TPU slice, e.g. "v5e:16x16", to compile for without having them.

  Raises:
    UserError: libtpu, which compiles for TPUs, is not installed, or knows no such slice.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("--topology needs the compiler for TPUs: pip install 'klrl[tpu]'")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # There is no metadata server to ask.
  # Any that libtpu knows: without them it prints errors, and then does the same.
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # Compilers do not share a TPU.
  jax.config.update("jax_platforms", "cpu")  # The constants of a program are computed here.
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
  except Exception as error:  # libtpu raises nothing more specific
    raise UserError(
      f"--topology={name} is no TPU slice that libtpu knows; write e.g. v5e:16x16 or v5p:8x8x8. "
      f"({str(error).splitlines()[0]})"
    ) from error


def use_every_core() -> None:
  """Makes every core of the processor a device, so that the members of a sweep can use them all.

  A program that names no mesh stays on one device, and so has the figures of a single run. Call
  this before anything is computed. It does nothing where the number of devices is set already
  (JAX_NUM_CPU_DEVICES, XLA_FLAGS), or where there are several processes.
  """
  told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
  if told or jax.config.jax_num_cpu_devices > 0 or jax.distributed.is_initialized():
    return
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  jax.config.update("jax_num_cpu_devices", cores)
  if jax.default_backend() == "cpu":  # There may be an accelerator.
    jax.config.update("jax_default_device", jax.devices()[0])


def make_mesh(spec: str, devices: list | None = None) -> Mesh:
  """Returns the mesh that `spec` asks for, e.g. "data=4,fsdp=2"; "" puts all devices on `data`.

  Axes that are not named have size 1. `devices` defaults to all that JAX sees. Where JAX has a
  default device, "" is that device alone.

  Raises:
    UserError: unknown axis, a size that is not a positive integer, more devices than there are, or
      TPU chips that cannot be linked so.
  """
  if devices is None:
    default = jax.config.jax_default_device  # May be the name of a platform.
    is_one = not spec and isinstance(default, jax.Device)
    devices = [default] if is_one else jax.devices()
  sizes: dict[str, int] = {}
  if not spec:
    sizes["data"] = len(devices)
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
  if needed > len(devices):
    raise UserError(
      f"--mesh={spec} needs {needed} devices, JAX sees {len(devices)}. Use a smaller mesh."
    )
  axis_types = (AxisType.Auto,) * len(AXES)
  try:
    return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices[:needed])
  except (AssertionError, NotImplementedError) as error:  # as JAX says it of a TPU
    raise UserError(
      f"--mesh={spec} cannot be laid over the links of {len(devices)} TPU chips. Use sizes whose "
      "product is the number of chips of the slice, or of a smaller slice."
    ) from error


def sweep_mesh(spec: str, num_members: int, devices: list | None = None) -> Mesh:
  """Returns the mesh of `spec`; "" takes as few devices as are as fast as all of them."""
  num_devices = jax.device_count() if devices is None else len(devices)
  per_device = -(-num_members // num_devices)
  return make_mesh(spec or f"sweep={-(-num_members // per_device)}", devices)


def mesh_of_places(spec: str, num_places: int) -> Mesh:
  """Returns the mesh of a sweep that began with `num_places` places; "" splits them evenly."""
  sizes = range(min(num_places, jax.device_count()), 0, -1)
  return make_mesh(spec or f"sweep={next(size for size in sizes if num_places % size == 0)}")


def without_sweep(spec: str) -> str:
  """Returns the mesh that each member of a sweep over `spec` has to itself."""
  return ",".join(part for part in spec.split(",") if not part.startswith("sweep="))


def places(mesh: Mesh, num_members: int, *, members_per_batch: int) -> int:
  """Returns how many members the devices of `mesh` take, at least `num_members`.

  All devices take the same number, and so do all batches, of at most `members_per_batch`.
  """
  per_device = -(-num_members // mesh.shape["sweep"])
  num_batches = -(-per_device // members_per_batch)
  return mesh.shape["sweep"] * num_batches * -(-per_device // num_batches)


def map_members(
  mesh: Mesh, fn: Callable, in_axes: tuple[int | None, ...], *, members_per_batch: int
) -> Callable:
  """Returns `fn` for all members: `vmap` with these `in_axes` (0 or None), batch after batch.

  The members of a device share one compiled body. With one member per batch the body is the program
  of a single run, and no member waits for the longest completion of another.
  """

  @functools.wraps(fn)
  def local(*arguments):
    def one(own):
      own = iter(own)
      pairs = zip(in_axes, arguments, strict=True)
      return fn(*(shared if axis is None else next(own) for axis, shared in pairs))

    pairs = zip(in_axes, arguments, strict=True)
    owns = [mine for axis, mine in pairs if axis is not None]
    num_members = jax.tree.leaves(owns)[0].shape[0]
    if num_members == 1:
      # The compiler for TPUs makes two copies of a loop's body that runs once, and runs both.
      return jax.tree.map(lambda x: x[None], one(jax.tree.map(lambda x: x[0], owns)))
    size = num_members // -(-num_members // members_per_batch)
    # A batch of one would be another program than that of a single run.
    return jax.lax.map(one, owns, batch_size=size if size > 1 else None)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=tuple(PartitionSpec() if axis is None else _MEMBERS for axis in in_axes),
    out_specs=_MEMBERS,
    axis_names={"sweep"},
    check_vma=False,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that keeps a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh, *, members: bool = False) -> NamedSharding:
  """Returns the sharding that splits the first axis, after that of members, by data and fsdp."""
  rows = ("data", "fsdp")
  return NamedSharding(mesh, PartitionSpec("sweep", rows) if members else PartitionSpec(rows))


def on_mesh(mesh: Mesh, fn: Callable) -> Callable:
  """Returns `fn` with `mesh` in scope for `split_rows`, to be compiled for arrays on that mesh."""

  @functools.wraps(fn)
  def in_scope(*arguments, **named):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return fn(*arguments, **named)

  return in_scope


def split_rows(tree):
  """Returns `tree`, arrays [rows, ...], with the rows split over the devices of the mesh in scope.

  Call it wherever rows are gathered, in functions that `on_mesh` or `map_members` compiles. An
  index that every device holds whole gathers all rows on every device, and then every device does
  all of the work. In a sweep the axis `sweep` belongs to the members; in a single run its devices
  take rows too. Where the devices do not divide the number of rows, the compiler pads the rows and
  ignores the padding, so the values are those of one device. Without a mesh, and on one device,
  nothing is done.
  """
  axes = _axes_of_rows()
  if not axes:
    return tree
  split = PartitionSpec(axes)
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, split), tree)


def repeat_rows(tree, times: int):
  """Returns `tree`, arrays [rows, ...], with `times` copies of each row as neighbours.

  The rows are split as by `split_rows`, and the compiler splits the other axes as it likes.
  """
  if times == 1:
    return tree
  axes = _axes_of_rows()

  def repeated(x):
    x = jnp.repeat(x, times, axis=0)
    others = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *others)) if axes else x

  return jax.tree.map(repeated, tree)


def summed_over_data(fn: Callable, num_rows: int) -> Callable:
  """Returns fn(whole, parts) -> sums, where the devices of `data` meet once, for their sum.

  Each device of `data` calls `fn` with its own rows of `parts`, arrays [parts, num_rows, ...], and
  with all of `whole`. So whatever `fn` sums over its parts is sent once, and not for each part.
  Without several devices, or if they do not divide the rows, it is `fn` itself. `fn` may close over
  no array that is traced: in a sweep it would be a member's own.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if "data" not in _axes_of_rows() or num_rows % mesh.shape["data"]:
    return fn
  return jax.shard_map(
    lambda whole, parts: jax.lax.psum(fn(whole, parts), "data"),
    in_specs=(PartitionSpec(), PartitionSpec(None, "data")),
    out_specs=PartitionSpec(),
    axis_names={"data"},
    check_vma=False,
  )


def rows_per_device(num_rows: int) -> int:
  """Returns how many of `num_rows` neighbouring rows `split_rows` leaves together on a device.

  It is 1 where the devices do not divide the number of rows.
  """
  mesh = jax.sharding.get_abstract_mesh()
  rows, rest = divmod(num_rows, math.prod(mesh.shape[axis] for axis in _axes_of_rows()))
  return 1 if rest else rows


def divides_rows(num_rows: int) -> bool:
  """Returns whether `split_rows` gives each device as many of `num_rows` rows as every other."""
  mesh = jax.sharding.get_abstract_mesh()
  return num_rows % math.prod(mesh.shape[axis] for axis in _axes_of_rows()) == 0


def for_own_rows_and_heads(fn: Callable, *, num_heads: int) -> Callable:
  """Returns fn(heads, rows), computed by each device for what is its own, without any other.

  `heads` and the result are trees of arrays [rows, heads, ...], and `rows` is one of arrays
  [rows, ...]. Rows are split as by `split_rows`, and must be divided by the devices. Heads are
  split over `tensor` if it divides `num_heads`, the fewest that an array has. A kernel, which no
  compiler can split, has to be called so.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return fn
  rows = _axes_of_rows()
  size = mesh.shape["tensor"]
  heads = PartitionSpec(rows, "tensor" if num_heads % size == 0 else None)
  return jax.shard_map(
    fn,
    in_specs=(heads, PartitionSpec(rows)),
    out_specs=heads,
    axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
    check_vma=False,
  )


def splits_weights() -> bool:
  """Returns whether the mesh in scope splits weights over `fsdp`."""
  return jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1


def rows_of_fsdp(num_rows: int) -> int:
  """Returns how many of `num_rows` rows the devices along `fsdp` have together."""
  mesh = jax.sharding.get_abstract_mesh()
  return -(-num_rows // math.prod(mesh.shape[axis] for axis in _axes_of_rows() if axis != "fsdp"))


def gather_weights(params):
  """Returns `params` whole on each device of `fsdp`, split over `tensor` as they were."""
  return _gathered(params, lambda names: True)


def gather_for_rows(params):
  """Returns `params` as rows move to them: whole are those factors of adapters that have the width.

  The others have heads or hidden units, by which all else of a layer is split. What these make of
  split rows would be sent, and they are small.
  """
  return _gathered(
    params, lambda names: "lora" in names and ("lora_b" in names) == _is_closing(names)
  )


def _gathered(params, is_gathered):
  if not splits_weights():
    return params
  mesh = jax.sharding.get_abstract_mesh()

  def whole(path, leaf):
    names = _names(path)
    if not is_gathered(names):
      return leaf
    spec = _partition_spec(mesh, names, leaf.shape)
    spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
    return jax.lax.with_sharding_constraint(leaf, spec)

  return jax.tree_util.tree_map_with_path(whole, params)


_weights_stay = contextvars.ContextVar("weights_stay", default=False)


@contextlib.contextmanager
def weights_stay(stay: bool) -> Iterator[None]:
  """What is traced in this scope moves rows to the weights that `fsdp` splits, if they `stay`.

  Otherwise the compiler gathers the weights wherever rows are split. Here each device multiplies
  all rows of `fsdp` with its part of a matrix (`rows_together`) and does what needs no weights,
  such as attention, for its own rows (`rows_apart`). It pays for steps of a few tokens, which are
  far smaller than the weights.
  """
  token = _weights_stay.set(stay and splits_weights())
  try:
    yield
  finally:
    _weights_stay.reset(token)


def rows_together(x):
  """Returns x [rows, ...] with all rows, and all of each, on every device of `fsdp`.

  This and the next two do nothing unless `weights_stay`.
  """
  return _with_rows_over(x, _axes_but_fsdp(), None)


def rows_at_weights(x):
  """Returns x [rows, ...] with all rows on each device of `fsdp`, and of each what weights make."""
  return _with_rows_over(x, _axes_but_fsdp(), PartitionSpec.UNCONSTRAINED)


def rows_apart(x):
  """Returns x [rows, ...] with its own rows on each device of `fsdp`."""
  return _with_rows_over(x, _axes_of_rows(), PartitionSpec.UNCONSTRAINED)


def _axes_but_fsdp() -> tuple[str, ...]:
  return tuple(axis for axis in _axes_of_rows() if axis != "fsdp")


def _with_rows_over(x, axes, others):
  if not _weights_stay.get():
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *(others,) * (x.ndim - 1)))


def split_vocabulary(tree):
  """Returns `tree`, arrays [..., vocabulary], with the vocabulary split over `fsdp` and `tensor`.

  Devices that these do not divide evenly have padding, which the compiler ignores.
  """
  axes = _axes_of_vocabulary()
  if not axes:
    return tree

  def split(x):
    others = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*others, axes))

  return jax.tree.map(split, tree)


def for_own_rows_of_vocabulary(fn: Callable) -> Callable:
  """Returns fn(rows, others), computed by each group of devices that has a whole vocabulary.

  A group computes for its own of the rows, and gradients of `others`, which all of them have, are
  added up over groups once. `rows` and the result are trees of arrays [rows, ...]. Where groups do
  not divide the rows, each computes all of them.
  """
  mesh, axes = jax.sharding.get_abstract_mesh(), _axes_of_rows()
  axes = tuple(axis for axis in axes if axis not in _axes_of_vocabulary())
  num_groups = math.prod(mesh.shape[axis] for axis in axes)

  def own(rows, others):
    if num_groups == 1 or len(jax.tree.leaves(rows)[0]) % num_groups:
      return fn(rows, others)
    split = PartitionSpec(axes)
    return jax.shard_map(
      fn, in_specs=(split, PartitionSpec()), out_specs=split, axis_names=set(axes), check_vma=False
    )(rows, others)

  return own


def devices_of_vocabulary() -> int:
  """Returns over how many devices `split_vocabulary` splits."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in _axes_of_vocabulary())


def _axes_of_vocabulary() -> tuple[str, ...]:
  return ("fsdp", "tensor") if splits_weights() else ()


def platform() -> str:
  """Returns for what a traced program is: the platform of the mesh in scope, or the default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def compiles_for_cpu() -> bool:
  """Returns whether what is traced is for a CPU."""
  return platform() == "cpu"


def _axes_of_rows() -> tuple[str, ...]:
  """Returns the axes of the mesh in scope over which rows are split, if they have devices."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(
    axis for axis in _ROWS if mesh.shape.get(axis, 1) > 1 and axis not in mesh.manual_axes
  )


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
  """Raises UserError where `by_rows` cannot split `batch_size` rows evenly."""
  num_shards = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size % num_shards:
    raise UserError(
      f"--batch_size={batch_size} cannot be split over {num_shards} devices; use a multiple of "
      f"{num_shards}, or --mesh with fewer devices on data and fsdp."
    )


def state_shardings(mesh: Mesh, state, *, members: bool = False):
  """Returns a tree of shardings for parameters, optimizer moments and scalars.

  The moments are sharded as their parameters are, since they have the same names and shapes. The
  arrays under `replay`, [iterations, rows, ...], are split by rows. With `members` every array has
  a leading axis of members, which is split over `sweep`.
  """

  def sharding(path, leaf):
    names = _names(path)
    if members:
      return NamedSharding(
        mesh, PartitionSpec("sweep", *_partition_spec(mesh, names, leaf.shape[1:]))
      )
    return NamedSharding(mesh, _partition_spec(mesh, names, leaf.shape))

  return jax.tree_util.tree_map_with_path(sharding, state)


def put(tree, shardings):
  """Returns `tree`, the same in all processes, on the devices of all of them; see `device_put`.

  What is `Unread` is read, by each process the shards of its devices.

  Raises:
    UserError: a file cannot be read, or holds numbers that are not finite.
  """
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda leaf: shardings, tree)
  if any(map(is_unread, jax.tree.leaves(tree))):
    tree = processes.together(_place_unread)(tree, shardings)
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)

  def place(leaf, sharding):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      data = place(jax.random.key_data(leaf), NamedSharding(sharding.mesh, PartitionSpec()))
      return jax.random.wrap_key_data(data)
    if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
      return leaf
    array = fetch(leaf) if isinstance(leaf, jax.Array) else np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  return jax.tree.map(place, tree, shardings)


def _place_unread(tree, shardings):
  """Returns `tree` with what is unread on the devices, and the rest as it was."""
  leaves, structure = jax.tree.flatten(tree)
  placed, shardings = dict(enumerate(leaves)), structure.flatten_up_to(shardings)
  for i in _largest_first({i: leaf for i, leaf in placed.items() if is_unread(leaf)}):
    placed[i] = _placed(leaves[i], shardings[i])
  return structure.unflatten(placed.values())


def _largest_first(leaves: dict) -> list:
  """Returns the keys of `leaves` in the order in which they are put on the devices.

  The host holds one leaf beside those on the devices, which is least while few of them are there.
  """
  return sorted(leaves, key=lambda key: -leaves[key].size)


def _placed(leaf: Unread, sharding) -> jax.Array:
  """Returns the array with each device's part read into a buffer of its own, one after the other.

  `jax.make_array_from_callback` would hold all parts on the host, and may keep them as buffers,
  which cannot be donated.
  """
  devices_of = {}  # Several may hold the same part.
  for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
    place = tuple((axis.start, axis.stop) for axis in index)
    devices_of.setdefault(place, (index, []))[1].append(device)
  arrays = []
  for index, devices in devices_of.values():
    part = leaf.read(index)
    arrays += [jax.device_put(part, device, may_alias=False) for device in devices]
    jax.block_until_ready(arrays[-len(devices) :])
    copied = weakref.ref(part)
    del part
    # JAX lets go of what it has copied when Python collects garbage, some time after it is ready.
    for _ in range(_MOST_WAITS):
      gc.collect(0)
      if copied() is None:
        break
      time.sleep(0.001)
  return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays, dtype=leaf.dtype)


def put_once(mesh: Mesh, tree):
  """Returns `tree` on the devices, sharded by `state_shardings`, each distinct array once.

  Use it for arrays that are never donated: what two models share is then shared on the devices too.
  A leaf that is only a shape gets its sharding.
  """
  leaves, structure = jax.tree.flatten(tree)
  shardings = dict(zip(map(id, leaves), jax.tree.leaves(state_shardings(mesh, tree)), strict=True))
  once = {id(leaf): leaf for leaf in leaves}
  placed = {}
  for key in _largest_first(once):
    leaf, sharding = once[key], shardings[key]
    is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
    placed[key] = leaf.update(sharding=sharding) if is_shape else put(leaf, sharding)
  return structure.unflatten(placed[id(leaf)] for leaf in leaves)


def put_own(mesh: Mesh, tree):
  """Returns `tree` on the devices, sharded by `state_shardings`, in buffers of its own.

  So donating them deletes nothing else. Arrays that are made like these, such as the moments of an
  optimizer, are made in shards too.
  """
  leaves, structure = jax.tree.flatten(tree)
  shardings = jax.tree.leaves(state_shardings(mesh, tree))
  own = dict(enumerate(leaves))
  for i in _largest_first(own):
    placed = put(leaves[i], shardings[i])
    own[i] = placed if is_unread(leaves[i]) else placed.copy()
  return structure.unflatten(own.values())


def distinct(tree) -> tuple[list, Callable[[list], Any]]:
  """Returns (the distinct leaves of `tree`, whole(leaves) -> `tree` with these leaves).

  A compiled program would take an array that is passed twice for two arrays.
  """
  leaves, structure = jax.tree.flatten(tree)
  once = {id(leaf): leaf for leaf in leaves}
  places = [list(once).index(id(leaf)) for leaf in leaves]
  return list(once.values()), lambda once: structure.unflatten(once[i] for i in places)


def _names(path) -> list[str]:
  return [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]


def _is_closing(names) -> bool:
  return any(name in _CLOSING for name in names)


def _partition_spec(mesh, names, shape) -> PartitionSpec:
  if "replay" in names:  # Not parameters.
    return PartitionSpec(None, ("data", "fsdp"))
  spec: list = [None] * len(shape)
  # A stacked layer axis is scanned over, never split.
  axes = list(range(1 if "layers" in names else 0, len(shape)))
  if len(axes) >= 2:
    # Heads, hidden units or the vocabulary.
    inner = len(shape) - (2 if _is_closing(names) else 1)
    if "embedding" in names:  # [vocabulary, width]
      inner = len(shape) - 2
    if "lora" in names:  # [in, rank] and [rank, out]: the rank is too small to split.
      del axes[0 if "lora_b" in names else 1]

    def divides(name, axis):
      size = mesh.shape[name]
      return size > 1 and shape[axis] % size == 0

    if inner in axes and divides("tensor", inner):
      spec[inner] = "tensor"
    free = [axis for axis in axes if spec[axis] is None and divides("fsdp", axis)]
    if free:
      axis = inner if inner in free else max(free, key=lambda axis: shape[axis])
      spec[axis] = "fsdp"
  return PartitionSpec(*spec)


def in_chunks(f, num_rows: int, size: int):
  """Returns what `f(rows [size])` returns, for all rows and on the host; all calls are alike.

  All processes must call it at the same place.
  """
  starts = range(0, num_rows, size)
  parts = [fetch(f(np.arange(start, start + size) % num_rows)) for start in starts]
  return jax.tree.map(lambda *x: np.concatenate(x)[:num_rows], *parts)
