"""The pictures of docs/note.md, each made by the command that the note names beside it."""

import pathlib
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from klrl.figures import KL

NOISE, PASSES = "kl_noise.png", "kl_passes.png"
_COLOURS = "#3b6fb5", "#b4540a", "#1a7f37", "#6b4fa0"
_MARKS = "o", "s", "D", "^"
# Of the penalties with the gradient of KL(pi || ref), those that the picture compares.
_COMPARED = {
  "reward/k1/none/sequence": "k1 in the reward",
  "loss/k1/prefix/sequence": "k1, ratio of the prefix",
  "loss/k3/prefix/sequence": "k3, ratio of the prefix",
  "loss/exact/prefix/sequence": "exact KL, ratio of the prefix",
}


def write_noise(results: dict[str, Any], folder: pathlib.Path) -> None:
  """Writes how many completions a gradient needs, against their length; of kl_variance.json."""
  trees = results["trees"]
  horizons = [tree["horizon"] for tree in trees]
  with matplotlib.style.context({"font.size": 9}):
    picture = Figure(figsize=(7.4, 2.9), dpi=160, layout="constrained")
    axes = picture.subplots(1, 2, sharey=True)
    for one, regime, title in zip(
      axes,
      ("on_policy", "off_policy"),
      ("the policy's own completions", "completions of an older policy"),
      strict=True,
    ):
      for (name, label), colour, mark in zip(_COMPARED.items(), _COLOURS, _MARKS, strict=True):
        values = [tree[regime][name]["completions"] for tree in trees]
        one.plot(horizons, values, marker=mark, markersize=4, color=colour, lw=1.3, label=label)
      _plain(one, title, "tokens of a completion")
      one.set_yscale("log")
    axes[0].set_ylabel("completions needed")
    axes[1].legend(frameon=False, fontsize=8, loc="lower right")
  picture.savefig(folder / NOISE, metadata={"Software": None})


def write_passes(results: dict[str, Any], folder: pathlib.Path) -> None:
  """Writes the KL that is reached, against passes over a rollout; of kl_directions.json."""
  penalties = dict.fromkeys(run["penalty"] for run in results["epochs"])
  with matplotlib.style.context({"font.size": 9}):
    picture = Figure(figsize=(5.2, 2.7), dpi=160, layout="constrained")
    axes = picture.add_subplot()
    for penalty, colour, mark in zip(penalties, _COLOURS, _MARKS, strict=False):
      runs = [run for run in results["epochs"] if run["penalty"] == penalty]
      passes, reached = [x["num_epochs"] for x in runs], [x[f"{KL}_after"] for x in runs]
      axes.plot(passes, reached, marker=mark, markersize=4, color=colour, lw=1.3, label=penalty)
    _plain(axes, "", "passes over a rollout")
    axes.set_xscale("log", base=2)
    axes.set_xticks(passes, map(str, passes))
    axes.set_ylabel("KL(\u03c0\u2016ref) at the end, nats")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
  picture.savefig(folder / PASSES, metadata={"Software": None})


def _plain(axes, title: str, x_label: str) -> None:
  axes.set_title(title, fontsize=9, loc="left")
  axes.set_xlabel(x_label)
  axes.spines[["top", "right"]].set_visible(False)
