"""Rules that move beta from one iteration to the next.

Each is a pure, branch-free function `(state, measured_kl, *, coefficients) -> state`. `measured_kl`
is a KL of whole sequences, nats per sequence, as is `target_kl`. All coefficients may be traced, so
a sweep over them is one program. The dtypes of the state are kept.

What is measured moves `doubling`, `proportional` and `dual_ascent` without an end, so each keeps
beta within `minimum` and `maximum`, and as it is where the measurement is NaN. The bounded beta is
all that is remembered: however long a bound has held, the first measurement on the other side of
the target leaves it. `at_bound` says whether one holds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class ControllerState(NamedTuple):
  """What a controller remembers; both arrays, so that it can be checkpointed and swept."""

  beta: jax.Array  # float scalar, reward per nat of sequence KL
  iteration: jax.Array  # int32 scalar, how many times the rule was applied


# Where nothing else is said: a rule that multiplies beta cannot leave 0, nor inf.
BETA_BOUNDS = (1e-4, 1e4)


def _next(state: ControllerState, beta) -> ControllerState:
  # What is measured may be NaN, and beta would stay so.
  beta = jnp.where(jnp.isnan(beta), state.beta, beta)
  return ControllerState(jnp.asarray(beta, state.beta.dtype), state.iteration + 1)


def at_bound(
  state: ControllerState, *, minimum=BETA_BOUNDS[0], maximum=BETA_BOUNDS[1]
) -> jax.Array:
  """Returns a bool scalar, whether beta stands at one of its bounds."""
  dtype = state.beta.dtype
  return (state.beta <= jnp.asarray(minimum, dtype)) | (state.beta >= jnp.asarray(maximum, dtype))


def fixed(state: ControllerState, measured_kl) -> ControllerState:
  """Returns the state with the same beta."""
  del measured_kl
  return _next(state, state.beta)


def doubling(
  state: ControllerState, measured_kl, *, target_kl, minimum=BETA_BOUNDS[0], maximum=BETA_BOUNDS[1]
) -> ControllerState:
  """Returns beta halved below `target_kl / 1.5`, doubled above `1.5 * target_kl`, else the same.

  It stays within `minimum`, which is positive, and `maximum`.
  John Schulman et al., "Proximal Policy Optimization Algorithms", 2017, section 4.
  """
  factor = jnp.where(measured_kl > 1.5 * target_kl, 2.0, 1.0)
  beta = state.beta * jnp.where(measured_kl < target_kl / 1.5, 0.5, factor)
  return _next(state, jnp.clip(beta, minimum, maximum))


def proportional(
  state: ControllerState,
  measured_kl,
  *,
  target_kl,
  num_samples,
  horizon,
  minimum=BETA_BOUNDS[0],
  maximum=BETA_BOUNDS[1],
) -> ControllerState:
  """Returns beta * (1 + error * num_samples / horizon), error = measured / target - 1.

  The error is clipped to [-0.2, 0.2], as published, so one outlier moves beta little. Daniel
  Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019, section 2.2.

  Args:
    state: the state.
    measured_kl: nats per sequence.
    target_kl: nats per sequence, positive.
    num_samples: sequences per iteration.
    horizon: sequences over which a constant error of 1 would act once; above num_samples / 5, since
      the factor is negative below.
    minimum: smallest beta, positive.
    maximum: largest beta.
  """
  error = jnp.clip(measured_kl / target_kl - 1, -0.2, 0.2)
  beta = state.beta * (1 + error * num_samples / horizon)
  return _next(state, jnp.clip(beta, minimum, maximum))


def dual_ascent(
  state: ControllerState, measured_kl, *, target_kl, step_size, maximum=BETA_BOUNDS[1]
) -> ControllerState:
  """Returns beta + step_size * (measured_kl - target_kl), within 0 and `maximum`.

  Projected gradient ascent on the multiplier of `maximise score subject to KL <= target_kl`: the
  dual is concave in beta with exactly this gradient, and a budget that does not bind ends at 0, as
  complementary slackness asks (a step in log beta could not get there, nor leave it). A budget that
  cannot be kept would wind beta up for ever: it ends at `maximum`. Stephen Boyd and Lieven
  Vandenberghe, "Convex Optimization", 2004, section 5.5. `step_size` is in reward per squared nat.
  """
  beta = state.beta + step_size * (measured_kl - target_kl)
  return _next(state, jnp.clip(beta, 0.0, maximum))


def linear_schedule(
  state: ControllerState, measured_kl, *, initial, final, num_iterations
) -> ControllerState:
  """Returns beta on the line from `initial` to `final` over `num_iterations`, then `final`."""
  del measured_kl
  return _next(state, initial + (final - initial) * _fraction(state, num_iterations))


def cosine_schedule(
  state: ControllerState, measured_kl, *, initial, final, num_iterations
) -> ControllerState:
  """Returns beta on half a cosine from `initial` to `final` over `num_iterations`, then `final`.

  Ilya Loshchilov and Frank Hutter, "SGDR", 2016, eq. 5, without restarts.
  """
  del measured_kl
  remaining = 0.5 * (1 + jnp.cos(jnp.pi * _fraction(state, num_iterations)))
  return _next(state, final + (initial - final) * remaining)


def _fraction(state, num_iterations):
  """Returns how far the iteration that comes next is, at most 1."""
  iteration = (state.iteration + 1).astype(state.beta.dtype)
  return jnp.minimum(iteration / num_iterations, 1.0)
