"""The gradient that each method really has, and what no method's update may depend on.

The first half runs one on-policy update of the learner on every batch that a small tree allows and
weighs it by its probability: the expected gradient, exact in float64. It is held against the
gradient of an objective. A table is the policy, one row of logits per prefix.
"""

import dataclasses
import functools
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_decoders import with_branches

from experiments import distill, grpo, ppo, reinforce
from klrl import ops
from klrl.algorithm import learner
from klrl.algorithm.policy_losses import POLICY_LOSSES
from klrl.exact import oracle
from klrl.models import Policy, ScalarModel, uniform_policy
from klrl.sampling import Rollout

TREE = oracle.make_tree(3, 3, eos_id=2)
LENGTHS = TREE.mask.sum(axis=1)
SCORES = np.sin(1.0 + np.arange(15)) + 0.5 * LENGTHS
WINS = (np.arange(15) % 4 == 1) * 1.0
GROUP_SIZE, BETA = 3, 0.5


def table(seed, columns=3):
  return np.random.default_rng(seed).normal(size=(7, columns)).squeeze()


LOGITS, REF, SAMPLER, VALUES = table(0), table(1), table(2), table(3, columns=1)


def tables(tree) -> tuple[Policy, ScalarModel]:
  """Returns a policy with params [S, V] and a value model with params [S]; prompts are one BOS."""
  children = jnp.maximum(tree.children, 0)

  @with_branches
  def look_up(params, tokens, mask):
    states = [jnp.zeros_like(tokens[:, 0])]
    for t in range(1, tokens.shape[1]):
      states.append(children[states[-1], tokens[:, t]])
    return jnp.asarray(params)[jnp.stack(states, axis=1)]

  unused = dict.fromkeys(("config", "init", "prefill", "unstack", "empty_cache", "grow", "decode"))
  policy = Policy(**unused, hidden=look_up, unembedding=lambda _: jnp.eye(tree.vocab_size))
  return policy, ScalarModel(None, None, None, values=look_up, scores=None)


def rollout_of(tree, rows, logits, sampler_logits) -> Rollout:
  """Returns the completions `rows` of the tree, with garbage in the padding of the log-probs."""
  mask = jnp.asarray(tree.mask)[rows]
  bos = jnp.zeros((len(rows), 1), jnp.int32)
  log_probs, sampler_log_probs = (
    jnp.where(mask, oracle.token_log_probs(tree, x)[rows], jnp.nan)
    for x in (logits, sampler_logits)
  )
  ends = (tree.mask & (tree.tokens == (-1 if tree.eos_id is None else tree.eos_id))).any(axis=1)
  return Rollout(
    tokens=jnp.concatenate([bos, jnp.asarray(tree.tokens)[rows]], axis=1),
    prompt_mask=bos == 0,
    completion_mask=mask,
    finished=jnp.asarray(ends)[rows],
    old_log_probs=log_probs,
    sampler_log_probs=sampler_log_probs,
  )


def make_config(module, **settings):
  """Returns the module's Config for batches of one group and a single step without clipping."""
  common = {"batch_size": GROUP_SIZE, "max_grad_norm": np.inf, "kl_every": 0}
  if module is not reinforce:
    common |= {"num_epochs": 1, "num_minibatches": 1}
  if module is grpo:
    common["group_size"] = settings.get("batch_size", GROUP_SIZE)
  return module.Config(**common | settings)


def preset(name, module=grpo, **settings):
  """Returns the configuration of experiments/presets with `settings` in place of its own."""
  path = pathlib.Path(grpo.__file__).parent / f"presets/{name}.flags"
  lines = [x[2:].partition("=") for x in path.read_text().splitlines() if x.startswith("--")]
  kinds = {field.name: field.type for field in dataclasses.fields(module.Config)}
  flags = {flag: kinds[flag](value) if equals else True for flag, equals, value in lines}
  return make_config(module, **flags | settings)


def first_gradient(config, tree, params, rollout, scores, *, reference, ref_params, sampler=None):
  """Returns what one update descends: Adam's first moment is a running mean of gradients."""
  policy, value_model = tables(tree)
  value_model = value_model if config.sources().has_value_model else None
  update = learner.make_update_after_sampling_fn(
    config.algorithm(), policy, value_model, reference or policy, sampler=sampler
  )
  state = learner.init_state(config.algorithm(), config.hypers(), params, jax.random.key(0))
  state, _ = update(state, {"reference": ref_params, "base": {}}, rollout, scores)
  return jax.tree.map(lambda x: x / 0.1, optax.tree.get(state.opt_state, "mu"))


def batches_of(tree, num_rows):
  return np.array(list(itertools.product(range(len(tree.tokens)), repeat=num_rows)))


def ascent(config, *, scores=SCORES, values=VALUES, sampler=LOGITS, reference=None, tree=TREE):
  """Returns [S, V], the mean over all batches of minus the gradient that the learner descends.

  The sampler makes its logits, by another arithmetic, of the parameters that the policy has.
  """
  batches = batches_of(tree, config.algorithm().samples)
  logits, ref, sampler = (x[: len(tree.depths)] for x in (LOGITS, REF, sampler))
  models = {"reference": reference, "ref_params": {} if reference else ref}
  policy, shift = tables(tree)[0], sampler - logits
  models["sampler"] = dataclasses.replace(
    policy,
    hidden=lambda params, *arguments, **named: policy.hidden(params + shift, *arguments, **named),
  )

  @jax.jit
  def mean(params, scores):
    def one(rows):
      rollout = rollout_of(tree, rows, logits, sampler)
      return first_gradient(config, tree, params, rollout, scores[rows], **models)["policy"]

    weights = jnp.exp(oracle.log_probs(tree, sampler)[batches].sum(axis=1))
    return -jnp.tensordot(weights, jax.vmap(one)(batches), 1)

  values = {"value": values} if config.sources().has_value_model else {}
  return mean({"policy": logits} | values, jnp.asarray(scores))


def gradient_of(objective, tree=TREE):
  return jax.jit(jax.grad(objective))(LOGITS[: len(tree.depths)])


def by_definition(credit, group_size=GROUP_SIZE, scores=SCORES, tree=TREE):
  """Returns [S, V], the mean of sum_i credit_i grad log pi(y_i) over groups.

  `credit(scores [K, G], lengths [K, G]) -> [K, G]`, for groups as a paper writes it. Its mean given
  y_i is the reward that is climbed in fact.
  """
  groups = batches_of(tree, group_size)
  log_probs = oracle.log_probs(tree, LOGITS[: len(tree.depths)])
  credits = credit(scores[groups], tree.mask.sum(axis=1)[groups])
  credits = np.exp(log_probs[groups].sum(axis=1, keepdims=True)) * credits
  frozen = np.bincount(groups.ravel(), credits.ravel())
  return gradient_of(lambda logits: (oracle.log_probs(tree, logits) * frozen).sum(), tree)


def standardised(scores):
  return (scores - scores.mean(1, keepdims=True)) / (scores.std(1, ddof=1, keepdims=True) + 1e-4)


def assert_same(found, expected):
  size = np.linalg.norm(expected)
  error = np.linalg.norm(found - expected) / size
  assert size > 1e-2 and error < 1e-6, error


def mean_score(logits):
  return oracle.expected_score(TREE, logits, SCORES)


def regularised(logits):
  return mean_score(logits) - BETA * oracle.sequence_kl(TREE, logits, REF)


@pytest.fixture(autouse=True)
def in_float64():
  with jax.enable_x64(True):
    yield


SUM, NO_KL = {"loss_aggregation": "sequence_mean_token_sum"}, {"kl_placement": "none"}
LEAVE_ONE_OUT = {"advantage": "leave_one_out"}
UNSHAPED_PPO = {"batch_size": 1, "whiten_advantages": False} | SUM


@pytest.mark.parametrize(
  ("config", "options"),
  [
    (make_config(reinforce, **SUM), {}),
    (preset("rloo"), {}),
    (preset("rloo", sampler_correction="sequence", sampler_cap=np.inf), {"sampler": SAMPLER}),
    (preset("reinforce_plus_plus", whiten_advantages=False, batch_size=1, **SUM), {}),
    (make_config(ppo, gae_lambda=1.0, **UNSHAPED_PPO), {}),
  ],
  ids=["reinforce", "rloo", "rloo_of_another_sampler", "returns", "gae_1_of_any_values"],
)
def test_these_climb_the_regularised_objective(config, options):
  assert_same(ascent(config, **options), gradient_of(regularised))


@pytest.mark.parametrize("trust_region", [x for x in POLICY_LOSSES if x != "regression"])
def test_at_the_old_policy_every_trust_region_climbs_the_score(trust_region):
  config = make_config(grpo, trust_region=trust_region, **LEAVE_ONE_OUT, **NO_KL, **SUM)
  assert_same(ascent(config), gradient_of(mean_score))


def test_regression_climbs_a_likelihood_weighted_by_the_score_less_the_cost_of_the_kl():
  scale = 2.0
  settings = {"trust_region": "regression", "trust_region_beta": scale, "batch_size": 2}
  config = preset("rloo", beta=BETA, **settings)
  old, ref = (oracle.log_probs(TREE, x) for x in (LOGITS, REF))
  totals = SCORES - BETA * (old - ref)
  # The baseline is the total of another completion, on which the weight of this one has no hold.
  weights = jnp.exp(old + totals / scale) * (jnp.exp(old) @ jnp.exp(-totals / scale))

  def likelihood(logits):
    return scale * weights @ oracle.log_probs(TREE, logits)

  assert_same(ascent(config), gradient_of(likelihood))


def summed(divergence, weights):
  """Returns f(logits), the sum over prefixes of the divergence [S] times `weights` [S]."""
  return lambda x: (weights * divergence(jax.nn.softmax(x), jax.nn.softmax(REF))).sum()


def symmetric_js(p, q):
  m = (p + q) / 2
  return (p * jnp.log(p / m) + q * jnp.log(q / m)).sum(axis=1) / 2


@pytest.mark.parametrize(
  ("choice", "objective"),
  [
    ("likelihood", lambda x: oracle.sequence_kl(TREE, REF, x)),
    ("forward", lambda x: oracle.sequence_kl(TREE, REF, x)),
    ("jensen_shannon", lambda x: summed(symmetric_js, oracle.visits(TREE, REF))(x)),
  ],
)
def test_on_completions_of_the_reference_a_divergence_from_it_is_descended(choice, objective):
  texts = {"pretrain_data": "reference", "ptx_coef": BETA, "ptx_divergence": choice}
  config = make_config(grpo, batch_size=1, advantage="returns", **texts, **NO_KL, **SUM)
  policy, _ = tables(TREE)
  update_with = functools.partial(
    learner.make_update_after_sampling_fn, config.algorithm(), policy, None, policy
  )
  state = learner.init_state(
    config.algorithm(), config.hypers(), {"policy": LOGITS}, jax.random.key(0)
  )

  @jax.jit
  def one(row):
    def rehearse(params, prompts, prompt_mask, key, *, temperature):
      return rollout_of(TREE, row[None], params, params)

    frozen, rollout = {"reference": REF, "base": {}}, rollout_of(TREE, row[None], LOGITS, LOGITS)
    trained, _ = update_with(rehearse)(state, frozen, rollout, jnp.zeros(1))
    return optax.tree.get(trained.opt_state, "mu")["policy"] / 0.1

  gradients = jax.vmap(one)(jnp.arange(15))
  weights = jnp.exp(oracle.log_probs(TREE, REF))
  assert_same(jnp.tensordot(weights, gradients, 1), BETA * gradient_of(objective))


def without_baseline(trust_region):
  return make_config(
    grpo, batch_size=1, trust_region=trust_region, advantage="returns", **NO_KL, **SUM
  )


@pytest.mark.parametrize("added", [0.0, 2.0])
def test_a_centred_score_climbs_where_its_sampler_would_whatever_is_added_to_the_scores(added):
  expected = jax.jit(jax.grad(mean_score))(SAMPLER)
  found = ascent(without_baseline("centred"), scores=SCORES + added, sampler=SAMPLER)
  assert_same(found, expected)
  plain = ascent(without_baseline("none"), scores=SCORES + added, sampler=SAMPLER)
  assert np.linalg.norm(plain - expected) > (1 + added) * np.linalg.norm(expected)


def test_lambda_below_one_climbs_the_score_where_the_values_are_true():
  probs, through = np.exp(oracle.log_probs(TREE, LOGITS)), np.zeros((2, len(TREE.depths)))
  for t in range(TREE.horizon):
    rows = TREE.mask[:, t]
    for total, weights in zip(through, (probs * SCORES, probs), strict=True):
      np.add.at(total, TREE.states[rows, t], weights[rows])
  config = make_config(ppo, gae_lambda=0.5, **UNSHAPED_PPO, **NO_KL)
  assert_same(ascent(config, values=through[0] / through[1]), gradient_of(mean_score))


def test_dr_grpo_climbs_the_score_times_what_its_mean_and_constant_take():
  shrunk = (1 - 1 / GROUP_SIZE) / TREE.horizon
  assert_same(ascent(preset("dr_grpo")), shrunk * gradient_of(mean_score))


def test_a_mean_within_completions_divides_the_score_by_their_length():
  baseline = mean_score(LOGITS)
  expected = gradient_of(lambda x: oracle.expected_score(TREE, x, (SCORES - baseline) / LENGTHS))
  assert_same(ascent(preset("gspo", **LEAVE_ONE_OUT)), expected)
  # What a constant added to all scores does: nothing; and no multiple of the score's gradient.
  plain = gradient_of(mean_score)
  cosine = (plain * expected).sum() / np.linalg.norm(plain) / np.linalg.norm(expected)
  assert cosine < 0.99, cosine


@pytest.mark.parametrize(
  ("name", "credit"),
  [
    ("gspo", lambda scores, lengths: standardised(scores) / lengths / GROUP_SIZE),
    ("cispo", lambda scores, lengths: standardised(scores) / lengths.sum(1, keepdims=True)),
  ],
)
def test_group_methods_climb_what_their_papers_credit(name, credit):
  assert_same(ascent(preset(name)), by_definition(credit))


def multiplier(p, group_size, *, ddof, eps):
  """Returns the mean of sum_i A_i d log pi(y_i) / dp / G where y_i wins with probability p."""
  total = 0.0
  for wins in range(1, group_size):
    share = wins / group_size
    deviation = math.sqrt(share * (1 - share) * group_size / (group_size - ddof)) + eps
    probability = math.comb(group_size, wins) * p**wins * (1 - p) ** (group_size - wins)
    total += probability * share * (1 - share) / deviation
  return total / (p * (1 - p))


def test_grpos_deviation_multiplies_the_gradient_of_the_win_rate_and_not_that_of_the_kl():
  # AF23's figure, of the population's deviation.
  assert abs(multiplier(0.25, 8, ddof=0, eps=0.0) - 2.026116) < 1e-6
  win_rate = lambda logits: oracle.expected_score(TREE, logits, WINS)  # noqa: E731
  factor = multiplier(float(win_rate(LOGITS)), GROUP_SIZE, ddof=1, eps=1e-4)
  assert abs(factor - 1) > 0.1, factor
  for config, kl in (
    (make_config(grpo, **SUM), lambda x: BETA * oracle.token_kl(TREE, x, REF)),
    (
      preset("deepseekmath", **SUM),
      lambda x: 0.04 * oracle.token_kl(TREE, REF, x, prefix_logits=LOGITS),
    ),
  ):
    expected = factor * gradient_of(win_rate) - gradient_of(kl)
    assert_same(ascent(config, scores=WINS), expected)


def test_deepseekmath_holds_long_completions_less():
  probs, ref = np.exp(oracle.log_probs(TREE, LOGITS)), oracle.token_log_probs(TREE, REF)

  def kl(logits):
    log_ratio = ref - oracle.token_log_probs(TREE, logits)
    k3 = jnp.exp(log_ratio) - 1 - log_ratio
    return (probs / LENGTHS * k3.sum(axis=1)).sum()

  credit = by_definition(lambda scores, lengths: standardised(scores) / lengths / GROUP_SIZE)
  found = ascent(preset("deepseekmath", beta=BETA))
  assert_same(found, credit - BETA * gradient_of(kl))


def test_dapos_drawing_anew_multiplies_and_its_overlong_scores_are_what_it_climbs():
  tree = oracle.make_tree(3, 2, eos_id=2)
  scores = (np.arange(7) % 3 == 1) * 1.0
  climbed = scores - (tree.mask.sum(axis=1) == tree.horizon)
  groups = batches_of(tree, 2)
  probs = np.exp(oracle.log_probs(tree, LOGITS[:3])[groups].sum(axis=1))
  equal = probs[climbed[groups[:, 0]] == climbed[groups[:, 1]]].sum()
  expected = by_definition(
    lambda scores, lengths: standardised(scores) / lengths.sum(1, keepdims=True), 2, climbed, tree
  )
  # The second group is trained on where the first has equal scores.
  found = ascent(preset("dapo", batch_size=2), scores=scores, tree=tree)
  assert_same(found, (1 + equal) * expected)


def js(logits):
  """Returns Agarwal et al., eq. 1, with 1/4 of the teacher, at the prefixes of LOGITS."""
  student, teacher = jax.nn.softmax(logits), jax.nn.softmax(REF)
  mixture = 0.25 * teacher + 0.75 * student
  per_token = 0.25 * teacher * jnp.log(teacher / mixture)
  per_token += 0.75 * student * jnp.log(student / mixture)
  return (oracle.visits(TREE, LOGITS) * per_token.sum(axis=1)).sum()


def hellinger(logits):
  """Returns four times the squared Hellinger distance at the prefixes of LOGITS."""
  student, teacher = jnp.sqrt(jax.nn.softmax(logits)), jnp.sqrt(jax.nn.softmax(REF))
  return 2 * (oracle.visits(TREE, LOGITS) * ((student - teacher) ** 2).sum(axis=1)).sum()


@pytest.mark.parametrize(
  ("settings", "divergence"),
  [
    ({}, lambda x: oracle.token_kl(TREE, x, REF)),
    (
      {"kl_correction": "prefix", "kl_credit": "sequence"},
      lambda x: oracle.sequence_kl(TREE, x, REF),
    ),
    (
      {"kl_placement": "reward", "kl_estimator": "centred"},
      lambda x: oracle.token_kl(TREE, x, REF),
    ),
    ({"kl_divergence": "forward"}, lambda x: oracle.token_kl(TREE, REF, x, prefix_logits=LOGITS)),
    ({"kl_divergence": "jensen_shannon", "jsd_weight": 0.25}, js),
    ({"kl_divergence": "hellinger"}, hellinger),
  ],
  ids=["reverse", "sequence", "sampled", "forward", "jensen_shannon", "hellinger"],
)
def test_distillation_descends_the_divergence_it_names(settings, divergence):
  config = make_config(distill, batch_size=1, **settings, **SUM)
  assert_same(-ascent(config, scores=np.zeros(15)), gradient_of(divergence))


def test_the_certainty_of_the_reference_weights_a_loss():
  probs = jax.nn.softmax(REF)
  certainty = (1 + (probs * jnp.log(probs)).sum(axis=1) / np.log(3)) ** 0.5
  whole = {"kl_correction": "prefix", "kl_credit": "sequence"}
  by_certainty = {"kl_weight": "certainty", "kl_weight_power": 0.5, **whole}
  config = make_config(distill, batch_size=1, **by_certainty, **SUM)

  def weighted(logits):
    return oracle.summed_divergence(TREE, lambda *x: certainty * ops.kl_of(*x), logits, REF)

  assert_same(-ascent(config, scores=np.zeros(15)), gradient_of(weighted))


def test_the_slope_of_a_divergence_in_the_reward_is_weighted_by_position():
  choice = {"kl_credit": "token", "kl_divergence": "chi_squared", "kl_weight": "position"}
  config = preset("max_entropy", reinforce, beta=BETA, **choice, **SUM)

  def penalised(logits):
    p, q = jax.nn.softmax(logits), jax.nn.softmax(REF)
    chi_squared = ((p - q) ** 2 / (2 * q)).sum(axis=1) / (1 + TREE.depths)
    return mean_score(logits) - BETA * (oracle.visits(TREE, LOGITS) * chi_squared).sum()

  assert_same(ascent(config), gradient_of(penalised))


def test_a_uniform_reference_is_entropy_and_a_cost_of_length():
  config = preset("max_entropy", reinforce, **SUM)

  def objective(logits):
    entropy, length = oracle.entropy(TREE, logits), oracle.expected_length(TREE, logits)
    return mean_score(logits) + 0.1 * (entropy - np.log(3) * length)

  assert_same(ascent(config, reference=uniform_policy(3, 4)), gradient_of(objective))
