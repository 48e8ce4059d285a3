"""The papers: what is said of the figures of runs, the command, and the page of the documentation.

What enumeration finds is in the tests of the experiments.
"""

import json
import pathlib

import pytest

from experiments import paper
from experiments.lab.papers import PAPERS, RESULTS
from klrl.errors import UserError
from klrl.figures import KL

PAGE = pathlib.Path(__file__).parents[1] / "docs/papers.md"


def anchors(**kls):
  """Returns results of kl_directions from the last KL and the local KL of each run."""
  return {
    "anchors": [
      {"name": name, f"{KL}_after": last, "curves": {"kl/old_k3": [0.0, old]}}
      for name, (last, old) in kls.items()
    ]
  }


def runs(**changes):
  kls = {"global": (0.3, 0.5), "local KL(old||new)": (1.2, 0.1), "none": (3.0, 0.6)}
  kls["global and local KL(old||new)"] = 0.2, 0.1
  return anchors(**(kls | changes))


def rows(*pairs):
  return {
    "rows": [{"n": n, "score": n, "gold": gold} for n, gold in pairs],
    "bandit": [{"n": n, "kl": kl, "kl_bound": 0.5} for n, kl in pairs],
  }


def samplers(**kls):
  return {
    "rows": [
      {"sampler_dtype": dtype, "sampler_correction": correction, "kl": [0.0, kl], "gold": 0.8}
      for dtype, kl in kls.items()
      for correction in ("none", "token")
    ]
  }


CASES = {
  "float16_2025": (
    samplers(float32=0.0, bfloat16=0.3, float16=0.001),
    samplers(float32=0.0, bfloat16=0.3, float16=0.2),
  ),
  "instruct_gpt_2022": (runs(), runs(**{"local KL(old||new)": (0.1, 0.1)})),
  "ppo_2017": (runs(), runs(none=(3.0, 0.05))),
  "gao_2022": (rows((1, 0.5), (4, 0.8), (64, 0.6)), rows((1, 0.5), (4, 0.6), (64, 0.8))),
  "beirami_2024": (rows((1, 0.0), (4, 0.4)), rows((1, 0.0), (4, 0.6))),
  "rafailov_2023": (
    {"gold_before": 0.5, "gold_after": 0.8, f"{KL}_after": 0.4},
    {"gold_before": 0.5, "gold_after": 0.4, f"{KL}_after": 0.4},
  ),
  "agarwal_2024": (
    {f"{KL}_before": 0.9, f"{KL}_after": 0.02},
    {f"{KL}_before": 0.9, f"{KL}_after": 0.8},
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_claim_holds_or_not_by_the_figures_of_runs(name):
  for results, agrees in zip(CASES[name], (True, False), strict=True):
    found = PAPERS[name].found(results)
    assert found.agrees == agrees and found.figure


def test_a_paper_is_tried_by_its_command_and_told(tmp_path, monkeypatch, capsys):
  def main(config, *, root):
    folder = tmp_path / "found"
    folder.mkdir(exist_ok=True)
    (folder / RESULTS["best_of_n"]).write_text(json.dumps(CASES["gao_2022"][0]))
    return folder

  monkeypatch.setattr("experiments.best_of_n.main", main)
  workdir = paper.main(paper.Config(name="gao_2022", workdir=str(tmp_path / "papers")))
  (row,) = (workdir / "papers.md").read_text().splitlines()[2:]
  assert "| yes | gold accuracy is 50% at n = 1, 80% at n = 4 and 60% at n = 64" in row
  assert "`python -m experiments.best_of_n`" in row
  assert "It holds here: gold accuracy is 50%" in capsys.readouterr().out


def test_papers_are_listed_and_a_wrong_name_is_told(capsys):
  assert paper.main(paper.Config()) is None
  listed = capsys.readouterr().out
  assert all(name in listed for name in PAPERS)
  with pytest.raises(UserError, match=r"No paper is called comedy\. Do you mean comedy_2025\?"):
    paper.Config(name="comedy")


def test_the_page_has_every_paper_with_its_claim_and_its_command():
  table = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
  cells = [[cell.strip().replace("\\|", "|") for cell in row.split(" | ")] for row in table]
  assert [row[0].strip("| `") for row in cells] == list(PAPERS)
  for row, one in zip(cells, PAPERS.values(), strict=True):
    assert row[1:3] == [one.source, one.claim]
    assert row[5].strip("`| ") == one.command
    assert row[4].endswith(one.beyond or ".")
