"""The page of `experiments.kl_directions`, from the figures in kl_directions.json alone."""

import numpy as np

from klrl.figures import KL, digits, find, shown
from klrl.report.page import Html, element, figure, grid, note, page, paragraph, table
from klrl.report.plots import INK, PAGE_COLOURS, SERIES, plot

NAMES = {"kl_old_new": "KL(old‖new)", "kl_new_old": "KL(new‖old)"}
JUDGED = "score", "gold", KL, "objective", "entropy"
COLUMNS = "", "Score", "Gold", "KL(π‖ref)", "Score \u2212 β KL", "Entropy"
_LEAST = 1e-12  # nats that a picture shows
_CSS = {"-": "solid", "--": "dashed"}
# Colour and style of each run of the study of anchors, in its order.
ANCHOR_STYLES = (
  (INK, "-"), (SERIES[0], "-"), (SERIES[1], "-"), (SERIES[2], "-"), (SERIES[1], "--"),
  (SERIES[2], "--"),
)  # fmt: skip


def final_figures(run: dict, beta: float) -> list[str]:
  """Returns the cells of `COLUMNS` after the first."""
  figures = run | {"objective_after": run["score_after"] - beta * run[f"{KL}_after"]}
  return [shown(name, figures[f"{name}_after"]) for name in JUDGED]


def report(results: dict) -> str:
  """Returns the page."""
  beta, moves, bounds = results["beta"], results["moves"], results["bounds"]
  rare = moves["rare, raised"]
  middle = int(np.argmin(np.abs(np.array(moves["radius"]) - 0.05)))
  reach = {name: rare[name][middle] for name in NAMES}
  last, pace, late = -1, results["pace"], results["late"]
  regressions = results["regressions"]
  return page(
    "Two directions and two anchors of KL",
    element("h1", "Two directions and two anchors of KL"),
    element(
      "p",
      "The direction of the KL decides which large moves are cheap; for small moves both are one. "
      "The anchor decides what is reached: a KL to the reference moves the optimum, a KL to the "
      "old policy only the speed.",
      class_="verdict",
    ),
    element("h2", "Which moves each direction permits"),
    paragraph(
      "A policy may move within a KL of its old self. KL(new‖old) charges for giving mass to what "
      "was rare; KL(old‖new) charges for taking mass from what was common. Neither is blind: both "
      "charge for every move, one of them by a bounded amount. At a radius of "
      f"{moves['radius'][middle]:.2g} nats an action of probability 1e-4 may rise to "
      f"{reach['kl_new_old']:.2g} under KL(new‖old) and to {reach['kl_old_new']:.2g} under "
      "KL(old‖new)."
    ),
    grid(
      figure(
        "A rare action (1e-4), raised", "largest new probability",
        _lines(moves["radius"], moves["rare, raised"], "radius, nats", xscale="log", yscale="log"),
        NAMES.values(),
      ),
      figure(
        "A common action (0.5), lowered", "least new probability",
        _lines(moves["radius"], moves["common, lowered"], "radius, nats", xscale="log"),
        NAMES.values(),
      ),
    ),
    element("h2", "How large one can be when the other is known"),
    paragraph(
      "With p_min the least old probability and δ = KL(old‖new), KL(new‖old) is at most δ / "
      "p_min. That is true, and exponentially loose for sequences; κ(1 / p_min) δ is sharp, with "
      f"κ(t) about ln t \u2212 1. At the right end of the picture (p_min = {bounds['p_min']:g}): "
      f"{digits(bounds['kl_new_old'][last])} nats, with bounds {digits(bounds['sharp'][last])}, "
      f"{digits(bounds['log'][last])} and {digits(bounds['linear'][last])}."
    ),
    figure(
      "KL(new‖old) and its bounds", "nats; an outcome of probability 1e-3 is raised",
      _lines(
        bounds["kl_old_new"], {x: bounds[x] for x in ("kl_new_old", "sharp", "log", "linear")},
        "KL(old‖new), nats", xscale="log", yscale="log",
      ),
      ("KL(new‖old)", "κ(1 / p_min) δ", "ln(1 + δ / p_min)", "δ / p_min"),
    ),
    element("h2", "For small moves they are one"),
    paragraph(
      "Both equal half the Fisher form to second order; they differ in the third, by a sixth of "
      "the third central moment of the move. A trust region with small steps need not choose."
    ),
    figure(
      "KL over half the Fisher form", "",
      _lines(
        results["second_order"]["eps"],
        {x: results["second_order"][x] for x in ("old_new", "new_old")},
        "size of the move in logits", xscale="log",
      ),
      NAMES.values(),
    ),
    element("h2", "The anchor: where a policy is bound for, and how fast"),
    paragraph(
      "Four choices, the best step each time under β = 1 times the KL to the reference and 1/η "
      "times the KL to the policy before. Whatever η is, the end is the best policy for β; the "
      "local KL multiplies the log-ratio to it by (1/η) / (β + 1/η) in each step."
    ),
    figure(
      "KL(π‖best policy)", "nats",
      _lines(
        np.arange(len(pace["kl"][0])),
        {str(eta): np.maximum(kl, _LEAST) for eta, kl in zip(*pace.values(), strict=True)},
        "step", yscale="log",
      ),
      [f"η = {eta:g}" for eta in pace["eta"]],
    ),
    element("h2", "Both anchors are one between them"),
    paragraph(
      "Over completions, β KL(π‖ref) and b KL(π‖old) are one KL, of weight β + b, to the policy "
      "between ref and old in log-probs. DAR finds its best policy by a regression, in which the "
      "likelihood of a completion has the weight exp(A / (β + b)). On a tree of three tokens, with "
      f"β = {regressions['beta']:g} and b = {regressions['trust_region_beta']:g}, the regression "
      "leads there. When each iteration samples from where the last one led, the end is the best "
      "policy for β alone: the two anchors do not conflict, and the local one sets the pace."
    ),
    figure(
      "From the best policy for β alone", "total variation",
      _lines(
        np.arange(len(regressions["distance"])),
        {"": np.maximum(regressions["distance"], _LEAST)}, "iteration", yscale="log",
      ),
    ),
    element("h2", "Whose value a late rollout teaches"),
    paragraph(
      "The expected value target of the first token on a tree, on completions of an older policy. "
      "Generalised advantage estimation (λ = 1) gives the older policy\u2019s, however far the "
      "present one has gone. V-trace is right where ratios have no cap; with the published cap of "
      "1 it is between the two, and pays with that for a bounded variance."
    ),
    figure(
      "Target of the first token", "reward",
      _lines(
        late["kl"], {x: late[x] for x in ("value", "gae", "capped", "exact")}, "KL(π‖old), nats"
      ),
      ("value of the present policy", "GAE", "V-trace, cap 1", "V-trace, no cap"),
    ),
    element("h2", "PPO with each anchor"),
    paragraph(
      f"The embedded task: one SFT policy, one reward model, the same seed. Global is β = {beta:g} "
      "times the KL to the reference in the reward; local is a penalty on the KL to the policy "
      "that sampled, in place of the clip."
    ),
    table(COLUMNS, [(run["name"], *final_figures(run, beta)) for run in results["anchors"]]),
    note(
      "On held-out problems after training. Score: the reward model\u2019s, which is trained on; "
      "gold: share that an exact verifier accepts, which is not. KL in nats per sequence, entropy "
      "in nats per token. One seed, and few iterations: where the runs end says how fast each "
      "moved as much as where it is bound for."
    ),
    _anchors(results["anchors"]),
    element("h2", "KL in the reward, or as a loss of its own"),
    paragraph(
      "Here nothing else holds the policy, and a rollout serves for several passes. In the "
      "reward, the KL is measured once, at the policy that sampled: for the rest of the iteration "
      "it pays for distance from the old policy, and the leash is gone. Measured anew in every "
      "minibatch it pulls again. As a loss of its own, with the exact KL and the importance ratio "
      "of the prefix, its gradient is that of KL(π‖ref) at every step."
    ),
    table(COLUMNS, [(run["name"], *final_figures(run, beta)) for run in results["epochs"]]),
    _epochs(results["epochs"], beta),
  )  # fmt: skip


def _lines(x, lines: dict[str, list], x_label: str, **scales) -> str:
  """Returns the picture of some lines over common places, the first in the first colour."""

  def draw(axes):
    for y, colour, style in zip(lines.values(), SERIES, ("-", "--", "-.", ":"), strict=False):
      axes.plot(x, y, style, color=colour, linewidth=1.5)

  return plot(draw, x_label, **scales)


def _anchors(runs: list[dict]) -> Html:
  """Returns KL to the reference and gold over the iterations, the runs named at their line."""

  def drawn(key: str) -> Html:
    about = find(key)

    def draw(axes):
      for run, (colour, style) in zip(runs, ANCHOR_STYLES, strict=True):
        values = about.scale * np.array(run["curves"][key], float)
        axes.plot(np.arange(len(values)), values, style, color=colour, linewidth=1.3)

    return figure(about.label, about.unit, plot(draw, "iteration"))

  names = [
    element(
      "span",
      element("i", style=f"border-top: 2px {_CSS[style]} {PAGE_COLOURS[colour]}"),
      run["name"],
    )
    for run, (colour, style) in zip(runs, ANCHOR_STYLES, strict=True)
  ]
  legend = element("div", *names, class_="legend", style="margin: 1rem 0")
  keys = "kl/ref_exact", "kl/old_k3", "gold/mean", "score/mean"
  return element("div", legend, grid(*map(drawn, keys), least=26))


def _epochs(runs: list[dict], beta: float) -> Html:
  penalties = list(dict.fromkeys(run["penalty"] for run in runs))

  epochs = sorted({run["num_epochs"] for run in runs})

  def drawn(figure_of) -> str:
    def draw(axes):
      for penalty, colour, style in zip(penalties, SERIES, ("-", "--", "-."), strict=False):
        values = [figure_of(run) for run in runs if run["penalty"] == penalty]
        axes.plot(epochs, values, style, color=colour, marker="o", markersize=4, linewidth=1.3)

    return plot(draw, "passes over a rollout", x_ticks=epochs)

  def objective(run):
    return run["score_after"] - beta * run[f"{KL}_after"]

  def kl(run):
    return run[f"{KL}_after"]

  return grid(
    figure("KL(π‖ref) reached", "nats per sequence", drawn(kl), penalties),
    figure("Score \u2212 β KL reached", "what is maximised", drawn(objective), penalties),
  )
