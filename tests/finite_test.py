"""Ratios and estimators of any size: finite and right wherever float32 can hold the result.

Log-ratios to the old policy and to the reference go from -1e4 to 1e4, each on its own, advantages
are 0 and +-1e3, and the truth is written out in float64.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl import ops
from klrl.algorithm import kl_terms, objective
from klrl.algorithm.objective import KLPenalty

HALF = (1e-3, 1.0, 10.0, 50.0, 80.0, 88.0, 89.0, 100.0, 120.0, 200.0, 800.0, 1e4)
GRID = (*(-x for x in HALF[::-1]), 0.0, *HALF)
ADVANTAGES = (0.0, 1e3, -1e3)
# Log-ratio to the old policy, log-ratio to the reference, advantage: one token each.
POINTS = np.array(list(itertools.product(GRID, GRID, ADVANTAGES)))
CLIP = {"clip_eps_low": 0.2, "clip_eps_high": 0.3}
FREE = {"clip_eps_low": 1.0, "clip_eps_high": jnp.inf}


def _clipped(r, adv, low=0.8, high=1.3, dual=np.inf):
  ratio = np.exp(r)
  value = -np.minimum(ratio * adv, np.clip(ratio, low, high) * adv)
  bounded = np.where(adv < 0, np.minimum(value, -dual * adv), value)
  free = np.where(adv >= 0, ratio <= high, (ratio >= low) & (ratio <= dual))
  return bounded, np.where(free, -ratio * adv, 0.0)


def _held(x):
  """Returns `x` where float32 can hold it, else NaN."""
  return np.where(np.abs(x) < 0.999 * np.finfo(np.float32).max, x, np.nan)


def _vtrace(lp, old, ref, adv, mask):
  values = jnp.zeros_like(adv)
  return ops.vtrace(lp, old, adv, values, mask, gamma=1.0)[0]


def _trust_region(kl):
  def loss(lp, old, ref, adv, mask):
    lp_real, old_real = ops.zero_padding(lp, mask), ops.zero_padding(old, mask)
    return ops.kl_penalised_policy_loss(
      lp, old, adv, kl(lp_real, old_real), mask, trust_region_beta=1.0
    )

  return loss


# name: (f(log_probs, old, ref, advantages, mask) -> [N, 1], truth(r, q, A) -> (value, gradient)).
POLICY_LOSSES = {
  "clipped": (lambda lp, old, ref, *x: ops.clipped_policy_loss(lp, old, *x, **CLIP),
    lambda r, q, a: _clipped(r, a)),
  "unclipped": (lambda lp, old, ref, *x: ops.clipped_policy_loss(lp, old, *x, **FREE),
    lambda r, q, a: (-np.exp(r) * a, -np.exp(r) * a)),
  "dual_clipped": (
    lambda lp, old, ref, *x: ops.clipped_policy_loss(lp, old, *x, **CLIP, dual_clip=3.0),
    lambda r, q, a: _clipped(r, a, dual=3.0)),
  "gspo": (lambda lp, old, ref, *x: ops.gspo_loss(lp, old, *x, **CLIP),
    lambda r, q, a: _clipped(r, a)),
  "cispo": (lambda lp, old, ref, *x: ops.cispo_loss(lp, old, *x, max_ratio=1.3),
    lambda r, q, a: (0 * a, -np.minimum(np.exp(r), 1.3) * a)),
  "cispo without a bound": (lambda lp, old, ref, *x: ops.cispo_loss(lp, old, *x, max_ratio=jnp.inf),
    lambda r, q, a: (0 * _held(np.exp(r) * a), -np.exp(r) * a)),
  "no trust region": (_trust_region(lambda lp, old: jnp.zeros_like(lp)),
    lambda r, q, a: (-np.exp(r) * a, -np.exp(r) * a)),
  "kl_old_new": (_trust_region(ops.kl_old_new),
    lambda r, q, a: (-np.exp(r) * a + np.expm1(r) - r, -np.exp(r) * a + np.expm1(r))),
  "kl_new_old": (_trust_region(ops.kl_new_old),
    lambda r, q, a: (np.exp(r) * (r - 1 - a) + 1, np.exp(r) * (r - a))),
  "smooth": (lambda lp, old, ref, *x: ops.smooth_policy_loss(lp, old, *x, size=0.25),
    lambda r, q, a: (2 * abs(a) * (np.exp(r) - 2 + np.exp(-r)) - np.exp(r) * a,
                     4 * abs(a) * np.expm1(r) - np.exp(r) * a)),
  "regression": (
    lambda lp, old, ref, adv, mask: ops.reinforce_loss(
      lp, ops.exponential_weights(adv, temperature=0.5), mask),
    lambda r, q, a: (0 * a, -np.minimum(np.exp(2 * a), 20.0))),
  "vtrace": (_vtrace,
    # At the bound itself the derivative is the mean of both sides'.
    lambda r, q, a: (np.minimum(np.exp(r), 1) * a, np.exp(-abs(r)) * a * (1 - np.sign(r)) / 2)),
}  # fmt: skip
ESTIMATORS = {
  "k1": (lambda lp, old, ref, *_: ops.k1(lp, ref), lambda r, q, a: (q, 1 + 0 * q)),
  "k2": (lambda lp, old, ref, *_: ops.k2(lp, ref), lambda r, q, a: (q**2 / 2, q)),
  "k3": (lambda lp, old, ref, *_: ops.k3(lp, ref),
    lambda r, q, a: (np.expm1(-q) + q, -np.expm1(-q))),
  "kl_old_new alone": (lambda lp, old, *_: ops.kl_old_new(lp, old),
    lambda r, q, a: (np.expm1(r) - r, np.expm1(r))),
  "kl_new_old alone": (lambda lp, old, *_: ops.kl_new_old(lp, old),
    lambda r, q, a: (np.exp(r) * (r - 1) + 1, np.exp(r) * r)),
}  # fmt: skip
# What each estimator is multiplied by the ratio, and the derivative of that.
WEIGHTED = {
  "k1": lambda r, q: (np.exp(r) * q, np.exp(r) * (q + 1)),
  "k2": lambda r, q: (np.exp(r) * q**2 / 2, np.exp(r) * q),
  "k3": lambda r, q: (np.exp(r - q) + np.exp(r) * (q - 1), np.exp(r) * q),
}


def _penalty(penalty):
  def loss(lp, old, ref, adv, mask):
    return kl_terms.kl_loss(penalty, kl_terms.TokenTerms(lp, old, ref, mask, jnp.abs(adv)))

  def truth(r, q, a):
    if penalty.estimator == "exact":
      return np.abs(a), 0 * a
    if penalty.correction == "none":
      return ESTIMATORS[penalty.estimator][1](r, q, a)
    return WEIGHTED[penalty.estimator](r, q)

  return loss, truth


LOSS_PENALTIES = [penalty for penalty in objective.DEFINED if penalty.in_loss]
MASKED = POLICY_LOSSES | {str(penalty): _penalty(penalty) for penalty in LOSS_PENALTIES}
CASES = MASKED | ESTIMATORS


@functools.cache
def _compiled(f):
  def total(lp, *data):
    values = f(lp, *data)
    return values.sum(), values

  return jax.jit(jax.grad(total, has_aux=True))


def _value_and_gradient(f, points, mask=None):
  """Returns (values [N], gradients to log_probs [N]) in float32, compiled."""
  r, q, adv = (jnp.asarray(x[:, None], jnp.float32) for x in points.T)
  mask = jnp.ones(r.shape, bool) if mask is None else mask[:, None]
  gradients, values = _compiled(f)(jnp.zeros_like(r), -r, -q, adv, mask)
  return np.asarray(values)[:, 0], np.asarray(gradients)[:, 0]


def _assert_right(found, truth, points):
  """Where float64 lies within float32, so does float32, and it is the same number.

  A weight below float32's smallest, 1e-38, may count as 0 before it meets an advantage of 1e3.
  """
  truth = _held(np.broadcast_to(truth, found.shape))
  held = np.isfinite(truth)
  wrong = held & ~np.isclose(found, truth, rtol=1e-3, atol=1e-34)
  assert not wrong.any(), list(zip(points[wrong], found[wrong], truth[wrong], strict=True))[:5]
  assert held.mean() > 0.3


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_finite_and_right_wherever_float32_holds_them(name):
  f, truth = CASES[name]
  with np.errstate(all="ignore"):
    expected = truth(*POINTS.T)
  for found, true in zip(_value_and_gradient(f, POINTS), expected, strict=True):
    _assert_right(found, true, POINTS)


@pytest.mark.parametrize("name", MASKED)
def test_numbers_of_any_size_in_the_padding_reach_neither_value_nor_gradient(name):
  f, _ = CASES[name]
  real = np.arange(len(POINTS)) % 2 == 0
  clean = np.where(real[:, None], POINTS, 0.0)
  for garbage in (POINTS, np.nan, np.inf, -np.inf):
    dirty = np.where(real[:, None], POINTS, garbage)
    values, gradients = _value_and_gradient(f, dirty, real)
    np.testing.assert_array_equal(values[~real], 0)
    np.testing.assert_array_equal(gradients[~real], 0)
    for found, expected in zip(
      (values, gradients), _value_and_gradient(f, clean, real), strict=True
    ):
      np.testing.assert_array_equal(found[real], expected[real])


@pytest.mark.parametrize(
  "penalty", [p for p in LOSS_PENALTIES if p.correction == "prefix"], ids=str
)
def test_a_prefix_of_any_weight_is_finite_and_credited(penalty):
  # Two tokens: the ratio of the first weighs the second.
  first, r, q = np.array(list(itertools.product(GRID, (-200.0, -1.0, 89.0), GRID))).T
  exact = np.where(np.arange(len(q)) % 2, 0.0, 1e3)
  own = 0 * q - (penalty.estimator == "k1")  # the first token's term has no slope of its own
  of_pair = lambda x, y: jnp.asarray(np.stack([x, y], axis=1), jnp.float32)  # noqa: E731

  def total(lp):
    old, ref = -of_pair(first, r), -of_pair(own, q)
    mask = jnp.ones(lp.shape, bool)
    terms = kl_terms.TokenTerms(lp, old, ref, mask, of_pair(0 * exact, exact))
    second = kl_terms.kl_loss(penalty, terms)[:, 1]
    return second.sum(), second

  gradients, values = jax.jit(jax.grad(total, has_aux=True))(jnp.zeros((len(q), 2)))
  with np.errstate(all="ignore"):
    if penalty.estimator == "exact":
      value, slope = np.exp(first) * exact, 0 * q
    else:
      value, slope = WEIGHTED[penalty.estimator](first + r, q)
  points = np.stack([first, r, q], axis=1)
  _assert_right(np.asarray(values), value, points)
  _assert_right(np.asarray(gradients)[:, 1], slope, points)
  credit = value if penalty.credit == "sequence" else 0 * q
  _assert_right(np.asarray(gradients)[:, 0], credit, points)


@pytest.mark.parametrize("estimator", ["k1", "k3", "exact"])
def test_what_a_cap_takes_away_is_finite_up_to_a_weight_of_60_nats(estimator):
  penalty = KLPenalty("loss", estimator, "prefix", "sequence")
  first = np.array([-1e4, 0.0, 1.0, 50.0, 59.0, 60.0, 61.0, 1e4])

  def terms(dtype):
    lp = jnp.zeros((len(first), 2), dtype)
    old = -jnp.stack([jnp.asarray(first, dtype), 0 * lp[:, 0]], axis=1)
    return kl_terms.TokenTerms(lp, old, lp + 1, lp == 0, lp + 2)

  for cap in (1.5, np.inf):
    bites, lost = kl_terms.prefix_cap_effect(penalty, terms(jnp.float32), prefix_cap=cap)
    kl = {"k1": -1.0, "k3": np.e - 2, "exact": 2.0}[estimator]
    expected = np.where(
      np.exp(np.minimum(first, 700)) > cap, np.exp(np.minimum(first, 60)) - 1.5, 0
    )
    np.testing.assert_allclose(lost[:, 1], expected * kl, rtol=1e-4)
    np.testing.assert_array_equal(bites[:, 1], first > np.log(cap))


@pytest.mark.parametrize(
  ("log_probs", "old_log_probs", "ref_log_probs"),
  [([-30.0, -30.0], [-60.0, -70.0], [0.0, 0.0]), ([0.0, 0.0], [-20.0, -1.0], [100.0, 0.0])],
)
def test_what_a_cap_takes_away_is_finite_where_the_loss_is_large(
  log_probs, old_log_probs, ref_log_probs
):
  penalty = KLPenalty("loss", "k3", "prefix", "token")
  lp, old, ref = (jnp.float32(x) for x in (log_probs, old_log_probs, ref_log_probs))
  terms = kl_terms.TokenTerms(lp, old, ref, jnp.ones(2, bool))
  _, lost = kl_terms.prefix_cap_effect(penalty, terms, prefix_cap=10.0)
  assert jnp.isfinite(lost.sum())


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_divergences_and_entropies_of_extreme_logits_are_finite(scale):
  logits, ref = scale * jax.random.uniform(jax.random.key(0), (2, 50, 6), minval=-1.0)
  names = {
    "exact_kl": lambda x, y: ops.exact_kl(x, y),
    "exact_jsd": lambda x, y: ops.exact_jsd(x, y, weight=0.3),
    "entropy": lambda x, y: ops.entropy(x),
    "hellinger": lambda x, y: ops.alpha_divergence_of(*map(ops.vocab_log_probs, (x, y)), 0.5),
    "alpha": lambda x, y: ops.alpha_divergence_of(*map(ops.vocab_log_probs, (x, y)), 0.9),
  }
  for name, f in names.items():
    fn = jax.jit(jax.value_and_grad(lambda *args, f=f: f(*args).sum(), argnums=(0, 1)))
    value, gradients = fn(logits, ref)
    with jax.enable_x64(True):
      true, true_gradients = fn(*(jnp.float64(x) for x in (logits, ref)))
    np.testing.assert_allclose(value, true, rtol=1e-4, atol=1e-5, err_msg=name)
    for found, expected in zip(gradients, true_gradients, strict=True):
      np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * scale, err_msg=name)


def test_divergences_where_one_excludes_what_the_other_does_not_have_no_nan():
  one, other = jnp.log(jnp.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))
  shape = kl_terms.Shape(jsd_weight=0.3, kl_alpha=0.3)
  finite = {"jensen_shannon", "alpha", "hellinger"}
  for name, row in kl_terms.DIVERGENCES.items():
    for both in ((one, other), (other, one), (one, one)):
      value, gradients = jax.value_and_grad(lambda *x, row=row: row.exact(*x, shape), (0, 1))(*both)
      assert not np.isnan([value, *np.ravel(gradients)]).any(), name
      if name in finite:
        assert np.isfinite([value, *np.ravel(gradients)]).all(), name
    slopes = row.slope(jnp.array([-jnp.inf, -80.0, 0.0, 80.0, jnp.inf]), shape)
    assert (jnp.diff(slopes) >= 0).all() and slopes[2] == 0, name
