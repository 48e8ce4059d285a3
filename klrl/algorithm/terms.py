"""What the choices of an algorithm read and return; T is the completion's length, padding included.

An advantage rule turns an `Experience` into `Advantages`; a loss turns `Terms` into `Losses`.
"""

from typing import NamedTuple

import jax


class Texts(NamedTuple):
  """Texts to keep likely, right-padded."""

  tokens: jax.Array  # [B, S] int32
  mask: jax.Array  # [B, S] bool


class Experience(NamedTuple):
  """What an advantage rule reads of B completions; the G ones of a prompt stand side by side."""

  scores: jax.Array  # [B], before any KL
  kl: jax.Array  # [B, T] what the penalty takes off the reward, nats; zeros with a KL in the loss
  values: jax.Array  # [B, T] of the value model before each token; zeros without one
  mask: jax.Array  # [B, T] bool
  beta: jax.Array  # scalar, reward per nat


class Advantages(NamedTuple):
  """What an advantage rule returns; anything in the padding."""

  advantages: jax.Array  # [B, T]
  returns: jax.Array  # [B, T], targets of the value model


class Terms(NamedTuple):
  """What a loss reads of a minibatch, [B, T] each and in nats; what is not there is None."""

  log_probs: jax.Array  # of the policy that is trained; carries gradient
  old_log_probs: jax.Array  # of the policy that sampled
  mask: jax.Array  # bool
  advantages: jax.Array
  entropy: jax.Array  # of the next-token distributions; carries gradient
  sampler_weights: jax.Array  # for a sampler that is not the old policy; else ones
  kl_loss: jax.Array | None  # the penalty's loss term, so weighted; carries gradient
  beta: jax.Array  # scalar, what `kl_loss` weighs: reward per nat, in units of the advantages
  trust_region_beta: jax.Array  # scalar, of the KL between old and present policy
  values: jax.Array | None = None  # of the value model, reward units; carries gradient
  old_values: jax.Array | None = None
  returns: jax.Array | None = None


# Of a loss, by the name of its metric: (weight, [B, T] loss per token; None where there is none).
# What is minimised is the sum of weight * aggregated loss.
Losses = dict[str, tuple[jax.Array | float, jax.Array | None]]
