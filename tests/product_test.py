"""A product of policies: its samples, and the objectives that have it as their reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods_test import (
  BETA,
  REF,
  SAMPLER,
  SCORES,
  SUM,
  TREE,
  ascent,
  assert_same,
  gradient_of,
  make_config,
  mean_score,
  preset,
  tables,
)
from small_decoders import BAG, bag_params

from experiments import distill, reinforce
from klrl import ops
from klrl.algorithm import completions
from klrl.errors import UserError
from klrl.exact import oracle
from klrl.models import DecoderConfig, product_policy, uniform_policy
from klrl.sampling import make_sample_fn

CONFIG = DecoderConfig(
  vocab_size=3, width=3, num_layers=0, num_heads=1, num_kv_heads=1, head_dim=2, mlp_dim=1, max_len=9
)
# Between two models; flatter than one; and one of them times exp(guide), the guide w * log(p / q).
REFERENCES = {
  "mixture": ((0.7, 0.3), (REF, SAMPLER)),
  "flattened": ((0.6,), (REF,)),
  "guided": ((1.0, 0.5, -0.5), (REF, SAMPLER, REF[::-1])),
}


def reference_of(powers, logits):
  """Returns the product of tables as a policy without params, and its logits [S, V]."""
  policy = dataclasses.replace(tables(TREE)[0], config=CONFIG)

  product = product_policy([policy] * len(powers), powers)
  without_params = dataclasses.replace(
    product,
    hidden=lambda _, *rest, **named: product.hidden(logits, *rest, **named),
    unembedding=lambda _: product.unembedding(logits),
  )
  log_probs = [power * jax.nn.log_softmax(x) for power, x in zip(powers, logits, strict=True)]
  return without_params, sum(log_probs)


@pytest.mark.parametrize("name", REFERENCES)
def test_the_learner_regularises_to_the_product(name):
  with jax.enable_x64(True):
    reference, logits = reference_of(*REFERENCES[name])
    config = preset("max_entropy", reinforce, reference="", beta=BETA, **SUM)

    def objective(x):
      return mean_score(x) - BETA * oracle.sequence_kl(TREE, x, logits)

    assert_same(ascent(config, reference=reference), gradient_of(objective))
    # There that gradient is 0.
    optimum = oracle.optimal_policy(TREE, logits, SCORES, beta=BETA).logits
    found = jnp.exp(oracle.log_probs(TREE, optimum))
    tilted = jnp.exp(oracle.log_probs(TREE, logits) + SCORES / BETA)
    np.testing.assert_allclose(found, tilted / tilted.sum(), rtol=1e-9)
    assert np.abs(jax.grad(objective)(optimum)).max() < 1e-9


def test_the_exact_divergence_is_that_to_the_product():
  with jax.enable_x64(True):
    reference, logits = reference_of(*REFERENCES["mixture"])
    config = make_config(distill, batch_size=1, **SUM)
    found = ascent(config, scores=np.zeros(15), reference=reference)
    assert_same(-found, gradient_of(lambda x: oracle.token_kl(TREE, x, logits)))


def test_a_product_is_sampled_and_scored_like_any_policy():
  bag = dataclasses.replace(BAG, config=dataclasses.replace(CONFIG, vocab_size=5, width=4))
  product = product_policy([bag, uniform_policy(5, 8), bag], (0.5, 1.0, -1.5))
  assert (product.config.width, product.config.max_len) == (9, 8)
  params = bag_params(5, seed=0), {}, bag_params(5, seed=1)
  sample = make_sample_fn(product, max_completion_len=3, eos_id=None, pad_id=0)
  prompts = jnp.arange(8).reshape(4, 2) % 5
  drawn = jax.jit(functools.partial(sample, temperature=0.7))(
    params, prompts, prompts >= 0, jax.random.key(0)
  )
  scored = completions.log_probs(product, params, drawn, temperature=0.7)
  np.testing.assert_allclose(drawn.old_log_probs, scored, rtol=1e-5)
  first = sum(
    power * ops.logits_of(bag.hidden(own, prompts, prompts >= 0)[:, -1], own["unembedding"])
    for power, own in ((0.5, params[0]), (-1.5, params[2]))
  )
  truth = jax.nn.log_softmax(first / 0.7)[jnp.arange(4), drawn.tokens[:, 2]]
  np.testing.assert_allclose(drawn.old_log_probs[:, 0], truth, rtol=1e-5)


def test_logits_with_a_soft_bound_are_refused():
  capped = dataclasses.replace(BAG, config=dataclasses.replace(CONFIG, logits_cap=30.0))
  with pytest.raises(UserError, match="bounds its logits softly"):
    product_policy([capped, uniform_policy(5, 8)], (0.5, 0.5))
