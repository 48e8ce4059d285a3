"""One Gaussian that imitates a mixture of two, by KL(p || Gaussian) and by KL(Gaussian || p).

Densities are [G] log-densities at the nodes of GRID, integrals the trapezoidal rule, which for what
falls as fast as a Gaussian is exact to rounding. theta is (mean, log sigma). Nats; the figures are
made under `jax.enable_x64`. `make_descent` serves the decoders of `mode_seeking` too.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from klrl.algorithm import optimizer

GRID = np.linspace(-16.0, 16.0, 1601)  # what is beyond has a mass below 1e-12 for every fit here
GAUSSIAN_STEPS = (0, 5, 10, 20, 40, 300)
GAUSSIAN_STARTS = {"left": -1.0, "right": 1.0}  # means; sigma starts at 1
# Of the reverse KL to equal modes, for Newton's method: (mean, sigma).
NEAR = {"reverse_middle": (0.0, 1.7), "reverse_saddle": (0.9, 1.5)}


def make_descent(loss_fn):
  """Returns path(params, steps, learning_rate, *arguments) -> the params after each of `steps`.

  Adam on `loss_fn(params, *arguments)`, its rate falling to zero over the last of `steps` (rising
  ints) as a cosine. Calls of one descent share its compilation.
  """

  @jax.jit
  def advance(state, first, last, num_steps, learning_rate, arguments):
    def step(i, state):
      params, opt_state = state
      rate = learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * i / num_steps))
      gradient = jax.grad(loss_fn)(params, *arguments)
      return optimizer.apply_gradients(
        params, opt_state, gradient, learning_rate=rate, max_grad_norm=1.0
      )[:2]

    return jax.lax.fori_loop(first, last, step, state)

  def path(params, steps, learning_rate, *arguments):
    state, done, shown = (params, optimizer.init_optimizer(params)), 0, []
    for step in steps:
      state = advance(state, done, step, steps[-1], learning_rate, arguments)
      shown.append(state[0])
      done = step
    return shown

  return path


class Mixture(NamedTuple):
  """Two Gaussians of one width."""

  means: tuple[float, float]
  sigma: float
  weights: tuple[float, float]


MIXTURES = {
  "equal": Mixture((-2.0, 2.0), 0.5, (0.5, 0.5)),
  "unequal": Mixture((-2.0, 2.0), 0.5, (0.7, 0.3)),
  "overlapping": Mixture((-1.0, 1.0), 1.0, (0.5, 0.5)),
}


def gaussian_log_density(theta) -> jax.Array:
  """Returns [G], the log-density of N(theta[0], exp(theta[1])^2)."""
  z = (GRID - theta[0]) * jnp.exp(-theta[1])
  return -0.5 * (z**2 + jnp.log(2 * jnp.pi)) - theta[1]


def mixture_log_density(mixture: Mixture) -> jax.Array:
  """Returns [G], the log-density of the mixture."""
  parts = [
    jnp.log(weight) + gaussian_log_density((mean, jnp.log(mixture.sigma)))
    for mean, weight in zip(mixture.means, mixture.weights, strict=True)
  ]
  return jnp.logaddexp(*parts)


def density_kl(log_density, other_log_density) -> jax.Array:
  """Returns KL(first || second) of two densities, each [G]."""
  differences = log_density - other_log_density
  return (jnp.exp(log_density) * differences).sum() * (GRID[1] - GRID[0])


def forward_kl(theta, log_density) -> jax.Array:
  """Returns KL(p || Gaussian): what SFT minimises."""
  return density_kl(log_density, gaussian_log_density(theta))


def reverse_kl(theta, log_density) -> jax.Array:
  """Returns KL(Gaussian || p): what RL with reward log p plus entropy minimises."""
  return density_kl(gaussian_log_density(theta), log_density)


@functools.cache
def _derivatives(kl):
  return jax.jit(jax.grad(kl)), jax.jit(jax.hessian(kl))


def stationary_point(kl, theta, log_density) -> dict:
  """Returns where Newton's method leads from `theta` [2]: mean, sigma, kl, and what kind it is.

  `kind` is minimum or saddle, by the curvature.
  """
  gradient, hessian = _derivatives(kl)
  for _ in range(20):  # five are enough from a descent's end
    theta -= jnp.linalg.solve(hessian(theta, log_density), gradient(theta, log_density))
  lowest = jnp.linalg.eigvalsh(hessian(theta, log_density))[0]
  return {
    "mean": float(theta[0]),
    "sigma": float(jnp.exp(theta[1])),
    "kl": float(kl(theta, log_density)),
    "kind": "minimum" if lowest > 0 else "saddle",
  }


def gaussian_results() -> dict:
  """Returns the fits of all mixtures: `points`, and the `paths` of [mean, sigma, kl] to them."""
  results = {"steps": GAUSSIAN_STEPS}
  directions = (("forward", forward_kl), ("reverse", reverse_kl))
  descents = {direction: make_descent(kl) for direction, kl in directions}
  with jax.enable_x64(True):
    for name, mixture in MIXTURES.items():
      log_density, points, paths = mixture_log_density(mixture), {}, {}
      for direction, kl in directions:
        for side, mean in GAUSSIAN_STARTS.items():
          fit, start = f"{direction}_{side}", jnp.array([mean, 0.0])
          path = descents[direction](start, GAUSSIAN_STEPS, 0.1, log_density)
          points[fit] = stationary_point(kl, path[-1], log_density)
          paths[fit] = [
            [float(theta[0]), float(jnp.exp(theta[1])), float(kl(theta, log_density))]
            for theta in path
          ]
      if name == "equal":
        for point, (mean, sigma) in NEAR.items():
          theta = jnp.array([mean, np.log(sigma)])
          points[point] = stationary_point(reverse_kl, theta, log_density)
      entropy = -(jnp.exp(log_density) * log_density).sum() * (GRID[1] - GRID[0])
      target = {"entropy": float(entropy), **mixture._asdict()}
      results[name] = {"target": target, "points": points, "paths": paths}
  return results
