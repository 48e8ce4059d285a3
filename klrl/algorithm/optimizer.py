"""The optimizer of every experiment.

Moments and updates are at least float32, as gradients are, also where parameters are bfloat16. Such
a parameter is rounded to the nearest number after each step.
"""

import jax
import jax.numpy as jnp
import optax

# How the learning rate falls after the warm-up, to this share of its peak at the last iteration.
_LAST_SHARE = 0.1
_DECAYS = {
  "constant": lambda steps: optax.constant_schedule(1.0),
  "linear": lambda steps: optax.linear_schedule(1.0, _LAST_SHARE, steps),
  "cosine": lambda steps: optax.cosine_decay_schedule(1.0, steps, alpha=_LAST_SHARE),
}
SCHEDULES = tuple(_DECAYS)


def make_schedule(name: str, *, num_iterations: int, warmup_iterations: int) -> optax.Schedule:
  """Returns factor(iteration), by which the peak learning rate is multiplied.

  It rises to 1 over `warmup_iterations`, then falls by the schedule `name` until `num_iterations`.
  """
  decay = _DECAYS[name](max(1, num_iterations - warmup_iterations))
  if not warmup_iterations:
    return decay
  rise = optax.linear_schedule(1 / (warmup_iterations + 1), 1.0, warmup_iterations)
  return optax.join_schedules([rise, decay], [warmup_iterations])


def make_optimizer(learning_rate, max_grad_norm) -> optax.GradientTransformation:
  """Returns Adam after clipping by the global norm.

  Both arguments may be traced scalars: the state depends on neither, so the transformation can be
  built inside a compiled function and a sweep over learning rates is one program.
  """
  return optax.chain(
    optax.clip_by_global_norm(max_grad_norm),
    optax.scale_by_adam(),
    optax.scale_by_learning_rate(learning_rate),
  )


def init_optimizer(params) -> optax.OptState:
  """Returns the optimizer's state at zero; the moments are sharded like `params`."""
  return make_optimizer(0.0, 1.0).init(jax.tree.map(_zeros_or_itself, params))


def _zeros_or_itself(x):
  """Returns an array like `x`, sharded as it is, in the dtype of its moments."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return x if x.dtype == dtype else jnp.zeros_like(x, dtype=dtype)


def apply_gradients(params, opt_state, gradients, *, learning_rate, max_grad_norm):
  """Returns (params, opt_state, gradient norm before clipping) after one step."""
  optimizer = make_optimizer(learning_rate, max_grad_norm)
  updates, opt_state = optimizer.update(gradients, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, optax.tree.norm(gradients)
