"""The step of the stages before RL: minimise a loss over examples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from klrl.optimizer import apply_gradients, init_optimizer

_FINAL_LEARNING_RATE = 0.1  # of the initial one, reached by a cosine


class SupervisedState(NamedTuple):
  """Everything that a checkpoint of a supervised stage holds."""

  params: dict
  opt_state: optax.OptState
  learning_rate: jax.Array
  max_grad_norm: jax.Array
  iteration: jax.Array  # int32


def init_supervised_state(params, config) -> SupervisedState:
  """Returns the state before the first step; reads `learning_rate` and `max_grad_norm`."""
  return SupervisedState(
    params,
    init_optimizer(params),
    jnp.float32(config.learning_rate),
    jnp.float32(config.max_grad_norm),
    jnp.int32(0),
  )


def make_supervised_step(loss_fn, *, num_iterations: int):
  """Returns step(state, batch) -> (state, metrics), Adam with a cosine schedule.

  Args:
    loss_fn: (params, batch) -> (loss, metrics as (sum, count) pairs).
    num_iterations: length of the schedule.
  """
  schedule = optax.cosine_decay_schedule(1.0, num_iterations, alpha=_FINAL_LEARNING_RATE)

  def step(state: SupervisedState, batch):
    (_, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    params, opt_state, norm = apply_gradients(
      state.params,
      state.opt_state,
      gradients,
      learning_rate=state.learning_rate * schedule(state.iteration),
      max_grad_norm=state.max_grad_norm,
    )
    state = state._replace(params=params, opt_state=opt_state, iteration=state.iteration + 1)
    return state, metrics | {"gradient/norm": (norm, 1.0)}

  return step
