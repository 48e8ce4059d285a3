"""The page of `experiments.kl_directions`, from the figures in kl_directions.json alone."""

import numpy as np

from klrl.report.page import Html, element, figure, note, page, paragraph, table
from klrl.report.plots import INK, SERIES, bare, picture

NAMES = {"kl_old_new": "KL(old\u2016new)", "kl_new_old": "KL(new\u2016old)"}
COLUMNS = ("", "Score", "Gold", "KL(\u03c0\u2016ref)", "Score \u2212 \u03b2 KL", "Entropy")
# Colour and style of each run of the study of anchors, in its order.
ANCHOR_STYLES = (
  (INK, "-"), (SERIES[0], "-"), (SERIES[1], "-"), (SERIES[2], "-"), (SERIES[1], "--"),
  (SERIES[2], "--"),
)  # fmt: skip


def final_figures(run: dict, beta: float) -> list[str]:
  """Returns the cells of `COLUMNS` after the first."""
  objective = run["score_after"] - beta * run["kl_ref_exact_after"]
  figures = run["score_after"], run["gold_after"], run["kl_ref_exact_after"], objective
  return [*(f"{x:.3f}".replace("-", "\u2212") for x in figures), f"{run['entropy_after']:.3f}"]


def report(results: dict) -> str:
  """Returns the page."""
  beta, moves, bounds = results["beta"], results["moves"], results["bounds"]
  rare = moves["rare, raised"]
  middle = int(np.argmin(np.abs(np.array(moves["radius"]) - 0.05)))
  reach = {name: rare[name][middle] for name in NAMES}
  last = -1
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
      "A policy may move within a KL of its old self. KL(new\u2016old) charges for giving mass to "
      "what was rare; KL(old\u2016new) charges for taking mass from what was common. Neither is "
      "blind: both charge for every move, one of them by a bounded amount. At a radius of "
      f"{moves['radius'][middle]:.2g} nats an action of probability 1e-4 may rise to "
      f"{reach['kl_new_old']:.2g} under KL(new\u2016old) and to {reach['kl_old_new']:.2g} under "
      "KL(old\u2016new)."
    ),
    _grid(
      figure(
        "A rare action (1e-4), raised", "largest new probability, against the radius in nats",
        picture(lambda f: _draw_moves(f, moves, "rare, raised"), width=4.2, height=2.4),
        NAMES.values(),
      ),
      figure(
        "A common action (0.5), lowered", "least new probability, against the radius in nats",
        picture(lambda f: _draw_moves(f, moves, "common, lowered"), width=4.2, height=2.4),
        NAMES.values(),
      ),
    ),
    element("h2", "How large one can be when the other is known"),
    paragraph(
      "With p_min the least old probability and \u03b4 = KL(old\u2016new), KL(new\u2016old) is "
      "at most \u03b4 / p_min. That is true, and exponentially loose for sequences; "
      "\u03ba(1 / p_min) \u03b4 is sharp, with \u03ba(t) about ln t \u2212 1. At the right end "
      f"of the picture (p_min = {bounds['p_min']:g}): {bounds['kl_new_old'][last]:.3g} nats, with "
      f"bounds {bounds['sharp'][last]:.3g}, {bounds['log'][last]:.3g} and "
      f"{bounds['linear'][last]:,.3g}."
    ),
    figure(
      "KL(new\u2016old) and its bounds", "nats, against KL(old\u2016new); two outcomes, one of "
      "probability 1e-3 that is raised",
      picture(lambda f: _draw_bounds(f, bounds), width=4.6, height=2.6),
      ("KL(new\u2016old)", "\u03ba(1 / p_min) \u03b4", "ln(1 + \u03b4 / p_min)", "\u03b4 / p_min"),
    ),
    element("h2", "For small moves they are one"),
    paragraph(
      "Both equal half the Fisher form to second order; they differ in the third, by a sixth of "
      "the third central moment of the move. A trust region with small steps need not choose."
    ),
    figure(
      "KL over half the Fisher form", "against the size of the move in logits",
      picture(lambda f: _draw_second_order(f, results["second_order"]), width=4.6, height=2.4),
      NAMES.values(),
    ),
    element("h2", "PPO with each anchor"),
    paragraph(
      "The embedded task: one SFT policy, one reward model, the same seed. Global is "
      f"\u03b2 = {beta:g} times the KL to the reference in the reward; local is a penalty on the "
      "KL to the policy that sampled, in place of the clip."
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
      "of the prefix, its gradient is that of KL(\u03c0\u2016ref) at every step."
    ),
    table(COLUMNS, [(run["name"], *final_figures(run, beta)) for run in results["epochs"]]),
    _epochs(results["epochs"], beta),
  )  # fmt: skip


def _grid(*figures: Html) -> Html:
  return element("div", *figures, class_="curves")


def _axes(f, **scales):
  axes = f.add_axes((0.11, 0.11, 0.87, 0.86))
  axes.set(**scales)
  bare(axes)
  axes.minorticks_off()
  return axes


def _draw_moves(f, moves: dict, case: str) -> None:
  axes = _axes(f, xscale="log", yscale="log" if "rare" in case else "linear")
  for name, colour, style in zip(NAMES, SERIES, ("-", "--"), strict=False):
    axes.plot(moves["radius"], moves[case][name], style, color=colour, linewidth=1.5)


def _draw_bounds(f, bounds: dict) -> None:
  axes = _axes(f, xscale="log", yscale="log")
  names = "kl_new_old", "sharp", "log", "linear"
  for name, colour, style in zip(names, SERIES, ("-", "--", "-.", ":"), strict=True):
    axes.plot(bounds["kl_old_new"], bounds[name], style, color=colour, linewidth=1.5)


def _draw_second_order(f, figures: dict) -> None:
  axes = _axes(f, xscale="log")
  axes.axhline(1.0, color=INK, alpha=0.4, linewidth=0.8)
  for name, colour, style in zip(("old_new", "new_old"), SERIES, ("-", "--"), strict=False):
    axes.plot(figures["eps"], figures[name], style, color=colour, linewidth=1.5)


def _anchors(runs: list[dict]) -> Html:
  """Returns KL to the reference and gold over the iterations, the runs named at their line."""

  def draw(f, key):
    axes = _axes(f)
    for run, (colour, style) in zip(runs, ANCHOR_STYLES, strict=True):
      values = np.array(run["curves"][key], float)
      axes.plot(np.arange(len(values)), values, style, color=colour, linewidth=1.3)

  def named(title, unit, key):
    return figure(title, unit, picture(lambda f: draw(f, key), width=4.2, height=2.6))

  lines = "; ".join(
    f"{run['name']}: {place}"
    for run, place in zip(
      runs,
      ("black or white", "blue", "orange", "green", "orange, dashed", "green, dashed"),
      strict=True,
    )
  )
  return element(
    "div",
    note(lines),
    _grid(
      named("KL(\u03c0\u2016ref), exact", "nats per sequence, over the iterations", "kl/ref_exact"),
      named("KL(old\u2016\u03c0) of an iteration", "k3, nats per sequence", "kl/old_k3"),
      named("Gold accuracy in training", "share, over the iterations", "gold/mean"),
      named("Reward model\u2019s score in training", "over the iterations", "score/mean"),
    ),
  )


def _epochs(runs: list[dict], beta: float) -> Html:
  penalties = list(dict.fromkeys(run["penalty"] for run in runs))

  def draw(f, figure_of, **scales):
    axes = _axes(f, xscale="log", **scales)
    epochs = sorted({run["num_epochs"] for run in runs})
    for penalty, colour, style in zip(penalties, SERIES, ("-", "--", "-."), strict=False):
      values = [figure_of(run) for run in runs if run["penalty"] == penalty]
      axes.plot(epochs, values, style, color=colour, marker="o", markersize=4, linewidth=1.3)
    axes.set_xticks(epochs, [str(x) for x in epochs])

  panels = (
    ("KL(\u03c0\u2016ref) reached", "nats per sequence", lambda run: run["kl_ref_exact_after"]),
    (
      "Score \u2212 \u03b2 KL reached",
      "what is maximised",
      lambda run: run["score_after"] - beta * run["kl_ref_exact_after"],
    ),
  )
  return _grid(
    *(
      figure(
        title,
        f"{unit}, against passes over a rollout",
        picture(lambda f, value=value: draw(f, value), width=4.2, height=2.4),
        penalties,
      )
      for title, unit, value in panels
    )
  )
