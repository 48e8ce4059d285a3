"""Trust regions measured on the probability of the token taken, and not on its ratio.

The ratio pi / old of a rare token is large long before the two distributions differ, and that of a
likely token is near 1 when they differ much. Here the token taken and all others together are two
outcomes, and the distance is that of these two: a lower bound of that of the whole distributions.
All arrays are [..., T]; the distances are zero where the policies agree.
"""

import jax
import jax.numpy as jnp

from klrl.ops.importance import weighted
from klrl.ops.masking import zero_padding


def binary_tv(log_probs: jax.Array, old_log_probs: jax.Array) -> jax.Array:
  """Returns [..., T] `|pi - old|` of the token taken, the total variation of two outcomes.

  Gradient flows to `log_probs`.

  >>> print(ops.binary_tv(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.2]))))
  [0.3]
  """
  return jnp.abs(jnp.exp(log_probs) - jnp.exp(old_log_probs))


def binary_kl(log_probs: jax.Array, old_log_probs: jax.Array) -> jax.Array:
  """Returns [..., T] KL(old || pi) of the two outcomes, nats; no gradient.

  It is infinite where pi is certain of a token of which old is not.

  >>> print(ops.binary_kl(jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.2, 0.2]))))
  [0.193 0.   ]
  """
  log_probs, old_log_probs = jax.lax.stop_gradient((log_probs, old_log_probs))
  old_others = -jnp.expm1(old_log_probs)
  # Where old is certain the others have no mass, whatever pi gives them.
  log_old_others = jnp.log(jnp.where(old_others > 0, old_others, 1.0))
  log_others = jnp.where(old_others > 0, jnp.log(-jnp.expm1(log_probs)), 0.0)
  return weighted(old_log_probs, old_log_probs - log_probs) + old_others * (
    log_old_others - log_others
  )


DISTANCES = {"tv": binary_tv, "kl": binary_kl}


def is_leaving(
  log_probs: jax.Array,
  old_log_probs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  distance: str,
  size: jax.Array | float,
) -> jax.Array:
  """Returns [..., T] bool, the tokens that are outside of the region and would go on outwards.

  Those are farther than `size` by the distance, with a probability that has risen and an advantage
  above 0, or one that has fallen and an advantage below 0.

  >>> log_probs, old_log_probs = jnp.log(jnp.array([[0.8, 0.8], [0.4, 0.4]]))
  >>> args = log_probs, old_log_probs, jnp.array([1.0, -1.0]), jnp.ones(2, bool)
  >>> print(ops.is_leaving(*args, distance="tv", size=0.2))
  [ True False]

  Args:
    log_probs: [..., T], of the current policy.
    old_log_probs: [..., T], of the policy that sampled.
    advantages: [..., T].
    mask: [..., T] bool.
    distance: "tv" or "kl", of `DISTANCES`.
    size: positive scalar, may be traced; of a probability, or nats.
  """
  log_probs, old_log_probs, advantages = jax.lax.stop_gradient(
    tuple(zero_padding(x, mask) for x in (log_probs, old_log_probs, advantages))
  )
  outwards = advantages * (log_probs - old_log_probs) > 0
  return outwards & (DISTANCES[distance](log_probs, old_log_probs) > size)


def divergence_masked_policy_loss(
  log_probs: jax.Array,
  old_log_probs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  distance: str,
  size: jax.Array | float,
) -> jax.Array:
  """Returns [..., T] `-ratio * A`, and 0 for the tokens that leave the region (`is_leaving`).

  Penghui Qi et al., "Rethinking the Trust Region in LLM Reinforcement Learning", 2026 (DPPO; the
  binary approximations of total variation and KL).

  >>> log_probs, old_log_probs = jnp.log(jnp.array([[0.8, 0.8], [0.4, 0.4]]))  # ratio 2
  >>> args = old_log_probs, jnp.array([1.0, -1.0]), jnp.ones(2, bool)
  >>> loss = lambda x: ops.divergence_masked_policy_loss(x, *args, distance="tv", size=0.2)
  >>> print(jax.grad(lambda x: loss(x).sum())(log_probs))
  [0. 2.]

  Args:
    log_probs: [..., T], of the current policy; carries gradient.
    old_log_probs: as in `is_leaving`, and so are the arguments that follow.
    advantages: [..., T].
    mask: [..., T] bool.
    distance: "tv" or "kl".
    size: positive scalar, may be traced.
  """
  leaving = is_leaving(log_probs, old_log_probs, advantages, mask, distance=distance, size=size)
  kept = mask & ~leaving
  log_ratio = zero_padding(log_probs, kept) - zero_padding(old_log_probs, kept)
  return -weighted(log_ratio, jax.lax.stop_gradient(zero_padding(advantages, kept)))


def smooth_policy_loss(
  log_probs: jax.Array,
  old_log_probs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  size: jax.Array | float,
) -> jax.Array:
  """Returns [..., T] `-ratio * A + |A| * (pi - old)**2 / (2 * size * old)`.

  Its gradient is that of `-ratio * A` times `1 - sign(A) * (pi - old) / size`: it is zero at the
  edge of the region, where `divergence_masked_policy_loss` ends, and leads back from beyond it.
  Jiarui Yao et al., "Rethinking the Divergence Regularization in LLM RL", 2026 (DRPO: a quadratic
  regulariser, weighted by the advantage, of the shift in probability).

  >>> log_probs, old_log_probs = jnp.log(jnp.array([[0.4, 0.6, 0.8], [0.4, 0.4, 0.4]]))
  >>> args = old_log_probs, jnp.ones(3), jnp.ones(3, bool)
  >>> print(jax.grad(lambda x: ops.smooth_policy_loss(x, *args, size=0.2).sum())(log_probs))
  [-1. -0.  2.]

  Args:
    log_probs: [..., T], of the current policy; carries gradient.
    old_log_probs: [..., T], of the policy that sampled.
    advantages: [..., T].
    mask: [..., T] bool.
    size: positive scalar, may be traced; a probability.
  """
  log_probs, old_log_probs, advantages = (
    zero_padding(x, mask) for x in (log_probs, old_log_probs, advantages)
  )
  old_log_probs, advantages = jax.lax.stop_gradient((old_log_probs, advantages))
  # The square is written out, so that no part of it is infinite where the product is not.
  log_ratio, scale = log_probs - old_log_probs, jnp.abs(advantages) / (2 * size)
  penalty = weighted(log_probs + log_ratio, scale) - 2 * weighted(log_probs, scale)
  return penalty + weighted(old_log_probs, scale) - weighted(log_ratio, advantages)
