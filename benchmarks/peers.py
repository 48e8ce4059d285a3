"""Times klrl beside its peers on the same work, alternately.

    python -m benchmarks.peers --torch=VENV/bin/python --trl=VENV/bin/python \\
        --trl_ppo=VENV/bin/python --tunix=VENV/bin/python

A peer takes part where the Python of an environment is named in which it is installed;
benchmarks/README.md has what to install. Works are GRPO and PPO at two sizes, and the
log-probabilities of tokens from hidden states, alone and with their gradients.

In each round every contender is a new process, in an order that turns round with each round, so
that a machine which becomes slower does not favour one. Of a process the median iteration counts,
among those during which others took less than 0.15 of a core if there are any. The table has
medians of rounds with the least and the most, and `of the fastest` is the median over rounds of
klrl's time divided by that of the peer which was fastest in that round. `first` has compilation;
klrl's first round finds no compiled programs, and its others find those of the first.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import results
from benchmarks.contenders import workload
from klrl.devices import tunables

HERE = pathlib.Path(__file__).parent / "contenders"
QUIET = 0.15  # cores that other processes take
WORKS = (
  *(("grpo", "small"), ("grpo", "large"), ("ppo", "small"), ("ppo", "large")),
  *(("log_probs", "large"), ("log_probs_gradient", "large")),
)
CAUSAL = ("grpo", "ppo")


class Contender(NamedTuple):
  """A program in `contenders`, and what it does."""

  script: str
  environment: str  # the flag with its Python; "" for klrl's own
  algorithms: tuple[str, ...]


OURS = "klrl"
CONTENDERS = {
  OURS: (
    Contender("klrl_run.py", "", ("grpo", "ppo")),
    Contender("jax_log_probs.py", "", ("log_probs", "log_probs_gradient")),
  ),
  "torch loop": (Contender("torch_loop.py", "torch", ("grpo",)),),
  "TRL": (
    Contender("trl_grpo.py", "trl", ("grpo",)),
    Contender("trl_ppo.py", "trl_ppo", ("ppo",)),
    Contender("trl_log_probs.py", "trl", ("log_probs", "log_probs_gradient")),
  ),
  "Tunix": (
    Contender("tunix_run.py", "tunix", ("grpo", "ppo")),
    Contender("jax_log_probs.py", "tunix", ("log_probs", "log_probs_gradient")),
  ),
}
ENVIRONMENTS = ("torch", "trl", "trl_ppo", "tunix")


def commands(algorithm: str, pythons: dict[str, str]) -> dict[str, list[str]]:
  """Returns {contender: its program} of those that do `algorithm` and are installed."""
  return {
    name: [pythons[contender.environment], str(HERE / contender.script)]
    for name, programs in CONTENDERS.items()
    for contender in programs
    if algorithm in contender.algorithms and pythons.get(contender.environment)
  }


def run(command: list[str], *, is_ours: bool) -> dict:
  """Returns what a contender reports, of a process that has ended."""
  environment = os.environ | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
  environment.pop("PYTHONPATH", None)
  if is_ours:
    # A program of klrl's begins with these by itself.
    environment |= tunables.variables() | {"PYTHONPATH": str(HERE.parents[1])}
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def rounds_of(
  algorithm: str, size: str, pythons: dict[str, str], *, rounds: int, warm: int, timed: int
) -> dict[str, list[dict]]:
  """Returns {contender: its reports, one of each round} of one work."""
  found: dict[str, list[dict]] = {}
  with tempfile.TemporaryDirectory() as folder:
    for number in range(rounds):
      turn = list(commands(algorithm, pythons).items())
      for name, command in turn if number % 2 == 0 else reversed(turn):
        # klrl's compiled programs stay from round to round, and all else is new.
        own = pathlib.Path(folder, str(number), name.replace(" ", "_"))
        own.mkdir(parents=True)
        kept = pathlib.Path(folder, "compiled")
        kept.mkdir(exist_ok=True)
        (own / "compiled").symlink_to(kept)
        flags = {"algorithm": algorithm, "size": size, "warm": warm, "timed": timed, "folder": own}
        flags = [f"--{flag}={value}" for flag, value in flags.items()]
        report = run([*command, *flags], is_ours=name == OURS)
        found.setdefault(name, []).append(report)
        print(
          f"{algorithm} {size}, round {number + 1}, {name}: {seconds(report):.3f} s", flush=True
        )
  return found


def quiet_rows(report: dict) -> list[dict]:
  """Returns the iterations that count."""
  return [row for row in report["timed"] if row["others"] < QUIET] or report["timed"]


def seconds(report: dict, part: str = "seconds") -> float:
  """Returns the seconds of an iteration, or of a part of it."""
  return statistics.median(row[part] for row in quiet_rows(report))


def spread(values) -> list[float]:
  """Returns [median, least, most]."""
  values = sorted(values)
  return [round(x, 3) for x in (statistics.median(values), values[0], values[-1])]


def figures_of(algorithm: str, size: str, found: dict[str, list[dict]]) -> dict[str, dict]:
  """Returns {contender: {figure: number or [median, least, most]}} of one work."""
  peers = [reports for name, reports in found.items() if name != OURS]
  figures = {}
  for name, reports in found.items():
    own = {"seconds": spread(map(seconds, reports))}
    if algorithm in CAUSAL:
      own["generate, s"] = spread(seconds(report, "generate") for report in reports)
      own["GFLOP/s"] = round(
        workload.flops(workload.SIZES[size], algorithm) / own["seconds"][0] / 1e9
      )
    if name == OURS and peers:
      own["of the fastest"] = spread(
        seconds(ours) / min(map(seconds, theirs))
        for ours, *theirs in zip(reports, *peers, strict=True)
      )
      if algorithm in CAUSAL:
        own["generate, of the fastest"] = spread(
          seconds(ours, "generate") / min(seconds(report, "generate") for report in theirs)
          for ours, *theirs in zip(reports, *peers, strict=True)
        )
    own["peak, MiB"] = spread(report["peak_mib"] for report in reports)
    own["beside what was loaded, MiB"] = spread(report["extra_mib"] for report in reports)
    first = [report["first"]["seconds"] for report in reports]
    own["first, s"] = round(first[0], 1) if name == OURS else spread(first)
    if name == OURS and first[1:]:
      own["first of the second start, s"] = spread(first[1:])
    rows = [row for report in reports for row in report["timed"]]
    own["quiet iterations"] = round(sum(row["others"] < QUIET for row in rows) / len(rows), 2)
    figures[name] = own
  return figures


def table_of(figures: dict[str, dict]) -> Table:
  """Returns the table of all works, whose rows are named WORK: CONTENDER."""
  columns = list(dict.fromkeys(column for row in figures.values() for column in row))
  table = Table(title="An iteration: median of the rounds, with the least and the most")
  table.add_column("")
  for column in columns:
    table.add_column(column, justify="right")
  for name, row in figures.items():
    table.add_row(name, *(_text(row.get(column)) for column in columns))
  return table


def _text(figure) -> str:
  if figure is None:
    return ""
  if isinstance(figure, list):
    return f"{figure[0]:g} ({figure[1]:g} to {figure[2]:g})"
  return f"{figure:g}"


def main() -> None:
  """Prints a line for each process, and the table; writes both."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name in ENVIRONMENTS:
    parser.add_argument(f"--{name}", default="", help="Python of an environment that has it")
  names = [f"{algorithm}:{size}" for algorithm, size in WORKS]
  parser.add_argument(
    "--works", default=",".join(names), help="ALGORITHM:SIZE, separated by commas"
  )
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument(
    "--warm", type=int, default=2, help="iterations of a process that do not count"
  )
  parser.add_argument("--timed", type=int, default=3, help="iterations of a process that count")
  parser.add_argument("--json", default="", help="file for every iteration of every process")
  parser.add_argument("--record", action="store_true", help="write benchmarks/results")
  args = parser.parse_args()
  pythons = {"": sys.executable} | {name: getattr(args, name) for name in ENVIRONMENTS}
  everything, figures = {}, {}
  for work in args.works.split(","):
    algorithm, _, size = work.partition(":")
    found = rounds_of(
      algorithm, size, pythons, rounds=args.rounds, warm=args.warm, timed=args.timed
    )
    everything[work] = found
    figures |= {f"{work}: {name}": x for name, x in figures_of(algorithm, size, found).items()}
    if args.json:  # What is measured stays, whatever comes.
      pathlib.Path(args.json).write_text(json.dumps(everything, indent=1) + "\n")
  Console(width=max(200, Console().width)).print(table_of(figures))
  if args.record:
    results.record("peers", figures)


if __name__ == "__main__":
  main()
