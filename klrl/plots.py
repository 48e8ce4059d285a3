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

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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


def _draw(axes, line: Line) -> None:
  # Differences of values near the end of float64 would overflow inside matplotlib.
  x, y = line.iterations, np.where(np.abs(line.values) < LARGEST, line.values, np.nan)
  errors = np.full(len(y), np.nan) if line.stderrs is None else line.stderrs
  errors = 2 * np.where((errors >= 0) & (errors < LARGEST), errors, np.nan)
  if line.style == "o":
    few = slice(None, None, -(-len(y) // MAX_MARKERS))
    marks = {"fmt": "o", "color": line.colour, "markersize": 2.6, "markeredgewidth": 0}
    axes.errorbar(x[few], y[few], errors[few], elinewidth=0.8, **marks)
    return
  low, high = y - errors, y + errors
  if len(y) > MAX_POINTS:
    x, y, low, high = stretches(x, y, MAX_POINTS)
  axes.fill_between(x, low, high, color=line.colour, alpha=0.2, linewidth=0)
  axes.plot(x, y, line.style, color=line.colour, linewidth=1.4)
  # A value with a gap on either side leaves no mark as a line.
  missing = np.isnan(np.concatenate([[np.nan], y, [np.nan]]))
  alone = ~missing[1:-1] & missing[:-2] & missing[2:]
  axes.plot(x[alone], y[alone], "o", color=line.colour, markersize=3.2, markeredgewidth=0)


def _tick_label(value: float, _) -> str:
  short = f"{value / 1000:.6g}k" if abs(value) >= 1e4 else f"{value:.6g}"
  return short.replace("-", "\u2212")


def curves(lines: list[Line]) -> str:
  """Returns the SVG markup of `lines` (at least one) over the iterations, on common axes."""

  def draw(figure):
    axes = figure.add_axes((0.115, 0.13, 0.87, 0.82))
    for line in lines:
      _draw(axes, line)
    first = min(line.iterations.min() for line in lines)
    span = max(1.0, max(line.iterations.max() for line in lines) - first)
    axes.set_xlim(first - 0.04 * span, first + 1.04 * span)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    bare(axes)

  return picture(draw, width=3.4, height=1.75)


def bare(axes) -> None:
  """Leaves a bottom line, faint horizontal rules and plain numbers of the axes."""
  axes.xaxis.set_major_formatter(_tick_label)
  axes.yaxis.set_major_formatter(_tick_label)
  axes.spines[["top", "right", "left"]].set_visible(False)
  axes.spines["bottom"].set(color=INK, alpha=0.45, linewidth=0.7)
  axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.7)
  axes.tick_params(length=0, labelsize=8, labelcolor=INK, pad=4)
  axes.set_axisbelow(True)


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
  svg = svg[svg.index("<svg") :]
  svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
  svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.DOTALL)
  svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
  # Groups carry names that every picture repeats; markers and clip paths, named by content, stay.
  svg = re.sub(r'<g id="[^"]*"', "<g", svg)
  svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
  svg = svg.replace("xlink:href", "href")
  # A hundredth of a point is finer than a screen; matplotlib writes millionths.
  svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
  # Older matplotlib writes one shorthand, newer two properties; the family is the page's.
  svg = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", svg)
  svg = re.sub(r"font-family: [^;]*; ", "", svg)
  for drawn, shown in PAGE_COLOURS.items():
    svg = svg.replace(drawn, shown)
  svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'aria-hidden="true"', svg, count=1)
  return re.sub(r"\n\s*", "\n", svg).strip()
