"""The page and the table of `experiments.over_optimisation`, from its figures alone."""

import jax
import numpy as np
from rich.table import Table

from klrl.exact import bandits
from klrl.figures import digits, shown
from klrl.report.page import element, figure, grid, note, page, paragraph, table
from klrl.report.plots import SERIES, plot
from klrl.run import progress

WAYS = {"best_of_n": "best of n", "rl": "RL"}
COLUMNS = ("width\npairs", "agreement", "", "most gold", "at KL\nnats", "gold\nat the end")
COLUMNS += ("alpha\n90%", "beta\n90%", "peak of the law\nnats, 90%")
X_LABEL = "square root of KL(π‖SFT), nats"
AT_KL = 1.0  # where the tails are compared in words


def reached(model: dict, way: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns (KLs, gold) of a way of optimising; of RL those of each evaluation, mean over seeds."""
  found = (np.array(model[way][name], float) for name in ("kl", "gold"))
  return tuple(x.mean(axis=0) if way == "rl" else x for x in found)


def falls(model: dict, way: str) -> bool:
  """Returns whether gold ends at least a point below the most that it was."""
  gold = reached(model, way)[1]
  return gold[-1] < gold.max() - 0.01


def named(model: dict) -> str:
  """Returns what a reward model is called."""
  return f"width {model['width']}, {model['preferences']:,} pairs"


def at_kl(results: dict, error: str, name: str, kl: float = AT_KL) -> float:
  """Returns the figure of the best policy for a KL, under a kind of error."""
  best = results["tails"]["errors"][error]["best"]
  return float(np.interp(kl, best["kl"], best[name]))


def verdict(results: dict) -> str:
  """Returns what came out, in two sentences."""
  models = results["models"]
  count = {way: sum(falls(model, way) for model in models) for way in WAYS}
  light, *_, heavy = results["tails"]["errors"]
  return (
    f"Of {len(models)} reward models gold falls again under {count['best_of_n']} as best-of-n goes "
    f"on, and under {count['rl']} as RL does. With an independent error whose tail is light, the "
    f"best policy {digits(AT_KL)} nat away gains {digits(at_kl(results, light, 'gold'))} of the "
    f"true score; with a heavy tail {digits(at_kl(results, heavy, 'gold'))}, at a reward of "
    f"{digits(at_kl(results, heavy, 'score'))}."
  )


def _interval(x: list | None) -> str:
  if x is None:
    return "none"
  return f"{x[0]:.2g} ({x[1]:.2g} to {x[2]:.2g})".replace("-", "\N{MINUS SIGN}")


def rows(results: dict) -> list[tuple[str, ...]]:
  """Returns the cells of `COLUMNS`, one row for each reward model and way."""
  found = []
  for model in results["models"]:
    for way, name in WAYS.items():
      kl, gold = reached(model, way)
      best, law = int(gold.argmax()), model[way]["law"]
      found.append(
        (
          f"{model['width']}\n{model['preferences']:,}", shown("gold", model["accuracy"]), name,
          shown("gold", gold[best]), digits(kl[best]), shown("gold", gold[-1]),
          _interval(law["alpha"]), _interval(law["slope"]), _interval(law["peak_kl"]),
        )
      )  # fmt: skip
  return found


def show(results: dict) -> None:
  """Prints the verdict and what each way reached."""
  progress.console.print(verdict(results), soft_wrap=True)
  shown_columns = (0, 1, 2, 3, 4, 5, 8)
  printed = Table(*(COLUMNS[i].replace("\n", ", ") for i in shown_columns), box=None)
  for cells in rows(results):
    printed.add_row(*(cells[i].replace("\n", ", ") for i in shown_columns))
  progress.console.print(printed)


def report(results: dict) -> str:
  """Returns the page."""
  errors = results["tails"]["errors"]
  return page(
    "Laws of over-optimisation",
    element("h1", "What becomes of gold while a reward model is optimised?"),
    element("p", verdict(results), class_="verdict"),
    paragraph(
      "The same SFT policy is optimised against reward models of several sizes, which learnt from "
      "few pairs or many: by keeping the best of n draws, and by RL without a KL penalty. Points "
      "are measured on held-out prompts, lines are the laws of Gao, Schulman and Hilton (2022) "
      "that fit them: with d the square root of the KL, gold gains d (\u03b1 \u2212 β d) for "
      "best-of-n and d (\u03b1 \u2212 β log d) for RL."
    ),
    grid(
      *(
        figure(
          named(model), "gold accuracy, % of completions",
          plot(lambda axes, model=model: _draw_model(axes, model), X_LABEL),
          tuple(WAYS.values()),
        )
        for model in results["models"]
      ),
      least=26,
    ),
    table(COLUMNS, rows(results), words=1),
    note(
      "Agreement: with held-out labels, of which one in twenty is wrong. Intervals hold 90% of "
      "bootstrap samples: of prompts for best-of-n, of evaluations for RL. They do not say how far "
      "another reward model of the same kind would be. No peak: the fitted law does not turn."
    ),
    element("h2", "The tail of the error"),
    paragraph(
      f"{results['tails']['num_completions']:,} completions, equally likely, with a normal true "
      "score of deviation 1. The reward adds an independent error: three kinds with the same "
      "quartiles. The lines are the best policies for each KL, ref · exp(reward/β)/Z, and the "
      "dots best-of-n, without sampling. If the error is normal as the score is, half of what "
      "reward gains is true, and gold is the square root of the KL, with no end. If its tail is "
      "heavy, a policy that is almost the reference has a high reward from few completions, whose "
      "score is anything."
    ),
    grid(
      *(
        figure(
          title, "in deviations of the true score",
          plot(lambda axes, key=key: _draw_tails(axes, errors, key), "square root of the KL, nats"),
          tuple(errors),
        )
        for key, title in (("gold", "True score"), ("score", "Reward"))
      ),
      least=26,
    ),
    table(
      ("error", *(f"true score\nat {digits(kl)} nats" for kl in _KLS),
       *(f"reward\nat {digits(kl)} nats" for kl in _KLS)),
      [
        (name, *(digits(at_kl(results, name, key, kl)) for key in ("gold", "score") for kl in _KLS))
        for name in errors
      ],
    ),
    note(
      "Among finitely many completions no tail is truly heavy: what is shown is how the law of the "
      "errors that were drawn decides long before the last completion."
    ),
  )  # fmt: skip


_KLS = (0.1, 1.0, 4.0)


def _draw_model(axes, model: dict) -> None:
  for way, colour, marker in zip(WAYS, SERIES, ("o", "s"), strict=False):
    kl, gold = (np.array(model[way][name], float) for name in ("kl", "gold"))
    start = gold[..., :1].mean()
    axes.plot(
      np.sqrt(np.maximum(kl, 0)).ravel(), 100 * gold.ravel(), marker, color=colour, markersize=3.5,
      alpha=0.7,
    )  # fmt: skip
    d = np.linspace(0, np.sqrt(kl.max()), 80)
    law = model[way]["law"]
    with jax.enable_x64(True):
      gain = bandits.GOLD_LAWS[way].score(d, law["alpha"][0], law["slope"][0])
    axes.plot(
      d, 100 * (start + np.asarray(gain)), "-" if way == "best_of_n" else "--", color=colour,
      linewidth=1.4,
    )  # fmt: skip


def _draw_tails(axes, errors: dict, key: str) -> None:
  for found, colour, style in zip(errors.values(), SERIES, ("-", "--", "-."), strict=False):
    best, best_of_n = (
      [np.array(found[way][name]) for name in ("kl", key)] for way in ("best", "best_of_n")
    )
    axes.plot(np.sqrt(best[0]), best[1], style, color=colour, linewidth=1.5)
    inside = best_of_n[0] <= best[0].max()
    axes.plot(
      np.sqrt(best_of_n[0][inside]), best_of_n[1][inside], "o", color=colour, markersize=3.5
    )
