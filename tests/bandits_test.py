"""Closed forms of a choice among four against published numbers and their own definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl.algorithm import kl_terms, objective
from klrl.exact import bandits, oracle

REF, SCORES = np.array([0.4, 0.3, 0.2, 0.1]), np.arange(4.0)
OPTIMA = {  # beta = 1: probs, multiplier
  "reverse": ([0.085073, 0.173439, 0.314304, 0.427184], 0.547956),
  "forward": ([0.125921, 0.137830, 0.169982, 0.566267], 3.176595),
  "js": ([0.000901, 0.005063, 0.027957, 0.966079], None),
  "chi_square": ([0.0, 0.3, 0.4, 0.3], 1.0),
  "clamp": ([0.0, 0.0, 0.423883, 0.576117], 1.248860),
}


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("name", bandits.DIVERGENCES)
def test_divergences(name):
  f, f_prime, inverse = bandits.DIVERGENCES[name]
  t = np.array([0.2, 0.7, 1.3, 4.0])
  np.testing.assert_allclose(f(1.0), 0.0, atol=1e-15)
  np.testing.assert_allclose((f(t + 1e-6) - f(t - 1e-6)) / 2e-6, f_prime(t), atol=1e-8)
  inside = t > 1 if name == "clamp" else t > 0  # the clamp's slope is flat below 1
  np.testing.assert_allclose(inverse(f_prime(t))[inside], t[inside])


@pytest.mark.parametrize("name", OPTIMA)
def test_optimum_under_a_divergence(name):
  probs, multiplier = bandits.optimal_under(name, REF, SCORES, beta=1.0)
  expected, expected_multiplier = OPTIMA[name]
  np.testing.assert_allclose(probs, expected, atol=1e-6)
  np.testing.assert_allclose(probs.sum(), 1.0, rtol=1e-12)
  if expected_multiplier is not None:
    np.testing.assert_allclose(multiplier, expected_multiplier, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMA)
@pytest.mark.parametrize("beta", [0.03, 0.8, 5.0])
def test_no_policy_beside_the_optimum_has_more(name, beta):
  rng = np.random.default_rng(0)
  ref, scores = rng.dirichlet(np.ones(6)), rng.normal(size=6)
  probs, _ = jax.jit(lambda beta: bandits.optimal_under(name, ref, scores, beta=beta))(beta)

  def j(probs):
    with np.errstate(divide="ignore", invalid="ignore"):
      f = bandits.DIVERGENCES[name].f(probs / ref)
    return (probs * scores).sum() - beta * (ref * jnp.nan_to_num(f)).sum()

  np.testing.assert_allclose(probs.sum(), 1.0, rtol=1e-9)
  for other in (ref, *rng.dirichlet(np.ones(6), size=50)):
    assert j(probs) >= j(probs + 0.01 * (other - probs)) - 1e-12


SAME = {"reverse": "reverse", "forward": "forward", "jensen_shannon": "js"}
SAME |= {"chi_squared": "chi_square"}


@pytest.mark.parametrize("penalised", SAME)
def test_a_slope_that_is_inverted_by_bisection_has_the_optimum_of_its_divergence(penalised):
  slope = kl_terms.slope_of(objective.KLPenalty(divergence=penalised))
  for beta in (0.3, 1.0):
    probs, _ = jax.jit(lambda b: bandits.optimal_under_slope(slope, REF, SCORES, beta=b))(beta)
    expected, _ = bandits.optimal_under(SAME[penalised], REF, SCORES, beta=beta)
    np.testing.assert_allclose(probs, expected, atol=1e-9)


def test_ascent_with_a_slope_in_the_reward_ends_at_the_optimum_of_its_divergence():
  shape = kl_terms.Shape(jsd_weight=0.7, kl_alpha=0.3)
  penalties = [
    objective.KLPenalty("reward", "k1", "none", "token", name) for name in objective.DIVERGENCES
  ]
  slopes = [kl_terms.slope_of(penalty, shape) for penalty in penalties]
  surrogates = [
    kl_terms.surrogate(penalty, slope=slope)
    for penalty, slope in zip(penalties, slopes, strict=True)
  ]
  ends = jax.jit(
    lambda ref: oracle.fixed_points(oracle.make_tree(4, 1), surrogates, ref, SCORES, beta=4.0)
  )(jnp.log(REF)[None])
  for penalty, slope, found in zip(penalties, slopes, jax.nn.softmax(ends)[:, 0], strict=True):
    probs, _ = bandits.optimal_under_slope(slope, REF, SCORES, beta=4.0)
    np.testing.assert_allclose(found, probs, atol=1e-6, err_msg=str(penalty))
    assert np.abs(probs - REF).max() > 0.05 and probs.min() > 1e-3


def test_choices_at_a_jump_of_the_clamp_get_what_is_left():
  probs, multiplier = bandits.optimal_under(
    "clamp", jnp.array([0.9, 0.1]), jnp.array([0.0, 0.01]), beta=1.0
  )
  np.testing.assert_allclose(probs[1], 0.1 * np.exp(0.01))
  np.testing.assert_allclose([probs.sum(), multiplier], [1.0, 0.0], atol=1e-12)


@pytest.mark.parametrize("max_kl", [1e-6, 0.1, 1.0, 2.0])
def test_optimum_within_a_kl(max_kl):
  probs, beta = jax.jit(lambda x: bandits.optimal_within(REF, SCORES, max_kl=x))(max_kl)
  np.testing.assert_allclose((probs * np.log(probs / REF)).sum(), max_kl, rtol=1e-6)
  np.testing.assert_allclose(bandits.optimal_under("reverse", REF, SCORES, beta=beta)[0], probs)


def test_optimum_within_a_kl_that_does_not_bind():
  probs, beta = bandits.optimal_within(REF, SCORES, max_kl=3.0)
  np.testing.assert_allclose(probs, [0, 0, 0, 1])
  np.testing.assert_allclose(beta, 0.0, atol=1e-12)
  probs, _ = bandits.optimal_within(REF, np.ones(4), max_kl=0.1)
  np.testing.assert_allclose(probs, REF)


def test_best_of_n():
  best = bandits.best_of_n(REF, SCORES, 4)
  np.testing.assert_allclose(best, [0.0256, 0.2145, 0.416, 0.3439])
  np.testing.assert_allclose((best * np.log(best / REF)).sum(), 0.587113667, atol=1e-9)
  # Unsorted scores with a tie: the two best share 1 - 0.3**3 as 0.5 to 0.2.
  tied = bandits.best_of_n(np.array([0.5, 0.3, 0.2]), np.array([1.0, 0.0, 1.0]), 3)
  np.testing.assert_allclose(tied, [0.973 * 5 / 7, 0.027, 0.973 * 2 / 7])


@pytest.mark.parametrize("n", [1.0, 2.5, 64.0])
def test_the_reward_of_best_of_n_is_the_log_of_its_ratio(n):
  for probs, scores in (REF, SCORES), (np.array([0.5, 0.3, 0.2]), np.array([1.0, 0.0, 1.0])):
    expected = np.log(bandits.best_of_n(probs, scores, n) / probs)
    found = bandits.best_of_n_reward(probs, scores, n)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_best_of_n_kl_bound():
  bound = bandits.best_of_n_kl_bound(np.array([1.0, 4.0, 16.0, 1000.0]))
  np.testing.assert_allclose(bound, [0.0, 0.636294361, 1.835088722, 5.908755279], atol=1e-9)
  fine = np.full(10_000, 1e-4)  # many choices, no ties: the bound is reached
  best = bandits.best_of_n(fine, np.arange(10_000.0), 16)
  np.testing.assert_allclose((best * np.log(best / fine)).sum(), bound[2], atol=1e-4)


@pytest.mark.parametrize("name", bandits.GOLD_LAWS)
def test_gold_laws_start_at_zero_and_peak_where_they_say(name):
  score, peak = bandits.GOLD_LAWS[name]
  top = peak(0.5, 0.25)
  assert score(0.0, 0.5, 0.25) == 0.0
  assert score(top, 0.5, 0.25) > max(score(top * x, 0.5, 0.25) for x in (0.99, 1.01))


@pytest.mark.parametrize("name", bandits.GOLD_LAWS)
def test_a_gold_law_is_found_again_from_its_points(name):
  distances = np.linspace(0.0, 3.0, 7)
  gains = bandits.GOLD_LAWS[name].score(distances, 0.5, 0.25)
  np.testing.assert_allclose(bandits.fitted_gold_law(name, distances, gains), (0.5, 0.25))


def test_mirror_steps_contract_to_the_optimum_under_the_global_kl():
  optimum = jax.nn.log_softmax(np.log(REF) + SCORES)
  log_probs, gaps = np.log(REF), []
  for _ in range(4):
    before = log_probs - optimum
    log_probs = bandits.mirror_step(np.log(REF), log_probs, SCORES, beta=1.0, eta=0.5)
    after = log_probs - optimum
    np.testing.assert_allclose(after - after[0], 2 / 3 * (before - before[0]), atol=1e-14)
    gaps.append((jnp.exp(optimum) * (optimum - log_probs)).sum())
  np.testing.assert_allclose(np.array(gaps)[[0, 1, 3]], [0.233192, 0.100730, 0.019033], atol=1e-6)
  np.testing.assert_allclose(
    jnp.exp(log_probs), [0.125971, 0.210785, 0.313513, 0.349731], atol=1e-6
  )
