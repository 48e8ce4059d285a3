"""Papers on KL-regularised RL: what each claims, by which command it is tried, and what comes out.

    python -m experiments.paper
    python -m experiments.paper comedy_2025
    python -m experiments.paper all

Without a name it lists the papers. With one it runs the command of that paper, or reads what the
same command found before, and says whether the claim holds here, with the figure. `all` does so for
every paper and writes WORKDIR/papers.md, which docs/papers.md holds; that takes about 45 minutes on
2 cores, of which most are `experiments.kl_directions`.
"""

import dataclasses
import difflib
import importlib
import pathlib

from rich.table import Table

from experiments.lab.papers import PAPERS, RESULTS, SUMMARY, Finding, Paper
from experiments.settings import common
from experiments.settings.common import setting
from klrl import schema
from klrl.errors import UserError
from klrl.run import progress
from klrl.run.workdir import create_workdir, find_workdir, write_text

ALL = "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.LabConfig):
  """Settings of the experiment."""

  name: str = setting("", f"of the paper, or {ALL}; default: the papers are listed")

  def __post_init__(self):
    super().__post_init__()
    if self.name not in ("", ALL, *PAPERS):
      near = difflib.get_close_matches(self.name, PAPERS, n=1, cutoff=0.3)
      hint = f" Do you mean {near[0]}?" if near else ""
      raise UserError(f"No paper is called {self.name}.{hint} Without a name they are listed.")


def main(config: Config, *, root: str = "runs") -> pathlib.Path | None:
  """Lists the papers, or tries those that are named and returns the folder with the table."""
  if not config.name:
    listed()
    return None
  names = tuple(PAPERS) if config.name == ALL else (config.name,)
  findings = {name: tried(PAPERS[name], config.seed, root=root) for name in names}
  for name, finding in findings.items():
    progress.console.print(sentences(PAPERS[name], finding), soft_wrap=True, markup=False)
  workdir = find_workdir("paper", config, root=root)
  create_workdir(workdir, "paper", config)
  write_text(workdir / "papers.md", table(findings))
  return workdir


def listed() -> None:
  """Prints the name and the claim of each paper."""
  rows = Table(box=None, pad_edge=False)
  rows.add_column("name", no_wrap=True)
  rows.add_column("claim")
  for name, paper in PAPERS.items():
    rows.add_row(name, paper.claim)
  progress.console.print(rows)
  progress.console.print("To try one: python -m experiments.paper NAME", soft_wrap=True)


def tried(paper: Paper, seed: int, *, root: str) -> Finding:
  """Runs the command of a paper, unless its results are there, and returns what came out."""
  experiment = importlib.import_module(f"experiments.{paper.experiment}")
  workdir = experiment.main(experiment.Config(seed=seed, **paper.flags), root=root)
  path = pathlib.Path(workdir) / RESULTS.get(paper.experiment, SUMMARY)
  return paper.found(schema.read(path))


def sentences(paper: Paper, finding: Finding) -> str:
  """Returns what a reader of the console is told."""
  verdict = "It holds here" if finding.agrees else "It does not hold here"
  beyond = f" {paper.beyond}" if paper.beyond else ""
  return f"\n{paper.source}\nClaim: {paper.claim}\n{verdict}: {finding.figure}.{beyond}"


def table(findings: dict[str, Finding]) -> str:
  """Returns a table in Markdown, with a row for each paper."""
  rows = ["| name | paper | claim | holds here | what comes out | command |", "|" + "---|" * 6]
  for name, finding in findings.items():
    paper = PAPERS[name]
    cells = (
      f"`{name}`",
      paper.source,
      paper.claim,
      "yes" if finding.agrees else "**no**",
      f"{finding.figure}. {paper.beyond}".strip(),
      f"`{paper.command}`",
    )
    rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
  return "\n".join(rows) + "\n"


if __name__ == "__main__":
  common.launch(main, Config, argument="name")
