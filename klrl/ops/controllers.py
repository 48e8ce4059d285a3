"""Rules that move beta from one iteration to the next.

Each rule is a pure function without branches, `(state, measured_kl, *, coefficients) -> state`.
`measured_kl` and `target_kl` are KLs of whole sequences, in nats per sequence. All coefficients may
be traced, so a sweep over them is one program. The dtypes of the state are kept.

A measurement can move beta without end in `doubling`, `proportional`, `dual_ascent` and `budget`.
So each of these keeps beta between `minimum` and `maximum`, and leaves beta as it is where the
measurement is NaN. They remember bounded numbers alone: however long a bound has held, the first
measurement on the other side of the target leaves it. `at_bound` says whether a bound holds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from klrl.ops.masking import at_least_float32


class ControllerState(NamedTuple):
  """What a controller remembers; both are arrays, so that they can be checkpointed and swept.

  >>> state = ops.ControllerState(beta=jnp.float32(0.5), iteration=jnp.int32(0))
  """

  beta: jax.Array  # float scalar, reward per nat of sequence KL
  iteration: jax.Array  # int32 scalar, how many times the rule was applied


class BudgetState(NamedTuple):
  """What `budget` remembers: beta, which is read, and the multiplier of the budget behind it.

  >>> state = ops.budget_state(jnp.float32(0.5))
  """

  beta: jax.Array  # float scalar, reward per nat of sequence KL
  iteration: jax.Array  # int32 scalar, how many times the rule was applied
  multiplier: jax.Array  # float scalar, reward per nat
  reached: jax.Array  # bool scalar, whether the KL has ever been at the budget


# The default bounds: a rule that multiplies beta could leave neither 0 nor inf.
BETA_BOUNDS = (1e-4, 1e4)


def _next(state: ControllerState, beta) -> ControllerState:
  # What is measured may be NaN, and beta would stay so.
  beta = jnp.where(jnp.isnan(beta), state.beta, beta)
  return ControllerState(jnp.asarray(beta, state.beta.dtype), state.iteration + 1)


def at_bound(
  state: ControllerState | BudgetState,
  *,
  minimum: jax.Array | float = BETA_BOUNDS[0],
  maximum: jax.Array | float = BETA_BOUNDS[1],
) -> jax.Array:
  """Returns a bool scalar, whether beta stands at one of its bounds.

  >>> state = ops.ControllerState(jnp.float32(100.0), jnp.int32(7))
  >>> print(ops.at_bound(state), ops.at_bound(state, maximum=100.0))
  False True
  """
  dtype = state.beta.dtype
  return (state.beta <= jnp.asarray(minimum, dtype)) | (state.beta >= jnp.asarray(maximum, dtype))


def fixed(state: ControllerState, measured_kl: jax.Array | float) -> ControllerState:
  """Returns the state with the same beta.

  >>> print(ops.fixed(ops.ControllerState(jnp.float32(0.5), jnp.int32(0)), 9.0).beta)
  0.5
  """
  del measured_kl
  return _next(state, state.beta)


def doubling(
  state: ControllerState,
  measured_kl: jax.Array | float,
  *,
  target_kl: jax.Array | float,
  minimum: jax.Array | float = BETA_BOUNDS[0],
  maximum: jax.Array | float = BETA_BOUNDS[1],
) -> ControllerState:
  """Returns beta halved below `target_kl / 1.5`, doubled above `1.5 * target_kl`, else the same.

  Beta stays between `minimum`, which is positive, and `maximum`.
  John Schulman et al., "Proximal Policy Optimization Algorithms", 2017, section 4.

  >>> state = ops.ControllerState(jnp.float32(0.5), jnp.int32(0))
  >>> print([float(ops.doubling(state, kl, target_kl=6.0).beta) for kl in (3.9, 6.0, 9.1)])
  [0.25, 0.5, 1.0]
  """
  factor = jnp.where(measured_kl > 1.5 * target_kl, 2.0, 1.0)
  beta = state.beta * jnp.where(measured_kl < target_kl / 1.5, 0.5, factor)
  return _next(state, jnp.clip(beta, minimum, maximum))


def proportional(
  state: ControllerState,
  measured_kl: jax.Array | float,
  *,
  target_kl: jax.Array | float,
  num_samples: jax.Array | float,
  horizon: jax.Array | float,
  minimum: jax.Array | float = BETA_BOUNDS[0],
  maximum: jax.Array | float = BETA_BOUNDS[1],
) -> ControllerState:
  """Returns beta times `1 + error * num_samples / horizon`, where error = measured / target - 1.

  The error is clipped to [-0.2, 0.2], as published, so one outlier moves beta little. Daniel
  Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019, section 2.2.

  >>> state = ops.ControllerState(jnp.float32(0.5), jnp.int32(0))
  >>> print(ops.proportional(state, 60.0, target_kl=6.0, num_samples=128, horizon=1280).beta)
  0.51

  Args:
    state: the state.
    measured_kl: nats per sequence.
    target_kl: nats per sequence, positive.
    num_samples: sequences per iteration.
    horizon: sequences over which a constant error of 1 would act once; larger than
      num_samples / 5, below which the factor could be negative.
    minimum: the smallest beta, positive.
    maximum: the largest beta.
  """
  error = jnp.clip(measured_kl / target_kl - 1, -0.2, 0.2)
  beta = state.beta * (1 + error * num_samples / horizon)
  return _next(state, jnp.clip(beta, minimum, maximum))


def dual_ascent(
  state: ControllerState,
  measured_kl: jax.Array | float,
  *,
  target_kl: jax.Array | float,
  step_size: jax.Array | float,
  maximum: jax.Array | float = BETA_BOUNDS[1],
) -> ControllerState:
  """Returns beta plus `step_size * (measured_kl - target_kl)`, between 0 and `maximum`.

  This is projected gradient ascent on the multiplier of "maximise the score subject to KL <=
  target_kl": the dual function is concave in beta, and this is its gradient. Where the budget does
  not bind, beta ends at 0, as complementary slackness asks (a step in log beta could neither reach
  0 nor leave it). Where the budget cannot be kept, beta would grow for ever and ends at `maximum`.
  `step_size` is in reward per squared nat. Stephen Boyd and Lieven Vandenberghe, "Convex
  Optimization", 2004, section 5.5.

  >>> state = ops.ControllerState(jnp.float32(0.5), jnp.int32(0))
  >>> print(ops.dual_ascent(state, 8.0, target_kl=6.0, step_size=0.25).beta)
  1.0
  """
  beta = state.beta + step_size * (measured_kl - target_kl)
  return _next(state, jnp.clip(beta, 0.0, maximum))


def budget_state(beta: jax.Array | float) -> BudgetState:
  """Returns the state of `budget` before the first measurement.

  >>> print(ops.budget_state(0.5).multiplier)
  0.5
  """
  beta = at_least_float32(jnp.asarray(beta))
  return BudgetState(beta, jnp.int32(0), jnp.array(beta), jnp.bool_(False))


def budget(
  state: BudgetState,
  measured_kl: jax.Array | float,
  *,
  target_kl: jax.Array | float,
  step_size: jax.Array | float = 0.8,
  gain: jax.Array | float = 4.0,
  minimum: jax.Array | float = BETA_BOUNDS[0],
  maximum: jax.Array | float = BETA_BOUNDS[1],
) -> BudgetState:
  """Returns dual ascent in log beta that also answers to the error of the moment.

      multiplier *= exp(step_size * error),   beta = multiplier * exp(gain * error),
      error = measured / target - 1, between -1 and 1

  So one setting serves scores and budgets of any unit. A policy takes some iterations to answer,
  and by then the multiplier alone has gone too far: it swings around the budget for ever. The
  second factor damps this, if beta is that of the update which follows the measurement; an
  iteration later it makes it worse. What the multiplier sums up is the error itself, so that its
  mean over K iterations is log(last multiplier / first) / (step_size * K) wherever it is not
  clipped. With a closer bound on it, that would be a mean of clipped errors, and KLs above a budget
  are farther from it than those below.

  While a run starts and has not reached its budget, the multiplier falls at a twentieth of the
  pace, or it would be far too low when that is reached. Both stay between `minimum`, which is
  positive, and `maximum`; where the budget does not bind, beta ends at `minimum`. Adam Stooke,
  Joshua Achiam and Pieter Abbeel, "Responsive Safety in Reinforcement Learning by PID Lagrangian
  Methods", 2020, without the derivative, in the logarithm.

  >>> state = ops.budget(ops.budget_state(0.5), 12.0, target_kl=6.0)
  >>> print(state.multiplier, state.beta)  # 0.5 * exp(0.8), and that times exp(4)
  1.113 60.755

  Args:
    state: the state.
    measured_kl: nats per sequence, of the policy before the update that beta is for.
    target_kl: the budget, nats per sequence, positive.
    step_size: of the multiplier.
    gain: of the second factor; best if gain / step_size is about the time that a policy takes to
      answer, in iterations.
    minimum: the smallest beta, positive.
    maximum: the largest beta.
  """
  error = jnp.clip(measured_kl / target_kl - 1, -1.0, 1.0)
  error = jnp.where(jnp.isnan(error), 0.0, error)
  reached = state.reached | (error >= 0)
  pace = jnp.where(reached, step_size, step_size / 20)
  multiplier = jnp.clip(state.multiplier * jnp.exp(pace * error), minimum, maximum)
  beta = jnp.clip(multiplier * jnp.exp(gain * error), minimum, maximum)
  dtype = state.beta.dtype
  return BudgetState(beta.astype(dtype), state.iteration + 1, multiplier.astype(dtype), reached)


def linear_schedule(
  state: ControllerState,
  measured_kl: jax.Array | float,
  *,
  initial: jax.Array | float,
  final: jax.Array | float,
  num_iterations: jax.Array | float,
) -> ControllerState:
  """Returns beta on the line from `initial` to `final` over `num_iterations`, then `final`.

  >>> state = ops.ControllerState(jnp.float32(2.0), jnp.int32(49))  # 49 of 100 iterations are done
  >>> print(ops.linear_schedule(state, 0.0, initial=2.0, final=0.0, num_iterations=100).beta)
  1.0
  """
  del measured_kl
  return _next(state, initial + (final - initial) * _fraction(state, num_iterations))


def cosine_schedule(
  state: ControllerState,
  measured_kl: jax.Array | float,
  *,
  initial: jax.Array | float,
  final: jax.Array | float,
  num_iterations: jax.Array | float,
) -> ControllerState:
  """Returns beta on half a cosine from `initial` to `final` over `num_iterations`, then `final`.

  Ilya Loshchilov and Frank Hutter, "SGDR", 2016, eq. 5, without restarts.

  >>> state = ops.ControllerState(jnp.float32(2.0), jnp.int32(24))
  >>> beta = ops.cosine_schedule(state, 0.0, initial=2.0, final=0.0, num_iterations=100).beta
  >>> print(beta)  # the line is at 1.5
  1.707
  """
  del measured_kl
  remaining = 0.5 * (1 + jnp.cos(jnp.pi * _fraction(state, num_iterations)))
  return _next(state, final + (initial - final) * remaining)


def _fraction(state, num_iterations):
  """Returns the share of the schedule that the next iteration has behind it, at most 1."""
  iteration = (state.iteration + 1).astype(state.beta.dtype)
  return jnp.minimum(iteration / num_iterations, 1.0)
