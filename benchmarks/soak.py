"""Whether a run loses anything, whatever happens to it: docs/reliability.md has what is promised.

    python -m benchmarks.soak

1. operations: a run on the tree is killed at each of its operations on files.
2. moments: PPO, its stages included, is killed at random moments, every other one in a save.
3. signals: SIGTERM, SIGINT, and SIGINT twice at random operations.
4. refused: from a random operation on the disk is full, or cannot be written to.
5. long: PPO goes on for --minutes; memory and the time of an iteration stay as they are.

After each of 1 to 4 the same command is given again, and must leave what an undisturbed run leaves,
byte for byte. Whatever differs is printed, and ends the program with status 1. --record writes the
figures of the parts that were run into benchmarks/results. Everything takes about two hours.
"""

import argparse
import collections
import os
import pathlib
import random
import re
import statistics
import sys
import tempfile
import time

from benchmarks import faults, results
from benchmarks.faults import Fault
from klrl.devices import tunables
from klrl.run import metrics

PPO = {
  "sft_iterations": 3,
  "reward_model_iterations": 3,
  "num_iterations": 4,
  "batch_size": 16,
  "num_minibatches": 2,
  "num_eval_rows": 16,
  "num_samples": 2,
  "mesh": "data=1",
  "save_every": 1,
  "keep": 2,
  "eval_every": 2,
  "keep_best": "gold",
  "workdir": "run",
}
LONG = PPO | {
  "batch_size": 64,
  "num_iterations": 10**6,
  "learning_rate_schedule": "constant",
  "save_every": 300,  # about ten seconds
  "eval_every": 0,
  "keep_best": "",
}


class Soak:
  """Commands in one folder, and what was found of them."""

  def __init__(self, folder: pathlib.Path, seed: int):
    self.folder, self.random = folder, random.Random(seed)
    self.found = collections.defaultdict(collections.Counter)
    self._wholes, self._names = {}, 0

  def run(self, command, name, **settings) -> faults.Ended:
    """Returns how a command ended in the folder `name`."""
    return faults.run(*command, self.folder / name, compiled=self.folder / "compiled", **settings)

  def whole(self, command) -> tuple[list[str], float, dict]:
    """Returns operations, seconds and results of a command that nothing happens to."""
    experiment, flags = command
    if experiment not in self._wholes:
      self.run(command, f"{experiment}-first")  # It compiles.
      operations = self.folder / f"{experiment}.txt"
      ended = self.run(command, f"{experiment}-whole", operations=operations)
      left = faults.results_of(self.folder / f"{experiment}-whole" / flags["workdir"])
      self._wholes[experiment] = operations.read_text().splitlines(), ended.seconds, left
    return self._wholes[experiment]

  def happens(self, part: str, command, statuses, **settings) -> None:
    """Lets something happen to a command, gives it again, and compares what it leaves."""
    self._names += 1
    name = f"{part}-{self._names}"
    first = self.run(command, name, **settings)
    last = self.run(command, name) if first.status else first
    wrong = []
    if first.status not in (*statuses, 0):  # It may have ended before.
      wrong.append(f"status {first.status}")
    if "Traceback" in first.said + last.said:
      wrong.append("a traceback")
    if last.status:
      wrong.append("it does not go on")
    else:
      left, expected = faults.results_of(self.folder / name / "run"), self.whole(command)[2]
      wrong += [x for x in left.keys() | expected.keys() if left.get(x) != expected.get(x)]
    self.found[part] += collections.Counter(tried=1, disturbed=first.status != 0, lost=bool(wrong))
    if wrong:
      print(f"{part}: {settings}: {', '.join(wrong)}\n  {first.said}\n  {last.said}", flush=True)


def operations(soak: Soak, args) -> None:
  """Kills a run on the tree at every operation; before some, and in the middle of others."""
  command = ("reinforce", faults.TREE)
  for number, text in enumerate(soak.whole(command)[0], 1):
    if number % args.every == 0:
      does = faults.TORN if text.startswith("open") and number % 2 else faults.KILL
      soak.happens("operations", command, [-9], fault=Fault(does, number))


def moments(soak: Soak, args) -> None:
  """Kills PPO at random moments, every other one shortly after an operation in a save."""
  command = ("ppo", PPO)
  listed, seconds, _ = soak.whole(command)
  num_in_saves = sum("run/checkpoints/" in text for text in listed)
  for i in range(args.moments):
    if i % 2:
      number, later = soak.random.randint(1, num_in_saves), soak.random.uniform(0.001, 0.03)
      fault = Fault(number=number, holding="run/checkpoints/", seconds=later)
      soak.happens("moments", command, [-9], fault=fault)
    else:
      soak.happens("moments", command, [-9], kill_after=soak.random.uniform(0, seconds))


def signals(soak: Soak, args) -> None:
  """Sends signals to a run on the tree."""
  _at_random(
    soak, "signals", args.moments // 2, (faults.TERM, faults.INT, faults.TWICE), [130, -15]
  )


def refused(soak: Soak, args) -> None:
  """Refuses files to a run on the tree."""
  _at_random(soak, "refused", args.moments // 2, (faults.FULL, faults.READ_ONLY), [1])


def _at_random(soak, part, times, kinds, statuses) -> None:
  command = ("reinforce", faults.TREE)
  last = len(soak.whole(command)[0])
  for i in range(times):
    fault = Fault(kinds[i % len(kinds)], soak.random.randint(1, last))
    soak.happens(part, command, statuses, fault=fault)


def long(soak: Soak, args) -> None:
  """Lets PPO go on, and finds how memory and time of its second tenth and its last differ."""
  rows = []

  def watch(process):
    # The stages before, and what compiles, are no part of it.
    while process.is_alive() and not (soak.folder / "long/run/timing.jsonl").exists():
      process.join(0.5)
    began = time.monotonic()
    while process.is_alive() and time.monotonic() < began + 60 * args.minutes:
      status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
      if resident := re.search(r"VmRSS:\s*(\d+) kB", status):
        rows.append(int(resident[1]) / 1024)
      process.join(0.5)
    process.terminate()

  ended = soak.run(("ppo", LONG), "long", while_it_runs=watch)
  if ended.status != 130:
    raise SystemExit(f"The long run ended with status {ended.status}: {ended.said}")
  lines = metrics.read_lines(soak.folder / "long/run/timing.jsonl")
  seconds = [line["seconds"] for line in lines]
  figures = {"minutes": args.minutes, "iterations": len(seconds)}
  for name, series in (("MiB", rows), ("seconds", seconds)):
    tenth = max(len(series) // 10, 1)
    early, late = (statistics.median(x) for x in (series[tenth : 2 * tenth], series[-tenth:]))
    figures |= {f"{name}, second tenth": round(early, 4), f"{name}, last tenth": round(late, 4)}
    figures[f"{name}, change"] = round(late / early - 1, 4)
  soak.found["long"] = figures


PARTS = {fn.__name__: fn for fn in (operations, moments, signals, refused, long)}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas")
  parser.add_argument("--every", type=int, default=1, help="of the operations, which one is tried")
  parser.add_argument("--moments", type=int, default=30, help="at random")
  parser.add_argument("--minutes", type=float, default=30.0, help="of the long run")
  parser.add_argument("--seed", type=int, default=0, help="of what is random")
  parser.add_argument("--record", action="store_true", help="write benchmarks/results")
  args = parser.parse_args()
  os.environ |= tunables.variables()  # as a command of klrl's does
  with tempfile.TemporaryDirectory() as folder:
    soak = Soak(pathlib.Path(folder), args.seed)
    for name in args.parts.split(","):
      PARTS[name](soak, args)
      print(name, dict(soak.found[name]), flush=True)
  keys = ("tried", "disturbed", "lost")
  figures = {
    name: {key: found[key] for key in keys} if "tried" in found else found
    for name, found in soak.found.items()
  }
  counted = [found for found in figures.values() if "tried" in found]
  total = {key: sum(found[key] for found in counted) for key in keys}
  if args.record:
    results.record("soak", {"all": total} | figures)
  sys.exit(bool(total["lost"]))


if __name__ == "__main__":
  main()
