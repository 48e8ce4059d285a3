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
      self._directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
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
      UserError: the checkpoint does not have the structure or shapes of `state`.
    """
    target = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    try:
      return self._manager.restore(self.latest(), args=ocp.args.StandardRestore(target))
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        f"The checkpoint in {self._directory} is damaged or does not fit this model: "
        f"{str(error).splitlines()[0]} Use another --workdir, or the flags that wrote it."
      ) from error

  def close(self) -> None:
    """Waits until everything is on disk."""
    self._manager.wait_until_finished()
    self._manager.close()
