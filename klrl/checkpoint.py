"""Saving and restoring the training state with Orbax.

A state is one pytree of arrays (PRNG keys included). Every process takes part in a save; a step is
visible only when it is whole, so a crash while saving loses nothing that was there.
"""

import pathlib

import jax
import orbax.checkpoint as ocp

from klrl.errors import UserError


class Checkpoints:
  """The checkpoints of one run, newest `keep` of them."""

  def __init__(self, directory: pathlib.Path, *, keep: int):
    self._directory = directory.absolute()
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
      item_handlers=ocp.StandardCheckpointHandler(),
    )

  def latest(self) -> int | None:
    """Returns how many iterations the newest checkpoint has done, None where there is none."""
    return self._manager.latest_step()

  def save(self, iteration: int, state) -> None:
    """Saves `state` after `iteration` finished iterations, unless that is saved already.

    The arrays are copied before this returns, so they may be donated at once; the writing goes on
    in the background until `close`.
    """
    if iteration != self.latest():
      self._manager.save(iteration, args=ocp.args.StandardSave(state))

  def restore(self, state):
    """Returns the newest checkpoint, in the structure, dtypes and shardings of `state`.

    Raises:
      UserError: the checkpoint does not have the structure or shapes of `state`, or is damaged.
    """
    target = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    try:
      self._check_shapes(state)
      return self._manager.restore(self.latest(), args=ocp.args.StandardRestore(target))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(
        f"The checkpoint in {self._directory} is damaged: {str(error).splitlines()[0]} "
        f"Delete its folder {self.latest()} to go on from an earlier one, or use another --workdir."
      ) from error

  def _check_shapes(self, state) -> None:
    # Before Orbax reads: what it has begun to read when it finds a wrong shape, it leaves behind.
    saved = _shapes(self._manager.item_metadata(self.latest()).tree)
    wanted = _shapes(jax.eval_shape(lambda: jax.tree.map(_integers, state)))
    differing = sorted(name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name))
    if differing:
      name = differing[0]
      raise UserError(
        f"The checkpoint in {self._directory} does not fit this model: {name} is "
        f"{saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here, and "
        f"{len(differing) - 1} more differ. Use another --workdir, or the flags that wrote it."
      )

  def close(self) -> None:
    """Waits until everything is on disk."""
    self._manager.wait_until_finished()
    self._manager.close()


def _integers(leaf):
  """Returns what is saved of an array: of a PRNG key its integers, of others themselves."""
  return (
    jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
  )


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
    for path, leaf in jax.tree.leaves_with_path(tree)
  }
