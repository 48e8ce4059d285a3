"""The pictures of a sweep's page: the frontier, and curves over training.

A setting is what the members that differ in the seed alone have in common. The first swept field
has the colours, and each setting has a marker of its own.
"""

from typing import NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

from klrl.figures import find
from klrl.report.page import Html, element
from klrl.report.plots import INK, SERIES, plot, stretches

# What a curve beside the members is: colour, style, and the same for the legend.
BEST_OF_N = SERIES[2], "--", "border-top: 2px dashed var(--third)"
OPTIMUM = SERIES[2], "-", "border-top: 2px solid var(--third)"
_MARKERS = tuple(zip("os^DvP", "●■▲◆▼✚", strict=True))
_MAX_STRETCHES = 40
_CLOSE = 0.09  # of the axes: a label as near to another one is left to the legend


class Setting(NamedTuple):
  """The members of one setting, seeds apart."""

  name: str  # e.g. "β = 0.1"
  label: str  # e.g. "0.1"
  position: int  # among the settings
  rank: float  # 0 to 1 in the order of the swept values
  records: list[dict]  # of frontier.json, those that stayed finite
  diverged: list[dict]

  def each(self, name: str) -> np.ndarray:
    """Returns [seeds], a figure of the members; NaN where it was not measured."""
    return np.array([np.nan if r.get(name) is None else r[name] for r in self.records], float)

  @property
  def colour(self) -> str:
    """What the page shows: from the second to the first colour of its series."""
    return f"color-mix(in oklch, var(--first) {100 * self.rank:.0f}%, var(--second))"

  @property
  def drawn(self) -> str:
    """What is drawn in place of `colour`."""
    return f"#0102{round(100 * self.rank):02x}"

  @property
  def marker(self) -> tuple[str, str]:
    """The marker as matplotlib names it, and as a letter."""
    return _MARKERS[self.position % len(_MARKERS)]


def legend(settings: list[Setting], others=()) -> Html:
  """Returns the names of settings beside their marker, and others with the style of their line."""
  names = [
    element("span", element("b", x.marker[1], style=f"color: {x.colour}"), f" {x.name}")
    for x in settings
  ]
  names += [element("span", element("i", style=style), name) for name, style in others]
  return element("div", *names, class_="legend", style="margin: .75rem 0")


def _coloured(svg: str, settings: list[Setting]) -> str:
  for setting in settings:
    svg = svg.replace(setting.drawn, setting.colour)
  return svg


def frontier(
  settings: list[Setting],
  before: dict,
  name: str,
  x_name: str,
  x_label: str,
  *,
  root: bool,
  line: bool,
  lines: list[tuple[dict, tuple]],
) -> str:
  """Returns the picture of a figure against the KL, its square root or another figure.

  Args:
    settings: of which every member is a point.
    before: the figures of the policy at the start.
    name: of the figure.
    x_name: of that along the axis.
    x_label: what is written there.
    root: whether the axis is the square root.
    line: whether the means over seeds are joined, in the order of the settings.
    lines: ({"kl", name}, colour and style) of what is drawn besides.
  """

  def place(x):
    return np.sqrt(np.maximum(x, 0.0)) if root else np.asarray(x, float)

  scale = find(name).scale
  points = [(place(x.each(x_name)), scale * x.each(name)) for x in settings]
  start = place(before[x_name])
  least, most = (reduce([start, *(reduce(x) for x, _ in points)]) for reduce in (np.min, np.max))
  width = (most - least) or 1.0  # Policies that have not moved are all at one place.
  least, most = least - 0.02 * width, most + 0.06 * width

  def draw(axes):
    for curve, (colour, style, _) in lines:
      x, y = _until(most, place(curve["kl"]), scale * np.asarray(curve[name], float))
      axes.plot(x, y, style, color=colour, linewidth=1.3)
    means = [(x.mean(), y.mean()) for x, y in points]
    if line:
      axes.plot(*zip(*means, strict=True), color=INK, alpha=0.4, linewidth=0.9)
    for setting, (x, y) in zip(settings, points, strict=True):
      _draw_members(axes, setting, x, y, scale * setting.each(f"{name}_stderr"))
    axes.plot(start, scale * before[name], "o", color=INK, markersize=5.5, fillstyle="none")
    axes.set_xlim(least, most)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    _write_labels(axes, means, [setting.label for setting in settings])

  return _coloured(plot(draw, x_label, height=3.0), settings)


def paths(
  settings: list[Setting], evaluations: dict[str, list[dict]], name: str, x_name: str, x_label: str
) -> str | None:
  """Returns the picture of a figure against a KL while the first seed of each setting trained.

  It is None where no setting has two evaluations with both. `evaluations` are the objects of
  evaluations.jsonl, of each member by name.
  """
  lines = []
  for setting in settings:
    rows = evaluations[setting.records[0]["name"]]
    x, y = _values(rows, x_name), _values(rows, name)
    known = np.isfinite(x) & np.isfinite(y)
    if known.sum() > 1:
      lines.append((setting, x[known], y[known]))
  if not lines:
    return None

  def draw(axes):
    for setting, x, y in lines:
      axes.plot(x, y, "-", color=setting.drawn, alpha=0.55, linewidth=1.0)
      axes.plot(x[:-1], y[:-1], "o", color=setting.drawn, markersize=2.2, markeredgewidth=0)
      marker = setting.marker[0]
      axes.plot(x[-1], y[-1], marker, color=setting.drawn, markersize=6.5, markeredgewidth=0)
    axes.plot(lines[0][1][0], lines[0][2][0], "o", color=INK, markersize=5.5, fillstyle="none")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))

  return _coloured(plot(draw, x_label, height=3.0), settings)


def _until(end: float, x, y):
  """Returns the part of a curve up to `end`, to which it is interpolated."""
  order = np.argsort(x)
  x, y = x[order], y[order]
  if x[-1] <= end:
    return x, y
  inside = x < end
  return np.append(x[inside], end), np.append(y[inside], np.interp(end, x, y))


def _draw_members(axes, setting: Setting, x, y, stderrs) -> None:
  """Draws each seed: a single one with its error, several with their mean and what they cover."""
  colour = setting.drawn
  axes.plot(x, y, setting.marker[0], color=colour, markersize=6, markeredgewidth=0, alpha=0.85)
  if len(x) == 1:
    axes.errorbar(x, y, 2 * np.nan_to_num(stderrs), fmt="none", ecolor=colour, elinewidth=0.9)
    return
  axes.fill_between([x.min(), x.max()], y.min(), y.max(), color=colour, alpha=0.13, linewidth=0)
  axes.plot(x.mean(), y.mean(), "+", color=colour, markersize=8, markeredgewidth=1.4)


def _write_labels(axes, points, texts: list[str]) -> None:
  written: list[np.ndarray] = []
  for (x, y), text in zip(points, texts, strict=True):
    at = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
    if all(np.abs(at - other).max() > _CLOSE for other in written):
      written.append(at)
      side = -1 if at[0] > 0.9 else 1
      axes.annotate(
        text, (x, y), xytext=(6 * side, -9), textcoords="offset points", fontsize=8, color=INK,
        ha="left" if side > 0 else "right",
      )  # fmt: skip


def curves(settings: list[Setting], series: dict[str, list[dict]], name: str) -> str | None:
  """Returns the picture of a figure over the iterations; None where no setting has it.

  A line is the mean over seeds, a band from their least to their most, of at most 40 stretches.

  Args:
    settings: each a line.
    series: of each member by name, the objects of metrics.jsonl.
    name: of the figure.
  """
  lines = []
  for setting in settings:
    rows = [series[record["name"]] for record in setting.records]
    values = [_values(row, name) for row in rows]
    if not values or not all(np.isfinite(y).any() for y in values):
      continue
    x = np.arange(min(map(len, values)), dtype=float)
    limit = min(_MAX_STRETCHES, len(x))
    found = [stretches(x, y[: len(x)], limit)[:2] for y in values]
    y = np.stack([y for _, y in found])
    seen = np.isfinite(y).all(axis=0)
    lines.append((setting, found[0][0][seen], y[:, seen]))
  if not lines:
    return None

  def draw(axes):
    for setting, x, y in lines:
      colour, marker = setting.drawn, setting.marker[0]
      axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.13, lw=0)
      marks = {"marker": marker, "markersize": 3.5, "markevery": max(1, len(x) // 6)}
      axes.plot(x, y.mean(axis=0), color=colour, linewidth=1.3, **marks)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))

  return _coloured(plot(draw, "iteration", width=3.4, height=2.3), settings)


def _values(rows: list[dict], name: str) -> np.ndarray:
  values = [np.nan if row.get(name) is None else row[name] for row in rows]
  return find(name).scale * np.array(values, float)
