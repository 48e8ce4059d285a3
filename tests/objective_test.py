"""Every KL penalty: its claims against exact sums, its refusals, its padding."""

import functools
import html
import itertools
import json
import pathlib
import re
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from experiments import ppo
from klrl.algorithm import Hypers, kl_terms, objective
from klrl.algorithm.kl_terms import TokenTerms
from klrl.algorithm.objective import KLPenalty
from klrl.algorithm.terms import Experience
from klrl.errors import UserError
from klrl.exact import oracle
from klrl.report.of_run import write_report
from klrl.run.summary import write_summary

TREES = {
  "bandit": oracle.make_tree(4, 1),
  "given": oracle.make_tree(2, 4),
  "short": oracle.make_tree(3, 2, eos_id=0),
  "tree_a": oracle.make_tree(3, 3, eos_id=2),
}
# Tokens that no policy chooses, by the prefix before them: after 0 come a 1 and a 0, after 11 a 1,
# and 100 ends with a 0, all of which are holes of a mask.
GIVEN = np.full(len(TREES["given"].depths), -1)
GIVEN[[1, 4, 6, 11]] = 1, 0, 1, 0
# A loss term reads no --kl_refresh.
CELLS = [(penalty, "iteration") for penalty in objective.DEFINED]
CELLS += [(penalty, "minibatch") for penalty in objective.DEFINED if penalty.in_reward]
CLAIMS = [objective.audit(penalty, kl_refresh=refresh) for penalty, refresh in CELLS]
PRODUCT = [
  KLPenalty(*fields)
  for fields in itertools.product(
    objective.PLACEMENTS, objective.ESTIMATORS, objective.CORRECTIONS, objective.CREDITS
  )
]


def with_holes(f, chosen):
  """Returns `f` of terms whose mask is `chosen`, with garbage that carries gradient in the holes.

  A policy gives a token that it does not choose some probability, and this is nobody's affair.
  """

  def of_chosen(terms):
    garbage = terms.log_probs.sum(axis=-1, keepdims=True) - 2.0
    fields = {
      name: jnp.where(terms.mask & ~chosen, (1 + i) * garbage, x)
      for i, (name, x) in enumerate(terms._asdict().items())
      if x is not None and name != "mask"
    }
    return f(terms._replace(**fields, mask=terms.mask & chosen))

  return of_chosen


@functools.cache
def enumerated(name):
  """Returns f(logits, old, ref) -> (values [cells], KL, gradients [cells, S, V], targets by name).

  All cells are one program: the gradient of cell k is that of a surrogate with weight on k alone.
  To the targets a given token is one of probability 1, and to the cells a hole of the mask.
  """
  tree = TREES[name]
  chosen = tree.mask & (GIVEN[tree.states] < 0) if name == "given" else tree.mask
  surrogates, estimates = (
    [with_holes(make(penalty, kl_refresh=refresh), chosen) for penalty, refresh in CELLS]
    for make in (kl_terms.surrogate, kl_terms.estimate)
  )

  @jax.jit
  def f(logits, old_logits, ref_logits):
    def gradient(weights):
      def weighted(terms):
        return jnp.tensordot(weights, jnp.stack([each(terms) for each in surrogates]), axes=1)

      return oracle.expected_gradient(tree, weighted, logits, ref_logits, old_logits=old_logits)

    values = [
      oracle.expected_value(tree, each, logits, ref_logits, old_logits=old_logits)
      for each in estimates
    ]
    sequence, token, at_old, to_old, forward = (
      jax.grad(kl)(logits)
      for kl in (
        lambda x: oracle.sequence_kl(tree, x, ref_logits),
        lambda x: oracle.token_kl(tree, x, ref_logits),
        lambda x: oracle.token_kl(tree, x, ref_logits, prefix_logits=old_logits),
        lambda x: oracle.token_kl(tree, x, old_logits, prefix_logits=old_logits),
        lambda x: oracle.token_kl(tree, ref_logits, x, prefix_logits=logits),
      )
    )
    targets = {
      objective.SEQUENCE: sequence,
      objective.TOKEN: token,
      objective.TOKEN_AT_OLD: at_old,
      objective.TOKEN_FORWARD: forward,
      objective.ZERO: jnp.zeros_like(logits),
      objective.FUTURE: sequence - token,
      objective.SEQUENCE_LESS_FORWARD: sequence - forward,
      objective.TOKEN_LESS_FORWARD: token - forward,
      objective.STALE_TOKEN: at_old - to_old,
    }
    kl = oracle.sequence_kl(tree, logits, ref_logits)
    return jnp.stack(values), kl, jax.vmap(gradient)(jnp.eye(len(CELLS))), targets

  return f


def policies(name, seed, scale, drift):
  """Returns random (logits, old logits, reference logits), [S, V] each."""
  noise = np.random.default_rng(seed).normal(size=(3, *TREES[name].children.shape))
  logits = scale * noise[0], scale * noise[0] + drift * noise[1], scale * noise[2]
  if name == "given":
    states = np.flatnonzero(GIVEN >= 0)
    for x in logits:
      x[states] = -np.inf
      x[states, GIVEN[states]] = 0.0
  return logits


def tree_a():
  """Returns the policies of TREE-A: theta, old, ref."""
  s, a = np.arange(1.0, 8.0)[:, None], np.arange(1.0, 4.0)[None]
  theta = 0.9 * np.sin(1.7 * s + 2.3 * a)
  return theta, theta + 0.6 * np.sin(3.1 * s * a), 0.9 * np.cos(1.1 * s - 0.7 * a)


def on_and_off_policy(name, logits, old_logits, ref_logits):
  """Yields (whether on-policy, what `enumerated` returns as numpy)."""
  with jax.enable_x64(True):
    for old in (logits, old_logits):
      yield old is logits, jax.device_get(enumerated(name)(logits, old, ref_logits))


# Few examples: each is all cells of a tree, on random policies of every sharpness.
examples = hypothesis.settings(derandomize=True, deadline=None, database=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("name", TREES)
@examples
@hypothesis.given(seed=seeds, scale=st.floats(0.1, 3.0), drift=st.floats(0.01, 1.0))
def test_value_and_gradient_are_what_the_audit_claims(name, seed, scale, drift):
  logits = policies(name, seed, scale, drift)
  for on_policy, (values, kl, gradients, targets) in on_and_off_policy(name, *logits):
    for cell, claim, value, gradient in zip(CELLS, CLAIMS, values, gradients, strict=True):
      named = claim.gradient if on_policy else claim.off_policy_gradient
      if named != objective.NO_DIVERGENCE:
        np.testing.assert_allclose(gradient, targets[named], rtol=0, atol=1e-9, err_msg=str(cell))
      if named == objective.SEQUENCE:
        error = np.linalg.norm(gradient - targets[named]) / np.linalg.norm(targets[named])
        assert error < 1e-9, cell
      if claim.unbiased_value if on_policy else claim.off_policy_unbiased_value:
        np.testing.assert_allclose(value, kl, rtol=0, atol=1e-9, err_msg=str(cell))


def test_what_is_claimed_to_be_wrong_is_wrong_on_tree_a():
  for on_policy, (values, kl, gradients, targets) in on_and_off_policy("tree_a", *tree_a()):
    scale = np.linalg.norm(targets[objective.SEQUENCE])
    for cell, claim, value, gradient in zip(CELLS, CLAIMS, values, gradients, strict=True):
      named = claim.gradient if on_policy else claim.off_policy_gradient
      for other, target in targets.items():
        if named not in targets or not np.allclose(target, targets[named], atol=1e-12):
          assert np.linalg.norm(gradient - target) > 1e-3 * scale, (cell, on_policy, other)
      if not (claim.unbiased_value if on_policy else claim.off_policy_unbiased_value):
        assert abs(value - kl) > 1e-3 * kl, (cell, on_policy)


@pytest.mark.parametrize("name", TREES)
@examples
@hypothesis.given(seed=seeds, scale=st.floats(5.0, 15.0), exclude=st.booleans())
def test_policies_that_exclude_tokens_or_nearly_do_give_no_nan(name, seed, scale, exclude):
  logits, old_logits, ref_logits = policies(name, seed, scale, 1.0)
  if exclude:
    states, tokens = np.arange(len(logits)), logits.argmin(axis=1)
    logits[states, tokens] = old_logits[states, tokens] = -np.inf
    if logits.shape[1] > 2:  # Pi reaches prefixes that the older policy does not.
      old_logits[0, (tokens[0] + 1) % logits.shape[1]] = -np.inf
  for _, (values, kl, gradients, targets) in on_and_off_policy(
    name, logits, old_logits, ref_logits
  ):
    assert np.isfinite(values).all() and np.isfinite(kl) and np.isfinite(gradients).all()
    for target in (objective.SEQUENCE, objective.TOKEN, objective.TOKEN_AT_OLD):
      assert np.isfinite(targets[target]).all()


OTHERS = [x for x in objective.DIVERGENCES if x != "reverse"]
SHAPE = kl_terms.Shape(jsd_weight=0.3, kl_alpha=0.7)


def plainly(divergence, log_probs, ref_log_probs):
  """Returns the divergence [...] by its textbook formula, with the coefficients of SHAPE."""
  p, q = jnp.exp(log_probs), jnp.exp(ref_log_probs)
  mixture = 0.7 * p + 0.3 * q
  summands = {
    "forward": q * jnp.log(q / p),
    "jensen_shannon": 0.7 * p * jnp.log(p / mixture) + 0.3 * q * jnp.log(q / mixture),
    "chi_squared": (p - q) ** 2 / (2 * q),
    "alpha": (p - p**0.3 * q**0.7) / (0.7 * 0.3),
    "hellinger": 2 * (jnp.sqrt(p) - jnp.sqrt(q)) ** 2,
  }
  return summands[divergence].sum(axis=-1)


CELLS_OF_OTHERS = [  # of each of OTHERS
  (penalty, refresh)
  for penalty in objective.DEFINED_OF_OTHERS
  if penalty.divergence == OTHERS[0]
  for refresh in ("iteration", "minibatch")
  if refresh == "iteration" or penalty.in_reward
]


@jax.jit
def others_enumerated(index, logits, old_logits, ref_logits):
  """Returns (values [cells], summed divergence, gradients [cells, S, V], targets) of TREE-A."""
  tree, rows = TREES["tree_a"], [kl_terms.DIVERGENCES[name] for name in OTHERS]

  def switched(choices):  # One program for all of them, whose divergence is OTHERS[index].
    return lambda *arrays: jax.lax.switch(index, choices, *arrays)

  exact = switched([functools.partial(row.exact, hypers=SHAPE) for row in rows])
  slope = switched([functools.partial(row.slope, hypers=SHAPE) for row in rows])
  plain = switched([functools.partial(plainly, name) for name in OTHERS])

  surrogates, estimates = (
    [make(penalty, kl_refresh=refresh, slope=slope) for penalty, refresh in CELLS_OF_OTHERS]
    for make in (kl_terms.surrogate, kl_terms.estimate)
  )

  def of_cell(weights):
    def weighted(fs):
      return lambda terms: jnp.tensordot(weights, jnp.stack([f(terms) for f in fs]), axes=1)

    arguments = {"old_logits": old_logits, "divergence": exact}
    return (
      oracle.expected_value(tree, weighted(estimates), logits, ref_logits, **arguments),
      oracle.expected_gradient(tree, weighted(surrogates), logits, ref_logits, **arguments),
    )

  truth, summed = jax.value_and_grad(
    lambda x: oracle.summed_divergence(tree, plain, x, ref_logits)
  )(logits)
  whole, token, at_old = (
    jax.grad(f)(logits)
    for f in (
      lambda x: oracle.completion_divergence(tree, plain, x, ref_logits),
      lambda x: oracle.token_divergence(tree, plain, x, ref_logits),
      lambda x: oracle.token_divergence(tree, plain, x, ref_logits, prefix_logits=old_logits),
    )
  )
  targets = (whole, summed, token, at_old, summed - token, jnp.zeros_like(logits))
  values, gradients = jax.vmap(of_cell)(jnp.eye(len(CELLS_OF_OTHERS)))
  return values, truth, gradients, targets


@pytest.mark.parametrize("divergence", OTHERS)
def test_other_divergences_are_what_the_audit_claims(divergence):
  index = OTHERS.index(divergence)
  named_targets = [f(divergence) for f in objective.GRADIENTS_OF_OTHERS]
  theta, old, ref = tree_a()
  for on_policy in (True, False):
    with jax.enable_x64(True):
      values, truth, gradients, targets = others_enumerated(
        index, theta, theta if on_policy else old, ref
      )
    targets = dict(zip(named_targets, targets, strict=True))
    unit = np.linalg.norm(targets[objective.summed_gradient(divergence)])
    for (penalty, refresh), value, gradient in zip(CELLS_OF_OTHERS, values, gradients, strict=True):
      claim = objective.audit(penalty._replace(divergence=divergence), kl_refresh=refresh)
      named = claim.gradient if on_policy else claim.off_policy_gradient
      for target, exact in targets.items():
        # On-policy the prefixes of old are pi's own.
        same = target == named or np.allclose(exact, targets.get(named, np.nan), atol=1e-12)
        error = np.linalg.norm(gradient - exact) / unit
        assert error < 1e-12 if same else error > 1e-3, (penalty, refresh, on_policy, target)
      if refresh == "iteration":
        unbiased = claim.unbiased_value if on_policy else claim.off_policy_unbiased_value
        assert np.isclose(value, truth, rtol=1e-12) == unbiased, (penalty, on_policy)


WEIGHTED = [
  KLPenalty(*name.split("/"), weight="certainty")
  for name in (
    "reward/k1/none/sequence",
    "reward/k1/none/token",
    "reward/exact/none/sequence",
    "loss/k2/none/token",
    "loss/k3/none/token",
    "loss/exact/none/token",
    "loss/k3/token/token",
    "loss/k1/prefix/sequence",
    "loss/exact/prefix/sequence",
    "both/k3/none/sequence",
    "both/exact/none/sequence",
  )
]


@jax.jit
def weighted_enumerated(logits, old_logits, ref_logits):
  """Returns (gradients of WEIGHTED [cells, S, V], targets) of TREE-A, by the certainty squared."""
  tree = TREES["tree_a"]
  probs = jax.nn.softmax(ref_logits)
  certainty = (1 + (probs * jnp.log(probs)).sum(axis=-1) / np.log(3)) ** 2
  surrogates = [kl_terms.surrogate(penalty) for penalty in WEIGHTED]

  def gradient(choice):
    def f(terms):
      terms = terms._replace(weights=certainty[tree.states])
      return jnp.tensordot(choice, jnp.stack([each(terms) for each in surrogates]), axes=1)

    return oracle.expected_gradient(tree, f, logits, ref_logits, old_logits=old_logits)

  def reverse(log_probs, ref_log_probs):
    return certainty * kl_terms.reverse_kl(log_probs, ref_log_probs, SHAPE)

  def forward(log_probs, ref_log_probs):
    return certainty * kl_terms.forward_kl(log_probs, ref_log_probs, SHAPE)

  def token(divergence, other, prefixes):
    return jax.grad(
      lambda x: oracle.token_divergence(tree, divergence, x, other, prefix_logits=prefixes)
    )(logits)

  summed = jax.grad(lambda x: oracle.summed_divergence(tree, reverse, x, ref_logits))(logits)
  at_old = token(reverse, ref_logits, old_logits)
  targets = {
    objective.SEQUENCE: summed,
    objective.TOKEN: token(reverse, ref_logits, logits),
    objective.TOKEN_AT_OLD: at_old,
    objective.TOKEN_FORWARD: token(forward, ref_logits, logits),
    objective.FUTURE: summed - token(reverse, ref_logits, logits),
    objective.STALE_TOKEN: at_old - token(reverse, old_logits, old_logits),
  }
  return jax.vmap(gradient)(jnp.eye(len(WEIGHTED))), targets


def test_a_weight_multiplies_the_divergence_at_each_prefix_as_the_audit_claims():
  theta, old, ref = tree_a()
  for on_policy in (True, False):
    with jax.enable_x64(True):
      gradients, targets = weighted_enumerated(theta, theta if on_policy else old, ref)
    unit = np.linalg.norm(targets[objective.SEQUENCE])
    named = {objective.weighted_gradient(x, "certainty"): y for x, y in targets.items()}
    for penalty, gradient in zip(WEIGHTED, gradients, strict=True):
      claim = objective.audit(penalty)
      name = claim.gradient if on_policy else claim.off_policy_gradient
      for target, exact in named.items():
        same = target == name or np.allclose(exact, named.get(name, np.nan), atol=1e-12)
        error = np.linalg.norm(gradient - exact) / unit
        assert error < 1e-12 if same else error > 1e-3, (penalty, on_policy, target)


def test_a_weight_is_told_and_the_divergence_of_whole_completions_has_none():
  refused = KLPenalty("loss", "k1", "none", "token", weight="position")
  claim = objective.audit(refused)
  assert claim.verdict == "refused" and claim.instead.weight == "position"
  assert objective.flags_of(claim.instead).endswith("--kl_credit=token --kl_weight=position")
  told = "no sum over tokens that a weight .*The nearest that has is reward/k1/none/token/forward/c"
  with pytest.raises(UserError, match=told):
    ppo.Config(kl_divergence="forward", kl_weight="certainty")
  hypers = Hypers(kl_weight_power=0.5)
  mask = jnp.array([False, True, True, False, True, True])  # what was given has no position
  weights = kl_terms.token_weights(refused, None, mask, hypers)
  np.testing.assert_allclose(weights[mask], [1, 2**-0.5, 3**-0.5, 0.5], rtol=1e-6)
  assert np.isfinite(weights).all()


@pytest.mark.parametrize("divergence", objective.DIVERGENCES)
def test_equal_policies_have_a_gradient_of_exactly_zero(divergence):
  log_probs = jax.nn.log_softmax(2 * jax.random.normal(jax.random.key(0), (4, 1000)))
  exact, slope = kl_terms.DIVERGENCES[divergence]
  loss = jax.jit(jax.value_and_grad(lambda *both: exact(*both, SHAPE).sum()))
  values, gradient = loss(log_probs, log_probs)
  np.testing.assert_allclose(values, 0.0, atol=1e-5)
  np.testing.assert_array_equal(gradient, 0.0)
  assert slope(jnp.float32(0.0), SHAPE) == 0.0


def config_of(penalty, **settings):
  return ppo.Config(**{f"kl_{name}": x for name, x in penalty._asdict().items()}, **settings)


def test_a_combination_is_defined_or_its_error_names_some_that_are():
  for penalty in PRODUCT:
    if penalty.placement == "none":
      continue
    if penalty not in objective.DEFINED:
      with pytest.raises(UserError) as error:
        objective.audit(penalty)
      message, _, names = str(error.value).partition("The nearest that has is ")
      assert str(penalty) in message
      named = [KLPenalty(*name.split("/")) for name in re.findall(r"\w+/\w+/\w+/\w+", names)]
      assert named and all(objective.audit(each).verdict == "exact" for each in named)
      continue
    claim = objective.audit(penalty)
    if claim.verdict == "refused":
      assert objective.audit(claim.instead).verdict == "exact"
      assert claim.instead.credit == penalty.credit
    else:
      assert claim.instead is None
      assert (claim.verdict == "exact") == (claim.gradient in objective.KL_GRADIENTS)


def test_an_estimator_without_rows_of_its_own_is_claimed_to_be_nothing(monkeypatch):
  monkeypatch.setattr(objective, "ESTIMATORS", (*objective.ESTIMATORS, "k4"))
  for placement in objective.PLACEMENTS[:-1]:
    with pytest.raises(UserError, match="the audit has no row of this estimator"):
      objective.audit(objective.KLPenalty(placement, "k4", "none", "token"))


@pytest.mark.parametrize("placement", [p for p in objective.PLACEMENTS if p != "none"])
def test_a_config_raises_for_what_is_refused_and_says_which_flags_to_use(placement):
  for penalty in (each for each in PRODUCT if each.placement == placement):
    if penalty not in objective.DEFINED:
      for allow in (False, True):
        with pytest.raises(UserError, match=f"The KL penalty {penalty} has no meaning"):
          config_of(penalty, allow_biased_kl=allow)
      continue
    claim = objective.audit(penalty)
    if claim.verdict != "refused":
      assert config_of(penalty).kl_warnings() == []
      continue
    with pytest.raises(UserError) as error:
      config_of(penalty)
    assert objective.flags_of(claim.instead) in str(error.value)
    assert "--allow_biased_kl" in str(error.value)
    flags = dict(re.findall(r"--(kl_\w+)=(\w+)", str(error.value)))
    assert ppo.Config(**flags).penalty() == claim.instead
    (warning,) = config_of(penalty, allow_biased_kl=True).kl_warnings()
    assert str(penalty) in warning and str(claim.instead) in warning


def test_without_a_penalty_nothing_is_refused():
  assert ppo.Config(kl_placement="none").kl_warnings() == []


def test_a_mean_over_each_completion_is_warned_of():
  in_loss = {"kl_placement": "loss", "kl_estimator": "k3", "kl_correction": "prefix"}
  config = ppo.Config(loss_aggregation="sequence_mean_token_mean", **in_loss)
  (warning,) = config.kl_warnings()
  assert "long completions are held less" in warning


def test_the_warning_of_an_allowed_penalty_is_in_the_report(tmp_path):
  config = config_of(KLPenalty("loss", "k1", "none", "token"), allow_biased_kl=True)
  warnings = config.kl_warnings()
  settings = {"experiment": "ppo", **config.__dict__}
  (tmp_path / "config.json").write_text(json.dumps(settings))
  (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": 0, "score/mean": 0.5}) + "\n")
  write_summary(tmp_path, {"warnings": warnings}, 0)
  assert json.loads((tmp_path / "summary.json").read_text())["warnings"] == warnings
  write_report(tmp_path)
  text = html.unescape((tmp_path / "report.html").read_text())
  assert "its expected gradient is zero" in warnings[0] and warnings[0] in text


MASK = np.arange(4) < np.array([4, 2, 3])[:, None]


# Where columns of given tokens are put between others.
HOLES = [0, 2, 2, 4, 4]
CHOSEN = np.delete(np.arange(4 + len(HOLES)), np.array(HOLES) + np.arange(len(HOLES)))


def some_terms(padding, *, extra=0, dtype=np.float32):
  """Returns TokenTerms of three completions with `padding` after each, `extra` columns of it."""
  noise = np.random.default_rng(0).normal(size=(5, *MASK.shape))
  width = ((0, 0), (0, extra))
  fields = [
    jnp.asarray(np.pad(np.where(MASK, x, padding), width, constant_values=padding), dtype)
    for x in (*(0.4 * noise[:3] - 1.5), *np.abs(noise[3:]))
  ]
  return TokenTerms(*fields[:3], jnp.asarray(np.pad(MASK, width)), *fields[3:])


class AlgorithmOf(NamedTuple):
  """What an advantage rule reads of an algorithm."""

  penalty: KLPenalty


def all_of(penalty, terms):
  """Returns everything that training computes of a penalty, [3, T] each, and the gradients."""
  zeros = jnp.zeros_like(terms.log_probs)
  outputs = []
  if penalty.in_loss:
    outputs += [kl_terms.kl_loss(penalty, terms, prefix_cap=1.5)]
    outputs += [kl_terms.prefix_cap_effect(penalty, terms, prefix_cap=1.5)[1]]
  if penalty.in_reward:
    arguments = terms.log_probs, terms.ref_log_probs, terms.mask, terms.exact_kl
    kl = kl_terms.reward_kl(penalty, *arguments, kl_terms.slope_of(penalty))
    x = Experience(zeros[:, 0] + 1.0, kl, zeros, terms.mask, 0.5)
    outputs += ppo.advantages(x, AlgorithmOf(penalty), Hypers(gamma=0.9, gae_lambda=0.8))

  def total(log_probs, exact_kl):
    changed = terms._replace(log_probs=log_probs, exact_kl=exact_kl)
    return kl_terms.surrogate(penalty, prefix_cap=1.5)(changed).sum()

  return *outputs, *jax.grad(total, argnums=(0, 1))(terms.log_probs, terms.exact_kl)


@pytest.mark.parametrize(
  "penalty",
  [*objective.DEFINED, KLPenalty(divergence="forward")],
  ids=str,
)
def test_nothing_in_padding_or_holes_and_no_length_of_them_reaches_a_penalty(penalty):
  clean = all_of(penalty, some_terms(0.0))
  padded = some_terms(np.nan, extra=1)
  given = jax.tree.map(
    lambda x: jnp.insert(x, np.array(HOLES), False if x.dtype == bool else np.nan, axis=1), padded
  )
  for other, columns in ((padded, np.arange(4)), (given, CHOSEN)):
    for x, expected in zip(all_of(penalty, other), clean, strict=True):
      np.testing.assert_allclose(x[:, columns], expected, rtol=1e-6, atol=1e-7)
      assert not np.any(np.where(other.mask, 0.0, x))


@pytest.mark.parametrize("penalty", [x for x in objective.DEFINED if x.in_reward], ids=str)
def test_what_is_taken_off_the_reward_carries_no_gradient(penalty):
  terms = some_terms(0.0)
  gradients = jax.grad(lambda *x: kl_terms.reward_kl(penalty, *x).sum(), argnums=(0, 1, 3))(
    terms.log_probs, terms.ref_log_probs, terms.mask, terms.exact_kl
  )
  np.testing.assert_array_equal(gradients, np.zeros((3, *MASK.shape)))


def test_what_the_cap_takes_away_is_measured_and_carries_no_gradient():
  penalty, terms = KLPenalty("loss", "k3", "prefix", "sequence"), some_terms(0.0)

  def lost(log_probs):
    changed = terms._replace(log_probs=log_probs)
    return kl_terms.prefix_cap_effect(penalty, changed, prefix_cap=1.5)[1].sum()

  value, gradient = jax.value_and_grad(lost)(terms.log_probs)
  assert value > 0.1 and not np.any(gradient)


def test_the_cap_bites_at_no_padding():
  penalty = KLPenalty("loss", "exact", "prefix", "sequence")
  terms = some_terms(0.0, extra=3)
  bites, _ = kl_terms.prefix_cap_effect(penalty, terms, prefix_cap=1.5)
  assert bites.any() and not (bites.astype(bool) & ~terms.mask).any()


@pytest.mark.parametrize("penalty", objective.DEFINED, ids=str)
def test_penalties_are_computed_in_float32_at_least(penalty):
  for x in all_of(penalty, some_terms(0.0, dtype=jnp.bfloat16))[:-2]:
    assert x.dtype == jnp.float32
  with jax.enable_x64(True):
    for x in all_of(penalty, some_terms(0.0, dtype=np.float64)):
      assert x.dtype == jnp.float64


def test_the_cap_bounds_the_weight_of_a_prefix_and_not_the_credit_for_later_kl():
  penalty = KLPenalty("loss", "exact", "prefix", "sequence")
  log_probs, kl = jnp.log(jnp.array([0.4, 0.6, 0.5])), jnp.array([0.1, 0.2, 0.4])
  terms = TokenTerms(log_probs, jnp.log(jnp.array([0.2, 0.2, 0.5])), log_probs, kl > 0, kl)
  # Ratios 2, 3, 1: the weights before each token are 1, 2 and 6, which the cap makes 4.
  loss = kl_terms.kl_loss(penalty, terms, prefix_cap=4.0)
  np.testing.assert_allclose(loss, [0.1, 0.4, 1.6], rtol=1e-6)
  gradient = jax.grad(
    lambda x: kl_terms.kl_loss(penalty, terms._replace(log_probs=x), prefix_cap=4.0).sum()
  )(log_probs)
  np.testing.assert_allclose(gradient, [0.4 + 1.6, 1.6, 0.0], rtol=1e-6)
  bites, lost = kl_terms.prefix_cap_effect(penalty, terms, prefix_cap=4.0)
  np.testing.assert_array_equal(bites, [0, 0, 1])
  np.testing.assert_allclose(lost, [0, 0, (6 - 4) * 0.4], atol=1e-6)
  # A sampled estimate at t needs the ratio of t as well: weights 2, 6 and 6, the last two capped.
  sampled = KLPenalty("loss", "k3", "prefix", "sequence")
  bites, _ = kl_terms.prefix_cap_effect(sampled, terms, prefix_cap=4.0)
  np.testing.assert_array_equal(bites, [0, 1, 1])


@pytest.mark.parametrize(
  ("penalty", "expected"),
  [
    # beta 0.1, gamma 0.5, lambda 1, score 8, KL 1, 2, 4 nats; then nothing but padding.
    (KLPenalty("reward", "k1", "none", "sequence"), [2 - 0.3, 4 - 0.4, 8 - 0.4]),
    (KLPenalty("reward", "k1", "none", "token"), [2 - 0.1, 4 - 0.2, 8 - 0.4]),
    # The token's own KL is the loss term's: 0.5 * 0.2 + 0.25 * 0.4, then 0.5 * 0.4.
    (KLPenalty("both", "exact", "none", "sequence"), [2 - 0.2, 4 - 0.2, 8]),
    (KLPenalty("both", "k3", "none", "sequence"), [2 - 0.3, 4 - 0.4, 8 - 0.4]),
    (KLPenalty("loss", "exact", "none", "token"), [2, 4, 8]),
  ],
  ids=str,
)
def test_advantages_of_each_placement_and_credit(penalty, expected):
  kl, mask = jnp.array([1.0, 2.0, 4.0, 1e9]), jnp.arange(4) < 3
  log_probs = jnp.zeros(4)
  estimate = kl if penalty.in_reward else kl_terms.reward_kl(penalty, log_probs, log_probs, mask)
  x = Experience(jnp.float32(8.0), estimate, log_probs, mask, 0.1)
  advantages, _ = ppo.advantages(x, AlgorithmOf(penalty), Hypers(gamma=0.5))
  np.testing.assert_allclose(advantages, [*expected, 0], rtol=1e-6)


def test_the_table_of_refusals_in_the_docs_is_what_the_audit_says():
  text = (pathlib.Path(__file__).parents[1] / "docs/kl.md").read_text("utf-8")
  told = {}
  for line in text.split("| refused |")[1].split("\n\n")[0].splitlines()[2:]:
    name, gradient, instead = (cell.strip() for cell in line.strip("|").split("|"))
    told[name] = gradient.split(",")[0].replace("\u2016", "||"), instead
  claims = {str(penalty): objective.audit(penalty) for penalty in objective.DEFINED}
  assert told == {
    name: (claim.gradient, str(claim.instead))
    for name, claim in claims.items()
    if claim.verdict == "refused"
  }


def test_a_penalty_is_described_and_permission_for_nothing_is_an_error():
  text = objective.description(KLPenalty("loss", "k3", "none", "token"))
  assert "that of token KL(ref||pi)" in text and "beta * ref / (lambda - r)" in text
  assert text.endswith("In later steps on the same rollout it is that of no divergence.")
  text = objective.description(KLPenalty("reward", "k1", "none", "sequence"), one_step=True)
  assert "the KL is taken off the reward" in text and "later steps" not in text
  with pytest.raises(UserError, match="is not refused"):
    ppo.Config(allow_biased_kl=True)
