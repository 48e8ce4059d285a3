"""The page and the tables of `experiments.best_of_n`, from the figures in best_of_n.json alone."""

import numpy as np

from klrl.figures import KL, digits, find, of_summary, shown
from klrl.report.page import Html, element, figure, note, page, paragraph, table
from klrl.report.plots import INK, SERIES, plot
from klrl.report.sweep_answer import apart

BANDIT_COLUMNS = ("n", "probabilities", "KL", "KL at most", "score", "best score at this KL")
BANDIT_COLUMNS += ("distance\nby its reward", "distance\nby the quantile")
X_LABEL = f"{find(KL).title}, {find(KL).unit}"
EXACT_COLUMNS = ("n", "KL", "KL at most", "score", "best score at this KL", "gold")
RUN_COLUMNS = ("run", "KL", "score", "score\nof best of n", "gold", "gold\nof best of n")
RUN_COLUMNS += ("score\nbefore training",)


def pool_table(rows: list[dict]) -> dict[str, list[str]]:
  """Returns the cells of each column of the table, one for each n; gold only where it is known."""
  columns = {
    "n": [str(row["n"]) for row in rows],
    "KL at most": [shown(KL, row["kl_bound"]) for row in rows],
    "KL of the pool": [shown(KL, row["kl"]) for row in rows],
    "score": [of_summary(row, "score") for row in rows],
    "gold": [of_summary(row, "gold") for row in rows],
    "wins": [f"{row['win_rate']:.3f}" for row in rows],
  }
  if rows[0]["gold"] is None:
    del columns["gold"]
  return columns


def verdict(results: dict) -> str:
  """Returns what the figures show, in one or two sentences."""
  first, last = results["rows"][0], results["rows"][-1]
  text = (
    f"Best of {last['n']} has a score of {of_summary(last, 'score')}, against "
    f"{of_summary(first, 'score')} for n = {first['n']}, at a KL of at most "
    f"{shown(KL, last['kl_bound'])} nats"
  )
  if last["gold"] is not None:
    best = max(results["rows"], key=lambda row: row["gold"])
    text += (
      f". The gold accuracy goes from {of_summary(first, 'gold')} to {of_summary(last, 'gold')}"
    )
    golds = ((row["gold"], row["gold_stderr"] or 0.0) for row in (last, best))
    if first["n"] < best["n"] < last["n"] and apart(*golds):
      text += (
        f", and is highest at n = {best['n']} with {of_summary(best, 'gold')}: for a larger n the "
        "errors of the reward model are what is picked"
      )
  return text + "."


def best_score_at(exact: dict, kl: float) -> float:
  """Returns the score of the exact frontier at a KL, by interpolation."""
  return float(np.interp(kl, exact["frontier"]["kl"], exact["frontier"]["score"]))


def best_of_n_at(rows: list[dict], kl: float, name: str) -> float | None:
  """Returns a figure of best-of-n at a KL, by interpolation; None beyond the largest n."""
  kls, values = ([row[key] for row in rows] for key in ("kl", name))
  return float(np.interp(kl, kls, values)) if None not in values and kl <= kls[-1] else None


def report(results: dict) -> str:
  """Returns the page."""
  rows, compared = results["rows"], results["compared"]
  names = ["best of n, KL of the pool", "best of n, its bound", *(["runs"] if compared else [])]
  columns = pool_table(rows)
  kinds = [name for name in ("score", "gold") if rows[0][name] is not None]
  return page(
    "Best of n",
    element("h1", "What does the best of n draws have, and how far is it from one draw?"),
    element("p", verdict(results), class_="verdict"),
    note(
      f"{results['num_prompts']} held-out prompts, {results['completions_per_prompt']} completions "
      "of each; ± is one standard error over prompts. All n share these completions, so that "
      "their errors go together."
    ),
    *(
      figure(
        find(name).label, find(name).unit,
        plot(lambda axes, name=name: _draw_pool(axes, rows, compared, name), X_LABEL), names,
      )
      for name in kinds
    ),
    paragraph(
      "Best-of-n is a policy that was never trained. Its KL to the policy drawn from is log n "
      "\u2212 (n \u2212 1)/n where no two scores tie, and less where the same completion comes up "
      "more than once. “KL of the pool” is the KL of best-of-n to a draw from the pool itself, "
      "which tends to the true one as the pool grows; it is the fair place on the axis, the bound "
      "is the safe one."
    ),
    table(tuple(columns), list(zip(*columns.values(), strict=True))),
    note(
      "“Wins”: the chance that its score beats one more draw\u2019s, ties counted half; n/(n + 1) "
      "without ties."
    ),
    *_runs(rows, compared),
    *_exact(results["exact"]),
    element("h2", "Four choices"),
    paragraph(
      "Probabilities 0.4, 0.3, 0.2, 0.1 and scores 0 to 3, all exact. The best score at this KL "
      "is that of ref · exp(score/β)/Z with β chosen to have it."
    ),
    table(BANDIT_COLUMNS, [_bandit_cells(row) for row in results["bandit"]]),
    note(
      "The last two columns: RL at β = 1 makes best-of-n of the policy, if the reward is the log "
      "of their ratio. Shown is the total variation between best-of-n and the best policy for that "
      "reward (BOND, 2024), and for n \u2212 1 times the log of the score\u2019s quantile "
      "(variational best-of-n, 2024), which is the same where no scores tie."
    ),
  )  # fmt: skip


def _runs(rows: list[dict], compared: list[dict]) -> list[Html]:
  if not compared:
    return []
  cells = [
    (
      run["name"], of_summary(run, "kl"), of_summary(run, "score"),
      shown("score", best_of_n_at(rows, run["kl"], "score")), of_summary(run, "gold"),
      shown("gold", best_of_n_at(rows, run["kl"], "gold")), digits(run["score_before"]),
    )
    for run in compared
  ]  # fmt: skip
  return [
    element("h2", "Runs beside it"),
    table(RUN_COLUMNS, cells),
    note(
      "From the runs\u2019 own evaluations, KL exact. They belong on these axes if they started "
      "from the same policy, were scored by the same function and were judged on the same "
      "prompts: their score before training is then that of n = 1, up to its error. “Best of n” "
      "is what that has at the run\u2019s KL, between the points of the pool."
    ),
  ]


def _exact(exact: dict | None) -> list[Html]:
  if exact is None:
    return []
  found = exact["best_of_n"]
  cells = [
    (
      str(n), digits(round(kl, 9)), digits(bound), digits(score), digits(best_score_at(exact, kl)),
      shown("gold", gold),
    )
    for n, kl, bound, score, gold in zip(
      exact["sizes"], found["kl"], exact["kl_bounds"], found["score"], found["gold"], strict=True
    )
  ]  # fmt: skip
  return [
    element("h2", "Exact, by enumeration"),
    paragraph(
      f"All {exact['num_completions']:,} completions of {exact['num_problems']} problems, with "
      "their probabilities and scores. The frontier is the most score that any policy can have "
      "for its KL: ref · exp(score/β)/Z, one β for all problems."
    ),
    figure(
      "Score", "per completion", plot(lambda axes: _draw_exact(axes, exact), X_LABEL),
      ("best of n", "best of n, its bound", "frontier"),
    ),
    table(EXACT_COLUMNS, cells),
    note("Means over the problems. The best score is interpolated between points of the frontier."),
    note(_laws(exact["gold_laws"])),
  ]  # fmt: skip


def _laws(laws: dict) -> str:
  """Returns what the laws of the gold score say, with d the square root of the KL."""
  texts = []
  for name, formula, law in (
    ("best of n", "d (a \u2212 b d)", laws["best_of_n"]),
    ("the frontier", "d (a \u2212 b log d)", laws["rl"]),
  ):
    peak = law["peak_kl"]
    top = "without a peak" if peak is None else f"with the most gold at a KL of {digits(peak)}"
    texts.append(
      f"{name}: {formula}, a = {digits(law['alpha'])}, b = {digits(law['slope'])}, {top}; no point "
      f"is further off than {digits(law['error'])}"
    )
  return (
    "Laws of over-optimisation (Gao, Schulman and Hilton, 2022) nearest to the gain of gold, d the "
    f"square root of the KL. For {'. For '.join(texts)}."
  )


def _bandit_cells(row: dict) -> tuple[str, ...]:
  probs = ", ".join(f"{p:.3f}" for p in row["probs"])
  figures = (row[name] for name in ("kl", "kl_bound", "score", "best_score"))
  distances = (digits(round(row[name], 9)) for name in ("tv_reward", "tv_quantile"))
  return str(row["n"]), probs, *(digits(x) for x in figures), *distances


def _draw_pool(axes, rows: list[dict], compared: list[dict], name: str) -> None:
  scale = find(name).scale

  def bars(x, row, marker, colour, size):
    error = 2 * scale * (row[f"{name}_stderr"] or 0.0)
    axes.errorbar(
      x, scale * row[name], error, fmt=marker, color=colour, markersize=size, elinewidth=0.8
    )

  for key, colour, style in (("kl", SERIES[0], "-"), ("kl_bound", SERIES[1], "--")):
    y = [scale * row[name] for row in rows]
    axes.plot([row[key] for row in rows], y, style, color=colour, linewidth=1.4)
    for row in rows:
      bars(row[key], row, "o", colour, 3)
  axes.margins(x=0.12, y=0.1)
  for row in rows:
    axes.annotate(
      f"n = {row['n']}", (row["kl"], scale * row[name]), xytext=(5, -9),
      textcoords="offset points", fontsize=7, color=INK,
    )  # fmt: skip
  shown_runs = [run for run in compared if run[name] is not None]
  for run in shown_runs:
    bars(run["kl"], run, "s", SERIES[2], 4)
  _label(axes, [(run["name"], run["kl"], scale * run[name]) for run in shown_runs])


def _label(axes, points: list[tuple[str, float, float]]) -> None:
  """Writes the text of each (text, x, y) below the curves, one below the other, with a line to it.

  Runs that are compared lie near the curve and often near each other.
  """
  left, right = axes.get_xlim()
  for i, (text, x, y) in enumerate(sorted(points, key=lambda point: -point[2])):
    side = -1 if x > left + 0.7 * (right - left) else 1
    axes.annotate(
      text, (x, y), xytext=(60 * side, -40 - 11 * i), textcoords="offset points", fontsize=7,
      color=INK, ha="left" if side > 0 else "right", va="center",
      arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.4, "alpha": 0.6},
    )  # fmt: skip


def _draw_exact(axes, exact: dict) -> None:
  found, frontier = exact["best_of_n"], exact["frontier"]
  end = max(exact["kl_bounds"])
  inside = np.array(frontier["kl"]) <= end
  axes.plot(
    np.array(frontier["kl"])[inside], np.array(frontier["score"])[inside], color=SERIES[2],
    linewidth=1.4,
  )  # fmt: skip
  axes.plot(found["kl"], found["score"], "o-", color=SERIES[0], linewidth=1.4, markersize=3)
  axes.plot(exact["kl_bounds"], found["score"], "o--", color=SERIES[1], linewidth=1.4, markersize=3)
