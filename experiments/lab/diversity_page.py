"""The page and the table of `experiments.diversity`, a function of diversity.json alone."""

import numpy as np
from rich.table import Table

from klrl.figures import digits, find, shown
from klrl.report.page import Html, element, figure, grid, note, page, paragraph, table
from klrl.report.plots import INK, PAGE_COLOURS, SERIES, plot
from klrl.run import progress

NAMES = {
  "reverse": "KL(π‖ref)",
  "forward": "KL(ref‖π)",
  "jensen_shannon": "Jensen-Shannon",
  "chi_squared": "chi-squared",
  "hellinger": "Hellinger",
  "none": "none, stopped there",
}
STYLES = {
  "reverse": (SERIES[0], "-"),
  "forward": (SERIES[1], "-"),
  "jensen_shannon": (SERIES[2], "-"),
  "chi_squared": (SERIES[3], "-"),
  "hellinger": (SERIES[0], "--"),
  "none": (INK, ":"),
}
_CSS = {"-": "solid", "--": "dashed", ":": "dotted"}
_SMOOTHED = 5  # iterations of GRPO in one point of its curves


def most(figures: dict[str, dict], name: str) -> str:
  """Returns which divergence has most of a figure."""
  return max(figures, key=lambda divergence: figures[divergence][name])


def verdict(results: dict) -> str:
  """Returns what came out, in a sentence for each language and one for arithmetic."""
  parts = []
  for language, found in results["languages"].items():
    best = {name: x["best"] for name, x in found["divergences"].items()}
    first, last = most(best, "found_k"), min(best, key=lambda name: best[name]["found_k"])
    parts.append(
      f"At equal score {results['k']} draws hold most modes of the language “{language}” under "
      f"{NAMES[first]}, {_percent(best[first]['found_k'])}, and fewest under {NAMES[last]}, "
      f"{_percent(best[last]['found_k'])} (the reference: {_percent(found['start']['found_k'])})."
    )
  key = f"pass_at_{results['k']}"
  equal = results["arithmetic"]["equal"]
  passes = [x[key] for x in equal.values()]
  entropies = [x["entropy"] for x in equal.values()]
  parts.append(
    f"On arithmetic, at a gold accuracy of {shown('gold', results['arithmetic']['gold'])}, pass@"
    f"{results['k']} is {_percent(min(passes))} to {_percent(max(passes))} and the entropy "
    f"{digits(min(entropies))} to {digits(max(entropies))} nats per token."
  )
  return " ".join(parts)


def _percent(share: float) -> str:
  return f"{100 * share:.1f}%"


def language_rows(found: dict) -> list[tuple[str, ...]]:
  """Returns the rows of the table of a language."""
  start = {"reference": found["start"] | {"beta": None}}
  best = {NAMES[name]: x["best"] for name, x in found["divergences"].items()}
  return [
    (
      name, digits(x["beta"]), digits(x["score"]), digits(x["kl"]), digits(x["entropy"]),
      _percent(x["found_1"]), _percent(x["found_k"]),
    )
    for name, x in (start | best).items()
  ]  # fmt: skip


def language_columns(k: int) -> tuple[str, ...]:
  """Returns the names of the columns of `language_rows`."""
  names = ("divergence", "beta", "score", "KL(π‖ref)\nnats", "entropy\nnats", "modes\nin one draw")
  return (*names, f"modes\nin {k} draws")


def arithmetic_rows(results: dict) -> list[tuple[str, ...]]:
  """Returns the rows of the table of arithmetic: the start, and each divergence at equal gold."""
  arithmetic, key = results["arithmetic"], f"pass_at_{results['k']}"
  points = {"SFT policy": arithmetic["start"]}
  points |= {NAMES[name]: x for name, x in arithmetic["equal"].items()}
  return [
    (name, *(shown(figure, x[short]) for figure, short in (("gold", "gold"), (key, key),
     ("entropy", "entropy"), ("kl_ref_exact", "kl"))))
    for name, x in points.items()
  ]  # fmt: skip


def show(results: dict) -> None:
  """Prints the verdict and the tables."""
  progress.console.print(verdict(results), soft_wrap=True)
  for title, columns, rows in _tables(results):
    printed = Table(*(name.replace("\n", ", ") for name in columns), title=title, box=None)
    for cells in rows:
      printed.add_row(*cells)
    progress.console.print(printed)


def _tables(results: dict):
  for name, found in results["languages"].items():
    yield name, language_columns(results["k"]), language_rows(found)
  names = ("gold", f"pass_at_{results['k']}", "entropy", "kl_ref_exact")
  columns = ("divergence", *(f"{find(name).title}\n{find(name).unit}" for name in names))
  yield "arithmetic", columns, arithmetic_rows(results)


def report(results: dict) -> str:
  """Returns the page."""
  k = results["k"]
  (*of_languages, (_, columns, rows)) = _tables(results)
  return page(
    "Diversity",
    element("h1", "What does each divergence keep, at equal gold?"),
    element("p", verdict(results), class_="verdict"),
    _legend(NAMES),
    *(
      part
      for (name, own_columns, own_rows) in of_languages
      for part in _language(name, results["languages"][name], own_columns, own_rows, k)
    ),
    element("h2", "Arithmetic"),
    paragraph(
      "GRPO with each divergence as an exact loss, token by token, and several betas. Gold "
      "accuracy and entropy over training are shown for the smallest beta, means of five "
      "iterations. The table is at the gold accuracy that all divergences reach, between the runs "
      "of each."
    ),
    grid(
      *(
        figure(
          find(key).label, find(key).unit,
          plot(lambda axes, key=key: _draw_runs(axes, results["arithmetic"], key), "iteration"),
        )
        for key in ("gold/mean", "policy/entropy")
      ),
      least=26,
    ),
    table(columns, rows),
    note("One seed; differences of a point or two of pass@k are within its error."),
  )  # fmt: skip


def _language(name: str, found: dict, columns, rows, k: int) -> list[Html]:
  about = {
    "tree": "The task of 341 completions: four of them are modes, of different height.",
    "two words": "1,296 completions of four letters; two words are right, and the commoner one is "
    "worth a little more. The reference writes both with many errors.",
  }
  return [
    element("h2", name.capitalize()),
    paragraph(
      f"{about[name]} Each beta is the one whose best policy has the score "
      f"{digits(found['score'])} (the reference has {digits(found['start']['score'])}), so that "
      "curves end at one score. "
      "The whole completion is one choice, every gradient exact."
    ),
    grid(
      *(
        figure(title, unit, plot(lambda axes, key=key: _draw(axes, found, key), "step"))
        for title, unit, key in (
          ("Modes in k draws", f"% of modes, k = {k}", "found_k"),
          ("Entropy", "nats per completion", "entropy"),
        )
      ),
      least=26,
    ),
    table(columns, rows),
  ]


def _legend(names: dict[str, str]) -> Html:
  spans = [
    element(
      "span",
      element("i", style=f"border-top: 2px {_CSS[style]} {PAGE_COLOURS[colour]}"),
      names[name],
    )
    for name, (colour, style) in STYLES.items()
  ]
  return element("div", *spans, class_="legend", style="margin: 1rem 0")


def _draw(axes, found: dict, key: str) -> None:
  scale = 100 if key == "found_k" else 1
  for name, (colour, style) in STYLES.items():
    path = found["divergences"][name]["path"]
    steps, values = np.array(path["steps"]), scale * np.array(path[key])
    if name == "none":  # It goes on to the single best completion; shown is the way to the score.
      inside = np.array(path["score"]) <= found["score"]
      steps, values = steps[inside], values[inside]
    axes.plot(steps, values, style, color=colour, linewidth=1.4)


def _draw_runs(axes, arithmetic: dict, key: str) -> None:
  for name, runs in arithmetic["members"].items():
    run = min(runs, key=lambda run: run["beta"])
    values = find(key).scale * np.array(run["curves"][key], float)
    num = max(1, len(values) // _SMOOTHED)
    parts = np.array_split(np.arange(len(values)), num)
    colour, style = STYLES[name]
    axes.plot(
      [part.mean() for part in parts], [values[part].mean() for part in parts], style,
      color=colour, linewidth=1.4,
    )  # fmt: skip
