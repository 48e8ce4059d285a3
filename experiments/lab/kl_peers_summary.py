"""What the KL penalties of other frameworks do, in a table and a picture for the README.

Both are made of audit.json alone. `experiments.kl_audit` leaves them in its folder.
"""

import pathlib
import textwrap
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from experiments.lab.kl_figures import LENGTH
from experiments.lab.kl_peers import DEFAULT, IF_ON
from klrl import schema
from klrl.algorithm import objective
from klrl.run.workdir import write_text

TABLE, PICTURE = "peers.md", "peers.png"
PROJECTS = ("TRL", "verl", "OpenRLHF", "Tunix")
_OWN = {"reward/k1/none/sequence": "PPO, default", "loss/k3/token/token": "GRPO, default"}
# What an expected gradient means to whoever trains with it.
_MEANINGS = {
  objective.SEQUENCE: "KL(π‖ref)",
  objective.TOKEN: "KL(π‖ref), token by token",
  objective.TOKEN_FORWARD: "KL(ref‖π), token by token: the other direction",
  objective.SEQUENCE_LESS_FORWARD: "KL(π‖ref) - KL(ref‖π): none near the reference",
  LENGTH: "of completions' lengths, whatever the reference: no leash",
}
_BEST = "the best policies, one for each beta"
_RIGHT, _WRONG = "#1a7f37", "#b4540a"  # a colour for KL(π‖ref), and one for any other gradient


def write(source: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes table and picture of the audit in the file `source` into `folder`."""
  audit = schema.read(source)
  write_text(folder / TABLE, table(audit))
  write_picture(audit, folder / PICTURE)


def rows(audit: dict[str, Any]) -> list[tuple[str, str, dict]]:
  """Returns (framework, setting, its row of the audit): klrl's defaults, then those of others."""
  own = {row["name"]: row for row in audit["penalties"]}
  found = [("klrl", setting, own[name]) for name, setting in _OWN.items()]
  for project in PROJECTS:
    for row in audit["peers"]:
      if row["project"] == project and row["status"] in (DEFAULT, IF_ON):
        when = ", once its KL is switched on" if row["status"] == IF_ON else ", default"
        found.append((project, row["setting"] + when, row))
  return found


def table(audit: dict[str, Any]) -> str:
  """Returns the Markdown table of `rows`: expected gradient, and where training ends."""
  lines = [
    "| framework | KL penalty | is in expectation the gradient of | KL at the end, nats "
    f"(best: {audit['tree']['optimum_kl']:.2f}) | distance from the best policy, 0 to 1 |",
    "|---|---|---|---|---|",
  ]
  for framework, setting, row in rows(audit):
    meaning = _MEANINGS[row["on_policy"]["gradient_unclamped"]]
    kl, distance = row["end"]["kl"], row["end"]["distance_to_optimum"]
    lines.append(f"| {framework} | {setting} | {meaning} | {kl:.2f} | {distance:.2f} |")
  return "\n".join(lines) + "\n"


def write_picture(audit: dict[str, Any], path: pathlib.Path) -> None:
  """Writes a PNG of where training ends with each of `rows`, beside the best policies."""
  ends: dict[tuple[float, float], tuple[str, list[str]]] = {}
  for framework, setting, row in rows(audit):
    place = (round(row["end"]["score"], 3), round(row["end"]["kl"], 3))
    is_right = row["on_policy"]["gradient_unclamped"] in objective.KL_GRADIENTS
    _, names = ends.setdefault(place, (_RIGHT if is_right else _WRONG, []))
    word = setting.split(",")[0]
    names.append(framework if "." in word else f"{framework}\N{NO-BREAK SPACE}{word}")
  tree, beta = audit["tree"], audit["config"]["beta"]
  with matplotlib.style.context({"font.size": 10}):
    figure = Figure(figsize=(8.4, 4.3), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(tree["frontier_kl"], tree["frontier_score"], color="#888", lw=1.4)
    middle = len(tree["frontier_kl"]) * 2 // 3
    texts = [((tree["frontier_score"][middle], tree["frontier_kl"][middle]), "#666", _BEST)]
    texts += [(place, colour, ", ".join(names)) for place, (colour, names) in ends.items()]
    # From the highest end to the lowest, so that no line crosses another.
    for i, ((score, kl), colour, text) in enumerate(sorted(texts, reverse=True)):
      if text != _BEST:
        axes.plot([kl], [score], "o", color=colour, markersize=8, zorder=3)
      axes.annotate(
        textwrap.fill(text, 44),
        (kl, score),
        xytext=(0.36, 0.86 - 0.145 * i),
        textcoords="axes fraction",
        va="center",
        color=colour,
        arrowprops={
          "arrowstyle": "-",
          "color": colour,
          "lw": 0.7,
          "shrinkB": 5,
          "relpos": (0, 0.5),
        },
      )
    axes.set_xlabel("KL(π‖ref) of the trained policy, nats")
    axes.set_ylabel("expected score")
    axes.set_title(
      f"One task, one beta ({beta:g}): where training ends with each framework's KL penalty",
      loc="left",
      fontsize=11,
    )
    axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, metadata={"Software": None})
