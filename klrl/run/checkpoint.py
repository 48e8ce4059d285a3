"""Saving and restoring the training state with Orbax.

A state is one pytree of arrays, PRNG keys included. Every process takes part in a save. A
checkpoint is visible only when it is whole, so a crash during a save loses no older one. Each
checkpoint holds its iteration and a digest of every array, which are compared when it is restored,
since storage may change a bit without an error.
"""

import gc
import math
import operator
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from klrl import schema
from klrl.devices import processes
from klrl.errors import UserError, is_of_the_machine, troubles_told

_ITEM = "default"  # Orbax's name for the only item of a checkpoint
METADATA = "_CHECKPOINT_METADATA"
_RECORD = {
  "iteration": schema.integer(0),
  "digests": schema.object_of(schema.text(16)),
}


_PART = 2**14  # elements

# Orbax asks TensorStore how much it wrote, which nothing here reads, and TensorStore (0.1.74 to
# 0.1.86) never frees the lists that it answers with: 20 KiB for each save.
if utils := sys.modules.get("orbax.checkpoint._src.serialization.tensorstore_utils"):
  utils.get_tensorstore_raw_bytes = lambda direction=None: 0


class Damaged(Exception):
  """A checkpoint differs from what was saved; the message says how."""


def _handler() -> ocp.StandardCheckpointHandler:
  """Returns Orbax's handler, which ends one of several processes that cannot write its part.

  Orbax would let the others wait ten minutes for that part, and this process for them.
  """
  handler = ocp.StandardCheckpointHandler()
  begin = handler.async_save

  async def async_save(*arguments, **named):
    return [_Written(part) for part in await begin(*arguments, **named) or ()]

  handler.async_save = async_save  # Orbax takes no subclass with its own arguments.
  return handler


class _Written:
  """A part of a checkpoint that this process writes in the background."""

  def __init__(self, future):
    self._future = future

  def result(self, timeout=None):
    """Returns when the part is on disk, as Orbax's future does."""
    try:
      with troubles_told():
        return self._future.result(timeout)
    except Exception as error:
      if processes.is_alone():
        raise
      processes.end_alone(f"Its part of a checkpoint cannot be written. {error}")


class Checkpoints:
  """Writes the checkpoints of one run, of which the newest `keep` stay."""

  def __init__(self, directory: pathlib.Path, *, keep: int):
    self._manager = ocp.CheckpointManager(
      directory.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        # Otherwise Orbax waits 5 minutes for a folder that cannot be made.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
      ),
      item_handlers=_handler(),
    )

  def latest(self) -> int | None:
    """Returns how many iterations the newest checkpoint has done, or None if there is none."""
    return self._manager.latest_step()

  def save(self, iteration: int, state) -> None:
    """Saves `state` after `iteration` finished iterations, unless that is saved already.

    The arrays are copied before this returns, so they may be donated at once. They are written in
    the background, until `close`; an error in the background is raised by the next call.
    """
    if iteration != self.latest():
      record = {"iteration": iteration, "digests": digests(state)}
      self._manager.save(iteration, args=ocp.args.StandardSave(state), custom_metadata=record)

  def close(self) -> None:
    """Waits until everything is on disk."""
    try:
      self._manager.wait_until_finished()
    finally:
      self._manager.close()


def saved_iterations(directory: pathlib.Path) -> list[int]:
  """Returns the iterations of the checkpoints in `directory`, the newest first."""
  if not directory.is_dir():
    return []
  names = [path.name for path in directory.iterdir() if path.is_dir()]
  return sorted((int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name)), reverse=True)


def named(path: str | pathlib.Path) -> pathlib.Path | None:
  """Returns the folder of the checkpoint that a path names, or None.

  It is `path` itself, as in RUN/checkpoints/40, or the newest one of a run that has left no model.
  """
  path = pathlib.Path(path)
  try:
    if (path / METADATA).is_file():
      return path
    done = [] if (path / "model").is_dir() else saved_iterations(path / "checkpoints")
    folders = (path / "checkpoints" / str(iteration) for iteration in done)
    return next((folder for folder in folders if (folder / METADATA).is_file()), None)
  except (OSError, ValueError):  # a name too long, a zero byte; told where a model is looked for
    return None


def policy_params(folder: pathlib.Path, like):
  """Returns the params of the policy in the checkpoint in `folder`, NumPy arrays.

  Args:
    folder: as `named` returns it.
    like: the params of a policy of the same model, of which the shapes are read.

  Raises:
    UserError: it is damaged, or its policy has parameters of other names or shapes.
  """
  try:
    found = _everywhere(_policy_params)(folder.absolute(), like)
  except Damaged as damage:
    raise UserError(f"The checkpoint {folder} is damaged: {damage}. Name another one.") from damage
  if isinstance(found, str):
    raise UserError(
      f"The policy in the checkpoint {folder} is not like the one that this run starts from: "
      f"{found}. Name a checkpoint of a run that began with the same model and trained all of it "
      "(--lora_rank=0)."
    )
  return found


def _policy_params(folder: pathlib.Path, like):
  """Returns the params, or, as a text, what is different."""
  shapes, record = _shapes_and_record(folder)
  saved = {name: text for name, text in shapes.items() if name.startswith("params/policy/")}
  wanted = _shapes({"params": {"policy": like}})
  for name in sorted({**saved, **wanted}):
    there, here = (names.get(name, "absent").partition("[")[1:] for names in (saved, wanted))
    if there != here:
      return f"{name} is {''.join(there) or 'absent'} there and {''.join(here) or 'absent'} here"
  tree = ocp.StandardCheckpointHandler().metadata(folder / _ITEM).tree
  target = {"params": {"policy": tree["params"]["policy"]}}
  target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), target)
  found = ocp.PyTreeCheckpointHandler().restore(
    folder / _ITEM,
    args=ocp.args.PyTreeRestore(
      item=target,
      restore_args=jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), target),
      partial_restore=True,
    ),
  )
  for path, leaf in jax.tree.leaves_with_path(found):
    a, b = _sums_on_host(leaf, 0, leaf.shape).tolist()
    if record is None or record["digests"].get(_name(path)) != f"{a:08x}{b:08x}":
      raise Damaged(f"{_name(path)} is not as it was saved")
  return found["params"]["policy"]


def restore(directory: pathlib.Path, iteration: int, like):
  """Returns the state that was saved after `iteration`, on the devices.

  Args:
    directory: of the checkpoints.
    iteration: as `saved_iterations` has it.
    like: the shapes, dtypes and shardings of the state.

  Raises:
    Damaged: it cannot be read, or is not what was saved. All processes raise it if one does.
    UserError: its arrays have other names or shapes than those of `like`.
  """
  folder = directory.absolute() / str(iteration)
  shapes, record = _everywhere(_shapes_and_record)(folder)
  if record is None:
    raise UserError(
      f"The checkpoint {folder} was saved by an older klrl, without what it could be checked by. "
      "Go on with that, or choose another --workdir."
    )
  if record["iteration"] != iteration:
    raise Damaged(f"its folder holds the one after iteration {record['iteration']}")
  whole = jax.eval_shape(lambda state: jax.tree.map(_bits, state), like)
  _check_shapes(directory, shapes, _shapes(whole))
  # The handler is called directly: with the manager the other processes would wait for one that
  # cannot read.
  found = _everywhere(ocp.StandardCheckpointHandler().restore)(
    folder / _ITEM, args=ocp.args.StandardRestore(like)
  )
  differing = [name for name, x in digests(found).items() if record["digests"].get(name) != x]
  if differing:
    more = ", ..." * (len(differing) > 3)
    raise Damaged(f"not as it was saved: {', '.join(differing[:3])}{more}")
  return found


def without_leftovers(hook):
  """Returns a `sys.unraisablehook` that does not tell what a failed save or a Ctrl-C leaves behind.

  Orbax ends its event loop when the first of its writes fails, which is raised. Each other write
  then finds the loop closed, and would be told as a traceback of its own by `hook`. So would a
  second Ctrl-C while a run that was stopped gives back its memory.
  """

  def tell(unraisable):
    error = unraisable.exc_value
    if not isinstance(error, KeyboardInterrupt) and str(error) != "Event loop is closed":
      hook(unraisable)

  return tell


@processes.on_writer
def set_aside(directory: pathlib.Path, iteration: int) -> pathlib.Path:
  """Renames a damaged checkpoint, so that nothing takes it for one, and returns its new path."""
  path = directory / str(iteration)
  aside = next(
    place
    for place in (path.with_name(f"{iteration}.damaged{'-' * i}") for i in range(100))
    if not place.exists()
  )
  return path.rename(aside)


def digests(state) -> dict[str, str]:
  """Returns 16 hex digits for each array, by its name; they are the same on any devices.

  All processes must call it at the same place.
  """
  named = {_name(path): _bits(leaf) for path, leaf in jax.tree.leaves_with_path(state)}
  sums = np.array([_sums_here(leaf) for leaf in named.values()], np.uint32).reshape(-1, 2)
  if not processes.is_alone():
    sums = multihost_utils.process_allgather(sums).sum(axis=0, dtype=np.uint32)
  return {name: f"{a:08x}{b:08x}" for name, (a, b) in zip(named, sums.tolist(), strict=True)}


def _sums_here(leaf: jax.Array) -> np.ndarray:
  """Returns [2] uint32, the sums over the parts of an array that this process counts."""
  total = np.zeros(2, np.uint32)
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      starts = [place.start or 0 for place in shard.index]
      offset = sum(map(operator.mul, starts, _strides(leaf.shape)))
      if next(iter(shard.data.devices())).platform == "cpu":
        # XLA would take longer to compile than NumPy takes to compute.
        total += _sums_on_host(np.asarray(shard.data), offset, leaf.shape)
      else:
        total += np.asarray(_sums_on_device(shard.data, np.uint32(offset % 2**32), leaf.shape))
  return total


def _sums_on_host(data: np.ndarray, offset: int, shape: tuple[int, ...]) -> np.ndarray:
  """Returns `_sums`, computed in parts that fit a processor's cache, which is five times faster."""
  if data.size <= _PART:
    return _sums(data, np.uint32(offset % 2**32), shape)
  if len(data) == 1:
    return _sums_on_host(data[0], offset, shape[1:])
  stride = _strides(shape)[0]
  step = max(1, _PART // (data.size // len(data)))
  parts = (
    _sums_on_host(data[i : i + step], offset + i * stride, shape) for i in range(0, len(data), step)
  )
  return sum(parts, np.zeros(2, np.uint32))


def _sums(data, offset, shape: tuple[int, ...]):
  """Returns two sums, modulo 2**32, over the words of a part of an array, mixed with their places.

  Sums of integers do not depend on their order, and so not on how an array is split. The mixing is
  one to one in the word, so that no change of one word escapes; one of several does so once in
  2**64.

  Args:
    data: a part of the array; of NumPy, or of JAX on one device.
    offset: the place of its first element in the whole array, counted as if it were flat.
    shape: of the whole array.
  """
  xp = np if isinstance(data, np.ndarray) else jnp
  if data.dtype == bool:
    data = data.astype(np.uint8)
  place = offset
  for axis, (size, stride) in enumerate(zip(data.shape, _strides(shape), strict=True)):
    along = xp.arange(size, dtype=np.uint32) * np.uint32(stride % 2**32)
    place = place + along.reshape([-1 if other == axis else 1 for other in range(data.ndim)])
  place = xp.asarray(place, np.uint32).reshape(-1)
  words = data.reshape(-1).view(f"uint{8 * data.dtype.itemsize}").astype(np.uint32)
  if data.dtype.itemsize == 8:  # Both halves, one mixed into the other.
    words ^= (data.reshape(-1).view("uint64") >> 32).astype(np.uint32) * np.uint32(0x2545F491)
  words ^= place * np.uint32(0x9E3779B1)
  for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # odd, so that nothing is lost
    words = (words ^ (words >> shift)) * np.uint32(factor)
  words ^= words >> 16
  both = (words, words * (2 * place + 1))
  return xp.stack([x.sum(dtype=np.uint32) for x in both])


_sums_on_device = jax.jit(_sums, static_argnums=2)


def _strides(shape: tuple[int, ...]) -> list[int]:
  """Returns how many elements lie between neighbours along each axis."""
  return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _everywhere(read):
  """Returns `read` for all processes to call: where one finds damage, all raise `Damaged`.

  What the machine refuses, and not the checkpoint, is raised as it is, or as a UserError elsewhere.
  """

  def call(*arguments, **named):
    found, reason, refused = None, "", None
    try:
      found = read(*arguments, **named)
    except Exception as error:  # Orbax and what it is made of raise anything.
      refused = error if is_of_the_machine(error) else None
      first_line = str(error).partition("\n")[0].partition(" See full TensorStore")[0]
      reason = first_line[:200].rstrip(".") or type(error).__name__
    if reason:
      _drop_leftovers()
    if processes.anywhere(refused is not None):
      raise refused or UserError("Another process could not read the checkpoint; see what it says.")
    if processes.anywhere(bool(reason)):
      raise Damaged(reason or "another process cannot read it")
    return found

  return call


def _drop_leftovers() -> None:
  """Ends what a failed reading has begun and left behind, without its tracebacks.

  Otherwise Python ends it when it next collects garbage, and tells each array as an error then.
  """
  hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
  try:
    gc.collect()
  finally:
    sys.unraisablehook = hook


def _shapes_and_record(folder: pathlib.Path):
  record = schema.check(schema.read(folder / METADATA), {}, folder / METADATA)
  record = record.get("custom_metadata") or None
  if record is not None:
    schema.check(record, _RECORD, folder / METADATA, required=_RECORD)
  return _shapes(ocp.StandardCheckpointHandler().metadata(folder / _ITEM).tree), record


def _check_shapes(directory, saved, wanted) -> None:
  # Before Orbax reads: what it has begun to read when it finds a wrong shape, it leaves behind.
  differing = sorted(name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name))
  if differing:
    name = differing[0]
    raise UserError(
      f"The checkpoint in {directory} does not fit this model: {name} is "
      f"{saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here, and "
      f"{len(differing) - 1} more differ. Use another --workdir, or the flags that wrote it."
    )


def _bits(leaf):
  """Returns what is saved of an array: of a PRNG key its integers, of others themselves."""
  return (
    jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
  )


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _shapes(tree) -> dict[str, str]:
  return {
    _name(path): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
    for path, leaf in jax.tree.leaves_with_path(tree)
  }
