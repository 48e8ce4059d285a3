"""Papers on KL-regularised RL: what each claims, the command that shows it, and what came out.

A row names an experiment, which is run as it is without flags but for `flags`, and a function from
its results to a finding. The table in docs/papers.md is what `experiments.paper all` writes.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from experiments.lab import kl_figures
from klrl.algorithm import objective
from klrl.figures import KL

# The file of an experiment's results; the others are runs, which have a summary.
RESULTS = {
  "kl_audit": "audit.json",
  "estimators": "estimators.json",
  "mode_seeking": "mode_seeking.json",
  "kl_variance": "kl_variance.json",
  "kl_directions": "kl_directions.json",
  "best_of_n": "best_of_n.json",
  "over_optimisation": "over_optimisation.json",
  "diversity": "diversity.json",
  "mismatch": "mismatch.json",
}
SUMMARY = "summary.json"


class Finding(NamedTuple):
  """What came out."""

  agrees: bool
  figure: str  # a clause, with its figures


class Paper(NamedTuple):
  """A claim, and how it is tried here."""

  source: str  # authors, title, year, and its number at arXiv if it has one
  claim: str  # a sentence
  experiment: str
  found: Callable[[dict], Finding]  # from the results of the experiment
  beyond: str = ""  # where what is known here says more than the claim, or denies a part of it
  flags: Mapping[str, Any] = types.MappingProxyType({})

  @property
  def command(self) -> str:
    given = "".join(f" --{name}={value}" for name, value in self.flags.items())
    return f"python -m experiments.{self.experiment}{given}"


def _row(audit: dict, name: str, group: str = "penalties") -> dict:
  (row,) = (row for row in audit[group] if row["name"] == name)
  return row


def _percent(x: float) -> str:
  return f"{100 * x:.0f}%"


def _approximating(results: dict) -> Finding:
  near, heavy = (
    next(case for case in results["cases"] if case["title"] == title)
    for title in ("Schulman, \u03bc = 0.1", "heavy tail")
  )

  def deviations(case):
    return [case["estimators"][name]["std"] / case["true"] for name in ("k1", "k3")]

  k1, k3 = deviations(near)
  heavy_k1, heavy_k3 = deviations(heavy)
  bias = abs(near["estimators"]["k3"]["mean"] / near["true"] - 1)
  return Finding(
    k3 < k1 and bias < 1e-6,
    f"over the KL, one sample deviates by {k1:.1f} for k1 and {k3:.2f} for k3; with a heavy tail "
    f"by {heavy_k1:.2g} and {heavy_k3:.2g}",
  )


def _rao_blackwell(results: dict) -> Finding:
  ratios = [
    policy["estimators"]["exact"]["std"] / policy["estimators"]["k1"]["std"]
    for policy in results["policies"]
  ]
  return Finding(
    max(ratios) < 1,
    f"its deviation is {_percent(min(ratios))} to {_percent(max(ratios))} of that of k1, at "
    f"{len(ratios)} distances from the reference",
  )


def _pitfalls(audit: dict) -> Finding:
  k1, k3 = (_row(audit, f"loss/{name}/none/token")["on_policy"] for name in ("k1", "k3"))
  return Finding(
    k1["gradient"] == objective.ZERO and k3["gradient"] == objective.TOKEN_FORWARD,
    f"as a loss, k1 has the expected gradient {k1['gradient']}, and k3 that of {k3['gradient']}",
  )


def _comedy(audit: dict) -> Finding:
  k1, k3, open_case = (
    _row(audit, name)
    for name in ("reward/k1/none/sequence", "reward/k3/none/sequence", "loss/k3/prefix/sequence")
  )
  off = open_case["off_policy"]
  return Finding(
    k1["on_policy"]["gradient"] == objective.SEQUENCE
    and k3["on_policy"]["gradient"] not in objective.KL_GRADIENTS
    and off["gradient"] == objective.SEQUENCE,
    f"k1 in the reward has an error of {_percent(k1['on_policy']['error_sequence'])}, k3 of "
    f"{_percent(k3['on_policy']['error_sequence'])}; off-policy {open_case['name']} has one of "
    f"{_percent(off['error_sequence'])}",
  )


def _rethinking(audit: dict) -> Finding:
  k2 = _row(audit, "loss/k2/none/token")["on_policy"]
  return Finding(
    k2["gradient"] == _row(audit, "reward/k1/none/token")["on_policy"]["gradient"],
    f"against the KL at given prefixes its error is {_percent(k2['error_token'])}, against the KL "
    f"of whole completions {_percent(k2['error_sequence'])}",
  )


def _regularised_policy_gradient(audit: dict) -> Finding:
  without, weighted = (
    _row(audit, f"loss/k3/{correction}/token")["off_policy"] for correction in ("none", "token")
  )
  return Finding(
    without["gradient"] == objective.NO_DIVERGENCE
    and weighted["gradient"] == objective.TOKEN_AT_OLD,
    f"on completions of an older policy the gradient of k3 is that of {without['gradient']}, and "
    f"of k3 times the ratio that of {weighted['gradient']}",
  )


def _weighted_k3(audit: dict) -> Finding:
  row = _row(audit, "loss/k3/token/token")
  on, off = row["on_policy"], row["off_policy"]
  return Finding(
    on["gradient"] == objective.TOKEN and on["value_unbiased"],
    f"its gradient is that of {on['gradient']}; on completions of an older policy its value is off "
    f"by {_percent(abs(off['value_bias_relative']))}, since the prefixes are the older policy's",
  )


def _grpo(audit: dict) -> Finding:
  row = _row(audit, "loss/k3/none/token")
  return Finding(
    row["on_policy"]["value_unbiased"],
    f"the value is unbiased; the gradient is that of {row['on_policy']['gradient']}, and ascent "
    f"ends at {row['end_at_horizon_1']['leads_to']}",
  )


def _inference(audit: dict) -> Finding:
  row = _row(audit, "reward/k1/none/sequence")
  return Finding(
    row["end_at_horizon_1"]["leads_to"] == kl_figures.TILT
    and row["end"]["distance_to_optimum"] < kl_figures.SAME_POLICY,
    f"ascent ends at {kl_figures.TILT}, to {row['end']['distance_to_optimum']:.0e} of total "
    "variation on a tree of several tokens",
  )


def _less_its_mean(results: dict) -> Finding:
  baselines = [tree["baseline"] for tree in results["trees"]]
  ratios = [baseline["variance"] for baseline in baselines]
  less, policies = (sum(x[name] for x in baselines) for name in ("less", "policies"))
  k1, centred = (
    results["decoder"]["on_policy"][f"reward/{estimator}/none/token"]["completions"]
    for estimator in ("k1", "centred")
  )
  return Finding(
    max(*ratios, centred / k1) < 1,
    f"on trees of {results['trees'][0]['horizon']} to {results['trees'][-1]['horizon']} tokens its "
    f"variance is {min(ratios):.1f} to {max(ratios):.1f} times that of k1, and less for {less} of "
    f"{policies} policies; on the embedded decoder it is {centred / k1:.2f} times",
  )


def _slopes(audit: dict) -> Finding:
  in_reward = [
    row
    for row in audit["divergences"]
    if row["placement"] == "reward" and row["credit"] == "sequence"
  ]
  descends = {
    (row["estimator"], row["divergence"]): row["verdict"] == "exact"
    and all(claim["agrees"] for claim in row["claims"])
    for row in in_reward
  }
  slopes, sums = (
    [found for (estimator, _), found in descends.items() if estimator == kind]
    for kind in ("k1", "exact")
  )
  return Finding(
    all(slopes) and not any(sums),
    f"with f' in the reward {sum(slopes)} of {len(slopes)} divergences are descended, and with the "
    f"divergence itself {sum(sums)}",
  )


def _guided(audit: dict) -> Finding:
  reward, product, prefix = audit["guides"]
  return Finding(
    reward["highest"] < 1e-9,
    f"with the guide times beta as a reward the gradient is that of the KL to it, on every tree; "
    f"a product of next tokens is {_percent(product['error'])} off, and a guide of the prefix in "
    f"k3, as in the code, {_percent(prefix['error'])}: that is KL(ref || pi), weighted by the "
    f"guide, to {prefix['error_weighted']:.0e}",
  )


def _clamped(audit: dict) -> Finding:
  clamped = _row(audit, "AlpacaFarm max(k1, 0) in the reward", "peers")
  pull = clamped["on_policy"]["pull"]
  return Finding(
    pull > 0.99,
    f"the clamped k1 pulls {_percent(pull)} as hard as the KL's gradient, and ascent ends at "
    f"{clamped['end_at_horizon_1']['leads_to']}",
  )


def _fit(results: dict, sees_prefix: bool, beta: float | None, reference: str) -> dict:
  wanted = (sees_prefix, beta, reference)
  (fit,) = (x for x in results["fits"] if (x["sees_prefix"], x["beta"], x["reference"]) == wanted)
  return fit


def _covering(results: dict) -> Finding:
  sft, rl = _fit(results, False, None, "none"), _fit(results, False, 1.0, "uniform")
  return Finding(
    sft["between"] > 0.5 and max(rl["words"]) > 0.9,
    f"of two words, a policy that cannot hold both gives {_percent(sft['between'])} to what lies "
    f"between them by KL(p || pi), and {_percent(max(rl['words']))} to one by KL(pi || p)",
  )


def _designed(results: dict) -> Finding:
  both, cold = _fit(results, True, 1.0, "uniform"), _fit(results, True, 0.25, "sft")
  data, want = results["data"]["words"], cold["optimum"]["words"]
  return Finding(
    max(abs(x - y) for x, y in zip(both["words"], data, strict=True)) < 0.02
    and abs(cold["words"][0] - want[0]) < 0.02,
    f"KL(pi || p) keeps both words, {_percent(both['words'][0])} and {_percent(both['words'][1])} "
    f"(the data has {_percent(data[0])} and {_percent(data[1])}); over the SFT policy at beta 0.25 "
    f"the first has {_percent(cold['words'][0])}, as its target {_percent(want[0])}",
  )


def _entropy_bonus(results: dict) -> Finding:
  x = results["three_tokens"]
  return Finding(
    abs(x["rl"] + x["reverse_kl"]) < 1e-9 and x["rl_at_data"] > x["rl_at_one_hot"],
    f"the objective is {x['rl']:.4f} nats where KL(pi || p) is {x['reverse_kl']:.4f}, and the data "
    "itself is the best policy",
  )


def _anchor(results: dict, name: str) -> dict:
  (run,) = (run for run in results["anchors"] if run["name"] == name)
  return run


def _global(results: dict) -> Finding:
  both, local, alone, free = (
    _anchor(results, name)[f"{KL}_after"]
    for name in ("global and local KL(old||new)", "local KL(old||new)", "global", "none")
  )
  return Finding(
    both < local,
    f"with a local KL beside it, KL(pi || SFT) ends at {both:.2f} nats per sequence, and at "
    f"{local:.2f} without it; with no local KL at {alone:.2f}, and at {free:.2f} without it",
  )


def _local(results: dict) -> Finding:
  held, free = (_anchor(results, name) for name in ("local KL(old||new)", "none"))
  largest_held, largest_free = (max(run["curves"]["kl/old_k3"]) for run in (held, free))
  return Finding(
    largest_held < largest_free,
    f"KL(old || new) of an iteration is at most {largest_held:.2f} nats with it and "
    f"{largest_free:.2f} without; KL(pi || SFT) ends at {held[f'{KL}_after']:.2f} and "
    f"{free[f'{KL}_after']:.2f}",
  )


def _second_order(results: dict) -> Finding:
  x = results["second_order"]
  return Finding(
    abs(x["old_new"][0] - 1) < 0.01 and abs(x["new_old"][0] - 1) < 0.01,
    f"over half the Fisher form they are {x['old_new'][0]:.4f} and {x['new_old'][0]:.4f} for a "
    f"step of {x['eps'][0]:g}, and {x['old_new'][-1]:.2f} and {x['new_old'][-1]:.2f} for one of "
    f"{x['eps'][-1]:g}",
  )


def _reverse_bound(results: dict) -> Finding:
  x = results["bounds"]
  ratios = [kl / bound for kl, bound in zip(x["kl_new_old"], x["sharp"], strict=True)]
  return Finding(
    max(ratios) <= 1 + 1e-9,
    f"KL(new || old) is {_percent(min(ratios))} to {_percent(max(ratios))} of the bound, for an "
    f"action that had the probability {x['p_min']:g}",
  )


def _between(results: dict) -> Finding:
  x = results["regressions"]
  distance, after = x["distance"], 10
  return Finding(
    x["between"] < 1e-9 and x["residual"] < 1e-9 and distance[-1] < distance[after] < distance[0],
    f"both are one to {x['between']:.0e} of total variation, and the gradient of the regression is "
    f"{x['residual']:.0e} of its first there; the best policy for KL(pi || ref) alone is "
    f"{_percent(distance[0])} of total variation away at first, {_percent(distance[after])} after "
    f"{after} iterations and {distance[-1]:.0e} after {len(distance) - 1}",
  )


def _best_of_n_bound(results: dict) -> Finding:
  rows = [row for row in results["bandit"] if row["n"] > 1]
  ratios = [row["kl"] / row["kl_bound"] for row in rows]
  return Finding(
    max(ratios) <= 1 + 1e-9,
    f"with four completions the KL is {_percent(max(ratios))} of the bound at n = {rows[0]['n']} "
    f"and {_percent(ratios[-1])} at n = {rows[-1]['n']}",
  )


def _over_optimisation(results: dict) -> Finding:
  rows = results["rows"]
  best, last = max(rows, key=lambda row: row["gold"]), rows[-1]
  return Finding(
    best["gold"] > last["gold"] and best["score"] < last["score"],
    f"gold accuracy is {_percent(rows[0]['gold'])} at n = 1, {_percent(best['gold'])} at n = "
    f"{best['n']} and {_percent(last['gold'])} at n = {last['n']}, while the score goes on rising, "
    f"{rows[0]['score']:.2f}, {best['score']:.2f}, {last['score']:.2f}",
  )


def _laws(results: dict) -> Finding:
  models = results["models"]
  peaks = [model["best_of_n"]["law"]["peak_kl"] for model in models]
  found = [peak[0] for peak in peaks if peak]
  reached = [
    [sum(each) / len(each) for each in zip(*model["rl"]["gold"], strict=True)] for model in models
  ]
  gains = [max(gold) - gold[0] for gold in reached]
  falls = [max(gold) - gold[-1] for gold in reached]
  named = (f"(width {model['width']}, {model['preferences']:,} pairs)" for model in models)
  each = ", ".join(
    f"{100 * gain:.0f} and {100 * fall:.0f} {name}"
    for gain, fall, name in zip(gains, falls, named, strict=True)
  )
  return Finding(
    len(found) == len(models) and falls[0] > falls[-1],
    f"the law of best-of-n peaks for {len(found)} of {len(models)} reward models, at "
    f"{min(found, default=0):.2f} to {max(found, default=0):.2f} nats; the points of gold that RL "
    f"gains and then loses are {each}",
  )


def _catastrophic(results: dict) -> Finding:
  errors = results["tails"]["errors"]
  light, *_, heavy = errors.values()
  near, far = (
    [{name: _at_kl(error, name, kl) for name in ("score", "gold")} for error in (light, heavy)]
    for kl in (0.1, 4.0)
  )
  return Finding(
    near[1]["score"] > 3 * near[0]["score"]
    and near[1]["gold"] < near[0]["gold"] / 2
    and far[0]["gold"] > 3 * far[1]["gold"],
    f"0.1 nats away the best policy has a reward of {near[1]['score']:.2f} under a heavy tail and "
    f"{near[0]['score']:.2f} under a light one, and the true score gains {near[1]['gold']:.2f} and "
    f"{near[0]['gold']:.2f}; 4 nats away it gains {far[1]['gold']:.2f} and {far[0]['gold']:.2f}",
  )


def _at_kl(error: dict, name: str, kl: float) -> float:
  best = error["best"]
  return best[name][min(range(len(best["kl"])), key=lambda i: abs(best["kl"][i] - kl))]


def _distilled_best_of_n(results: dict) -> Finding:
  rows = [row for row in results["bandit"] if row["n"] > 1]
  exact, plain = (max(row[f"tv_{name}"] for row in rows) for name in ("reward", "quantile"))
  return Finding(
    exact < 0.01,
    f"with four completions its best policy is {_percent(exact)} of total variation from "
    f"best-of-n, and up to {_percent(plain)} without the term for ties",
  )


def _divergences(results: dict) -> Finding:
  kept = {
    name: {key: x["best"]["found_k"] for key, x in found["divergences"].items()}
    for name, found in results["languages"].items()
  }
  return Finding(
    all(x[name] > x["reverse"] for x in kept.values() for name in ("forward", "jensen_shannon")),
    "at equal score "
    + "; ".join(
      f"{results['k']} draws of “{name}” hold {_percent(x['forward'])} of the modes under "
      f"KL(ref || pi), {_percent(x['jensen_shannon'])} under Jensen-Shannon and "
      f"{_percent(x['reverse'])} under KL(pi || ref)"
      for name, x in kept.items()
    ),
  )


def _precision(results: dict) -> Finding:
  rows = {x["sampler_dtype"]: x for x in results["rows"] if x["sampler_correction"] == "none"}
  brain, half = (sum(rows[x]["kl"]) / len(rows[x]["kl"]) for x in ("bfloat16", "float16"))
  golds = ", ".join(f"{_percent(row['gold'])} with {dtype}" for dtype, row in rows.items())
  return Finding(
    half < brain / 10,
    f"KL(sampler || policy) is {brain:.2g} nats per sequence with bfloat16 and {half:.2g} with "
    f"float16; without weights for it gold accuracy ends at {golds}",
  )


def _centred(results: dict) -> Finding:
  scores = results["scores"]
  last = -1
  variance, drift = (
    {name: scores[name][figure][last] for name in ("centred", "ratio", "plain")}
    for figure in ("variance", "drift")
  )
  return Finding(
    max(scores["centred"]["drift"]) < 1e-9 < min(scores["plain"]["drift"][1:])
    and variance["centred"] < variance["ratio"],
    f"a sampler {scores['kl'][last]:.2g} nats away, and 1 added to all scores: the gradient moves "
    f"by {_percent(drift['centred'])} of its norm with the centred score and by "
    f"{_percent(drift['plain'])} with the plain one; the variance is {variance['centred']:.2g}, "
    f"{variance['plain']:.2g} for the plain score and {variance['ratio']:.2g} with the ratio of "
    "each token",
  )


def _closed_form(summary: dict) -> Finding:
  before, after = summary["gold_before"], summary["gold_after"]
  return Finding(
    after > before,
    f"gold accuracy goes from {_percent(before)} to {_percent(after)}, "
    f"{summary[f'{KL}_after']:.2f} nats from the reference",
  )


def _distillation(summary: dict) -> Finding:
  before, after = (summary[f"{KL}_{when}"] for when in ("before", "after"))
  return Finding(
    after < before / 2, f"KL(student || teacher) goes from {before:.2f} to {after:.3f} nats"
  )


def of(experiment: str) -> list[str]:
  """Returns the names of the papers that an experiment tries."""
  return [name for name, paper in PAPERS.items() if paper.experiment == experiment]


PAPERS = {
  "schulman_2020": Paper(
    "John Schulman, Approximating KL Divergence, 2020",
    "k3 estimates KL(pi || ref) without bias, and with less variance than k1.",
    "estimators",
    _approximating,
    "Only near the reference: where it likes a token much more than the policy does, k3 has the "
    "larger variance.",
  ),
  "amini_2025": Paper(
    "Afra Amini, Tim Vieira and Ryan Cotterell, Better Estimation of the KL Divergence Between "
    "Language Models, 2025, 2504.10637",
    "The exact KL of the next-token distributions, summed over the prefixes of a sample, estimates "
    "the KL without bias and with no more variance than k1.",
    "estimators",
    _rao_blackwell,
    "Token by token always; over whole completions there are trees where it has more "
    "(`tests/oracle_test.py`).",
  ),
  "tang_munos_2025": Paper(
    "Yunhao Tang and R\u00e9mi Munos, On a few pitfalls in KL divergence gradient estimation for "
    "RL, 2025, 2506.09477",
    "To differentiate an estimate of the KL does not give the gradient of the KL.",
    "kl_audit",
    _pitfalls,
  ),
  "comedy_2025": Paper(
    "Vedant Shah and others, A Comedy of Estimators: On KL Regularization in RL Training of LLMs, "
    "2025, 2512.21852",
    "k1 in the reward has the right gradient, and k3 in the reward has not; an unbiased gradient "
    "of the KL of whole completions off-policy is an open question.",
    "kl_audit",
    _comedy,
    "It is not open here: k3 or the exact KL as a loss, times the differentiated ratio of the "
    "whole prefix.",
  ),
  "rethinking_2025": Paper(
    "Kezhao Liu and others, Rethinking KL Regularization in RLHF: From Value Estimation to "
    "Gradient Optimization, 2025, 2510.01555",
    "k2 as a loss has the gradient of k1 in the reward.",
    "kl_audit",
    _rethinking,
    "Token by token only: a loss gives an earlier token no credit for later KL, and a reward does.",
  ),
  "rpg_2025": Paper(
    "Yifan Zhang and others, On the Design of KL-Regularized Policy Gradient Algorithms for LLM "
    "Reasoning, 2025, 2505.17508",
    "On completions of an older policy the KL term of GRPO lacks an importance weight.",
    "kl_audit",
    _regularised_policy_gradient,
  ),
  "deepseek_v3_2_2025": Paper(
    "DeepSeek-AI, DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models, 2025, "
    "2512.02556",
    "k3 times the importance ratio of the token has an unbiased gradient.",
    "kl_audit",
    _weighted_k3,
    "It is that of the KL at given prefixes; the KL of whole completions needs the ratio of the "
    "prefix.",
  ),
  "deepseekmath_2024": Paper(
    "Zhihong Shao and others, DeepSeekMath, 2024, 2402.03300",
    "The loss of GRPO regularises by an unbiased estimate of KL(pi || ref).",
    "kl_audit",
    _grpo,
    "The estimate is unbiased and what is differentiated is another divergence: its gradient is "
    "that of the forward KL, whose best policy has heavier tails.",
  ),
  "korbak_2022": Paper(
    "Tomasz Korbak and others, RL with KL penalties is better viewed as Bayesian inference, 2022, "
    "2205.11275",
    "The policy that maximises E[r] - beta * KL(pi || ref) is ref * exp(r / beta) / Z.",
    "kl_audit",
    _inference,
  ),
  "opd_plus_2026": Paper(
    "Hanyang Zhao and others, OPD+: Rethinking the Advantage Design for On-Policy Distillation, "
    "2026, 2606.01039",
    "The reward that descends an f-divergence is f' of the ratio, and not the divergence.",
    "kl_audit",
    _slopes,
    "Over a completion it is f' of the ratio of the whole; f' of each token's ratio descends the "
    "divergence at given prefixes.",
  ),
  "sage_2026": Paper(
    "Chanuk Lee, Minki Kang and Sung Ju Hwang, SAGE: Shaping Anchors for Guided Exploration in "
    "RLVR of LLMs, 2026, 2605.18864",
    "A guide reshapes the reference of the reverse KL to ref * exp(guide) / Z.",
    "kl_audit",
    _guided,
    "So it needs no reference of its own, and what the code computes is no reshaped reference.",
  ),
  "alpaca_farm_2023": Paper(
    "Yann Dubois and others, AlpacaFarm, 2023, 2305.14387, and its code",
    "max(k1, 0) of each token, taken off the reward, is a penalty on KL(pi || SFT).",
    "kl_audit",
    _clamped,
    "The clamp takes most of the pull away; without it k1 in the reward is exact.",
  ),
  "bishop_2006": Paper(
    "Christopher Bishop, Pattern Recognition and Machine Learning, 2006, section 10.1.2",
    "KL(p || q) covers all modes of p, and KL(q || p) picks one.",
    "mode_seeking",
    _covering,
    "So it is where the family of q cannot hold both; the next row has the other case.",
  ),
  "designed_2025": Paper(
    "Anthony GX-Chen and others, KL-Regularized Reinforcement Learning is Designed to Mode "
    "Collapse, 2025, 2510.20817",
    "Reward and beta decide which modes are kept, and not the direction of the KL.",
    "mode_seeking",
    _designed,
  ),
  "ziebart_2010": Paper(
    "Brian Ziebart, Modeling Purposeful Adaptive Behavior with the Principle of Maximum Causal "
    "Entropy, 2010",
    "RL with the reward log p and the entropy as a bonus minimises KL(pi || p).",
    "mode_seeking",
    _entropy_bonus,
  ),
  "vopd_2026": Paper(
    "Minjae Oh and others, KL for a KL: On-Policy Distillation with Control Variate Baseline "
    "(vOPD), 2026, 2605.07865",
    "k1 less the KL of its prefix has the gradient of k1 in the reward, and less variance.",
    "kl_variance",
    _less_its_mean,
    "The gradient is the same (`kl_audit`). The best baseline weighs by the square of the score, "
    "which is small for the likely tokens that make up most of the KL. On stories260K, 0.3 nats "
    "from its reference, the variance is 1.01 times that of k1.",
  ),
  "instruct_gpt_2022": Paper(
    "Long Ouyang and others, Training language models to follow instructions with human feedback, "
    "2022, 2203.02155, eq. 2",
    "A KL to the SFT policy in the reward keeps the policy near it.",
    "kl_directions",
    _global,
    "Where nothing holds the policy near the one that sampled, it need not: measured once for "
    "several steps, it rewards the distance from that policy (docs/note.md, section 5).",
  ),
  "ppo_2017": Paper(
    "John Schulman and others, Proximal Policy Optimization Algorithms, 2017, 1707.06347, eq. 8",
    "A penalty on KL(old || new) keeps each update small.",
    "kl_directions",
    _local,
    "It bounds each update and not their sum; only a KL to the SFT policy does that.",
  ),
  "trpo_2015": Paper(
    "John Schulman and others, Trust Region Policy Optimization, 2015, 1502.05477, appendix C",
    "To second order KL(old || new) and KL(new || old) are both half the Fisher form.",
    "kl_directions",
    _second_order,
  ),
  "sason_verdu_2016": Paper(
    "Igal Sason and Sergio Verd\u00fa, f-Divergence Inequalities, 2016, 1508.00335",
    "KL(new || old) is bounded by KL(old || new) and the least probability of the old policy.",
    "kl_directions",
    _reverse_bound,
  ),
  "dar_2026": Paper(
    "Li He and others, Unifying Stable Optimization and Reference Regularization in RLHF, 2026, "
    "2602.11523",
    "KL(pi || ref) and KL(pi || old) are one KL to what lies between ref and old in log-probs, and "
    "a regression finds its best policy.",
    "kl_directions",
    _between,
    "The paper says that the two conflict. They do not: all iterations together lead where the "
    "penalty alone does, and the local KL sets the pace. `--trust_region=regression` trains it.",
  ),
  "beirami_2024": Paper(
    "Ahmad Beirami and others, Theoretical guarantees on the best-of-n alignment policy, 2024, "
    "2401.01879",
    "The KL of best-of-n to the policy drawn from is at most log n - (n - 1) / n.",
    "best_of_n",
    _best_of_n_bound,
    "With few completions it is far below.",
  ),
  "gao_2022": Paper(
    "Leo Gao, John Schulman and Jacob Hilton, Scaling Laws for Reward Model Overoptimization, "
    "2022, 2210.10760",
    "As the KL grows, the gold score rises and then falls while the reward model's goes on rising.",
    "best_of_n",
    _over_optimisation,
  ),
  "gao_laws_2022": Paper(
    "Leo Gao, John Schulman and Jacob Hilton, Scaling Laws for Reward Model Overoptimization, "
    "2022, 2210.10760, section 3",
    "Over d, the square root of the KL, gold gains d (alpha - beta d) under best-of-n and "
    "d (alpha - beta log d) under RL, and less is lost with a larger reward model or more data.",
    "over_optimisation",
    _laws,
    "More data helps in each case, and width only with much data. RL rises first against the "
    "reward models with the most pairs alone, and turns only against the smaller of them; the KL "
    "goes back and forth meanwhile, so that its law, a function of the KL, fits RL badly here.",
  ),
  "catastrophic_goodhart_2024": Paper(
    "Thomas Kwa, Drake Thomas and Adri\u00e0 Garriga-Alonso, Catastrophic Goodhart: regularizing "
    "RLHF with KL divergence does not mitigate heavy-tailed reward misspecification, 2024, "
    "2407.14503",
    "If the reward's error has a heavy tail, some policies have a high reward at a small KL and "
    "gain nothing; with a light tail and an independent error the best ones gain.",
    "over_optimisation",
    _catastrophic,
  ),
  "bond_2024": Paper(
    "Pier Giuseppe Sessa and others, BOND: Aligning LLMs with Best-of-N Distillation, 2024, "
    "2407.14622",
    "Best-of-n is the best policy for the reward log of best-of-n over the reference at beta 1, "
    "which is n - 1 times the log of the score's quantile and a term for ties.",
    "best_of_n",
    _distilled_best_of_n,
    "The quantile alone (Amini and others, Variational Best-of-N Alignment, 2024, 2407.06057) is "
    "exact where nothing ties. `experiments.grpo --flagfile=experiments/presets/bond_tree.flags` "
    "is trained on a language of 341 completions to a total variation of 0.006 from best-of-4, and "
    "with another seed or twice as long to 0.007 to 0.013; `bond.flags` on the embedded task.",
  ),
  "dph_rl_2025": Paper(
    "Long Li and others, The Choice of Divergence: A Neglected Key to Mitigating Diversity "
    "Collapse in Reinforcement Learning with Verifiable Reward (DPH-RL), 2025, 2509.07430",
    "KL(ref || pi) and Jensen-Shannon keep more of what many draws find than KL(pi || ref).",
    "diversity",
    _divergences,
    "What is compared here has equal score. The forward KL keeps what scores low as well, and for "
    "an equal score that is paid by the lesser modes. On arithmetic pass@8 is 99% under each.",
  ),
  "float16_2025": Paper(
    "Penghui Qi and others, Defeating the Training-Inference Mismatch via FP16, 2025, 2510.26788",
    "A sampler in float16 is far closer to the policy that is trained than one in bfloat16.",
    "mismatch",
    _precision,
    "At the size and length of the embedded task neither changes what is learnt.",
  ),
  "score_centring_2026": Paper(
    "Martin Marek and Max Ryabinin, Score Centering Stabilizes Off-policy Reinforcement Learning, "
    "2026, 2609.20807",
    "Under another sampler a score less what the sampler expects of it is moved by no baseline, "
    "and needs no ratio, whose variance it does not have.",
    "mismatch",
    _centred,
    "Its gradient is that of the sampler's score, and of the policy's only where the two are one; "
    "near the sampler it saves nothing. `--trust_region=centred` trains with it.",
  ),
  "rafailov_2023": Paper(
    "Rafael Rafailov and others, Direct Preference Optimization, 2023, 2305.18290",
    "Pairs of completions lead to the policy that RL with a KL penalty looks for, and no rollout "
    "is needed.",
    "dpo",
    _closed_form,
    "`tests/dpo_test.py` enumerates it: the optimum is that of RL where the labels follow the "
    "Bradley-Terry model and the pairs come from the reference.",
  ),
  "agarwal_2024": Paper(
    "Rishabh Agarwal and others, On-Policy Distillation of Language Models, 2024, 2306.13649",
    "A student that learns at the prefixes it writes itself comes close to its teacher.",
    "distill",
    _distillation,
  ),
}
