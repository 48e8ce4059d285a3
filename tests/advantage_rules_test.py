"""Tests of the advantage rules, of what shapes scores and picks groups, and of GRPO's presets."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from experiments import grpo, ppo, reinforce
from experiments.settings import common
from klrl.algorithm import Algorithm, Hypers, advantage_rules, learner, preparation
from klrl.algorithm.advantage_rules import RULES
from klrl.algorithm.objective import KLPenalty
from klrl.algorithm.terms import Experience
from klrl.errors import UserError
from klrl.exact import bandits
from klrl.models import DecoderConfig, policy_model
from klrl.sampling import Rollout

SCORES = jnp.array([1.0, 0.0, 0.0, 1.0])
KL = jnp.array([[0.1, 0.2], [0.3, 0.0], [0.0, 0.4], [0.2, 0.2]])
MASK = jnp.array([[True, True], [True, False], [True, True], [True, True]])
K1, NONE = KLPenalty("reward", "k1", "none", "sequence"), KLPenalty("none")
PRESETS = sorted(pathlib.Path(grpo.__file__).parent.glob("presets/*.flags"))


def rule(name, penalty=NONE):
  algorithm = Algorithm(batch_size=4, num_iterations=1, group_size=2, penalty=penalty)
  kl = KL if penalty.in_reward else jnp.zeros_like(KL)
  x = Experience(SCORES, kl, jnp.zeros_like(KL), MASK, 0.5)
  found = RULES[name](x, algorithm, Hypers())
  return np.where(MASK, found.advantages, 0.0)


def test_the_baseline_that_reinforce_shows_is_the_one_of_the_table():
  algorithm = Algorithm(batch_size=4, num_iterations=1, penalty=K1)
  x = Experience(SCORES, KL, jnp.zeros_like(KL), MASK, 0.5)
  shown = reinforce.advantages(x, algorithm, Hypers()).advantages
  np.testing.assert_allclose(np.where(MASK, shown, 0.0), rule("batch_mean", K1), rtol=1e-5)


@pytest.mark.parametrize(
  ("name", "firsts"),
  [
    ("returns", [1.0, 0.0, 0.0, 1.0]),
    ("batch_mean", [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
    ("leave_one_out", [1.0, -1.0, -1.0, 1.0]),
    ("group_centred", [0.5, -0.5, -0.5, 0.5]),
    ("group_relative", np.array([1.0, -1.0, -1.0, 1.0]) * 0.5 / (np.sqrt(0.5) + 1e-4)),
    ("best_of_n", [0.0, 0.0, 0.0, 0.0]),  # of one
  ],
)
def test_every_rule_gives_one_number_to_all_tokens_of_a_completion(name, firsts):
  expected = np.where(MASK, np.array(firsts)[:, None], 0.0)
  np.testing.assert_allclose(rule(name), expected, rtol=1e-6)


def test_the_kl_in_the_reward_is_part_of_the_total_before_the_baseline():
  totals = np.array([1 - 0.15, -0.15, -0.2, 1 - 0.2])
  expected = totals - totals[[1, 0, 3, 2]]
  np.testing.assert_allclose(rule("leave_one_out", K1)[:, 0], expected, rtol=1e-6)


def test_later_kl_is_charged_to_the_token_before_it_and_credit_token_to_its_own():
  later = rule("group_centred", KLPenalty("both", "exact", "none", "sequence"))
  np.testing.assert_allclose(later[0], [0.5 - 0.5 * 0.2, 0.5], rtol=1e-6)
  own = rule("group_centred", KLPenalty("reward", "k1", "none", "token"))
  np.testing.assert_allclose(own[0], [0.5 - 0.5 * 0.1, 0.5 - 0.5 * 0.2], rtol=1e-6)


# Completions of two turns, with the output of a tool between them.
WITH_TOOL = jnp.array([True, True, False, False, True, True])


def advantages_of(config, kl, mask, *, gamma=0.5, values=0.0):
  """Returns the advantages of a completion with score 1, by PPO's rule or that of `config`."""
  x = Experience(jnp.ones(1), kl[None], jnp.full((1, len(kl)), values), mask[None], 1.0)
  algorithm = Algorithm(batch_size=1, num_iterations=1, penalty=config)
  return [
    np.asarray(rule(x, algorithm, Hypers(gamma=gamma, gae_lambda=1.0)).advantages[0])
    for rule in (RULES["returns"], ppo.advantages)
  ]


def test_the_kl_of_a_tools_tokens_is_in_no_return():
  """As in slime#1370, where it was added to that of every token before."""
  kl = jnp.array([1.0, 1.0, 100.0, jnp.nan, 1.0, 1.0])
  for found in advantages_of(K1, kl, WITH_TOOL, gamma=1.0):
    np.testing.assert_allclose(found[WITH_TOOL], [-3.0, -2.0, -1.0, 0.0])


def test_a_return_goes_on_across_a_tools_tokens_and_is_not_discounted_there():
  """As in verl#6376, where each of them counted as the end of the completion."""
  for found in advantages_of(NONE, jnp.zeros(6), WITH_TOOL):
    np.testing.assert_allclose(found[WITH_TOOL], [0.125, 0.25, 0.5, 1.0])


def test_a_tools_tokens_change_no_advantage():
  """As in verl#7278, where the turns before them lost the score."""
  kl = jnp.array([0.1, 0.2, 9.0, 9.0, 0.3, 0.4])
  for penalty in (K1, KLPenalty("both", "exact"), KLPenalty("reward", "k1", "none", "token")):
    compact = advantages_of(penalty, kl[WITH_TOOL], jnp.ones(4, bool), values=0.7)
    for found, expected in zip(
      advantages_of(penalty, kl, WITH_TOOL, values=0.7), compact, strict=True
    ):
      np.testing.assert_allclose(found[WITH_TOOL], expected, rtol=1e-6)


def test_a_score_is_at_the_last_token_of_the_policy_though_a_tool_has_the_last_word():
  """As in miles#1827, where a discount of 0 lost it, and values of a tool's tokens were read."""
  mask = jnp.array([True, False, True, False, False])
  for found in advantages_of(NONE, jnp.zeros(5), mask, gamma=0.0):
    np.testing.assert_allclose(found[mask], [0.0, 1.0])


def test_group_deviation_is_the_mean_of_what_divides_the_scores():
  found = advantage_rules.group_deviation(SCORES, jnp.ones(SCORES.shape, bool), 2)
  np.testing.assert_allclose(found, np.sqrt(0.5), rtol=1e-6)


def rollout_of(lengths, finished, max_len=4):
  mask = jnp.arange(max_len)[None] < jnp.array(lengths)[:, None]
  prompts = jnp.ones((len(lengths), 1), jnp.int32)
  zeros = jnp.zeros(mask.shape)
  tokens = jnp.concatenate([prompts, jnp.arange(mask.size).reshape(mask.shape)], axis=1)
  return Rollout(tokens, prompts > 0, mask, jnp.array(finished), zeros, zeros)


def test_scores_pay_for_length_and_for_a_missing_end():
  rollout = rollout_of([1, 3, 4, 4], [True, True, True, False])

  def shaped(**settings):
    return preparation.shaped_scores(SCORES, rollout, Hypers(**settings))

  np.testing.assert_array_equal(shaped(), SCORES)
  np.testing.assert_allclose(shaped(overlong_buffer=2.0), SCORES - np.array([0, 0.5, 1, 1]))
  np.testing.assert_allclose(shaped(missing_eos_penalty=0.3), SCORES - np.array([0, 0, 0, 0.3]))
  np.testing.assert_allclose(shaped(length_penalty=0.1), SCORES - 0.1 * np.array([1, 3, 4, 4]))
  # What was given is not the policy's length, and brings the limit nearer.
  rollout = rollout._replace(completion_mask=rollout.completion_mask.at[1, 0].set(False))
  np.testing.assert_allclose(shaped(length_penalty=0.1), SCORES - 0.1 * np.array([1, 2, 4, 4]))
  np.testing.assert_allclose(shaped(overlong_buffer=2.0), SCORES - np.array([0, 0.5, 1, 1]))


def test_groups_of_equal_scores_give_way_to_others():
  scores = jnp.array([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 2.0, 1.0])
  rollout = rollout_of([4] * 8, [True] * 8)
  kept, kept_scores, share = preparation.informative_groups(
    rollout, scores, jnp.ones(8, bool), group_size=2, batch_size=4
  )
  np.testing.assert_array_equal(kept_scores, [0.0, 1.0, 2.0, 1.0])
  np.testing.assert_array_equal(kept.tokens, rollout.tokens[jnp.array([2, 3, 6, 7])])
  assert share == 0.5


def config_class_of(path):
  return reinforce.Config if path.stem in ("max_entropy", "tree") else grpo.Config


def config_of_preset(path):
  before = set(flags.FLAGS)
  common.define_flags(config_class_of(path))
  try:
    flags.FLAGS(["program", f"--flagfile={path}"])
    return common.config_from_flags(config_class_of(path))
  finally:
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


DECODER = DecoderConfig(
  vocab_size=7, width=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8, max_len=8
)


def traced_update(config):
  """Returns the shapes of the metrics of one update, which is traced and not run."""
  policy = policy_model(DECODER)
  params = {"policy": policy.init(jax.random.key(0))}
  state = learner.init_state(config.algorithm(), config.hypers(), params, jax.random.key(1))
  num_rows = config.algorithm().samples
  update = learner.make_update_fn(config.algorithm(), policy, None, policy)
  frozen = {"reference": params["policy"], "base": {}}
  rollout = rollout_of([4] * num_rows, [True] * num_rows)
  _, metrics = jax.eval_shape(update, state, frozen, rollout, jnp.zeros(num_rows))
  return metrics


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_a_configuration_that_the_learner_takes(path):
  config = config_of_preset(path)
  assert config != config_class_of(path)()
  metrics = traced_update(config)
  assert ("rollout/informative_groups" in metrics) == (config.algorithm().oversampling > 1)
  assert ("controller/effective_beta" in metrics) == (config.kl_placement != "none")


def test_presets_have_the_penalties_of_their_papers():
  penalties = {path.stem: config_of_preset(path).penalty() for path in PRESETS}
  assert str(penalties["deepseekmath"]) == "loss/k3/none/token"
  assert penalties["rloo"] == penalties["reinforce_plus_plus"] == penalties["bond"] == K1
  assert {str(penalties[name]) for name in ("dr_grpo", "dapo", "gspo", "cispo")} == {"none"}


def test_critic_free_experiments_have_no_value_model_and_ppo_has_one():
  assert "value/loss" not in traced_update(reinforce.Config(batch_size=4))
  assert ppo.Config().sources().has_value_model


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"group_size": 1}, "takes two or more"),
    ({"batch_size": 12}, "not a multiple of --group_size=8"),
    ({"advantage": "returns", "group_size": 1, "oversampling": 2}, "--oversampling"),
    ({"whiten_advantages": True}, "nothing reads it with --advantage=group_relative"),
    (
      {
        "kl_placement": "reward",
        "kl_estimator": "k1",
        "kl_correction": "none",
        "kl_refresh": "minibatch",
      },
      "needs an advantage per token",
    ),
    ({"advantage": "best_of_n"}, "reads the ratio to the reference from the KL in the reward"),
    ({"best_of": 2.0}, "nothing reads it with --advantage=group_relative"),
  ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    grpo.Config(**settings)


REF = np.array([0.02, 0.3, 0.08, 0.25, 0.05, 0.2, 0.1], np.float32)
PLACES = np.array([6.0, 0.0, 4.0, 1.0, 5.0, 3.0, 3.0], np.float32)  # two are equal


@jax.jit
def followed(best_of, beta, forward_share):
  """Returns the policy [N] that the rule best_of_n leads to, from groups of completions."""
  algorithm = Algorithm(batch_size=8192, num_iterations=1, group_size=128, penalty=K1)
  hypers = Hypers(best_of=best_of, forward_share=forward_share)
  mask = jnp.ones((algorithm.batch_size, 1), bool)

  def step(logits, inputs):
    key, rate = inputs
    log_probs = jax.nn.log_softmax(logits)
    rows = jax.random.categorical(key, log_probs, shape=(len(mask),))
    kl = (log_probs - np.log(REF))[rows][:, None]
    x = Experience(jnp.asarray(PLACES)[rows], kl, jnp.zeros_like(kl), mask, beta)
    advantages = RULES["best_of_n"](x, algorithm, hypers).advantages[:, 0]
    # A step of the natural gradient: the mean advantage of each choice.
    total, count = (jnp.zeros(len(REF)).at[rows].add(y) for y in (advantages, 1.0))
    return logits + rate * total / jnp.maximum(count, 1), log_probs

  steps = jax.random.split(jax.random.key(0), 60), jnp.linspace(0.4, 0.05, 60)
  return jnp.exp(jax.lax.scan(step, jnp.log(REF), steps)[1][-20:]).mean(axis=0)


def distance(probs, others):
  return np.abs(probs - others).sum() / 2


@pytest.mark.parametrize(
  ("n", "share"), [(2.0, 0.0), (4.0, 0.0), (8.0, 0.0), (4.0, 0.5), (4.0, 1.0)]
)
def test_the_rule_best_of_n_leads_to_best_of_n(n, share):
  expected = bandits.best_of_n(REF, PLACES, n)
  assert distance(followed(n, 1.0, share), expected) < 0.01
  assert distance(REF, expected) > 0.1


def test_the_reference_is_known_from_the_groups_other_completions_alone():
  """As enumerated: the mean over all groups of three that a policy draws is right, ties and all."""
  ref, scores = np.array([0.5, 0.3, 0.2]), np.array([1.0, 0.0, 1.0])
  policy = np.array([0.2, 0.1, 0.7])
  groups = np.array(list(itertools.product(range(3), repeat=3)))
  chances = policy[groups].prod(axis=1, keepdims=True)
  found = advantage_rules.reference_chances(
    jnp.asarray(scores)[groups], jnp.log(policy / ref)[groups], jnp.ones(groups.shape, bool)
  )
  for i, expected in enumerate([(0.0, 0.7), (0.7, 0.3), (0.0, 0.7)]):
    own = (groups == i) * chances
    means = [(own * x).sum() / own.sum() for x in found]
    np.testing.assert_allclose(means, expected, rtol=1e-5)


def test_at_another_beta_the_rule_best_of_n_leads_to_a_tilt_of_its_reward():
  reward = np.log(bandits.best_of_n(REF, PLACES, 3.0) / REF)
  expected = jax.nn.softmax(np.log(REF) + reward / 2)
  for share in (0.0, 1.0):
    assert distance(followed(3.0, 2.0, share), expected) < 0.01


def test_a_completion_without_a_score_changes_nothing_in_the_rule_best_of_n():
  algorithm = Algorithm(batch_size=4, num_iterations=1, group_size=4, penalty=K1)
  hypers = Hypers(best_of=4.0, forward_share=0.5)
  mask = jnp.array([[True], [True], [True], [False]])
  advantages = [
    RULES["best_of_n"](
      Experience(jnp.array([1.0, 0.0, 2.0, odd]), KL[:, :1], KL[:, :1], mask, 1.0),
      algorithm,
      hypers,
    ).advantages[:3]
    for odd in (-5.0, 5.0)
  ]
  np.testing.assert_array_equal(*advantages)
