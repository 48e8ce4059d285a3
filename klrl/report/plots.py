"""Curves of a run as small SVG pictures that live inside a page.

A `Line` is one quantity over iterations; `curves` draws several of them on one pair of axes and
returns SVG markup; `picture` does so for any drawing. Titles, units and legends are text of the
page, not of the picture, which keeps them selectable and lets mathematical markup in a metric's
name do no harm.

The page owns the colours: what is drawn in a colour of `PAGE_COLOURS` comes out as the CSS value
beside it, so one picture serves light and dark. The same lines give the same bytes.

A band is two standard errors wide on either side. A line of more than `MAX_POINTS` values is drawn
as the means of as many stretches, its band from their lowest to their highest value. NaN,
infinities and what is beyond `LARGEST` leave a gap.
"""

import dataclasses
import io
import re
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

INK = "#010101"
SERIES = ("#010102", "#010103", "#010104", "#010105")
PAGE_COLOURS = {
  INK: "currentColor",
  SERIES[0]: "var(--first)",
  SERIES[1]: "var(--second)",
  SERIES[2]: "var(--third)",
  SERIES[3]: "var(--fourth)",
}
MAX_POINTS, MAX_MARKERS = 300, 30  # the first is about a small picture's columns of pixels
LARGEST = 1e100

SETTINGS = {
  "svg.hashsalt": "klrl",  # else every drawing has other identifiers
  "svg.fonttype": "none",  # text stays text, in the page's font
  "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; only measures the text
  "path.simplify": True,
}


@dataclasses.dataclass(frozen=True)
class Line:
  """One quantity: `values` [N] at `iterations` [N], and standard errors [N] where it has them."""

  iterations: np.ndarray
  values: np.ndarray
  stderrs: np.ndarray | None = None
  colour: str = SERIES[0]
  style: str = "-"  # as matplotlib names them; "o" draws points with error bars and no line


def stretches(x: np.ndarray, y: np.ndarray, limit: int) -> tuple[np.ndarray, ...]:
  """Returns the mean place, the mean, the lowest and the highest value of `limit` stretches.

  The stretches are of equal length, to one; each result is [limit]. A stretch without a finite
  value is NaN, a gap. The extremes keep the spike of a single iteration in sight, which a mean
  would hide.
  """
  rows = []
  for part in np.array_split(np.arange(len(y)), limit):
    seen = y[part][np.isfinite(y[part])]
    figures = (seen.mean(), seen.min(), seen.max()) if len(seen) else (np.nan,) * 3
    rows.append((x[part].mean(), *figures))
  return tuple(np.array(rows).T)


# Of a picture of curves, in points: its size, and where the axes are.
_WIDTH, _HEIGHT = 244.8, 136.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 28.2, 241.1, 6.3, 109.6


def curves(lines: list[Line]) -> str:
  """Returns the SVG markup of `lines` (at least one) over the iterations, on common axes.

  Matplotlib would take 15 ms for each of what may be a thousand figures; this takes half of one.
  """
  drawn = [_drawn(line) for line in lines]
  first = min(line.iterations.min() for line in lines)
  span = max(1.0, max(line.iterations.max() for line in lines) - first)
  x_scale = _Scale(first - 0.04 * span, first + 1.04 * span, _LEFT, _RIGHT)
  values = np.concatenate([part for _, *parts in drawn for part in parts])
  values = values[np.isfinite(values)] if np.isfinite(values).any() else np.array([0.0, 1.0])
  low, high = float(values.min()), float(values.max())
  margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
  y_scale = _Scale(low - margin, high + margin, _BOTTOM, _TOP)
  x_ticks = MaxNLocator(5, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
  y_ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10])
  parts = [f'<svg aria-hidden="true" viewBox="0 0 {_WIDTH} {_HEIGHT}" version="1.1">']
  for place, text in x_scale.ticks(x_ticks):
    parts.append(_text(place, _BOTTOM + 10.1, "middle", text))
  for place, text in y_scale.ticks(y_ticks):
    parts.append(_rule(place, "stroke-opacity: 0.13"))
    parts.append(_text(_LEFT - 4, place + 3, "end", text))
  for line, points in zip(lines, drawn, strict=True):
    x, *parts_of_y = points
    parts += _marks(line, x_scale(x), *map(y_scale, parts_of_y))
  parts.append(_text((_LEFT + _RIGHT) / 2, _BOTTOM + 20, "middle", "iteration"))
  return "\n".join([*parts, _rule(_BOTTOM, "opacity: 0.45"), "</svg>"])


def _drawn(line: Line) -> tuple[np.ndarray, ...]:
  """Returns places, values, and the lower and the upper end of the band around them, [N] each."""
  # Differences of values near the end of float64 would overflow.
  x, y = line.iterations, np.where(np.abs(line.values) < LARGEST, line.values, np.nan)
  errors = np.full(len(y), np.nan) if line.stderrs is None else line.stderrs
  errors = 2 * np.where((errors >= 0) & (errors < LARGEST), errors, np.nan)
  if line.style == "o":
    few = slice(None, None, -(-len(y) // MAX_MARKERS))
    x, y, errors = x[few], y[few], errors[few]
  if line.style == "o" or len(y) <= MAX_POINTS:
    return x, y, y - errors, y + errors
  return stretches(x, y, MAX_POINTS)


class _Scale(NamedTuple):
  """What puts the numbers from `first` to `last` on the picture, from `start` to `end`."""

  first: float
  last: float
  start: float
  end: float

  def __call__(self, numbers):
    return self.start + (numbers - self.first) / (self.last - self.first) * (self.end - self.start)

  def ticks(self, locator) -> list[tuple[float, str]]:
    """Returns the place and the text of each tick."""
    numbers = locator.tick_values(self.first, self.last)
    shown = [x + 0.0 for x in numbers.tolist() if self.first <= x <= self.last]
    return [(self(x), _tick_label(x, None)) for x in shown]


def _marks(line: Line, x, y, low, high) -> list[str]:
  colour = PAGE_COLOURS[line.colour]
  if line.style == "o":
    bars = "".join(
      f"M{place:.2f} {a:.2f}V{b:.2f}"
      for place, a, b in zip(x.tolist(), low.tolist(), high.tolist(), strict=True)
      if a == a
    )
    stroke = f"fill: none; stroke: {colour}; stroke-width: 0.8"
    return [f'<path d="{bars}" style="{stroke}"/>' if bars else "", *_dots(x, y, 1.3, colour)]
  # A value with a gap on either side leaves no mark as a line.
  missing = np.isnan(np.concatenate([[np.nan], y, [np.nan]]))
  alone = ~missing[1:-1] & missing[:-2] & missing[2:]
  dashes = "; stroke-dasharray: 5.2 2.2" if line.style == "--" else ""
  stroke = f"fill: none; stroke: {colour}; stroke-width: 1.4{dashes}"
  band = _band(x, low, high)
  return [
    f'<path d="{band}" style="fill: {colour}; fill-opacity: 0.2"/>' if band else "",
    f'<path d="{_path(x, y)}" style="{stroke}"/>',
    *_dots(x[alone], y[alone], 1.6, colour),
  ]


def _path(x, y) -> str:
  """Returns the path through the points, with a gap where one is missing."""
  parts, pen = [], "M"
  for place, value in zip(x.tolist(), y.tolist(), strict=True):
    if value == value:
      parts.append(f"{pen}{place:.2f} {value:.2f}")
    pen = "L" if value == value else "M"
  return "".join(parts)


def _band(x, low, high) -> str:
  """Returns the outlines of what is between `low` and `high`."""
  known = np.isfinite(low) & np.isfinite(high)
  runs = np.split(np.arange(len(x)), np.flatnonzero(np.diff(known)) + 1)
  outlines = [
    _path(np.concatenate([x[run], x[run][::-1]]), np.concatenate([low[run], high[run][::-1]]))
    for run in runs
    if known[run].all()
  ]
  return "".join(f"{outline}Z" for outline in outlines if outline)


def _dots(x, y, radius: float, colour: str) -> list[str]:
  return [
    f'<circle cx="{place:.2f}" cy="{value:.2f}" r="{radius}" style="fill: {colour}"/>'
    for place, value in zip(x.tolist(), y.tolist(), strict=True)
    if value == value
  ]


def _rule(place: float, opacity: str) -> str:
  style = f"fill: none; stroke: currentColor; stroke-width: 0.7; {opacity}"
  return f'<path d="M{_LEFT} {place:.2f}H{_RIGHT}" style="{style}"/>'


def _text(x: float, y: float, anchor: str, text: str) -> str:
  style = f"font-size: 8px; text-anchor: {anchor}; fill: currentColor"
  return f'<text style="{style}" x="{x:.2f}" y="{y:.2f}">{text}</text>'


def _tick_label(value: float, _) -> str:
  short = f"{value / 1000:.6g}k" if abs(value) >= 1e4 else f"{value:.6g}"
  return short.replace("-", "\u2212")


def bare(axes) -> None:
  """Leaves a bottom line, faint horizontal rules and plain numbers of the axes."""
  axes.xaxis.set_major_formatter(_tick_label)
  axes.yaxis.set_major_formatter(_tick_label)
  axes.spines[["top", "right", "left"]].set_visible(False)
  axes.spines["bottom"].set(color=INK, alpha=0.45, linewidth=0.7)
  axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.7)
  axes.tick_params(length=0, labelsize=8, labelcolor=INK, pad=4)
  axes.set_axisbelow(True)


def plot(
  draw, x_label: str, *, width=4.6, height=2.8, left=0.42, x_ticks=None, y_ticks=None, **scales
) -> str:
  """Returns the SVG markup of `draw(axes)`; ticks that are given make an axis logarithmic.

  Sizes are in inches, `left` that of the labels beside the axes. `scales` is passed on to the axes,
  as in yscale="log".
  """

  def draw_axes(figure):
    below = 0.44 / height
    axes = figure.add_axes((left / width, below, 0.985 - left / width, 0.97 - below))
    axes.set(**scales)
    bare(axes)
    axes.minorticks_off()
    axes.set_xlabel(x_label, size=8, color=INK, labelpad=3)
    for ticks, axis, scale in (
      (x_ticks, axes.xaxis, axes.set_xscale),
      (y_ticks, axes.yaxis, axes.set_yscale),
    ):
      if ticks is not None:
        scale("log")
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(_tick_label)
    draw(axes)

  return picture(draw_axes, width=width, height=height)


def picture(draw, *, width: float, height: float) -> str:
  """Returns the SVG markup of what `draw(figure)` puts on a matplotlib figure, sizes in inches.

  The markup has neither identifiers that clash with another picture's, nor dates, nor addresses.
  """
  with matplotlib.style.context(["default", SETTINGS]):  # whatever is in a matplotlibrc
    # Never pyplot: its figures are global state, and it may look for a screen.
    figure = Figure(figsize=(width, height))
    draw(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
  return _for_page(buffer.getvalue())


def _for_page(svg: str) -> str:
  root = ElementTree.fromstring(svg)
  for element in list(root.iter()):
    for child in list(element):
      if child.tag.endswith(("}metadata", "}style")):
        element.remove(child)
    # The page is no XML: neither tags nor attributes have a name space.
    element.tag = element.tag.rpartition("}")[2]
    element.attrib = {name.rpartition("}")[2]: x for name, x in element.attrib.items()}
    # Groups carry names that every picture repeats; markers and clip paths, named by content, stay.
    if element.tag == "g":
      element.attrib.pop("id", None)
    # A hundredth of a point is finer than a screen; matplotlib writes millionths.
    if "d" in element.attrib:
      element.set("d", re.sub(r"(\.\d\d)\d+", r"\1", element.get("d")))
    # The family of a font is the page's. Older matplotlib writes it in one property with the size.
    styles = [x for x in element.get("style", "").split("; ") if not x.startswith("font-family")]
    styles = [re.sub(r"^font: ([\d.]+px).*", r"font-size: \1", x) for x in styles]
    if any(styles):
      element.set("style", "; ".join(styles))
  root.attrib = {"viewBox": root.get("viewBox"), "version": "1.1", "aria-hidden": "true"}
  text = ElementTree.tostring(root, "unicode", short_empty_elements=True)
  for drawn, shown in PAGE_COLOURS.items():
    text = text.replace(drawn, shown)
  return re.sub(r"\n\s*", "\n", text).strip()
