"""Facts about the KL that were computed apart from this code, by number, through klrl's functions.

Inputs, figures and tolerances are read from kl_facts.json beside the checkout; what its statements
give in words only is written out here. What a peer alone uses comes from
`experiments.lab.kl_peers`. A figure that is zero has to be zero to rounding.
"""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import estimators, kl_directions, mode_seeking
from experiments.lab import kl_peers, mode_seeking_gaussian
from klrl import ops
from klrl.algorithm import kl_terms, optimizer
from klrl.algorithm.objective import KLPenalty
from klrl.exact import bandits, oracle
from klrl.sampling import top_k_logits

PATH = pathlib.Path(__file__).parents[2] / "shared" / "facts" / "kl_facts.json"
FACTS = json.loads(PATH.read_text()) if PATH.is_file() else {}
pytestmark = pytest.mark.skipif(not FACTS, reason="the facts are not beside this checkout")

ZERO = 1e-10
REF, SCORES, BETA = np.array([0.4, 0.3, 0.2, 0.1]), np.arange(4.0), 1.0  # CAT-B


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def expected(name):
  return FACTS[name]["expected"]


def close(name, actual, figures, tolerance=None):
  """Asserts that the actual values are a fact's figures to its tolerance, which leads its `tol`."""
  if tolerance is None:
    tolerance = float(re.match(r"[\d.e-]+", FACTS[name]["tol"]).group())
  actual, figures = np.asarray(actual), np.asarray(figures)
  np.testing.assert_allclose(actual, figures, rtol=0, atol=tolerance)
  np.testing.assert_allclose(np.where(figures == 0, actual, 0), 0, atol=min(ZERO, tolerance))


def surrogate(*penalty):
  return kl_terms.surrogate(KLPenalty(*penalty))


def peer(project, setting):
  (row,) = (x for x in kl_peers.PEERS if (x.project, x.setting) == (project, setting))
  return row.surrogate


K1_REWARD = surrogate("reward", "k1")
K3_REWARD = surrogate("reward", "k3")
EXACT_REWARD = surrogate("reward", "exact")
K1_LOSS, K2_LOSS, K3_LOSS, EXACT_LOSS = (
  surrogate("loss", estimator, "none", "token") for estimator in ("k1", "k2", "k3", "exact")
)
WEIGHTED_K3_LOSS = surrogate("loss", "k3", "token", "token")
CLAMP_REWARD = peer("AlpacaFarm", "max(k1, 0) in the reward")
K1_SEQUENCE_MEAN = peer("Tunix", "GRPO, kl_loss_mode=kl")
K2_SEQUENCE_MEAN = peer("Tunix", "GRPO, kl_loss_mode=mse_kl")


def bandit(num):
  return oracle.make_tree(num, 1)


def logits_of(probs):
  return jnp.log(jnp.asarray(probs))[None]


def tree_a():
  """Returns (tree, logits, ref_logits, old_logits, scores)."""
  tree = oracle.make_tree(3, 3, eos_id=2)
  theta, ref, old = (
    jnp.asarray(FACTS[name]["inputs"][key])
    for name, key in (("AF05", "theta"), ("AF05", "ref"), ("AF06", "old"))
  )
  return tree, theta, ref, old, np.sin(1.0 + np.arange(len(tree.tokens)))


def expectations(tree, surrogates, logits, ref_logits, old_logits=None):
  """Returns name -> (expected gradient [S, V], trace covariance) of named surrogates."""
  moments = jax.jit(
    lambda *policies: oracle.gradient_moments(
      tree, list(surrogates.values()), *policies[:2], old_logits=policies[2]
    )
  )(logits, ref_logits, logits if old_logits is None else old_logits)
  return dict(zip(surrogates, zip(*map(np.asarray, moments), strict=True), strict=True))


def relative_error(gradient, target):
  return np.linalg.norm(gradient - target) / np.linalg.norm(target)


def total_variation(p, q):
  return np.abs(np.asarray(p) - np.asarray(q)).sum() / 2


@pytest.mark.parametrize("name", ["AF01", "AF02"])
def test_af01_af02_schulmans_tables(name):
  figures, mu = expected(name), FACTS[name]["inputs"]["mu"]
  case = estimators.gaussian(mu)
  num = 1_000_000
  measured = estimators.measure(case, case.sample(np.random.default_rng(0), num))
  close(name, case.true, figures["true"], 1e-12)
  for estimator in ops.KL_ESTIMATORS:
    x = measured["estimators"][estimator]
    exact = (x["mean"] / case.true - 1, x["std"] / case.true)
    sampled = (x["sample_mean"] / case.true - 1, x["sample_std"] / case.true)
    bias, std = figures[estimator]
    np.testing.assert_allclose(exact, (bias, std), rtol=0, atol=1e-5)
    np.testing.assert_allclose(sampled[0], bias, rtol=0, atol=4 * std / np.sqrt(num))
    np.testing.assert_allclose(sampled[1], std, rtol=0.02)


def test_af03_moments_between_categoricals():
  figures, inputs = expected("AF03"), FACTS["AF03"]["inputs"]
  case = estimators.categorical("", inputs["pi"], inputs["ref"])
  swapped = estimators.categorical("", inputs["ref"], inputs["pi"])
  close("AF03", [case.true, swapped.true], [figures["rkl"], figures["fkl"]])
  values = estimators.estimates(case.points)
  values["clamp"] = values["max(k1, 0)"]
  for key in ("k1", "k2", "k3", "clamp"):
    close("AF03", estimators.moments(case.points.probs, values[key]), figures[key])


def test_af04_expected_gradients_between_mirrored_categoricals():
  figures, inputs = expected("AF04"), FACTS["AF04"]["inputs"]
  tree, pi, ref = bandit(4), logits_of(inputs["pi"]), logits_of(inputs["ref"])
  surrogates = {
    "k1_loss": K1_LOSS,
    "k2_loss": K2_LOSS,
    "k1_reward": K1_REWARD,
    "k3_loss": K3_LOSS,
    "k3_reward": K3_REWARD,
    "k2_reward": surrogate("reward", "k2"),
    "clamp_reward": CLAMP_REWARD,
  }
  found = expectations(tree, surrogates, pi, ref)
  assert set(found) == set(figures)
  for key, (gradient, _) in found.items():
    close("AF04", gradient[0], figures[key])
  reverse, forward = (
    jax.jit(jax.grad(kl))(pi)
    for kl in (
      lambda x: oracle.sequence_kl(tree, x, ref),
      lambda x: oracle.sequence_kl(tree, ref, x),
    )
  )
  for key, exact in (
    ("k2_loss", reverse),
    ("k1_reward", reverse),
    ("k3_loss", forward),
    ("k3_reward", reverse - forward),
  ):
    np.testing.assert_allclose(found[key][0], exact, rtol=0, atol=1e-12)


def test_af05_expected_gradients_on_policy():
  figures = expected("AF05")
  tree, theta, ref, _, _ = tree_a()
  kl, gradient_of_kl = jax.value_and_grad(lambda x: oracle.sequence_kl(tree, x, ref))(theta)
  forward = oracle.sequence_kl(tree, ref, theta)
  close("AF05", [kl, forward], [figures["KL"], figures["KL_fwd"]], 1e-9)
  close("AF05", np.linalg.norm(gradient_of_kl), figures["grad_norm"], 1e-9)
  surrogates = {
    "k1 reward-to-go": K1_REWARD,
    "k2 reward-to-go": surrogate("reward", "k2"),
    "k3 reward-to-go": K3_REWARD,
    "clamp(k1,0) reward-to-go": CLAMP_REWARD,
    "RB full-vocab KL reward-to-go": EXACT_REWARD,
    "k1 loss (token sum)": K1_LOSS,
    "k2 loss (token sum)": K2_LOSS,
    "k3 loss (token sum)": K3_LOSS,
    "RB full-vocab KL loss": EXACT_LOSS,
    "sequence-level k2 loss": bandits.sequence_surrogate("k2"),
    "sequence-level k3 loss": bandits.sequence_surrogate("k3"),
    "k3 reward-to-go + k3 loss": surrogate("both", "k3"),
    "RB loss + future RB in reward": surrogate("both", "exact"),
    "k2 loss seq-mean (1/|y|)": K2_SEQUENCE_MEAN,
    "k1 loss seq-mean (1/|y|)": K1_SEQUENCE_MEAN,
  }
  found = expectations(tree, surrogates, theta, ref)
  assert set(found) == set(figures["rows"])
  for key, row in figures["rows"].items():
    gradient, covariance = found[key]
    close("AF05", relative_error(gradient, gradient_of_kl), row["rel_err"])
    close("AF05", covariance, row["trCov"])
    if row["cos"] is None:
      np.testing.assert_allclose(gradient, 0, atol=ZERO)
    else:
      norms = np.linalg.norm(gradient) * np.linalg.norm(gradient_of_kl)
      close("AF05", (gradient * gradient_of_kl).sum() / norms, row["cos"])


def test_af06_expected_gradients_off_policy():
  figures = expected("AF06")
  tree, theta, ref, old, _ = tree_a()
  kls = [oracle.sequence_kl(tree, theta, old), oracle.sequence_kl(tree, old, ref)]
  close("AF06", kls, [figures["KL_pi_old"], figures["KL_old_ref"]], 1e-9)
  sequence = jax.grad(lambda x: oracle.sequence_kl(tree, x, ref))(theta)
  token = jax.grad(lambda x: oracle.token_kl(tree, x, ref, prefix_logits=old))(theta)
  surrogates = {
    "W(diff)*seq k1": bandits.sequence_surrogate("k1", "ratio"),
    "W(diff)*seq k3": bandits.sequence_surrogate("k3", "ratio"),
    "sg(W)*seq k2": bandits.sequence_surrogate("k2", "stopped_ratio"),
    "W(diff)*seq k2": bandits.sequence_surrogate("k2", "ratio"),
    "sg(W)*seq k3": bandits.sequence_surrogate("k3", "stopped_ratio"),
    "rho_1:t(diff)*k1_t": surrogate("loss", "k1", "prefix"),
    "rho_1:t(diff)*k3_t": surrogate("loss", "k3", "prefix"),
    "rho_1:t-1(diff)*RB_t": surrogate("loss", "exact", "prefix"),
    "w_t(diff)*k3_t (DeepSeek-V3.2)": WEIGHTED_K3_LOSS,
    "sg(w_t)*k2_t": surrogate("loss", "k2", "token", "token"),
    "no-IS k2_t loss": K2_LOSS,
    "no-IS k3_t loss": K3_LOSS,
    "no-IS k1_t loss": K1_LOSS,
    "no-IS RB loss": EXACT_LOSS,
    "stale k1 in reward * seq ratio": bandits.sequence_surrogate(
      "stale_k1", "ratio", in_reward=True
    ),
    "TIS min(W,2) k1": bandits.sequence_surrogate("k1", "ratio", in_reward=True, cap=2.0),
  }
  found = expectations(tree, surrogates, theta, ref, old)
  assert set(found) == set(figures["rows"])
  for key, row in figures["rows"].items():
    gradient, covariance = found[key]
    close("AF06", relative_error(gradient, sequence), row["rel_err_seq"])
    close("AF06", relative_error(gradient, token), row["rel_err_token"])
    close("AF06", covariance, row["trCov"])


def test_af07_stale_kl_in_the_reward():
  figures = expected("AF07")
  tree, old = bandit(4), jnp.zeros((1, 4))
  pi, ref = (logits_of(FACTS["AF04"]["inputs"][key]) for key in ("pi", "ref"))
  stale = bandits.sequence_surrogate("stale_k1", "ratio", in_reward=True)

  @jax.jit
  def of(pi):
    value = oracle.expected_value(tree, stale, pi, ref, old_logits=old)
    kls = [oracle.sequence_kl(tree, pi, x) for x in (ref, old)]
    exact = jax.grad(lambda x: oracle.sequence_kl(tree, x, ref) - oracle.sequence_kl(tree, x, old))
    gradients = [
      oracle.expected_gradient(tree, f, pi, ref, old_logits=old) for f in (stale, K1_REWARD)
    ]
    return value, kls, exact(pi), gradients

  value, kls, exact, gradients = of(pi)
  close("AF07", value, figures["lhs"])
  close("AF07", kls, [figures["kl_ref"], figures["kl_old"]])
  close("AF07", value, kls[0] - kls[1], ZERO)
  # So its gradient, and that of what training does over inner epochs, is the difference's.
  for gradient in gradients:
    np.testing.assert_allclose(gradient, exact, rtol=0, atol=ZERO)


def test_af08_k1_loss_as_a_sequence_mean_makes_completions_longer():
  figures = expected("AF08")
  tree, theta, ref, old, _ = tree_a()
  inverse_lengths = 1 / tree.mask.sum(axis=-1)
  value, exact = jax.value_and_grad(lambda x: oracle.expected_score(tree, x, inverse_lengths))(
    theta
  )
  close("AF08", value, figures["E_inv_len"])
  close("AF08", oracle.expected_length(tree, theta), figures["E_len"])
  gradient = jax.jit(lambda ref: oracle.expected_gradient(tree, K1_SEQUENCE_MEAN, theta, ref))
  for reference in (ref, old, jnp.zeros_like(ref)):
    np.testing.assert_allclose(gradient(reference), exact, rtol=0, atol=1e-10)


@functools.cache
def trained_on_cat_b():
  """Returns name -> probs [4] after exact ascent of E[r] - beta * penalty from the reference."""

  def cost_in_reward(divergence):  # f'(pi / ref), which makes the reward's gradient that of D_f
    f_prime = bandits.DIVERGENCES[divergence].f_prime
    return lambda terms: kl_peers.reward(lambda t: f_prime(jnp.exp(kl_peers.k1(t))), terms)[1]

  surrogates = {
    "k1_reward": K1_REWARD,
    "k2_loss": K2_LOSS,
    "weighted_k3_loss": WEIGHTED_K3_LOSS,
    "k3_loss": K3_LOSS,
    "clamp": CLAMP_REWARD,
    "jsd": cost_in_reward("js"),
    "chi2": cost_in_reward("chi_square"),
    "k1_loss": K1_LOSS,
    "rb_reward": EXACT_REWARD,
  }
  ends = oracle.fixed_points(
    bandit(4), list(surrogates.values()), logits_of(REF), SCORES, beta=BETA
  )
  return dict(zip(surrogates, np.asarray(jax.nn.softmax(ends))[:, 0], strict=True))


def test_af09_optimum_of_a_bandit():
  figures, inputs = expected("AF09"), FACTS["AF09"]["inputs"]
  assert (inputs["ref"], inputs["r"], inputs["beta"]) == (REF.tolist(), SCORES.tolist(), BETA)
  tree, ref = bandit(4), logits_of(REF)
  optimum = oracle.optimal_policy(tree, ref, SCORES, beta=BETA)
  probs = jax.nn.softmax(optimum.logits[0])
  score = oracle.expected_score(tree, optimum.logits, SCORES)
  kl = oracle.sequence_kl(tree, optimum.logits, ref)
  gap = BETA * optimum.log_z - oracle.expected_score(tree, ref, SCORES)
  close("AF09", probs, figures["pi"])
  close("AF09", [optimum.log_z, score, kl], [figures[x] for x in ("logZ", "Er", "KL")])
  close("AF09", gap, figures["gap_ref"])
  close("AF09", gap, oracle.sequence_kl(tree, ref, optimum.logits), ZERO)
  close("AF09", score - BETA * kl, BETA * optimum.log_z, ZERO)
  for name in ("k1_reward", "k2_loss", "weighted_k3_loss"):
    assert total_variation(trained_on_cat_b()[name], figures["pi"]) < 5e-3, name


def test_af10_fixed_points_by_estimator_and_divergence():
  figures, trained = expected("AF10"), trained_on_cat_b()
  for key, divergence, multiplier in (
    ("k3_loss", "forward", "lam"),
    ("clamp", "clamp", "c"),
    ("jsd", "js", None),
    ("chi2", "chi_square", None),
  ):
    probs, found = bandits.optimal_under(divergence, REF, SCORES, beta=BETA)
    close("AF10", probs, figures[key], 1e-5)
    if multiplier:
      close("AF10", found, figures[multiplier])
    assert total_variation(trained[key], figures[key]) < (5e-2 if key == "clamp" else 5e-3), key
  for name in ("k1_loss", "rb_reward"):
    assert total_variation(trained[name], figures["onehot"]) < 5e-3, name
  # Here the end depends on the path: the natural gradient's stops at a mixture of the best two.
  end = oracle.fixed_point(bandit(4), K3_REWARD, logits_of(REF), SCORES, beta=BETA, natural=False)
  assert total_variation(jax.nn.softmax(end[0]), figures["onehot"]) < 5e-3


def test_af11_soft_values_of_a_tree():
  figures, beta = expected("AF11"), FACTS["AF11"]["inputs"]["beta"]
  tree, theta, ref, _, scores = tree_a()
  optimum = oracle.optimal_policy(tree, ref, scores, beta=beta)
  close("AF11", optimum.values[:3], [figures[x] for x in ("V_root", "V_0", "V_1")])
  close("AF11", optimum.values[0], beta * optimum.log_z, ZERO)
  close("AF11", jax.nn.softmax(optimum.logits[0]), figures["root"])
  close("AF11", oracle.expected_score(tree, optimum.logits, scores), figures["Er"])
  close("AF11", oracle.sequence_kl(tree, optimum.logits, ref), figures["KL"])
  j = oracle.expected_score(tree, theta, scores) - beta * oracle.sequence_kl(tree, theta, ref)
  gap = optimum.values[0] - j
  close("AF11", [j, gap], [figures["J_theta"], figures["gap_theta"]])
  close("AF11", gap, beta * oracle.sequence_kl(tree, theta, optimum.logits), ZERO)


def test_af12_where_ascent_ends_by_placement():
  figures, beta = expected("AF12"), 0.5
  tree, _, ref, _, scores = tree_a()
  surrogates = {
    "k1_reward": K1_REWARD,
    "k2_token_loss": K2_LOSS,
    "rb_token_loss": EXACT_LOSS,
    "k3_token_loss": K3_LOSS,
    "k2_loss_seqmean": K2_SEQUENCE_MEAN,
    "rb_in_reward": EXACT_REWARD,
  }
  assert {*surrogates, "k3_in_reward"} == set(figures)
  ends = oracle.fixed_points(tree, list(surrogates.values()), ref, scores, beta=beta)

  @jax.jit
  @jax.vmap
  def describe(logits):
    kl = oracle.sequence_kl(tree, logits, ref)
    return oracle.expected_score(tree, logits, scores) - beta * kl, oracle.log_probs(tree, logits)

  found, log_probs = describe(ends)
  found = dict(zip(surrogates, np.asarray(found), strict=True))
  probs = dict(zip(surrogates, np.exp(log_probs), strict=True))
  for key in list(surrogates)[:-1]:
    close("AF12", found[key], figures[key], 1e-3 if key == "k2_loss_seqmean" else 1e-4)
  (one_eos,) = np.flatnonzero((tree.tokens == [1, 2, 0]).all(axis=1))
  assert found["rb_in_reward"] < 0.2
  assert total_variation(probs["rb_in_reward"], np.eye(len(tree.tokens))[one_eos]) < 5e-3
  assert figures["k3_in_reward"] == "diverges"
  end = oracle.fixed_point(tree, K3_REWARD, ref, scores, beta=beta, natural=False, max_gap=60.0)
  assert end.min() == -60  # nothing else stops it


def test_af13_frontier():
  figures = expected("AF13")
  betas = jnp.array([float(key) for key in figures])

  def frontier(betas):
    return oracle.frontier(bandit(4), logits_of(REF), SCORES, betas)

  (scores, kls), (d_scores, d_kls) = jax.jit(
    lambda x: jax.jvp(frontier, (x,), (jnp.ones_like(x),))
  )(betas)
  close("AF13", np.stack([scores, kls], axis=-1), list(figures.values()))
  close("AF13", d_scores / d_kls, betas)


def test_af14_best_of_n():
  figures = expected("AF14")
  for n, kl in figures["kl_cont"].items():
    close("AF14", bandits.best_of_n_kl_bound(float(n)), kl)
  best = bandits.best_of_n(REF, SCORES, 4)
  close("AF14", best, figures["catB_n4"])
  close("AF14", best @ SCORES, figures["catB_Er"])
  close("AF14", ops.exact_kl(jnp.log(best), jnp.log(REF)), figures["catB_KL"])
  coin = jnp.full(2, 0.5)
  kl = ops.exact_kl(jnp.log(bandits.best_of_n(coin, jnp.arange(2.0), 4)), jnp.log(coin))
  close("AF14", kl, figures["binary_KL"])
  # N(0, 1) scores, as a choice among 8,000 cells of equal width.
  edges = jnp.linspace(-10, 10, 8001)
  cells, scores = jnp.diff(jax.scipy.stats.norm.cdf(edges)), (edges[1:] + edges[:-1]) / 2
  cells = jnp.maximum(cells, 1e-300)
  close("AF14", bandits.best_of_n(cells, scores, 16) @ scores, figures["Emax16"])
  kl = figures["kl_cont"]["16"]
  probs, beta = bandits.optimal_within(cells, scores, max_kl=kl)
  close("AF14", probs @ scores, figures["frontier16"])
  found = oracle.frontier(bandit(8000), jnp.log(cells)[None], scores, beta[None])
  close("AF14", jnp.concatenate(found), [figures["frontier16"], kl])


def test_af15_gaussian_fits():
  figures, results = expected("AF15"), mode_seeking_gaussian.gaussian_results()

  def check(key, mixture, names):
    for name in names:
      point = results[mixture]["points"][name]
      fit = np.array([point["mean"], point["sigma"], point["kl"]])
      if key == "rev_mode":
        fit[0] *= -1 if name == "reverse_left" else 1
      figure = figures[key]
      np.testing.assert_allclose(fit[-len(figure) :], figure, rtol=0, atol=2e-4, err_msg=key)

  check("fwd", "equal", ["forward_left", "forward_right"])
  check("rev_mode", "equal", ["reverse_left", "reverse_right"])
  check("rev_saddle", "equal", ["reverse_middle"])  # a shallow minimum by its curvature
  check("w73_fwd", "unequal", ["forward_left", "forward_right"])
  check("w73_rev_global", "unequal", ["reverse_left"])
  check("w73_rev_local", "unequal", ["reverse_right"])
  check("unimodal_pm1_s1_fwd", "overlapping", ["forward_left", "forward_right"])
  check("unimodal_rev", "overlapping", ["reverse_left", "reverse_right"])


def test_af16_sft_and_rl_on_three_tokens():
  figures, found = expected("AF16"), mode_seeking.three_tokens()
  for key, name in (
    ("CE", "cross_entropy"),
    ("H", "data_entropy"),
    ("FKL", "forward_kl"),
    ("grad", "sft_gradient"),
    ("J", "rl"),
    ("J_onehot", "rl_at_one_hot"),
  ):
    close("AF16", found[name], figures[key])
  close("AF16", found["rl"], -found["reverse_kl"], ZERO)
  close("AF16", found["cross_entropy"], found["data_entropy"] + found["forward_kl"], ZERO)
  close("AF16", found["rl_at_data"], 0.0)


def test_af17_bound_of_one_direction_by_the_other():
  figures = expected("AF17")
  old, new = [0.001, 0.999], [0.3236, 0.6764]
  delta, actual = kl_directions.kl(old, new), kl_directions.kl(new, old)
  bounds = kl_directions.new_old_bounds(delta, min(old))
  close("AF17", [delta, actual], [figures["delta"], figures["actual"]])
  close("AF17", bounds, [figures[f"{x}_bound"] for x in ("kappa", "log", "article")])
  assert actual <= bounds.sharp <= bounds.log <= bounds.linear
  for t, kappa in figures["kappa"].items():
    close("AF17", kl_directions.kappa(float(t)), kappa)


def test_af18_what_each_direction_permits():
  figures = expected("AF18")
  rare, half = [1e-6, 1 - 1e-6], [0.5, 0.5]
  for key, old, new in (("raise_rare", rare, half), ("drop_common", half, rare)):
    kls = [kl_directions.kl(old, new), kl_directions.kl(new, old)]
    close("AF18", kls, figures[key])
  for key, direction in (("max_p_newold", "kl_new_old"), ("max_p_oldnew", "kl_old_new")):
    farthest = kl_directions.farthest(jnp.float64(1e-4), 0.05, direction, up=True)
    close("AF18", farthest, figures[key])


def test_af19_both_directions_agree_to_second_order():
  figures = expected("AF19")
  found = kl_directions.second_order([0.5, 0.3, 0.2], [1.0, -2.0, 0.5], 0.01)
  close("AF19", found, [figures[x] for x in ("dFd", "kappa3", "ratio_on", "ratio_no", "third")])


def test_af20_policy_losses():
  figures = dict(expected("AF20"))
  clip = {"clip_eps_low": 0.2, "clip_eps_high": 0.2}
  for key, ratio, advantage, options in (
    ("r1.5 A+1", 1.5, 1.0, {}),
    ("r.5 A+1", 0.5, 1.0, {}),
    ("r1.5 A-1", 1.5, -1.0, {}),
    ("r.5 A-1", 0.5, -1.0, {}),
    ("r4 A-1", 4.0, -1.0, {}),
    ("r4 A-1 dual", 4.0, -1.0, {"dual_clip": 3.0}),
    ("r1.25 A+1", 1.25, 1.0, {}),
    ("r1.25 A+1 hi.28", 1.25, 1.0, {"clip_eps_high": 0.28}),
  ):
    loss, gradient = _loss_and_gradient(
      ops.clipped_policy_loss, [np.log(ratio)], advantage, clip | options
    )
    close("AF20", [loss, gradient[0]], figures.pop(key))
  log_ratio = [0.02, -0.01, 0.03, 0.04]
  loss, gradient = _loss_and_gradient(ops.gspo_loss, log_ratio, 1.0, clip)
  close("AF20", loss, -figures.pop("GSPO logratios(.02,-.01,.03,.04) s"))
  close("AF20", gradient, np.full(4, figures.pop("GSPO grad/token A=1")))
  _, gradient = _loss_and_gradient(ops.cispo_loss, [np.log(8.0)], 1.0, {"max_ratio": 5.0})
  close("AF20", gradient, [figures.pop("CISPO r8 A+1 cap5 grad")])
  assert not figures


def _loss_and_gradient(loss, log_ratio, advantage, options):
  """Returns (the mean loss of one sequence, its gradient per token)."""
  log_ratio, mask = jnp.asarray(log_ratio), jnp.ones(len(log_ratio), bool)
  advantages, old_log_probs = jnp.full(len(log_ratio), advantage), jnp.full(len(log_ratio), -2.0)
  return jax.value_and_grad(
    lambda x: ops.sequence_mean_token_mean(
      loss(x, old_log_probs, advantages, mask, **options), mask
    )[0]
  )(old_log_probs + log_ratio)


def test_af21_controllers():
  figures = expected("AF21")
  ziegler = {"target_kl": 6.0, "num_samples": 512, "horizon": 1e4}
  alpaca = {"target_kl": 6.0, "num_samples": 1, "horizon": 10}  # num_samples / horizon = 0.1
  for key, rule, beta, measured_kls, coefficients in (
    ("ppo", ops.doubling, 0.2, [0.005, 0.0066, 0.00667, 0.015, 0.0151], {"target_kl": 0.01}),
    ("ziegler", ops.proportional, 0.15, [12, 6.3, 0], ziegler),
    ("alpaca", ops.proportional, 0.2, [9], alpaca),
  ):
    state = ops.ControllerState(jnp.float64(beta), jnp.int32(0))
    betas = [rule(state, kl, **coefficients).beta for kl in measured_kls]
    close("AF21", betas, np.atleast_1d(figures[key]))


def test_af22_advantages_and_shaped_rewards():
  figures = expected("AF22")
  garbage = [np.nan, np.inf]
  rewards, values = (jnp.array([*x, *garbage]) for x in ([0, 0, 1.0], [0.5, 0.6, 0.8]))
  mask = jnp.arange(5) < 3
  for key, gae_lambda, bootstrap in (
    ("terminal", 0.95, None),
    ("truncated", 0.95, jnp.array(0.9)),
    ("lam1", 1.0, None),
    ("lam0", 0.0, None),
  ):
    advantages, returns = ops.gae(
      rewards, values, mask, gamma=1.0, gae_lambda=gae_lambda, bootstrap_values=bootstrap
    )
    close("AF22", advantages, [*figures[key], 0, 0])
    np.testing.assert_allclose(returns[:3], advantages[:3] + values[:3])
  log_ratio = jnp.array([0.5, -0.2, 0.3, *garbage])
  kl = ops.k1(log_ratio, jnp.zeros(5))
  shaped = ops.shaped_rewards(jnp.array(1.0), kl, mask, beta=0.1)
  close("AF22", shaped, [*figures["shaped"], 0, 0])
  to_go = ops.discounted_returns(shaped, mask, gamma=1.0)
  close("AF22", to_go, [*figures["shaped_to_go"], 0, 0])


def test_af23_group_advantages_and_aggregations():
  figures = expected("AF23")
  scores = jnp.array([1.0, 0, 0, 1, 1, 0, 0, 0])
  for key, advantages in (
    ("rloo", ops.leave_one_out(scores)),
    ("grpo_pop", _whitened_group(scores)),
    ("grpo_sample", ops.group_relative(scores, eps=0.0)),
    ("drgrpo", ops.group_centred(scores)),
  ):
    close("AF23", advantages, np.where(scores == 1, *figures[key]))
  for group_size, ps in ((8, (0.25, 0.5)), (4, (0.25,))):
    multipliers = _multipliers(
      [_whitened_group, ops.group_centred, ops.leave_one_out], group_size, jnp.array(ps)
    )
    whitened = [figures[f"mult_G{group_size}_p{int(100 * p)}"] for p in ps]
    close("AF23", multipliers[0], whitened)
    close("AF23", multipliers[1], np.full(len(ps), 1 - 1 / group_size), ZERO)
    close("AF23", multipliers[2], np.ones(len(ps)), ZERO)
  gradient = _binary_gradients([_standardised_reward], 0.25, 0.25)[0]
  close("AF23", -gradient / (0.25 * 0.75), figures["limit_p25"])

  loss = jnp.array([[1.0, 1, np.nan, np.nan], [3, 3, 3, 3]])
  for key, aggregation, constant_length in (
    ("token_mean", "token_mean", None),
    ("seqmean_tokmean", "sequence_mean_token_mean", None),
    ("seqmean_toksum", "sequence_mean_token_sum", None),
    ("seqmean_toksum_norm8", "constant", 8),
  ):
    mask = ~jnp.isnan(loss)
    found = ops.divide(*ops.AGGREGATIONS[aggregation](loss, mask))
    if constant_length is not None:
      found *= mask.shape[-1] / constant_length
    close("AF23", found, figures["agg"][key])


def _whitened_group(scores):
  """GRPO with the population's standard deviation."""
  return ops.whiten(scores, jnp.ones(scores.shape, bool))


def _multipliers(advantages, group_size, ps):
  """Returns the expected gradient of a group's loss over that of p, by all groups; [...] each.

  A group is a completion of `group_size` independent tokens, and token 1 is a success.
  """
  tree = oracle.make_tree(2, group_size)
  by_group = [jax.vmap(f)(tree.tokens.astype(float)) for f in advantages]

  @jax.jit
  @jax.vmap
  def multipliers(p):
    logits = jnp.tile(logits_of([1 - p, p]), (len(tree.depths), 1))
    gradients = [
      oracle.expected_gradient(
        tree, lambda terms, a=a: ops.reinforce_loss(terms.log_probs, a, terms.mask), logits, logits
      )
      for a in by_group
    ]
    return [-x[:, 1].sum() / (group_size * p * (1 - p)) for x in gradients]

  return multipliers(ps)


def _standardised_reward(terms):
  """The loss of GRPO with an infinite group on the binary bandit, whose choice 1 succeeds."""
  probs = jax.lax.stop_gradient(jnp.exp(terms.log_probs[:, 0]))
  centred = jnp.arange(2.0) - probs[1]
  return _reward(centred / jnp.sqrt((probs * centred**2).sum()), terms)


def _plain_reward(terms):
  return _reward(jnp.arange(2.0), terms)


def _reward(advantages, terms):
  return ops.reinforce_loss(terms.log_probs, advantages[:, None], terms.mask)


def _binary_gradients(surrogates, p, ref_p):
  """Returns each surrogate's gradient in the logit of success, at success probability p."""
  pi, ref = logits_of([1 - p, p]), logits_of([1 - ref_p, ref_p])
  return [oracle.expected_gradient(bandit(2), f, pi, ref)[0, 1] for f in surrogates]


def test_af24_grpo_on_a_binary_reward():
  figures, ref_p = expected("AF24"), 0.25

  def loss(reward, penalty, beta):
    return lambda terms: reward(terms) + beta * penalty(terms)

  surrogates = {
    "std_k3_b1": loss(_standardised_reward, K3_LOSS, 1.0),
    "std_k3_b004": loss(_standardised_reward, K3_LOSS, 0.04),
    "nostd_k3_b1": loss(_plain_reward, K3_LOSS, 1.0),
    "nostd_k1_b1": loss(_plain_reward, K1_REWARD, 1.0),
    "nostd_k2_b1": loss(_plain_reward, K2_LOSS, 1.0),
    "std_k1_b095": loss(_standardised_reward, K1_REWARD, 0.95),
    "std_k1_b105": loss(_standardised_reward, K1_REWARD, 1.05),
  }
  ends = oracle.fixed_points(
    bandit(2),
    list(surrogates.values()),
    logits_of([1 - ref_p, ref_p]),
    jnp.zeros(2),  # the reward is in the surrogates, for it moves with the policy
    beta=1.0,
    step_size=0.05,
  )
  ends = dict(zip(surrogates, jax.nn.softmax(ends)[:, 0, 1], strict=True))
  for key in ("std_k3_b1", "std_k3_b004", "nostd_k3_b1", "nostd_k1_b1"):
    close("AF24", ends[key], figures[key])
  close("AF24", ends["nostd_k2_b1"], figures["nostd_k1_b1"])

  # Reward and KL balance where beta is the ratio of their gradients: no p has one below beta_c.
  @jax.jit
  @jax.vmap
  def balancing_beta(p):
    reward, kl = _binary_gradients([_standardised_reward, K1_REWARD], p, ref_p)
    return -reward / kl

  p = ends["std_k1_b105"]
  betas = balancing_beta(jnp.append(jnp.linspace(ref_p + 0.01, 0.9999, 20_000), p))
  close("AF24", betas.min(), figures["beta_c"])
  np.testing.assert_allclose(betas[-1], 1.05, rtol=1e-6)
  assert ref_p < p < 0.99
  assert ends["std_k1_b095"] > 1 - 1e-9


def test_af25_population_dpo_mirror_steps_and_mpos_dual():
  figures = expected("AF25")
  tree, ref = bandit(4), jnp.log(REF)
  optimum = oracle.optimal_policy(tree, ref[None], SCORES, beta=BETA).logits[0]
  labels = 2 * REF[:, None] * REF * jax.nn.sigmoid(SCORES[:, None] - SCORES)  # chosen, rejected

  def population_loss(logits):
    log_probs = jax.nn.log_softmax(logits)
    pairs = jnp.stack(jnp.meshgrid(jnp.arange(4), jnp.arange(4), indexing="ij"))
    losses = ops.dpo_loss(*log_probs[pairs], *ref[pairs], beta=BETA)
    return (labels * losses).sum()

  start = (ref[:1], ref[1:2], ref[:1], ref[1:2])
  losses, gradients = jax.value_and_grad(
    lambda *x: ops.dpo_loss(*x, beta=BETA).sum(), argnums=(0, 1)
  )(*start)
  close("AF25", [losses, population_loss(ref)], [figures["init"]] * 2)
  close("AF25", np.ravel(gradients), [-BETA / 2, BETA / 2], ZERO)
  trained = jax.lax.fori_loop(0, 3000, lambda _, x: x - 4 * jax.grad(population_loss)(x), ref)
  close("AF25", jax.nn.softmax(trained), figures["dpo"])
  close("AF25", jax.nn.softmax(trained), jax.nn.softmax(optimum), 1e-7)

  steps = [ref]
  for _ in range(4):
    steps.append(bandits.mirror_step(ref, steps[-1], SCORES, beta=BETA, eta=0.5))
  close("AF25", jnp.exp(steps[1]), figures["mirror1"])
  close("AF25", jnp.exp(steps[4]), figures["mirror4"])
  gaps = [ops.exact_kl(optimum, steps[k]) for k in (1, 2, 4)]
  close("AF25", gaps, figures["kl_after"])
  distances = np.array([jnp.std(x - optimum) for x in steps])
  np.testing.assert_allclose(distances[1:] / distances[:-1], 2 / 3, rtol=1e-9)

  probs, beta = bandits.optimal_within(REF, SCORES, max_kl=0.1)
  close("AF25", [beta, probs @ SCORES], [figures["mpo_eta"], figures["mpo_Er"]])


def test_s1_k3_of_a_small_log_ratio_in_float32():
  value = ops.k3(jnp.float32(1e-4), jnp.float32(0.0))
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, expected("S1")["true"], rtol=0.01)


def test_s2_top_2_sampling_makes_the_mean_of_k1_negative():
  figures = expected("S2")
  found = estimators.truncated_sampling(
    "top-2", lambda x: top_k_logits(x, 2), (0.5, 0.3, 0.2), (0.6, 0.3, 0.1)
  )
  close("S2", found["true"], figures["true"])
  close("S2", [found["k1"], found["k3"]], [figures["top2_k1"], figures["top2_k3"]])


def test_s3_heavy_tail_of_k3():
  figures = expected("S3")
  case = estimators.categorical("", (0.9, 0.0999, 0.0001), (0.5, 0.3, 0.2))
  values = estimators.estimates(case.points)
  for name in ops.KL_ESTIMATORS:
    close("S3", estimators.moments(case.points.probs, values[name])[1], figures[name])
  # u = ref / pi = 1 + k3 - k1, and its variance under pi is chi2(ref || pi).
  _, std = estimators.moments(case.points.probs, values["k3"] - values["k1"])
  close("S3", std**2, figures["chi2"])


def test_s4_gold_laws():
  figures = expected("S4")
  for key, law, slope in (("rl", "rl", 0.25), ("bon", "best_of_n", 0.125)):
    score, peak = bandits.GOLD_LAWS[law]
    distance = peak(0.5, slope)
    close("S4", distance, figures[f"d_{key}"])
    close("S4", score(distance, 0.5, slope), figures[f"R_{key}"])
    close("S4", jax.grad(score)(jnp.float64(distance), 0.5, slope), 0.0)


def test_s5_vtrace():
  figures = expected("S5")
  rewards, values = jnp.array([0, 0, 1.0]), jnp.array([0.5, 0.6, 0.8])
  for key, ratio in (("on", [1, 1, 1.0]), ("off", [2, 0.5, 0.8])):
    _, targets = ops.vtrace(
      jnp.log(jnp.array(ratio)), jnp.zeros(3), rewards, values, jnp.ones(3, bool), gamma=1.0
    )
    close("S5", targets, figures[key])


def test_s6_adams_epsilon():
  """TensorFlow 1 adds its eps to the root of the second moment before the bias is corrected."""
  eps_hat, b1, b2 = 1e-5, 0.9, 0.999
  gradients = 1e-4 * np.sin(np.arange(1.0, 1001.0))
  for t, eps in zip((1, 10, 1000), expected("S6"), strict=True):
    # Adam with another eps is Adam on gradients scaled by the ratio; the optimizer's is 1e-8.
    scaled = jnp.asarray(gradients[:t]) * 1e-8 / eps

    def step(state, gradient):
      params, opt_state, _ = optimizer.apply_gradients(
        jnp.zeros(()), state, gradient, learning_rate=1.0, max_grad_norm=jnp.inf
      )
      return opt_state, params

    _, updates = jax.lax.scan(step, optimizer.init_optimizer(jnp.zeros(())), scaled)
    decay = np.arange(t - 1, -1, -1)
    m, v = ((1 - b) * (b**decay * gradients[:t] ** k).sum() for b, k in ((b1, 1), (b2, 2)))
    published = -np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps_hat)
    np.testing.assert_allclose(updates[-1], published, rtol=1e-9)
