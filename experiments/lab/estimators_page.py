"""The page and the tables of `experiments.estimators`, from the figures in estimators.json alone.

Deviations and biases are shown in units of the KL: a standard deviation of 1 means that one sample
is typically off by the whole KL.
"""

import numpy as np

from klrl.figures import digits
from klrl.report.page import Html, element, figure, note, page, paragraph, table
from klrl.report.plots import INK, SERIES, plot

ESTIMATORS = ("k1", "k2", "k3")  # those of one token
NAMES = (*ESTIMATORS, "exact")
STYLES = "-", "--", "-", "-"  # one for each of the colours in SERIES
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)

CASE_COLUMNS = ("case", "estimator", "bias", "sampled", "deviation", "sampled")
POLICY_COLUMNS = ("step", "KL", *NAMES, "k2 bias", "k3 bias")


def case_rows(case: dict) -> list[list[str]]:
  """Returns the cells of `CASE_COLUMNS` for every estimator of a case."""
  true, rows = case["true"], []
  for name, x in case["estimators"].items():
    # Adding 0.0 turns the -0.0 that a rounding error leaves into 0.0.
    biases = [
      f"{round((x[key] - true) / true, 4) + 0.0:+.4f}".replace("-", "\N{MINUS SIGN}")
      for key in ("mean", "sample_mean")
    ]
    deviations = [f"{x[key] / true:.4f}" for key in ("std", "sample_std")]
    rows.append(["" if rows else case["title"], name, *biases, *deviations])
  return rows


def policy_row(policy: dict) -> list[str]:
  """Returns the cells of `POLICY_COLUMNS`: step, KL, deviations, biases."""
  kl, found = policy["kl"], policy["estimators"]
  return [
    f"{policy['step']:g}",
    digits(kl),
    *(digits(found[name]["std"] / kl) for name in NAMES),
    *(digits(found[name]["bias"] / kl, found[name]["bias_stderr"] / kl) for name in ("k2", "k3")),
  ]


def verdict(policies: list[dict]) -> str:
  """Returns what the policies show, in one or two sentences."""
  stds = {
    name: [policy["estimators"][name]["std"] / policy["kl"] for policy in policies]
    for name in NAMES
  }
  spans = {name: f"{min(x):.2g} to {max(x):.2g}" for name, x in stds.items()}
  better = [k3 < k1 for k1, k3 in zip(stds["k1"], stds["k3"], strict=True)]
  turn = better.index(False) if False in better else len(better)
  text = (
    f"One completion tells the KL to within {spans['k1']} times its size by k1, {spans['k3']} by "
    f"k3, and {spans['exact']} by the exact KL of each next-token distribution."
  )
  if 0 < turn < len(better) and not any(better[turn:]):
    low, high = (f"{policies[i]['kl']:.2g}" for i in (turn - 1, turn))
    text += f" k3 beats k1 up to a KL of {low} nats; from {high} on, k1 beats k3."
  return text


def report(results: dict) -> str:
  """Returns the page."""
  policies, cases, heavy = results["policies"], results["cases"], results["heavy"]
  mixed = [case for case in cases if case["title"] != "skewed"]  # colours for four
  largest = max(policy["estimators"]["k3"]["largest_share"] for policy in policies)
  return page(
    "Estimators of the KL",
    element("h1", "How well do samples tell KL(π ‖ ref)?"),
    element("p", verdict(policies), class_="verdict"),
    note(
      "π is the policy that draws, ref the reference, u = ref/π. “To within” is one standard "
      "deviation; for the mean of N samples it is √N times smaller."
    ),
    element("h2", "What one sample is worth"),
    paragraph(
      "A token is drawn from π, and both models say how likely it was. k1 is the difference of "
      "the log-probabilities: its mean is the KL, but single values have either sign and mostly "
      "cancel. k2, half its square, is never negative, and its mean is the KL only while the two "
      "models are close. k3 = k1 + (u \u2212 1) is never negative and has the right mean. Its "
      "price is on the left: where the reference likes a token much more than the policy does, it "
      "grows exponentially."
    ),
    figure(
      "Value of each estimator", "nats",
      plot(
        lambda axes: _draw_estimators(axes, results["curves"]),
        "log π \u2212 log ref of the token drawn",
      ),
      ESTIMATORS,
    ),
    element("h2", "The embedded task\u2019s policies"),
    paragraph(
      "Models on the straight line through the parameters of the SFT policy (step 0, the "
      "reference) and the PPO policy (step 1), and beyond. For each, "
      f"{policies[0]['num_completions']:,} completions of held-out problems, estimates summed over "
      "a completion. Knowing the KL to 10% takes 100 \u00d7 deviation² completions."
    ),
    figure(
      "Standard deviation of one completion, over the KL",
      "Dotted: √(2/KL), what k1 tends to near the reference",
      plot(
        lambda axes: _draw_policies(axes, policies),
        "KL(π ‖ ref), nats per sequence", x_ticks=TICKS, y_ticks=TICKS,
      ),
      NAMES,
    ),
    table(POLICY_COLUMNS, [policy_row(policy) for policy in policies]),
    note(
      "KL in nats per sequence, then standard deviations and biases over the KL; ± is one "
      "standard error. The KL is the mean of the exact one, which has no bias. k3\u2019s "
      f"deviation rests on rare completions, up to {largest:.0%} of its variance on a single one: "
      "read it as a size, not as a figure."
    ),
    element("h2", "Schulman\u2019s two tables, and three more cases"),
    paragraph(
      "Bias and standard deviation of one sample over the KL, by quadrature or by summing over "
      f"all outcomes; beside each, over {results['num_samples']:,} samples. max(k1, 0), a clamp "
      "found in RLHF code, is too high on average, and the more so the closer the two are."
    ),
    table(CASE_COLUMNS, [row for case in cases for row in case_rows(case)]),
    note("; ".join(f"{x['title']}: {x['name']}, KL {digits(x['true'])}" for x in cases)),
    element("h2", "Where k3 is far worse than k1"), *_heavy(heavy, cases[-1]["true"]),
    element("h2", "The best mixture of k1 and k3"),
    paragraph(
      "k1 + c (u \u2212 1) has the right mean for every c, because u \u2212 1 has mean zero: "
      "c\u00a0=\u00a00 is k1, c\u00a0=\u00a01 is k3. No c serves all: the best is near 1 where "
      "the two are close, and near 0 where the tail is heavy. Dots mark the best."
    ),
    figure(
      "Standard deviation of one sample, over the KL", "",
      plot(lambda axes: _draw_mixtures(axes, mixed), "c", y_ticks=TICKS),
      [f"{x['title']}: best c {digits(x['control_variate']['best_c'])}" for x in mixed],
    ),
    element("h2", "Alarms"),
    _alarms([results[name] for name in ("truncated", "nucleus")], results["float32"]),
  )  # fmt: skip


def _heavy(heavy: dict, true: float) -> list[Html]:
  rows = [
    (
      f"{prob:g}", f"{ref_prob:g}", *(digits(heavy["estimates"][name][i]) for name in ESTIMATORS),
      f"{prob * heavy['estimates']['k3'][i] / true:.0%}",
    )
    for i, (prob, ref_prob) in enumerate(zip(heavy["probs"], heavy["ref_probs"], strict=True))
  ]  # fmt: skip
  rarest, share = heavy["probs"][-1], rows[-1][-1]
  return [
    paragraph(
      f"The last outcome comes up once in {1 / rarest:,.0f} draws and holds {share} of k3\u2019s "
      f"mean. A batch of 1,000 misses it {(1 - rarest) ** 1000:.0%} of the time: k3 is then far "
      "too low, with a small spread that gives no warning. k1 hardly notices."
    ),
    table(("π", "ref", *ESTIMATORS, "share of k3"), rows),
    figure(
      "Mean over the first N samples", "nats. Dotted: the KL",
      plot(
        lambda axes: _draw_running(axes, heavy["running_means"], true), "N",
        x_ticks=10.0 ** np.arange(2, 7),
      ),
      ESTIMATORS,
    ),
  ]  # fmt: skip


def _alarms(truncated: list[dict], small: dict) -> Html:
  rows = (
    *(
      (
        f"Mean of k1 below zero: {x['name']}", digits(x["true"]),
        f"k1 {digits(x['k1'])}, k3 {digits(x['k3'])}",
        f"Drawn by {x['sampler']} sampling, scored as if drawn from the whole policy. Score what "
        "is drawn.",
      )
      for x in truncated
    ),
    (
      f"k3 below zero: log-ratio x = {small['log_ratio']:g}", _scientific(small["true"]),
      f"exp(\u2212x) \u2212 1 + x: {_scientific(small['textbook'])}; by expm1: "
      f"{_scientific(small['ops'])}",
      "float32 cannot hold a difference that small of numbers near 1. Write expm1(\u2212x) + x, "
      "as klrl does.",
    ),
  )  # fmt: skip
  return table(("What is seen", "true KL or k3", "found", "Cause and cure"), rows, words=4)


def _scientific(x: float) -> str:
  return f"{x:.2e}".replace("-", "\N{MINUS SIGN}")


def _lines(axes, x, lines, **marks) -> None:
  for y, colour, style in zip(lines, SERIES, STYLES, strict=False):
    axes.plot(x, y, style, color=colour, linewidth=1.5, **marks)


def _draw_estimators(axes, curves: dict) -> None:
  axes.axvline(0, color=INK, alpha=0.3, linewidth=0.7)
  _lines(axes, curves["log_ratio"], [curves[name] for name in ESTIMATORS])


def _draw_policies(axes, policies: list[dict]) -> None:
  kls = np.array([policy["kl"] for policy in policies])
  axes.plot(kls, np.sqrt(2 / kls), ":", color=INK, alpha=0.6, linewidth=1)
  stds = [[policy["estimators"][name]["std"] for policy in policies] / kls for name in NAMES]
  _lines(axes, kls, stds, marker="o", markersize=3)


def _draw_running(axes, means: dict, true: float) -> None:
  axes.axhline(true, color=INK, alpha=0.6, linewidth=1, linestyle=":")
  _lines(axes, means["num"], [means[name] for name in ESTIMATORS])


def _draw_mixtures(axes, cases: list[dict]) -> None:
  found = [case["control_variate"] for case in cases]
  stds = [np.array(x["stds"]) / case["true"] for x, case in zip(found, cases, strict=True)]
  _lines(axes, found[0]["c"], stds)
  for x, case, colour in zip(found, cases, SERIES, strict=True):
    axes.plot(x["best_c"], x["best_std"] / case["true"], "o", color=colour, markersize=4)
