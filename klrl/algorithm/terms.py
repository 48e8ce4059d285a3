"""The arguments and results of an algorithm's choices.

An advantage rule turns an `Experience` into `Advantages`; a loss turns `Terms` into `Losses`. T is
the length of completions, padding included.
"""

from typing import NamedTuple

import jax


class Texts(NamedTuple):
  """Texts that the policy has not written and is to stay near, in the layout of a rollout."""

  tokens: jax.Array  # [B, P + T] int32
  prompt_mask: jax.Array  # [B, P] bool; what is given
  completion_mask: jax.Array  # [B, T] bool; what counts
  ref_hidden: jax.Array | None = None  # [B, T, D_ref], where a divergence from pi_ref is taken


def texts_of(tokens, mask) -> Texts:
  """Returns right-padded texts [B, S], of which all but the first token counts."""
  return Texts(tokens, mask[:, :1], mask[:, 1:])


class Experience(NamedTuple):
  """What an advantage rule reads of B completions; those of one prompt are neighbouring rows."""

  scores: jax.Array  # [B], before any KL; finite, and not to be read where `mask` has no token
  kl: jax.Array  # [B, T], nats, by `kl_terms.reward_kl`; zeros with a KL in the loss
  values: jax.Array  # [B, T], by the value model, before each token; zeros without one
  # [B, T] bool, the tokens that the policy chose; none in a completion that no reward scored
  mask: jax.Array
  beta: jax.Array  # scalar, reward per nat

  @property
  def scored(self) -> jax.Array:
    """Which completions [B] have a score."""
    return self.mask.any(axis=-1)


class Advantages(NamedTuple):
  """What an advantage rule returns; its values in the padding are not read."""

  advantages: jax.Array  # [B, T]
  returns: jax.Array  # [B, T], targets of the value model


class Terms(NamedTuple):
  """What a loss reads of a minibatch: [B, T], nats; None if the algorithm has no such term."""

  log_probs: jax.Array  # of the present policy; carries gradient
  old_log_probs: jax.Array  # of the policy that sampled
  mask: jax.Array  # bool
  advantages: jax.Array
  entropy: jax.Array  # of the next-token distributions; carries gradient
  sampler_weights: jax.Array  # correct for an inexact sampler; ones if it is exact
  sampler_mean: jax.Array | None  # of log pi under the sampler, before the token; carries gradient
  kl_loss: jax.Array | None  # the penalty's loss term times these weights; carries gradient
  beta: jax.Array  # scalar, the coefficient of `kl_loss`, in the unit of the advantages
  trust_region_beta: jax.Array  # scalar, the coefficient of a KL between old and present policy
  values: jax.Array | None  # of the value model, reward units; carries gradient
  old_values: jax.Array  # zeros without a value model, as the next
  returns: jax.Array


# {name of the metric: (weight, [B, T] loss of each token, or None)}. The sum of weight times
# aggregated loss is minimised.
Losses = dict[str, tuple[jax.Array | float, jax.Array | None]]
