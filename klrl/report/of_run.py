"""The report of a run: one HTML file with its pictures inside, which opens offline.

`write_report` is a function of the files that a run leaves in its folder, and of nothing else: the
same files give the same bytes. Any of them may be missing, cut short or hold null and NaN, as an
interrupted run leaves them; the page then says so and shows the rest.

Prompts, completions, settings and names of figures come from models and from people: all markup is
made by `page.element`, which escapes them. Labels, units and formats are those of `klrl.figures`;
an error is one standard error in text, two in the curves.
"""

import collections
import functools
import json
import math
import pathlib

import numpy as np

from klrl import schema
from klrl.errors import UserError
from klrl.figures import KL, KLS, before_and_after, find, number, of_summary, shown
from klrl.report.page import Html, duration, element, figure, fold, grid, note, page, table
from klrl.report.plots import INK, MAX_POINTS, SERIES, Line, curves, plot
from klrl.report.samples import samples_part
from klrl.run import fingerprints
from klrl.run.evaluations import FILE
from klrl.run.workdir import write_text

# Small multiples: the names of figures that share their axes, each drawn in its place's style.
PANELS = (
  ("score/mean",), ("gold/mean",),
  ("kl/ref_k1", "kl/ref_k3", "kl/ref_exact"),
  ("kl/ref_k1_per_token", "kl/ref_k3_per_token", "kl/ref_exact_per_token"),
  ("kl/old_k1", "kl/old_k3"),
  ("loss/cross_entropy", "policy/pretraining_loss"),
  ("loss/bradley_terry",), ("loss/dpo",), ("loss/ipo",),
  ("loss/accuracy",), ("preference/accuracy",), ("preference/margin",),
  ("preference/chosen_log_prob", "preference/rejected_log_prob"),
  ("policy/entropy",), ("policy/clip_fraction", "value/clip_fraction"),
  ("value/loss",), ("value/explained_variance",),
  ("controller/beta",), ("rollout/length",), ("tokens_per_second",),
)  # fmt: skip
# Of the evaluations while a run trains.
EVALUATED = (
  ("gold",), ("score",), ("kl_ref_exact", "kl_ref_forward"), ("nll",), ("distinct_2",),
  ("length",), ("entropy",), ("finished_fraction",),
)  # fmt: skip
STYLES = (SERIES[0], "-", "first"), (SERIES[1], "--", "second"), (INK, "o", "dots")


def _read_text(path: pathlib.Path, gaps: list[str]) -> str | None:
  try:
    return path.read_text("utf-8", "replace")
  except FileNotFoundError:
    gaps.append(f"{path.name} is missing.")
  except OSError as error:
    gaps.append(f"{path.name} cannot be read: {error.strerror}.")
  return None


def _parsed(text: str) -> dict | None:
  """Returns the JSON object in `text`, None where there is none; half characters may be in it."""
  try:
    value = json.loads(text)
  except (ValueError, RecursionError):
    return None
  return value if isinstance(value, dict) and not schema.is_deep(value, text) else None


def _read_object(path: pathlib.Path, gaps: list[str]) -> dict:
  text = _read_text(path, gaps)
  value = {} if text is None else _parsed(text)
  if value is None:
    gaps.append(f"{path.name} holds no JSON object; it is left out.")
  return value or {}


def _read_lines(path: pathlib.Path, gaps: list[str]) -> list[dict]:
  text = _read_text(path, gaps)
  if text is None:
    return []
  lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
  records = {i: _parsed(line) for i, line in lines}
  bad = [str(i) for i, record in records.items() if record is None]
  if bad:
    listed = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
    gaps.append(f"{path.name}: left out what is no JSON object, in line {listed}.")
  elif not records:
    gaps.append(f"{path.name} is empty.")
  return [record for record in records.values() if record is not None]


def _read_iterations(path: pathlib.Path, gaps: list[str]) -> list[dict]:
  """Returns the records of a file that has one of each iteration; of two the last one is shown."""
  records = _read_lines(path, gaps)
  counts = collections.Counter(map(_iteration, records))
  counts.pop(None, None)
  if twice := sorted(i for i, count in counts.items() if count > 1):
    listed = ", ".join(f"{i:g}" for i in twice[:5]) + (", ..." if len(twice) > 5 else "")
    gaps.append(f"{path.name}: several records of iteration {listed}, of which the last is shown.")
  missing = int(max(counts, default=-1)) + 1 - len(counts)
  if missing > 0:
    gaps.append(f"{path.name}: {missing} of the iterations before its last one are missing.")
  return records


def _iteration(record: dict) -> float | None:
  """Returns the iteration of a record, None where it has none."""
  iteration = number(record.get("iteration"))
  return iteration if iteration is not None and math.isfinite(iteration) else None


def _read_accepted(workdir: pathlib.Path, gaps: list[str]) -> list[str]:
  try:
    return [f"{text}." for text in fingerprints.read(workdir)["accepted"]]
  except UserError as error:
    gaps.append(str(error))
    return []


def _series(records: list[dict]) -> dict[str, dict[float, float]]:
  """Returns name -> iteration -> value; what is null was not measured, and is left out."""
  series: dict[str, dict[float, float]] = {}
  for position, record in enumerate(records):
    iteration = _iteration(record)
    if iteration is None:
      iteration = float(position)
    for name, value in record.items():
      x = number(value)
      if name != "iteration" and x is not None:
        series.setdefault(name, {})[iteration] = x
  return series


def _flat(record: dict, prefix: str = "") -> dict[str, object]:
  flat = {}
  for key, value in record.items():
    name = prefix + key.replace("/", "_")
    flat.update(_flat(value, name + "_") if isinstance(value, dict) else {name: value})
  return flat


FACTS = {
  "num_iterations": lambda n: f"{n:,.0f} iterations",
  "wall_seconds": duration,
  "tokens_per_second": lambda n: f"{n:,.0f} tokens per second",
}
# What a run is judged by, the first two that it has: words, name in the summary, in the metrics.
CHANGES = (
  ("the score", "score", "score/mean"),
  ("the gold accuracy", "gold", "gold/mean"),
  ("the cross-entropy", "held_out_cross_entropy", "loss/cross_entropy"),
  ("the preference loss", "held_out_loss", "loss/bradley_terry"),
)


def _change(words: str, name: str, figures: dict[str, object]) -> str:
  """Returns how a figure changed, as far as its error lets one say so; "" where it is unknown."""
  after = f"{name}_after" if f"{name}_after" in figures else name
  names = f"{name}_before", after
  values = [number(figures.get(key)) for key in names]
  if None in values:
    return ""
  errors = [number(figures.get(f"{key}_stderr")) for key in names]
  # Of a difference on the same examples where that was measured, else as if they were others.
  error = number(figures.get(f"{name}_change_stderr"))
  error = math.hypot(*errors) if error is None and None not in errors else error
  before, after = (shown(name, *pair) for pair in zip(values, errors, strict=True))
  if before == after:
    return f"{words} stayed at {after}"
  if error is None:
    return f"{words} went from {before} to {after}"
  if not abs(values[1] - values[0]) > 2 * error:
    return f"{words} did not change beyond its error, from {before} to {after}"
  return f"{words} {'rose' if values[1] > values[0] else 'fell'} from {before} to {after}"


def _agreement(figures: dict[str, object], experiment: object) -> str:
  share, error = (number(figures.get(f"held_out_accuracy{x}")) for x in ("", "_stderr"))
  if share is None:
    return ""
  who = "the reward model" if experiment == "reward_model" else "the policy"
  many = number(figures.get("held_out_examples"))
  pairs = f"{many:,.0f} pairs" if many else "the pairs"
  chance = ", no more than chance" if error is not None and share - 2 * error <= 0.5 else ""
  return (
    f"{who} agrees with the labels of {shown('held_out_accuracy', share, error)} of {pairs}{chance}"
  )


def _verdict(figures: dict[str, object], series: dict, experiment: object) -> str:
  """Returns the run in one sentence; without a summary, from its first and last iteration."""
  examples = number(figures.get("held_out_examples")) is not None
  where = "on held-out examples, " if examples else "on held-out prompts, "
  if not any(number(figures.get(x)) is not None for x in ("score_after", "held_out_examples")):
    where = "in training, "
    figures = {name.replace("/", "_"): [*values.values()][-1] for name, values in series.items()}
    for _, name, metric in CHANGES:
      if metric in series:
        values = [*series[metric].values()]
        figures |= {f"{name}_before": values[0], f"{name}_after": values[-1]}
  parts = []
  if number(figures.get("objective_gap")) is not None:
    where = ""
    gap, distance = (shown(x, figures[x]) for x in ("objective_gap", "tv_to_optimum"))
    parts.append(
      f"the policy lacks {gap} of what the best policy for this beta gains, at a total variation "
      f"of {distance} from it"
    )
  parts += [_agreement(figures, experiment), *(_change(*x[:2], figures) for x in CHANGES)]
  parts = [part for part in parts if part][:2]
  if not parts:
    return "This run left no figures to judge."
  sentence = where + "; ".join(parts)
  for name in KLS:
    if number(figures.get(name)) is not None:
      kl, how = shown(name, figures[name], figures.get(f"{name}_stderr")), name.rpartition("_")[2]
      sentence += f", at {kl} nats per sequence of KL from the reference ({how})"
      break
  return f"{sentence[:1].upper()}{sentence[1:]}."


def _table(figures: dict[str, object]) -> Html:
  rows = before_and_after(figures)
  if not rows:
    return note("No figures before and after.")
  cells = [(f"{x.label}\n{x.per}", before, after) for x, before, after in rows]
  about = "π is the policy, ref the reference; ± is one standard error."
  return table(("", "Before", "After"), cells, caption=about)


def _optimum(optimum: dict, figures: dict[str, object], series: dict) -> list[Html]:
  """Returns the picture of the best policies of an enumerated task, with the run on it."""
  kl, score = (optimum.get(name) for name in ("kl", "score"))
  end = number(figures.get("exact_kl")), number(figures.get("exact_score"))
  lists = isinstance(kl, list) and isinstance(score, list) and 0 < len(kl) == len(score)
  if not lists or None in (*map(number, [*kl, *score]), *end):
    return []
  path = [series.get(name, {}) for name in ("kl/ref_k1", "score/mean")]
  iterations = [i for i in path[0] if i in path[1]]

  def draw(axes):
    near = np.array(kl) <= max(1.5 * end[0], 0.2)
    axes.plot(np.array(kl)[near], np.array(score)[near], color=SERIES[2], linewidth=1.4)
    xy = [[of[i] for i in iterations] for of in path]
    axes.plot(*xy, "o", color=INK, alpha=0.25, markersize=2.5, markeredgewidth=0)
    axes.plot(kl[0], score[0], "o", color=INK, fillstyle="none", markersize=6)
    axes.plot(*end, "o", color=SERIES[0], markersize=7, markeredgewidth=0)

  return [
    figure(
      "Score against KL(π‖ref)", "of the policy and of the best policies, by enumeration",
      plot(draw, "KL(π‖ref), nats per sequence"),
      below="The line is what the best policies have, ref · exp(score/β)/Z for every β. The dot is "
      "the policy after training, the ring the reference; grey are the batches of the iterations.",
    )
  ]  # fmt: skip


def _path(evaluations: list[dict], figures: dict[str, object]) -> list[Html]:
  """Returns the pictures of what was gained against the KL, over the evaluations of a run."""
  pictures = []
  for name in ("gold", "score"):
    points = [
      (iteration, *x, *y)
      for record in evaluations
      if (iteration := number(record.get("iteration"))) is not None
      and None not in (x := _estimate(record, KL), y := _estimate(record, name))
    ]
    if len({point[3] for point in points}) > 1:  # What stayed the same is told below.
      svg = plot(functools.partial(_draw_path, sorted(points)), "KL(π‖ref), nats per sequence")
      pictures.append(figure(find(name).title, f"{find(name).unit}, against KL(π‖ref)", svg))
  if not pictures:
    return []
  about = (
    "The policy on its way, each time on the same held-out prompts: the ring is where it started, "
    "the dot where it ended, and the numbers count iterations. Bars are two standard errors long "
    "on either side."
  )
  chosen = [name for name in ("gold", "score") if number(figures.get(f"{name}_best")) is not None]
  best = number(figures.get("best_iteration"))
  if chosen and best is not None:
    about += (
      f" The model after {best:g} iterations is kept in model_best. Of all these it has the "
      f"highest {find(chosen[0]).title[:1].lower()}{find(chosen[0]).title[1:]}, "
      f"{of_summary(figures, f'{chosen[0]}_best')}; the best of many looks better than it is."
    )
  heading = element("h2", "Gained against KL, on held-out prompts")
  return [heading, grid(*pictures, least=24), note(about)]


def _estimate(record: dict, name: str) -> tuple[float, float] | None:
  """Returns a figure and its standard error, 0 where that is not known, or None."""
  x, error = number(record.get(name)), number(record.get(f"{name}_stderr"))
  if x is None or not math.isfinite(x):
    return None
  return find(name).scale * x, find(name).scale * (error if error and math.isfinite(error) else 0.0)


def _draw_path(points: list[tuple], axes) -> None:
  iterations, x, x_error, y, y_error = np.array(points).T
  axes.errorbar(
    x, y, 2 * y_error, 2 * x_error, color=SERIES[0], alpha=0.35, linewidth=0, elinewidth=0.8
  )
  axes.plot(x, y, "-", color=SERIES[0], alpha=0.6, linewidth=1.1)
  axes.plot(x[1:-1], y[1:-1], "o", color=SERIES[0], markersize=3.5, markeredgewidth=0)
  axes.plot(x[0], y[0], "o", color=SERIES[0], fillstyle="none", markersize=6.5)
  axes.plot(x[-1], y[-1], "o", color=SERIES[0], markersize=7.5, markeredgewidth=0)
  for place in _apart(x, y):
    axes.annotate(
      f"{iterations[place]:g}", (x[place], y[place]), (4, 4), textcoords="offset points",
      size=7, color=INK, alpha=0.75,
    )  # fmt: skip


def _apart(x, y) -> list[int]:
  """Returns which points a text has room beside: the ends, and those that are near to no other."""
  places = np.stack([of / max(np.ptp(of), 1e-9) for of in (x, y)], axis=1)
  near = (np.abs(places[:, None] - places[None]) < (0.06, 0.08)).all(axis=-1)
  ends = (0, len(x) - 1)
  return [i for i in range(len(x)) if i in ends or near[i].sum() == 1]


def _panel(names: tuple[str, ...], series: dict) -> Html:
  drawn, legend = [], []
  many = len({find(name).title for name in names}) > 1
  for name, (colour, style, mark) in zip(names, STYLES, strict=False):
    if name in series:
      scale = find(name).scale
      iterations, values = np.array([*series[name]]), np.array([*series[name].values()])
      errors = series.get(f"{name}_stderr")
      stderrs = errors and scale * np.array([errors.get(i, math.nan) for i in iterations])
      if np.isfinite(values).any():
        drawn.append(Line(iterations, scale * values, stderrs, colour, style))
      how = find(name).title if many else find(name).label.partition(", ")[2]
      last = element("b", shown(name, values[-1]))
      mark = (element("i", class_=mark), f"{how} ") if how else ()
      legend.append(element("span", *mark, last))
  first = find(next(name for name in names if name in series))
  legend = element("div", *legend, class_="legend")
  return figure(first.title, first.unit, curves(drawn) if drawn else "", legend)


def _curves(series: dict, panels=PANELS) -> list[Html]:
  if not series:
    return [note("No iteration was recorded.")]
  # A picture of its own for every figure that no panel has.
  placed = {name for names in panels for name in names} | {f"{name}_stderr" for name in series}
  rest = [(name,) for name in sorted(series) if name not in placed]
  present = [names for names in panels if any(name in series for name in names)]
  still = {
    names for names in (*present, *rest)
    if all(len({*series.get(x, {}).values()}) <= 1 < len(series.get(x, "ab")) for x in names)
  }  # fmt: skip
  grids = [
    grid(*(_panel(names, series) for names in some if names not in still))
    for some in (present, rest)
  ]
  about = (
    "The figure in each heading is the last one measured. Bands and bars are two standard "
    "errors wide on either side."
  )
  if max(map(len, series.values())) > MAX_POINTS:
    about += (
      f" A line of more than {MAX_POINTS} points is drawn as the means of as many stretches, its "
      "band from their lowest to their highest value."
    )
  constant = [x for names in (*present, *rest) if names in still for x in names if x in series]
  if constant:
    said = (f"{find(x).label} {shown(x, next(iter(series[x].values())))}" for x in constant)
    about += f" The same in every iteration, and not drawn: {'; '.join(said)}."
  more = [fold("All metrics that are not above", grids[1])] if {*rest} - still else []
  return [note(about), grids[0], *more]


def _evaluated(evaluations: list[dict]) -> list[Html]:
  series = _series(evaluations)
  heading = element("h2", "Held-out prompts, while it trained")
  return [heading, *_curves(series, EVALUATED)] if series else []


def _notices(title: str, lines: list, class_: str) -> list[Html]:
  listed = element("ul", *(element("li", line) for line in lines))
  return [element("div", element("b", title), listed, class_=class_)] if lines else []


def _settings(title: str, record: dict) -> list[Html]:
  entries = []
  for key, value in record.items():
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
      text = shown(key, value)
    entries.append(element("div", element("dt", key), element("dd", text)))
  return [element("h3", title), element("dl", *entries, class_="settings")] if entries else []


def _run(config: dict, figures: dict, versions: dict, has_flags: bool) -> list[Html]:
  name = config.get("experiment", "EXPERIMENT")
  again = f"python -m experiments.{name} --flagfile=FOLDER/flags.txt"
  about = "The same run again, in the checkout; FOLDER is the folder of this page:"
  tabled = {x.key for x, *_ in before_and_after(figures)} | {*FACTS, "device"}
  rest = {name: x for name, x in figures.items() if find(name).key not in tabled}
  return [
    *([note(about), element("pre", again)] if has_flags else []),
    *_settings("Settings", config),
    *_settings("Versions", versions),
    *_settings("Figures that are not above", rest),
  ]


def write_report(workdir: pathlib.Path) -> pathlib.Path:
  """Returns the path of `report.html`, written into `workdir` from the files that a run left there.

  Reads config.json, metrics.jsonl, timing.jsonl, samples.jsonl, summary.json and, where they are,
  evaluations.jsonl and optimum.json; what is missing or broken is named on the page. A report that
  is there already is replaced whole.
  """
  gaps: list[str] = []
  config = _read_object(workdir / "config.json", gaps)
  summary = _read_object(workdir / "summary.json", gaps)
  series = _series(_read_iterations(workdir / "metrics.jsonl", gaps))
  timing = _series(_read_iterations(workdir / "timing.jsonl", gaps))
  experiment = config.get("experiment")
  supervised = experiment in ("sft", "reward_model")  # These draw no samples.
  samples = [] if supervised else _read_lines(workdir / "samples.jsonl", gaps)
  optimum = workdir / "optimum.json"
  optimum = _read_object(optimum, gaps) if optimum.exists() else {}
  evaluations = workdir / FILE
  evaluations = _read_lines(evaluations, gaps) if evaluations.exists() else []
  for name, values in series.items():
    if bad := [i for i in values if not math.isfinite(values[i])]:
      gaps.append(f"{name} is not finite in {len(bad)} iterations, first in {bad[0]:g}.")
  series |= {name: timing[name] for name in ("tokens_per_second",) if name in timing}

  warnings = summary.pop("warnings", None) or []
  warnings = warnings if isinstance(warnings, list) else [warnings]
  warnings = warnings + _read_accepted(workdir, gaps)
  versions, penalty = summary.pop("versions", None), summary.pop("kl_penalty", "")
  figures = _flat(summary)
  numbers = {name: number(figures.get(name)) for name in FACTS}
  facts = [FACTS[name](x) for name, x in numbers.items() if x and math.isfinite(x)]
  facts += [str(figures["device"])] if "device" in figures else []
  has_beta = config.get("beta") is not None and config.get("kl_placement") != "none"
  title = str(config.get("experiment", "A run"))
  title += f", beta {config['beta']}" if has_beta else ""

  body = [
    element("h1", title),
    element("p", _verdict(figures, series, experiment), class_="verdict"),
    note(" · ".join(facts)), *([note(str(penalty))] if penalty else []),
    *_notices("Warnings", warnings, "warnings"), *_notices("Not complete", gaps, "missing"),
    *_path(evaluations, figures),
    element("h2", "Before and after"), _table(figures), *_optimum(optimum, figures, series),
    *_evaluated(evaluations),
    element("h2", "Curves"), *_curves(series),
    *([] if supervised else [element("h2", "Samples"), *samples_part(samples)]),
    element("h2", "The run"),
    *_run(
      config, figures, versions if isinstance(versions, dict) else {},
      (workdir / "flags.txt").is_file(),
    ),
  ]  # fmt: skip
  path = workdir / "report.html"
  text = page(title, *body).encode("utf-8", "replace").decode()  # a model may emit half a character
  try:
    write_text(path, text)
  except OSError as error:
    raise UserError(f"{path} cannot be written: {error.strerror}.") from error
  return path
