"""What the members of a sweep reached, at which KL to the reference: what frontier.json holds."""

import pathlib
from collections.abc import Sequence
from typing import Any

from klrl import schema
from klrl.figures import KL, KLS
from klrl.run.summary import read_summary

# Figures of a judgement that a frontier holds, with their standard errors where they have one.
FIGURES = (*("score", "gold", *KLS[:2], "kl_ref_forward", "entropy", "nll", "length"),)
# Of an enumerated task, without error.
EXACT = ("objective_gap", "tv_to_optimum")
# Of a field that members differ in.
_VALUE = schema.either(schema.number(), schema.text(), schema.boolean())


def frontier(workdir: pathlib.Path, members: Sequence) -> dict[str, Any]:
  """Returns what the finished members reached, and where they started, from their summaries.

  The members are those in the folder, whichever command ran them, in the order of their values;
  where two have the same values one counts. `members` are the present ones, whose fields come
  first.

  Each record has the `values` of the fields that members differ in, `FIGURES` with `_stderr` where
  there is one, `diverged_at` (null or an iteration), and `pareto`: no other member that stayed
  finite has a better gold score (score, where nothing is gold) at no more exact KL(pi || pi_ref),
  nor as good a one at less. Of an enumerated task it has `EXACT` too, and score and KL are exact.
  """
  folders = [*(member.folder(workdir) for member in members), *sorted(workdir.glob("members/*"))]
  names = [part.partition("=")[0] for folder in folders for part in folder.name.split(",")]
  names = [*dict.fromkeys(name for name in names if name != "seed"), "seed"]
  found = {}
  for folder in folders:
    if (summary := read_summary(folder)) is not None:
      path = folder / "config.json"
      config = schema.check(schema.read(path), dict.fromkeys(names, _VALUE), path, required=names)
      schema.check(summary, _rules(), folder / "summary.json", required=("diverged_at",))
      values = {name: config[name] for name in names}
      found.setdefault(tuple(values.values()), (folder.name, values, summary))
  found = [found[key] for key in sorted(found)]
  records = [
    {
      "name": name,
      "values": values,
      **_figures(summary, "after"),
      "diverged_at": summary["diverged_at"],
    }
    for name, values, summary in found
  ]
  gain = "gold" if any(record["gold"] is not None for record in records) else "score"
  for record in records:
    record["pareto"] = _is_pareto(record, records, gain)
  return {"gain": gain, "before": _figures(found[0][-1], "before"), "members": records}


def _rules() -> dict[str, schema.Rule]:
  """Returns what the figures of a summary that a frontier holds must be."""
  whens = "before", "before_stderr", "after", "after_stderr"
  names = [f"{name}_{when}" for name in FIGURES for when in whens]
  names += [*EXACT, "exact_score", "exact_kl"]
  return dict.fromkeys(names, schema.optional(schema.number())) | {
    "diverged_at": schema.optional(schema.integer(1))
  }


def _figures(summary: dict, when: str) -> dict[str, float | None]:
  figures = {
    f"{name}{suffix}": summary[f"{name}_{when}{suffix}"]
    for name in FIGURES
    for suffix in ("", "_stderr")
    if f"{name}_{when}{suffix}" in summary
  }
  if when == "after" and "exact_score" in summary:
    figures |= {name: summary[name] for name in EXACT}
    figures |= {"score": summary["exact_score"], KL: summary["exact_kl"]}
    figures |= {"score_stderr": None, f"{KL}_stderr": None}
  return figures


def _is_pareto(record, records, gain: str) -> bool:
  def place(record):
    return -record[gain], record.get(KL)

  comparable = [x for x in records if not x["diverged_at"] and None not in (x[gain], x.get(KL))]
  return record in comparable and not any(
    other != place(record) and all(a <= b for a, b in zip(other, place(record), strict=True))
    for other in map(place, comparable)
  )
