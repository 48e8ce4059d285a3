"""What the figures of a run say of a run that went wrong, in words, and what to change.

Everything is read from `metrics.jsonl`, so that a run that was stopped says the same.
"""

import math
import pathlib
from collections.abc import Sequence

from klrl.devices import processes
from klrl.figures import shown
from klrl.run import metrics

LARGEST_KL_OLD = 1.0  # nats per sequence, in one iteration
_FEWEST = 5  # iterations of a mean over a part of the run
_ERRORS = 3.0  # standard errors that are no noise

_FAR = (
  "In {which} the steps took the policy far from the one that had sampled: KL(old||pi) was {value} "
  "nats per sequence. Beyond {largest:g} nat a rollout says little of where the steps lead: lower "
  "--learning_rate, or take fewer steps on a rollout."
)


def far_step(done: int, value: float) -> str:
  """Returns what to say at once of iteration `done`, from 1, with so large a KL(old || pi)."""
  return _far(f"iteration {done}", value)


def of_run(workdir: pathlib.Path) -> tuple[str, str]:
  """Returns what the run in `workdir` shows: of its steps, and of its objective; "" for nothing."""
  records = processes.on_writer(metrics.read_lines)(workdir / "metrics.jsonl")
  return _far_steps(records), falling_objective(records)


def _far(which: str, value: float, up_to: str = "") -> str:
  value = f"{up_to}{shown('kl/old_k1', value)}"
  return _FAR.format(which=which, value=value, largest=LARGEST_KL_OLD)


def _far_steps(records: Sequence[dict]) -> str:
  values = {record["iteration"] + 1: _finite(record.get("kl/old_k1")) for record in records}
  measured = {done: x for done, x in values.items() if x is not None}
  far = {done: x for done, x in measured.items() if x > LARGEST_KL_OLD}
  if not far:
    return ""
  if len(far) == 1:
    return far_step(*far.popitem())
  which = f"{len(far)} of {len(measured)} measured iterations, first in iteration {min(far)},"
  return _far(which, max(far.values()), "up to ")


def falling_objective(records: Sequence[dict]) -> str:
  """Returns what to say where the objective fell over a run, beyond its noise; "" elsewhere.

  The objective is score - beta * KL(pi || pi_ref) by k1, with beta as it is at the end, so that a
  beta that rises does not look like a loss. Compared are its means over the first and the last
  tenth of the iterations.
  """
  kls = [_finite(record.get("kl/ref_k1")) for record in records]
  scores = [_finite(record.get("score/mean")) for record in records]
  betas = [x for record in records if (x := _finite(record.get("controller/beta"))) is not None]
  # Where no KL is in the objective it is measured now and then, or never.
  beta = betas[-1] if betas and None not in kls else 0.0
  both = [
    (score - beta * (kl or 0.0), score, kl)
    for score, kl in zip(scores, kls, strict=True)
    if score is not None
  ]
  num = max(_FEWEST, len(both) // 10)
  if len(both) < 2 * num:
    return ""
  parts = both[:num], both[-num:]
  (first, first_error), (last, last_error) = (_mean(x for x, *_ in part) for part in parts)
  if not last < first - _ERRORS * math.hypot(first_error, last_error):
    return ""
  objective = f"the score less {beta:g} times the KL to the reference" if beta else "the score"
  return (
    f"The objective, {objective}, fell over the run: from "
    f"{shown('objective/mean', first, first_error)} in the first {num} iterations to "
    f"{shown('objective/mean', last, last_error)} in the last {num}. Lower --learning_rate, or "
    "raise --batch_size; if the KL is what rose, raise --beta."
  )


def _mean(values) -> tuple[float, float]:
  """Returns the mean of independent values, and its standard error."""
  values = list(values)
  mean = sum(values) / len(values)
  variance = sum((x - mean) ** 2 for x in values) / (len(values) - 1)
  return mean, math.sqrt(variance / len(values))


def _finite(x) -> float | None:
  is_number = isinstance(x, int | float) and not isinstance(x, bool)
  return float(x) if is_number and math.isfinite(x) else None
