"""The pictures of the audit: what each penalty pulls, and where it leads."""

import textwrap
from typing import Any

from matplotlib.ticker import StrMethodFormatter

from klrl.algorithm import objective
from klrl.report.plots import INK, SERIES, plot

Audit = dict[str, Any]
_WIDTH = 4.6  # inches
# Verdict: (sign, colour of the page, colour of a picture, marker, meaning).
VERDICTS = {
  "exact": (
    "\N{BLACK CIRCLE}",
    "--third",
    SERIES[2],
    "o",
    "has the gradient of KL(π‖ref), whole or token by token",
  ),
  "other": ("\N{BLACK DIAMOND}", "--first", SERIES[0], "D", "has the gradient of KL(ref‖π)"),
  "refused": ("\N{BALLOT X}", "--second", SERIES[1], "X", "has neither, and klrl refuses it"),
  "neither": ("\N{BALLOT X}", "--second", SERIES[1], "X", "has neither, in another framework"),
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def in_words(row) -> str:
  """Returns what a row does, as one would say it."""
  if "project" in row:
    return f"{row['project']} {row['setting']}"
  words = [
    {"reward": "in the reward", "loss": "as a loss", "both": "as a loss and in the reward"}[
      row["placement"]
    ]
  ]
  words += [f"{row['correction']} ratio"] if row["correction"] != "none" else []
  words += ["own token only"] if (row["placement"], row["credit"]) == ("reward", "token") else []
  return f"{row['estimator']} {', '.join(words)}"


def behaviours(audit: Audit) -> list[Audit]:
  """Returns the different things that penalties do to a policy that samples for itself.

  Rows whose expected gradients are the same are one behaviour. Those of other frameworks join where
  klrl has the same, and add one where a default of theirs does what no penalty of klrl does.
  """
  found: dict[tuple, list] = {}
  for row in (*audit["penalties"], *audit["peers"]):
    figures = row["on_policy"]
    key = (figures["gradient_unclamped"],)
    if key[0] == objective.NO_DIVERGENCE:
      key = tuple(round(figures[x], 9) for x in ("pull", "error_sequence", "error_token"))
    found.setdefault(key, []).append(row)
  kept = []
  for rows in found.values():
    own = [row for row in rows if "project" not in row]
    defaults = [row for row in rows if row.get("status", "").startswith("default")]
    if own or defaults:
      first = min(own or defaults, key=lambda row: len(in_words(row)))
      kept.append({"first": first, "own": own, "defaults": defaults, "verdict": first["verdict"]})
  kept.sort(key=lambda behaviour: list(VERDICTS).index(behaviour["verdict"]))
  return [behaviour | {"letter": LETTERS[i]} for i, behaviour in enumerate(kept)]


def pulls(kept) -> str:
  """Returns the picture of what each behaviour pulls, one lane each, as SVG."""

  def draw(axes):
    for i, behaviour in enumerate(kept):
      figures, y = behaviour["first"]["on_policy"], -i
      _, _, colour, marker, _ = VERDICTS[behaviour["verdict"]]
      axes.plot([figures["pull_lowest"], figures["pull_highest"]], [y, y], color=colour, lw=2.2)
      axes.plot([figures["pull"]], [y], marker, color=colour, markersize=7, markeredgewidth=0)
    for x in (0, 1):
      axes.axvline(x, color=INK, alpha=0.3 + 0.3 * x, lw=0.9, zorder=0)
    names = [f"{x['letter']}  {_in_two_lines(in_words(x['first']))}" for x in kept]
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x}"))
    axes.set_yticks(range(0, -len(kept), -1), names, ha="left")
    axes.tick_params(axis="y", pad=0.39 * 72 * _WIDTH)
    axes.set_xticks([-1, 0, 1, 2])
    axes.set_ylim(0.5 - len(kept), 0.5)

  return plot(draw, "component along the gradient of KL(π‖ref)", left=0.4 * _WIDTH, **_size(kept))


def _in_two_lines(text: str) -> str:
  return "\n     ".join(textwrap.wrap(text, 26))


def _size(kept) -> dict[str, float]:
  return {"width": _WIDTH, "height": 0.34 * len(kept) + 0.6}


def ends(audit: Audit, kept) -> str:
  """Returns the picture of where ascent with each behaviour ends, below the frontier, as SVG."""

  def draw(axes):
    tree = audit["tree"]
    axes.plot(tree["frontier_kl"], tree["frontier_score"], color=INK, lw=1.2, alpha=0.6)
    axes.plot([tree["optimum_kl"]], [tree["optimum_score"]], "*", color=INK, markersize=15)
    close: list[tuple[float, float, list[str]]] = []  # ends that share a label
    for behaviour in kept:
      x, y = behaviour["first"]["end"]["kl"], behaviour["first"]["end"]["score"]
      _, _, colour, marker, _ = VERDICTS[behaviour["verdict"]]
      axes.plot([x], [y], marker, color=colour, markersize=7, markeredgewidth=0)
      for a, b, letters in close:
        if abs(x - a) < 0.2 and abs(y - b) < 0.04:
          letters.append(behaviour["letter"])
          break
      else:
        close.append((x, y, [behaviour["letter"]]))
    for x, y, letters in close:
      place = {"xytext": (9, -12), "textcoords": "offset points", "fontsize": 9, "color": INK}
      axes.annotate(", ".join(letters), (x, y), **place)
    axes.set_xlim(left=0, right=1.1 * max(x for x, _, _ in close))

  return plot(draw, "KL(π‖ref), nats", **_size(kept))
