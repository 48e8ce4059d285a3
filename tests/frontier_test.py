"""What a sweep reads from the folders of its members: the frontier, and who is best on it."""

import json

import pytest

from klrl import population
from klrl.errors import UserError
from klrl.report import frontier


def test_pareto_optimal_members_are_marked():
  def record(gold, kl, diverged_at=None):
    return {"gold": gold, "kl_ref_exact": kl, "diverged_at": diverged_at}

  records = [record(0.5, 1), record(0.6, 1), record(0.6, 2), record(0.7, 3), record(0.9, 0, 4)]
  marks = [frontier._is_pareto(x, records, "gold") for x in records]
  assert marks == [False, True, False, True, False]
  unmeasured = [record(0.5, None), record(0.6, None), record(None, 1)]
  assert not any(frontier._is_pareto(x, unmeasured, "gold") for x in unmeasured)


def write_member(workdir, name, values, **summary):
  """Leaves what `frontier` reads of a finished member; without a summary, of one that is not."""
  folder = workdir / "members" / name
  folder.mkdir(parents=True)
  settings = {"beta": 0.5, "learning_rate": 1e-3, "num_epochs": 2, "seed": 0, **values}
  (folder / "config.json").write_text(json.dumps({"experiment": "ppo", **settings}))
  if summary:
    measured = {"gold_before": 0.5, "score_before": 0.0, "diverged_at": None}
    (folder / "summary.json").write_text(json.dumps(measured | summary))
  return population.Member(name, values, None)


def test_the_frontier_has_all_members_of_the_folder(tmp_path):
  def finished(gold, kl):
    return {"gold_after": gold, "kl_ref_exact": kl, "kl_ref_exact_after": kl}

  def members(name, *points):
    return [
      write_member(tmp_path, f"{name}={x:g},seed=0", {name: x}, **finished(gold, kl))
      for x, gold, kl in points
    ]

  members("learning_rate", (0.001, 0.8, 1.0), (0.01, 0.6, 2.0))
  write_member(tmp_path, "learning_rate=0.1,seed=0", {"learning_rate": 0.1})
  present = members("beta", (2.0, 0.7, 0.5), (0.5, 0.7, 1.0))
  found = frontier.frontier(tmp_path, present)
  assert [list(record["values"].items()) for record in found["members"]] == [
    [("beta", 0.5), ("learning_rate", 0.001), ("seed", 0)],
    [("beta", 0.5), ("learning_rate", 0.01), ("seed", 0)],
    [("beta", 2.0), ("learning_rate", 0.001), ("seed", 0)],
  ]
  # Of two with the same values that of the present command counts.
  assert found["members"][0]["name"] == "beta=0.5,seed=0"
  assert [record["pareto"] for record in found["members"]] == [False, False, True]


@pytest.mark.parametrize(
  ("file", "content", "words"),
  [
    ("config.json", "{", "is not JSON"),
    ("config.json", "{}", "has no beta"),
    ("config.json", '{"beta": [1], "seed": 0}', "beta is"),
    ("summary.json", '{"score_after": 1', "is not JSON"),
    ("summary.json", '{"score_after": "x", "diverged_at": null}', "score_after is 'x'"),
    ("summary.json", "{}", "has no diverged_at"),
  ],
)
def test_a_damaged_file_of_a_member_is_named(tmp_path, file, content, words):
  member = write_member(tmp_path, "beta=1,seed=0", {"beta": 1.0}, gold_after=1.0)
  (tmp_path / "members/beta=1,seed=0" / file).write_text(content)
  with pytest.raises(UserError, match=rf"beta=1,seed=0/{file}.*{words}"):
    frontier.frontier(tmp_path, [member])


def test_of_an_enumerated_task_exact_figures_are_compared(tmp_path):
  sampled = {"gold_after": None, "gold_before": None}
  exact = {"objective_gap": 0.1, "tv_to_optimum": 0.2}
  members = [
    write_member(
      tmp_path, f"beta={i},seed=0", {"beta": float(i)},
      score_after=score, score_after_stderr=0.1, kl_ref_exact_after=1.0, kl_ref_exact_stderr=0.1,
      exact_score=exact_score, exact_kl=2.0, **exact, **sampled,
    )
    for i, (score, exact_score) in enumerate([(1.0, 1.0), (2.0, 0.5)])
  ]  # fmt: skip
  found = frontier.frontier(tmp_path, members)["members"]
  assert [record["pareto"] for record in found] == [True, False]
  assert [record["score"] for record in found] == [1.0, 0.5]
  assert found[0]["kl_ref_exact"] == 2.0 and found[0]["score_stderr"] is None
  assert found[0]["objective_gap"] == 0.1 and found[0]["tv_to_optimum"] == 0.2
