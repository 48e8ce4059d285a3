"""The page of `experiments.evaluate`, from what is in evaluate.json alone."""

import math

from klrl.figures import ABSENT, JUDGED, KL, Figure, find, number, of_summary
from klrl.report.page import Html, element, figure, fold, grid, note, page, table
from klrl.report.plots import INK, SERIES, plot
from klrl.report.samples import samples_part

_GAINS = ("gold", "score")


def rows_of(results: dict) -> list[tuple[Figure, ...]]:
  """Returns (figure, text of each model) for the figures that some model has, in one order."""
  models = [model["figures"] for model in results["models"]]
  names = dict.fromkeys(
    name for figures in models for name in figures if not name.endswith("_stderr")
  )
  # The name of a figure may end in a number where that of its row ends in K.
  known = [
    name
    for key in (x.key for x in JUDGED)
    for name in names
    if name == key or (key.endswith("_K") and name.startswith(key.removesuffix("K")))
  ]
  rest = [name for name in ("distinct_1", "distinct_3", "finished_fraction") if name in names]
  rows = []
  for name in (*known, *rest):
    cells = [of_summary(figures, name) for figures in models]
    if {*cells} != {ABSENT}:
      rows.append((find(name), *cells))
  return rows


def verdict(results: dict) -> str:
  """Returns in a sentence which model has the most, as far as the errors let one say so."""
  models = results["models"]
  parts = []
  for name in _GAINS:
    known = [(x["figures"][name], x) for x in models if number(x["figures"].get(name)) is not None]
    if not known:
      continue
    label = f"{find(name).title[:1].lower()}{find(name).title[1:]}"
    ranked = sorted(known, key=lambda pair: pair[0], reverse=True)
    best = ranked[0][1]
    text = of_summary(best["figures"], name)
    if len(models) == 1:
      parts.append(f"{best['name']} has a {label} of {text}")
      continue
    parts.append(f"{best['name']} has the highest {label}, {text}")
    if len(ranked) > 1 and not _apart(best["figures"], ranked[1][1]["figures"], name):
      parts[-1] += " (not beyond its error)"
  if not parts:
    return "Nothing scores these completions, so there are only KLs, likelihoods and diversity."
  return f"On {results['num_prompts']} prompts, {'; '.join(parts)}."


def _apart(one: dict, other: dict, name: str) -> bool:
  errors = [number(x.get(f"{name}_stderr")) for x in (one, other)]
  # The noise is the same, so that the error of a difference is smaller than this.
  return None not in errors and abs(one[name] - other[name]) > 2 * math.hypot(*errors)


def report(results: dict) -> str:
  """Returns the page."""
  models = results["models"]
  rows = [(f"{x.label}\n{x.per}", *cells) for x, *cells in rows_of(results)]
  reference = results["reference"]
  about = f"{results['num_rows']} completions of {results['num_prompts']} prompts, the same noise "
  about += f"for each model; temperature {results['temperature']:g}. "
  about += f"The reference is {reference}." if reference else "There is no reference, so no KL."
  records = [sample for model in models for sample in model["samples"]]
  directories = [
    (model["name"], f"{model['parameters']:,}", model["directory"]) for model in models
  ]
  return page(
    "Evaluation",
    element("h1", "What do these models write on the same prompts?"),
    element("p", verdict(results), class_="verdict"),
    note(about),
    *_pictures(models),
    element("h2", "Side by side"),
    table(
      ("", *(model["name"] for model in models)), rows,
      caption="π is the model, ref the reference; ± is one standard error.",
    ),
    element("h2", "Samples"),
    *samples_part(records, [model["name"] for model in models], "and what each model writes"),
    fold(
      "Directories",
      table(("model", "parameters", "directory"), directories),
    ),
  )  # fmt: skip


def _pictures(models: list[dict]) -> list[Html]:
  pictures = []
  for name in _GAINS:
    points = [
      (model["name"], *(number(model["figures"].get(x)) for x in _with_errors(KL, name)))
      for model in models
    ]
    points = [point for point in points if None not in (point[1], point[3])]
    if len(points) > 1:
      svg = plot(lambda axes, points=points, name=name: _draw(axes, points, name), _X_LABEL)
      pictures.append(figure(find(name).title, f"{find(name).unit}, against KL(π‖ref)", svg))
  about = note("Bars are two standard errors long on either side.")
  return [grid(*pictures, least=24), about] if pictures else []


_X_LABEL = f"{find(KL).title}, {find(KL).unit}"


def _with_errors(*names: str) -> list[str]:
  return [f"{name}{suffix}" for name in names for suffix in ("", "_stderr")]


def _draw(axes, points: list[tuple], name: str) -> None:
  scale = find(name).scale
  middle = (min(point[1] for point in points) + max(point[1] for point in points)) / 2
  for i, (label, x, x_error, y, y_error) in enumerate(points):
    colour = SERIES[i % len(SERIES)]
    axes.errorbar(
      x, scale * y, 2 * scale * (y_error or 0.0), 2 * (x_error or 0.0),
      fmt="o", color=colour, markersize=6, markeredgewidth=0, elinewidth=0.9,
    )  # fmt: skip
    left = x > middle  # Where a name has room.
    axes.annotate(
      label[-28:], (x, scale * y), (-7 if left else 7, 6), textcoords="offset points",
      ha="right" if left else "left", size=8, color=INK,
    )  # fmt: skip
