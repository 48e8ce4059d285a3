"""A product of policies, each to a power: a reference between several models, or beyond one."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from klrl.errors import UserError
from klrl.models.decoder import Policy


def product_policy(policies: Sequence[Policy], powers: Sequence[float]) -> Policy:
  """Returns the policy whose next token has the probability

      prod_i pi_i(v) ** powers[i] / Z,    Z its sum over the vocabulary, at each prefix.

  Powers 1 - w and w are a geometric mixture, which interpolates log-probs. A single power below 1
  flattens a policy, and 1, w, -w is the first policy times exp(w * log(pi_2 / pi_3)). Geoffrey
  Hinton, "Training Products of Experts by Minimizing Contrastive Divergence", 2002; Alisa Liu et
  al., "DExperts: Decoding-Time Controlled Text Generation with Experts and Anti-Experts", 2021.

  The params are a tuple, those of each policy. A hidden state is all of theirs side by side, and
  the unembedding is their tables below one another, each times its power. So the logits are
  sum_i powers[i] * logits_i, and whatever takes a policy (a sampler, the exact KL by chunks of the
  vocabulary) takes this one as it is. A temperature acts on each of them.

  Raises:
    UserError: the logits of a policy have a soft bound, so that they are no product of matrices.
  """
  configs = [policy.config for policy in policies]
  if any(config.logits_cap for config in configs):
    raise UserError(
      "A model that bounds its logits softly, as Gemma 2 does, cannot be a factor of a product."
    )
  # Of a config, others ask how long a row may be, and from where on a rotation is another one.
  config = dataclasses.replace(
    max(configs, key=lambda config: config.short_len),
    width=sum(config.width for config in configs),
    max_len=min(config.max_len for config in configs),
  )

  def beside(parts):
    return jnp.concatenate(list(parts), axis=-1)

  def hidden(params, tokens, mask, segment_ids=None, fork=None):
    return beside(
      policy.hidden(own, tokens, mask, segment_ids, fork)
      for policy, own in zip(policies, params, strict=True)
    )

  def unembedding(params):
    tables = (
      power * policy.unembedding(own)
      for policy, own, power in zip(policies, params, powers, strict=True)
    )
    return jnp.concatenate(list(tables))

  def init(key):
    keys = jax.random.split(key, len(policies))
    return tuple(policy.init(own) for policy, own in zip(policies, keys, strict=True))

  def prefill(params, tokens, mask, row_len):
    read = [
      policy.prefill(own, tokens, mask, row_len)
      for policy, own in zip(policies, params, strict=True)
    ]
    states, prompts = zip(*read, strict=True)
    return beside(states), prompts

  def unstack(params):
    return tuple(policy.unstack(own) for policy, own in zip(policies, params, strict=True))

  def empty_cache(prompts, num_branches):
    return tuple(
      policy.empty_cache(own, num_branches) for policy, own in zip(policies, prompts, strict=True)
    )

  def grow(caches, num_slots):
    return tuple(
      policy.grow(cache, num_slots) for policy, cache in zip(policies, caches, strict=True)
    )

  def decode(params, tokens, t, prompts, caches):
    read = [
      policy.decode(own, tokens, t, prompt, cache)
      for policy, own, prompt, cache in zip(policies, params, prompts, caches, strict=True)
    ]
    states, caches = zip(*read, strict=True)
    return beside(states), caches

  return Policy(
    config=config,
    init=init,
    hidden=hidden,
    unembedding=unembedding,
    prefill=prefill,
    unstack=unstack,
    empty_cache=empty_cache,
    grow=grow,
    decode=decode,
  )
