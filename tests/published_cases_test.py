"""Figures that other people's tests and papers assert, reproduced.

The figures live beside the checkout and name their repository, path and commit; each test's
docstring names the source in short. Cases that no function of `klrl.ops` computes (DPO, sampling,
tokenizers, text) are tested with the modules that do.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from klrl import ops

FACTS = pathlib.Path(__file__).parents[2] / "shared" / "facts"


def _array(values):
  return jnp.asarray(np.array(values, np.float64))  # also reads "inf" and "-inf"


def _log_probs(logits, tokens):
  return ops.token_log_probs(_array(logits), jnp.asarray(tokens))


class PublishedCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    if not FACTS.is_dir():
      self.skipTest("the published figures are not beside this checkout")
    self.enter_context(jax.enable_x64(True))
    cases = json.loads((FACTS / "published_cases.json").read_text())["cases"]
    self.cases = {case["id"]: case for case in cases}

  def case(self, name):
    """Returns the inputs, the expected figures and the tolerance of a published case."""
    case = self.cases[name]
    return case["inputs"], case["expected"], {"rtol": 0, "atol": 0, **case["tolerance"]}


class AdvantagesTest(PublishedCase):
  def _rlax_returns(self, name):
    inputs, expected, tolerance = self.case(name)
    rewards, discounts, next_values = (_array(inputs[k]) for k in ("r_t", "discount_t", "v_t"))
    return inputs, rewards, discounts, next_values, expected, tolerance

  def test_lambda_returns(self):
    """google-deepmind/rlax, multistep_test.py: the returns of `gae`, discount by discount."""
    inputs, rewards, discounts, next_values, expected, tolerance = self._rlax_returns(
      "rlax.lambda_returns"
    )
    _, returns = ops.gae(
      rewards,
      jnp.roll(next_values, 1, axis=-1),  # the first value cancels in the returns
      jnp.ones(rewards.shape, bool),
      gamma=discounts,
      gae_lambda=inputs["lambda"],
      bootstrap_values=next_values[:, -1],
    )
    np.testing.assert_allclose(returns, expected, **tolerance)

  @parameterized.parameters(
    "rlax.discounted_returns",
    "rlax.n_step_bootstrapped_returns.n5",
    "rlax.n_step_bootstrapped_returns.n7",
  )
  def test_discounted_returns(self, name):
    """google-deepmind/rlax, multistep_test.py; n-step returns of five steps with n >= 5."""
    _, rewards, discounts, next_values, expected, tolerance = self._rlax_returns(name)
    returns = ops.discounted_returns(
      rewards,
      jnp.ones(rewards.shape, bool),
      gamma=discounts,
      bootstrap_values=next_values[:, -1],
    )
    np.testing.assert_allclose(returns, expected, **tolerance)

  @parameterized.parameters("1.0", "0.7", "0.4")
  def test_gae(self, gae_lambda):
    """google-deepmind/rlax, multistep_test.py; the same figures in EdanToledo/Stoix."""
    inputs, expected, tolerance = self.case(f"rlax.truncated_gae.lambda{gae_lambda}")
    rewards, values = _array(inputs["r_t"]), _array(inputs["values_T_plus_1"])
    advantages, returns = ops.gae(
      rewards,
      values[:, :-1],
      jnp.ones(rewards.shape, bool),
      gamma=_array(inputs["discount_t"]),
      gae_lambda=inputs["lambda"],
      bootstrap_values=values[:, -1],
    )
    np.testing.assert_allclose(advantages, expected, **tolerance)
    np.testing.assert_allclose(returns, advantages + values[:, :-1])

  def test_vtrace(self):
    """google-deepmind/rlax, vtrace_test.py."""
    inputs, expected, tolerance = self.case("rlax.vtrace_td_error_and_advantage")
    values = _array(inputs["v_tm1"])
    advantages, returns = ops.vtrace(
      _log_probs(inputs["target_logits"], inputs["actions"]),
      _log_probs(inputs["behaviour_logits"], inputs["actions"]),
      _array(inputs["rewards"]),
      values,
      jnp.ones(values.shape, bool),
      gamma=_array(inputs["discounts"]),
      bootstrap_values=_array(inputs["bootstrap_value"]),
    )
    np.testing.assert_allclose(advantages, expected["pg_advantage"], **tolerance)
    np.testing.assert_allclose(returns - values, expected["errors"], **tolerance)

  @parameterized.parameters(
    ("tunix.rloo_advantages", ops.leave_one_out),
    ("tunix.rloo_advantages_group1", ops.leave_one_out),
    ("tunix.grpo_advantages", ops.group_relative),
    ("tunix.drgrpo_advantages", ops.group_centred),
  )
  def test_group_advantages(self, name, advantages):
    """google/tunix, algo_core_test.py and drgrpo_learner_test.py."""
    inputs, expected, tolerance = self.case(name)
    scores = _array(inputs["rewards"]).reshape(-1, inputs["num_generations"])
    np.testing.assert_allclose(advantages(scores).ravel(), expected, **tolerance)


class LogProbsTest(PublishedCase):
  def test_token_log_probs(self):
    """openai/summarize-from-feedback, test_torch_utils.py; one logit is -inf."""
    inputs, expected, tolerance = self.case("openai.label_logprobs")
    for case, log_prob in zip(inputs["cases"], expected, strict=True):
      np.testing.assert_allclose(_log_probs(case["logits"], case["label"]), log_prob, **tolerance)

  def test_softmax(self):
    """google-deepmind/rlax, distributions_test.py: temperatures, log-probs and entropy."""
    inputs, expected, tolerance = self.case("rlax.softmax")
    logits = _array(inputs["logits"])
    for temperature in (1, 10):
      probs = jnp.exp(ops.vocab_log_probs(logits, temperature=temperature))
      np.testing.assert_allclose(probs, expected[f"probs_temperature_{temperature}"], **tolerance)
    log_probs = _log_probs(logits, inputs["samples"])
    np.testing.assert_allclose(log_probs, expected["logprobs_of_samples"], **tolerance)
    np.testing.assert_allclose(ops.entropy(logits), expected["entropy"], **tolerance)

  def test_cross_entropy_of_one_hot_labels(self):
    """google-deepmind/rlax, distributions_test.py."""
    inputs, expected, tolerance = self.case("rlax.categorical_cross_entropy")
    tokens = np.argmax(inputs["labels"], axis=-1)
    np.testing.assert_allclose(-_log_probs(inputs["logits"], tokens), expected, **tolerance)

  def test_entropy_loss(self):
    """google-deepmind/rlax, policy_gradients_test.py."""
    inputs, expected, tolerance = self.case("rlax.entropy_loss")
    loss = -(_array(inputs["weights"]) * ops.entropy(_array(inputs["logits"]))).mean(axis=-1)
    np.testing.assert_allclose(loss, expected, **tolerance)

  def test_first_true_index(self):
    """openai/summarize-from-feedback, test_torch_utils.py."""
    inputs, expected, _ = self.case("openai.first_true_indices")
    mask = np.array(inputs["bools"], bool)
    np.testing.assert_array_equal(ops.first_true_index(mask), expected)

  def test_masked_mean_and_variance(self):
    """google/tunix, ppo_helpers_test.py; its variance divides by n - 1, ours by n."""
    inputs, expected, tolerance = self.case("tunix.masked_mean")
    x, mask = _array(inputs["x"]), np.array(inputs["mask"], bool)
    np.testing.assert_allclose(ops.masked_mean(x, mask), expected["all"], **tolerance)
    np.testing.assert_allclose(ops.masked_mean(x, mask, axis=1), expected["axis1"], **tolerance)
    for name in ("tunix.masked_var", "tunix.masked_var_1d"):
      inputs, expected, tolerance = self.case(name)
      x, mask = _array(inputs["x"]), np.array(inputs["mask"], bool)
      sample_variance = ops.masked_var(x, mask) * mask.sum() / (mask.sum() - 1)
      np.testing.assert_allclose(sample_variance, expected, **tolerance)


class KLTest(PublishedCase):
  def test_exact_kl(self):
    """google-deepmind/rlax, distributions_test.py."""
    inputs, expected, tolerance = self.case("rlax.categorical_kl_divergence")
    kl = ops.exact_kl(_array(inputs["p_logits"]), _array(inputs["q_logits"]))
    np.testing.assert_allclose(kl, expected, **tolerance)

  def test_estimators(self):
    """google/tunix, common_test.py."""
    inputs, expected, tolerance = self.case("tunix.kl_estimators")
    log_ratio = _array(inputs["logp_minus_ref_logp"])
    zeros = jnp.zeros_like(log_ratio)
    np.testing.assert_allclose(ops.k1(log_ratio, zeros), log_ratio)
    np.testing.assert_allclose(ops.k2(log_ratio, zeros), expected["mse_kl_k2"], **tolerance)
    np.testing.assert_allclose(ops.k3(log_ratio, zeros), expected["low_var_kl_k3"], **tolerance)

  def test_moments_between_gaussians(self):
    """Schulman, "Approximating KL Divergence", 2020: bias and spread, by quadrature."""
    inputs, expected, tolerance = self.case("analytic.schulman_kl_estimator_moments")
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)  # samples x from N(0, 1)
    weights = weights / weights.sum()
    for mu in inputs["mu"]:
      figures = expected[f"mu_{mu}"]
      log_probs, ref_log_probs = jnp.array(-(nodes**2) / 2), jnp.array(-((nodes - mu) ** 2) / 2)
      for name, estimator in ops.KL_ESTIMATORS.items():
        values = np.asarray(estimator(log_probs, ref_log_probs))
        mean = weights @ values
        spread = np.sqrt(weights @ (values - mean) ** 2) / figures["true_kl"]
        np.testing.assert_allclose(mean, figures[name]["mean"], **tolerance)
        np.testing.assert_allclose(spread, figures[name]["std_over_true"], **tolerance)


class LossesTest(PublishedCase):
  def test_reinforce(self):
    """google-deepmind/rlax, policy_gradients_test.py."""
    inputs, expected, tolerance = self.case("rlax.policy_gradient_loss")
    log_probs = _log_probs(inputs["logits"], inputs["actions"])
    advantages = _array(inputs["weights"]) * _array(inputs["advantages"])
    loss = ops.reinforce_loss(log_probs, advantages, jnp.ones(log_probs.shape, bool))
    np.testing.assert_allclose(loss.mean(axis=-1), expected, **tolerance)

  def test_clipped_surrogate(self):
    """google-deepmind/rlax, policy_gradients_test.py."""
    inputs, expected, tolerance = self.case("rlax.clipped_surrogate_pg_loss")
    log_probs = _log_probs(inputs["logits"], inputs["actions"])
    loss = ops.clipped_policy_loss(
      log_probs,
      _log_probs(inputs["old_logits"], inputs["actions"]),
      _array(inputs["advantages"]),
      jnp.ones(log_probs.shape, bool),
      clip_eps_low=inputs["epsilon"],
      clip_eps_high=inputs["epsilon"],
    )
    np.testing.assert_allclose(loss.mean(axis=-1), expected, **tolerance)

  def test_importance_ratio(self):
    """google-deepmind/rlax, distributions_test.py: the unclipped surrogate of advantage -1."""
    inputs, expected, tolerance = self.case("rlax.importance_sampling_ratios")
    ratio = ops.kl_penalised_policy_loss(
      _log_probs(inputs["pi_logits"], inputs["actions"]),
      _log_probs(inputs["mu_logits"], inputs["actions"]),
      -jnp.ones(2),
      jnp.zeros(2),
      jnp.ones(2, bool),
      trust_region_beta=0.0,
    )
    np.testing.assert_allclose(ratio, expected, **tolerance)

  def test_value_loss(self):
    """google-deepmind/rlax, losses_test.py."""
    inputs, expected, tolerance = self.case("rlax.l2_loss")
    x = _array(inputs["x"])
    loss = lambda x: ops.value_loss(x, jnp.zeros_like(x), jnp.ones(x.shape, bool))  # noqa: E731
    np.testing.assert_allclose(loss(x), expected["loss"], **tolerance)
    gradient = jax.grad(lambda x: loss(x).sum())(x)
    np.testing.assert_allclose(gradient, expected["grad"], **tolerance)

  @parameterized.parameters(
    ("tunix.loss_aggregation", "token-mean", "token_mean", None),
    ("tunix.loss_aggregation", "sequence-mean-token-mean", "sequence_mean_token_mean", None),
    ("tunix.loss_aggregation", "seq-mean-token-sum", "sequence_mean_token_sum", None),
    ("tunix.loss_aggregation", "sequence-mean-token-scale(norm=max_len=3)", "constant", 3),
    ("tunix.loss_aggregation", "sequence-mean-token-scale(norm=3.14)", "constant", 3.14),
    # A norm of 4 for all tokens is 2 for each of two sequences.
    ("tunix.loss_aggregation", "sequence-mean-token-sum-norm(norm=4)", "constant", 2),
    ("tunix.loss_aggregation_partial_zero", "seq-mean-token-sum", "sequence_mean_token_sum", None),
    ("tunix.loss_aggregation_partial_zero", "sequence-mean-token-sum-norm(norm=4)", "constant", 4),
  )
  def test_aggregation(self, name, key, aggregation, constant_length):
    """google/tunix, common_test.py; a fully masked sequence does not count."""
    inputs, expected, tolerance = self.case(name)
    loss, mask = _array(inputs["per_token_loss"]), np.array(inputs["mask"], bool)
    found = ops.divide(*ops.AGGREGATIONS[aggregation](loss, mask))
    if constant_length is not None:  # Ours is the longest that a completion can be.
      found *= mask.shape[-1] / constant_length
    np.testing.assert_allclose(found, expected[key], **tolerance)

  def test_grpo_on_policy(self):
    """google/tunix, algo_core_test.py: advantages spread over completions of length 3 and 1."""
    inputs, expected, tolerance = self.case("tunix.grpo_loss_aggregation_onpolicy")
    mask = np.arange(3)[None] < np.array(inputs["lengths"])[:, None]
    advantages = jnp.broadcast_to(_array(inputs["advantages"])[:, None], mask.shape)
    loss = ops.clipped_policy_loss(
      jnp.zeros(mask.shape),
      jnp.zeros(mask.shape),
      advantages,
      mask,
      clip_eps_low=0.2,
      clip_eps_high=0.2,
    )
    loss = ops.divide(*ops.sequence_mean_token_mean(loss, mask))
    np.testing.assert_allclose(loss, expected, **tolerance)


class ControllersTest(PublishedCase):
  def _betas(self, rule, beta, measured_kls, **coefficients):
    state, betas = ops.ControllerState(jnp.float64(beta), jnp.int32(0)), []
    for kl in measured_kls:
      state = rule(state, kl, **coefficients)
      betas.append(state.beta)
    return betas

  def test_proportional(self):
    """openai/lm-human-preferences, train_policy.py."""
    inputs, expected, tolerance = self.case("openai.adaptive_kl_controller")
    betas = self._betas(
      ops.proportional,
      inputs["init"],
      [step["current_kl"] for step in inputs["sequence"]],
      target_kl=inputs["target"],
      num_samples=512,
      horizon=inputs["horizon"],
    )
    np.testing.assert_allclose(betas, expected, **tolerance)

  def test_cosine_schedule(self):
    """stanford-cs336/assignment1-basics, test_optimizer.py, after its warm-up."""
    inputs, expected, tolerance = self.case("cs336.cosine_lr")
    warmup, end = inputs["warmup"], inputs["cosine_cycle_iters"]
    betas = self._betas(
      ops.cosine_schedule,
      inputs["max_lr"],
      [0.0] * (len(expected) - warmup - 1),
      initial=inputs["max_lr"],
      final=inputs["min_lr"],
      num_iterations=end - warmup,
    )
    np.testing.assert_allclose(betas, expected[warmup + 1 :], **tolerance)


if __name__ == "__main__":
  absltest.main()
