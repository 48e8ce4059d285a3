"""Figures of KL penalties by enumeration: expected gradient, variance, value, end of an ascent.

A penalty comes as two functions of `kl_terms.TokenTerms`: its surrogate loss, whose gradient
training descends, and its estimate of the KL. R penalties, C policies on one tree, N completions, S
prefixes, V tokens; float64 throughout. Gradients are with respect to the logits of every prefix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from klrl import ops
from klrl.algorithm import kl_terms, objective
from klrl.exact import bandits, oracle

SHAPE = kl_terms.SHAPE  # the coefficients of divergences, as by default
MILD = 2.5  # a largest |log-ratio| of a token at which no peer's clamp bites
EXACT = 1e-9  # relative to |gradient of KL(pi || ref)|, on every tree
SAME_POLICY = 5e-3  # total variation
NUM_STEPS = 10_000
BANDIT = ((0.4, 0.3, 0.2, 0.1), (0.0, 1.0, 2.0, 3.0), 1.0)  # reference, scores, beta
# Where ascent on the bandit ends.
TILT = "ref * exp(r / beta) / Z"
FORWARD_TILT = "beta * ref / (lambda - r)"
BEST = "all mass on the best completion"
CUT = "a tilt of part of the reference"
ELSEWHERE = "elsewhere"
# Gradients that only a peer has, beside the names of `objective`.
FORWARD = "KL(ref||pi)"
LENGTH = "mean of 1/length, whatever the reference"


class Policies(NamedTuple):
  """Three policies on each of C trees, [C, S, V] logits each; the first tree is TREE-A."""

  logits: jax.Array
  old_logits: jax.Array
  ref_logits: jax.Array


def tree_a() -> tuple[oracle.Tree, Policies, np.ndarray]:
  """Returns the fixed tree, its policies [1, S, V] and its scores [N]."""
  tree = oracle.make_tree(3, 3, eos_id=2)
  s, a = np.arange(1, 8)[:, None], np.arange(1, 4)
  logits = 0.9 * np.sin(1.7 * s + 2.3 * a)
  old_logits = logits + 0.6 * np.sin(3.1 * s * a)
  ref_logits = 0.9 * np.cos(1.1 * s - 0.7 * a)
  policies = Policies(*(x[None] for x in (logits, old_logits, ref_logits)))
  return tree, policies, np.sin(1.0 + np.arange(len(tree.tokens)))


def with_random(policies: Policies, num_trees: int, seed: int) -> Policies:
  """Returns `policies` and `num_trees` random ones.

  Logits of policy and reference are normal, of standard deviation 1 and 0.4 in turn: far apart and
  close. The older policy is the policy and half as much noise.
  """
  noise = np.random.default_rng(seed).normal(size=(3, num_trees, *policies.logits.shape[1:]))
  noise[:, 1::2] *= 0.4
  drawn = Policies(noise[0], noise[0] + 0.5 * noise[1], noise[2])
  return jax.tree.map(lambda a, b: np.concatenate([a, b]), policies, drawn)


def gradients_by_name(tree: oracle.Tree, policies: Policies) -> dict[str, np.ndarray]:
  """Returns the exact gradient [C, S, V] of everything that a penalty may turn out to descend."""
  inverse_lengths = 1.0 / tree.mask.sum(axis=-1)

  def of_one(case: Policies):
    x, old, ref = case
    by_name = {
      objective.SEQUENCE: jax.grad(lambda x: oracle.sequence_kl(tree, x, ref))(x),
      objective.TOKEN: jax.grad(lambda x: oracle.token_kl(tree, x, ref))(x),
      objective.TOKEN_AT_OLD: jax.grad(lambda x: oracle.token_kl(tree, x, ref, prefix_logits=old))(
        x
      ),
      objective.TOKEN_FORWARD: jax.grad(lambda x: oracle.token_kl(tree, ref, x, prefix_logits=x))(
        x
      ),
      objective.ZERO: jnp.zeros_like(x),
      FORWARD: jax.grad(lambda x: oracle.sequence_kl(tree, ref, x))(x),
      LENGTH: jax.grad(lambda x: oracle.expected_score(tree, x, inverse_lengths))(x),
    }
    to_old = jax.grad(lambda x: oracle.token_kl(tree, x, old, prefix_logits=old))(x)
    sequence, token, forward = (
      by_name[name] for name in (objective.SEQUENCE, objective.TOKEN, objective.TOKEN_FORWARD)
    )
    return by_name | {
      objective.FUTURE: sequence - token,
      objective.SEQUENCE_LESS_FORWARD: sequence - forward,
      objective.TOKEN_LESS_FORWARD: token - forward,
      objective.STALE_TOKEN: by_name[objective.TOKEN_AT_OLD] - to_old,
    }

  with jax.enable_x64(True):
    found = jax.device_get(jax.jit(jax.vmap(of_one))(policies))
  # In this order they are tried: on-policy, the prefixes of old and pi are the same.
  first = (objective.SEQUENCE, objective.TOKEN)
  return {name: found[name] for name in (*first, *(set(found) - set(first)))}


def measure(tree: oracle.Tree, surrogates, estimates, policies: Policies):
  """Returns (gradients [R, C, S, V], trace covariances [R, C], values [R, C]) of R penalties.

  Args:
    tree: the completions.
    surrogates: R functions of TokenTerms, what each adds to the loss.
    estimates: R functions of TokenTerms, the KL that each computes with.
    policies: `old_logits` draws.
  """

  # One program whose rows are picked by weights of 0 and 1 compiles several times faster than one
  # program per row, and that is most of the time.
  def of_one(case: Policies):
    def of_row(weights):
      surrogate, estimate = (
        lambda terms, fs=fs: sum(weights[i] * f(terms) for i, f in enumerate(fs))
        for fs in (surrogates, estimates)
      )
      arguments = (case.logits, case.ref_logits)
      old = {"old_logits": case.old_logits}
      return (
        oracle.expected_gradient(tree, surrogate, *arguments, **old),
        oracle.gradient_covariance(tree, surrogate, *arguments, **old),
        oracle.expected_value(tree, estimate, *arguments, **old),
      )

    return jax.vmap(of_row)(jnp.eye(len(surrogates)))

  with jax.enable_x64(True):
    found = jax.device_get(jax.jit(lambda policies: jax.lax.map(of_one, policies))(policies))
  return tuple(np.moveaxis(x, 1, 0) for x in found)


def ends(tree: oracle.Tree, surrogates, ref_logits, scores, beta) -> list[dict]:
  """Returns for each surrogate where ascent of E[score] - beta * penalty ends, from the reference.

  `moved` is the total variation between the policies half-way and at the end: what has not come
  to rest.
  """

  def describe(logits):
    return {
      "score": oracle.expected_score(tree, logits, scores),
      "kl": oracle.sequence_kl(tree, logits, ref_logits),
      "probs": jnp.exp(oracle.log_probs(tree, logits)),
    }

  @jax.jit
  def go_on(start):
    """Returns the logits after half of the steps, and what they are."""
    logits = oracle.fixed_points(
      tree, surrogates, ref_logits, scores, beta=beta, start=start, num_steps=NUM_STEPS // 2
    )
    return logits, jax.vmap(describe)(logits)

  with jax.enable_x64(True):
    ref_logits, scores = jnp.asarray(ref_logits), jnp.asarray(scores)
    best = jax.device_get(
      describe(oracle.optimal_policy(tree, ref_logits, scores, beta=beta).logits)
    )
    middle, halfway = go_on(jnp.stack([jax.nn.log_softmax(ref_logits)] * len(surrogates)))
    halfway, end = jax.device_get((halfway, go_on(middle)[1]))
  return [
    {
      "score": float(end["score"][i]),
      "kl": float(end["kl"][i]),
      "objective": float(end["score"][i] - beta * end["kl"][i]),
      "distance_to_optimum": _total_variation(probs, best["probs"]),
      "moved": _total_variation(probs, halfway["probs"][i]),
      "probs": probs.tolist(),
    }
    for i, probs in enumerate(end["probs"])
  ]


def _total_variation(p, q) -> float:
  return float(bandits.total_variation(np.asarray(p), np.asarray(q)))


def ends_on_bandit(surrogates) -> list[dict]:
  """Returns `ends` at horizon 1, each with the name of the policy that it `leads_to`."""
  ref, scores, beta = (np.asarray(x) for x in BANDIT)
  with jax.enable_x64(True):
    known = {
      TILT: bandits.optimal_under("reverse", jnp.asarray(ref), jnp.asarray(scores), beta=beta)[0],
      FORWARD_TILT: bandits.optimal_under(
        "forward", jnp.asarray(ref), jnp.asarray(scores), beta=beta
      )[0],
      BEST: np.eye(len(ref))[scores.argmax()],
      CUT: bandits.optimal_under("clamp", jnp.asarray(ref), jnp.asarray(scores), beta=beta)[0],
    }
  tree = oracle.make_tree(len(ref), 1)
  found = ends(tree, surrogates, np.log(ref)[None], scores, beta)
  for end in found:
    distances = {name: _total_variation(end["probs"], probs) for name, probs in known.items()}
    name = min(distances, key=distances.get)
    end["leads_to"] = name if distances[name] < SAME_POLICY else ELSEWHERE
  return found


def figures(tree: oracle.Tree, surrogates, estimates, policies: Policies) -> list[dict]:
  """Returns the figures of each penalty: on the policies' own samples and on the older ones'.

  Each is {"on_policy": {...}, "off_policy": {...}}; plain figures are those of the first tree.
  """
  num_trees = len(policies.logits)
  own = policies._replace(old_logits=policies.logits)
  both = jax.tree.map(lambda a, b: np.concatenate([a, b]), own, policies)
  by_name = gradients_by_name(tree, both)
  with jax.enable_x64(True):
    kl = jax.vmap(lambda x, ref: oracle.sequence_kl(tree, x, ref))
    kls = np.asarray(kl(jnp.asarray(both.logits), jnp.asarray(both.ref_logits)))
  measured = measure(tree, surrogates, estimates, both)
  log_ratios = _log_softmax(policies.logits) - _log_softmax(policies.ref_logits)
  mild = np.abs(log_ratios).max(axis=(-1, -2)) < MILD
  regimes = {"on_policy": slice(num_trees), "off_policy": slice(num_trees, None)}
  return [
    {
      regime: _figures_of_one(
        *(x[row][part] for x in measured),
        {name: g[part] for name, g in by_name.items()},
        kls[part],
        mild,
      )
      for regime, part in regimes.items()
    }
    for row in range(len(surrogates))
  ]


def _figures_of_one(gradients, covariances, values, by_name, kl, mild) -> dict:
  sequence, token = by_name[objective.SEQUENCE], by_name[objective.TOKEN_AT_OLD]
  unit, bias = _norm(sequence), values - kl
  errors = {name: _norm(gradients - exact) / unit for name, exact in by_name.items()}

  def name_on(trees):
    names = [name for name, error in errors.items() if error[trees].max() < EXACT]
    return names[0] if names else objective.NO_DIVERGENCE

  pull = (gradients * sequence).sum(axis=(-1, -2)) / unit**2
  result = {
    "gradient": name_on(slice(None)),
    "gradient_unclamped": name_on(mild),
    "value_bias": bias[0],
    "value_bias_relative": bias[0] / kl[0],
    "value_bias_worst": np.abs(bias).max(),
    "value_unbiased": bool((np.abs(bias) < EXACT).all()),
    "pull": pull[0],
    "pull_lowest": pull.min(),
    "pull_highest": pull.max(),
    "trace_covariance": covariances[0],
  }
  size = _norm(gradients)[0]
  for target, exact in (("sequence", sequence), ("token", token)):
    error = _norm(gradients - exact) / _norm(exact)
    product = (gradients[0] * exact[0]).sum()
    # A gradient that is zero has no direction.
    cosine = product / (size * _norm(exact[0])) if size > EXACT * unit[0] else None
    result |= {
      f"error_{target}": error[0],
      f"error_{target}_lowest": error.min(),
      f"error_{target}_highest": error.max(),
      f"cosine_{target}": cosine,
    }
  return {k: float(v) if isinstance(v, np.floating) else v for k, v in result.items()}


def _log_softmax(logits):
  return np.asarray(jax.nn.log_softmax(logits))


def _norm(x):
  return np.sqrt((x**2).sum(axis=(-1, -2)))


def of_divergences(tree: oracle.Tree, policies: Policies) -> list[tuple]:
  """Returns (penalty, figures on the policies' own samples, on older ones') of other divergences.

  The figures are the `gradient`, by the name that it has on every tree, and of the first tree
  `pull_of_kl`, its component along the gradient of KL(pi || ref), as a fraction of that one.
  """
  names = [name for name in objective.DIVERGENCES if name != "reverse"]
  rows = [kl_terms.DIVERGENCES[name] for name in names]
  penalties = [x for x in objective.DEFINED_OF_OTHERS if x.divergence == names[0]]

  def of_one(index, case: Policies):
    """One program serves all divergences, by the index of one."""

    def exact(*both):
      return jax.lax.switch(index, [lambda *x, f=row.exact: f(*x, SHAPE) for row in rows], *both)

    def slope(log_ratio):
      return jax.lax.switch(index, [lambda x, f=row.slope: f(x, SHAPE) for row in rows], log_ratio)

    x, old, ref = case
    surrogates = [kl_terms.surrogate(penalty, slope=slope) for penalty in penalties]

    def gradient(weights):
      return oracle.expected_gradient(
        tree,
        lambda terms: sum(weights[i] * f(terms) for i, f in enumerate(surrogates)),
        x,
        ref,
        old_logits=old,
        divergence=exact,
      )

    whole, summed, token, at_old, kl = (
      jax.grad(f)(x)
      for f in (
        lambda x: oracle.completion_divergence(tree, exact, x, ref),
        lambda x: oracle.summed_divergence(tree, exact, x, ref),
        lambda x: oracle.token_divergence(tree, exact, x, ref),
        lambda x: oracle.token_divergence(tree, exact, x, ref, prefix_logits=old),
        lambda x: oracle.sequence_kl(tree, x, ref),
      )
    )
    targets = (whole, summed, token, at_old, summed - token, jnp.zeros_like(x))
    return jax.vmap(gradient)(jnp.eye(len(penalties))), targets, kl

  run = jax.jit(lambda index, cases: jax.lax.map(lambda case: of_one(index, case), cases))
  own = policies._replace(old_logits=policies.logits)
  found = []
  for index, divergence in enumerate(names):
    labels = [f(divergence) for f in objective.GRADIENTS_OF_OTHERS]
    regimes = []
    for cases in (own, policies):
      with jax.enable_x64(True):
        gradients, targets, kl = jax.device_get(run(index, cases))
      unit = _norm(kl)[:, None]
      errors = [(_norm(gradients - exact[:, None]) / unit).max(axis=0) for exact in targets]
      pulls = (gradients[0] * kl[0]).sum(axis=(-1, -2)) / unit[0] ** 2
      regimes.append((np.array(errors), pulls))
    for row, penalty in enumerate(penalties):
      figures = []
      for errors, pulls in regimes:
        names_found = np.array(labels)[errors[:, row] < EXACT]
        gradient = str(names_found[0]) if len(names_found) else objective.NO_DIVERGENCE
        figures.append({"gradient": gradient, "pull_of_kl": float(pulls[row])})
      found.append((penalty._replace(divergence=divergence), *figures))
  return found


def of_guides(tree: oracle.Tree, policies: Policies) -> list[dict]:
  """Returns what three ways to put a guide exp(g) beside the reference descend, on own samples.

  Each has its `name`, and `error`, the distance of its gradient from that of
  KL(pi || ref * exp(g) / Z) over completions, over the norm of that, on the first tree, with its
  `lowest` and `highest` on all. In the last the guide is that of SAGE's code (Chanuk Lee et al.,
  2026): log q, where q >= 1 grows with the entropy of the policy before a token, is added to
  log ref in k3 as a loss. Its `error_weighted` is the distance, the greatest of all trees, from the
  gradient of KL(ref || pi) weighted by q at each prefix.
  """
  of_tokens = np.cos(np.arange(len(tree.depths) * tree.vocab_size)).reshape(-1, tree.vocab_size)
  guide = (of_tokens[tree.states, tree.tokens] * tree.mask).sum(axis=1)

  def of_one(x, ref):
    q = 1 + ops.entropy(x) / 2
    before = (jnp.log(q)[tree.states] * tree.mask).sum(axis=1)
    visits, probs = oracle.visits(tree, x), jax.nn.softmax(x)

    def to_guided(guide):
      log_probs = jax.nn.log_softmax(oracle.log_probs(tree, ref) + guide)
      return jax.grad(lambda x: ops.kl_of(oracle.log_probs(tree, x), log_probs))(x)

    def rewarded(x):
      return oracle.sequence_kl(tree, x, ref) - oracle.expected_score(tree, x, guide)

    def product(x):
      return oracle.sequence_kl(tree, x, ref + of_tokens)

    def shifted(x):  # The tokens are drawn, and their choice is not credited.
      shifted_ref = ops.vocab_log_probs(ref) + jnp.log(q)[:, None]
      return visits @ (probs * ops.k3(ops.vocab_log_probs(x), shifted_ref)).sum(axis=1)

    def weighted(x):
      return visits @ (q * ops.kl_of(ops.vocab_log_probs(ref), ops.vocab_log_probs(x)))

    of_guide, of_prefixes = to_guided(guide), to_guided(before)
    found = [jax.grad(f)(x) for f in (rewarded, product, shifted, weighted)]
    return found, [of_guide, of_guide, of_prefixes, found[-1]]

  with jax.enable_x64(True):
    found, exact = jax.device_get(jax.jit(jax.vmap(of_one))(policies.logits, policies.ref_logits))
  errors = [_norm(x - y) / _norm(y) for x, y in zip(found, exact, strict=True)]
  errors.append(_norm(found[2] - found[3]) / _norm(found[3]))
  names = (
    "g of the completion, as a reward",
    "g of each token, as a product at each prefix",
    "q of each prefix, as log q beside log ref in k3 as a loss",
  )
  rows = [
    {
      "name": name,
      "error": float(error[0]),
      "lowest": float(error.min()),
      "highest": float(error.max()),
    }
    for name, error in zip(names, errors, strict=False)
  ]
  rows[-1]["error_weighted"] = float(errors[-1].max())
  return rows


def describe_tree(tree: oracle.Tree, policies: Policies, scores, beta) -> dict:
  """Returns the truth about the first tree: KLs, nats per completion, the optimum, the frontier."""
  with jax.enable_x64(True):
    logits, old, ref = (jnp.asarray(x[0]) for x in policies)
    scores = jnp.asarray(scores)
    best = oracle.optimal_policy(tree, ref, scores, beta=beta).logits
    kls = {
      "kl_pi_ref": oracle.sequence_kl(tree, logits, ref),
      "kl_ref_pi": oracle.sequence_kl(tree, ref, logits),
      "kl_pi_old": oracle.sequence_kl(tree, logits, old),
      "optimum_score": oracle.expected_score(tree, best, scores),
      "optimum_kl": oracle.sequence_kl(tree, best, ref),
    }
    betas = beta * np.geomspace(1 / 50, 50, 61)
    frontier_scores, frontier_kls = oracle.frontier(tree, ref, scores, betas)
  return {
    "completions": len(tree.tokens),
    "tokens": tree.vocab_size,
    "horizon": tree.horizon,
    **{name: float(kl) for name, kl in kls.items()},
    "frontier_score": np.asarray(frontier_scores).tolist(),
    "frontier_kl": np.asarray(frontier_kls).tolist(),
  }
