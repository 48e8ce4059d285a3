"""The memory of a run besides its parameters: scores so far, old rollouts, a moving reference.

All are pytrees of arrays in the training state, so that a resumed run goes on bit for bit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from klrl import ops
from klrl.sampling import Rollout


class ScoreStats(NamedTuple):
  """Number, mean and sum of squared deviations of the scores so far."""

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride], of tuples
  mean: jax.Array
  squares: jax.Array


def no_scores() -> ScoreStats:
  """Returns the statistics of no score."""
  return ScoreStats(*(jnp.float32(0.0) for _ in ScoreStats._fields))


def normalised(stats: ScoreStats, scores, scored) -> tuple[ScoreStats, jax.Array, jax.Array]:
  """Returns (statistics with `scores` [B], (scores - mean) / std, std) over all scores so far.

  Only those that are `scored` [B] count.

  Tony Chan, Gene Golub and Randall LeVeque, "Updating Formulae and a Pairwise Algorithm for
  Computing Sample Variances", 1979. If all scores so far are equal up to rounding, the normalised
  scores are exactly 0 and the deviation counts as 1.
  """
  number = scored.sum().astype(jnp.float32)
  count = stats.count + number
  batch_mean, deviations = ops.mean_and_deviations(scores, scored)
  shift = batch_mean.reshape(()) - stats.mean
  share = ops.divide(number, count)
  mean = stats.mean + shift * share
  squares = stats.squares + (deviations**2).sum()
  squares += shift**2 * stats.count * share
  std = jnp.sqrt(ops.divide(squares, count))
  equal = ops.within_rounding(std, jnp.abs(mean))
  normal = jnp.where(equal, 0.0, scores - mean) / jnp.where(equal, 1.0, std)
  return ScoreStats(count, mean, squares), normal, jnp.where(equal, 1.0, std)


def empty_replay(rollout, staleness: int) -> Rollout:
  """Returns a memory of `staleness` rollouts, on a leading axis, with the shapes of `rollout`."""
  return jax.tree.map(lambda x: jnp.zeros((staleness, *x.shape), x.dtype), rollout)


def waiting(replay: Rollout, iteration) -> Rollout:
  """Returns the rollout that has waited longest, of `staleness` iterations ago."""
  slot = iteration % len(replay.tokens)
  return jax.tree.map(lambda buffer: buffer[slot], replay)


def exchanged(replay: Rollout, rollout: Rollout, iteration) -> tuple[Rollout, Rollout]:
  """Returns (memory with the new rollout, the rollout of iteration `trained_on`)."""
  staleness, old = len(replay.tokens), waiting(replay, iteration)
  replay = jax.tree.map(lambda buffer, x: buffer.at[iteration % staleness].set(x), replay, rollout)
  is_new = iteration < staleness
  return replay, jax.tree.map(lambda x, y: jnp.where(is_new, x, y), rollout, old)


def trained_on(iteration: int, staleness: int) -> int:
  """Returns the iteration, from 0, whose rollout is trained on in `iteration`.

  It is `staleness` iterations earlier. Until there is one of that age, it is the new rollout.
  """
  return iteration - staleness if iteration >= staleness else iteration


def _moving_average(reference, params, iteration, algorithm, hypers):
  """decay * reference + (1 - decay) * params: Alexandre Ramé et al., "WARP", 2024.

  With adapters it averages the factors, and not their product.
  """
  decay = hypers.reference_decay
  return jax.tree.map(lambda ref, x: decay * ref + (1 - decay) * x, reference, params)


def _reset(reference, params, iteration, algorithm, hypers):
  """A copy of `params` every `reference_every` iterations.

  Mingjie Liu et al., "ProRL", 2025, who reset the optimizer as well (`reset_optimizer`).
  """
  return replaced_when_due(reference, params, iteration, algorithm)


def replaced_when_due(old, new, iteration, algorithm):
  """Returns `new` after each `reference_every`-th iteration, and `old` after the others."""
  due = (iteration + 1) % algorithm.reference_every == 0
  return jax.tree.map(lambda old, new: jnp.where(due, new, old), old, new)


# (reference, params, iteration, algorithm, hypers) -> the reference after an iteration that ended
# with `params`. None is a reference that does not move.
REFERENCE_RULES = {"frozen": None, "ema": _moving_average, "reset": _reset}
