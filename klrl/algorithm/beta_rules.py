"""The rules that move beta from one iteration to the next, by name; `klrl.ops` computes them.

A rule that answers at once has read the KL of the completions that are then trained on with its
beta, so that beta depends on them a little, as a baseline of the same batch does.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from klrl import ops


class BetaRule(NamedTuple):
  """A rule; `lowest` is None if no measurement moves beta."""

  step: Callable  # (state, measured KL in nats per sequence, algorithm, hypers) -> state
  lowest: Callable | None = None  # hypers -> the smallest beta that it ends at
  # beta at the start -> state
  start: Callable = lambda beta: ops.ControllerState(beta, jnp.int32(0))
  at_once: bool = False  # whether beta answers in the iteration that is measured, or in the next


def _fixed(state, kl, algorithm, hypers):
  return ops.fixed(state, kl)


def _doubling(state, kl, algorithm, hypers):
  return ops.doubling(
    state, kl, target_kl=hypers.kl_target, minimum=hypers.beta_min, maximum=hypers.beta_max
  )


def _proportional(state, kl, algorithm, hypers):
  return ops.proportional(
    state,
    kl,
    target_kl=hypers.kl_target,
    num_samples=algorithm.batch_size,
    horizon=hypers.kl_horizon,
    minimum=hypers.beta_min,
    maximum=hypers.beta_max,
  )


def _dual_ascent(state, kl, algorithm, hypers):
  return ops.dual_ascent(
    state, kl, target_kl=hypers.kl_target, step_size=hypers.kl_step_size, maximum=hypers.beta_max
  )


def _budget(state, kl, algorithm, hypers):
  return ops.budget(
    state,
    kl,
    target_kl=hypers.kl_target,
    minimum=hypers.beta_min,
    maximum=hypers.beta_max,
  )


def _scheduled(schedule):
  def step(state, kl, algorithm, hypers):
    # The last iteration is the one that has `beta_final`.
    num_steps = max(1, algorithm.num_iterations - 1)
    return schedule(
      state, kl, initial=hypers.beta, final=hypers.beta_final, num_iterations=num_steps
    )

  return step


RULES = {
  "fixed": BetaRule(_fixed),
  "doubling": BetaRule(_doubling, lambda hypers: hypers.beta_min),
  "proportional": BetaRule(_proportional, lambda hypers: hypers.beta_min),
  "dual_ascent": BetaRule(_dual_ascent, lambda hypers: 0.0),
  "budget": BetaRule(
    _budget,
    lambda hypers: hypers.beta_min,
    ops.budget_state,
    at_once=True,
  ),
  "linear": BetaRule(_scheduled(ops.linear_schedule)),
  "cosine": BetaRule(_scheduled(ops.cosine_schedule)),
}
