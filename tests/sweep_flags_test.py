"""Every flag of a sweep reaches its members or changes how they run; no experiment is unwalked."""

import dataclasses
import pathlib

import flag_walk_lab_test
import flag_walk_test
import pytest

from experiments import sweep as experiment
from klrl.errors import UserError
from klrl.run.workdir import NOT_PART_OF_THE_RESULT

ROOT = pathlib.Path(__file__).parents[1]
# What a member does not have as the sweep has it: its folder, and its part of the mesh.
OF_THE_SWEEP = ("workdir", "mesh", "dry_run", "topology")
WALK = [
  (name, field)
  for name in experiment.EXPERIMENTS
  for field in flag_walk_test.fields_of(name)
  if field not in OF_THE_SWEEP
]


def make_config(name, **settings):
  return experiment.config_class(name)(**settings)


@pytest.mark.parametrize(("name", "field"), WALK)
def test_every_member_has_what_the_sweep_was_given(name, field):
  case = flag_walk_test.CASES[name][field]
  settings = flag_walk_test.settings_of(name, case.given) | {"mesh": "", field: case.value}
  grid = "max_grad_norm=3,4" if field != "max_grad_norm" else "learning_rate=3,4"
  try:
    members = experiment.members_of(make_config(name, sweep=grid, **settings))
  except UserError as error:
    # What a run refuses a sweep refuses.
    with pytest.raises(UserError) as refused:
      experiment.EXPERIMENTS[name].Config(**settings)
    assert str(refused.value) in str(error)
    return
  assert [getattr(member.config, field) for member in members] == [case.value] * 2


OWN = {
  "experiment": "grpo",
  "sweep": "beta=0.1,0.4",
  "seeds": 3,
  "members_per_batch": 2,
  "best_of_n": False,
  "mesh": "sweep=2",
  "seed": 1,
  "workdir": "elsewhere",
  "dry_run": True,
}


def test_the_cases_are_all_flags_of_a_sweep_that_members_do_not_have():
  own = {field.name for field in dataclasses.fields(experiment.SweepConfig)}
  # The first is read in a dry run alone, the second before anything else.
  assert own | set(OF_THE_SWEEP) == set(OWN) | {"topology", "compilation_cache"}
  assert {"workdir", "dry_run", "topology", "sweep", "seeds"} <= set(NOT_PART_OF_THE_RESULT)


@pytest.mark.parametrize("field", OWN)
def test_a_changed_flag_of_the_sweep_changes_how_it_is_run(field, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  calls, drawn = [], []

  def run(*arguments, **more):
    calls.append((arguments, more))

  monkeypatch.setattr(experiment.population, "train_members", run)
  monkeypatch.setattr(experiment.best_of_n, "main", lambda *args, **more: drawn.append(args))
  monkeypatch.setattr(experiment, "_dry_run", lambda *args: calls.append("dry run"))
  monkeypatch.setattr(experiment, "show_frontier", lambda found: None)
  monkeypatch.setattr(
    experiment, "write_page", lambda workdir, *, best_of_n=False: drawn.append(best_of_n)
  )

  def call(**settings):
    name = settings.get("experiment", "ppo")
    drawn.clear()
    experiment.main(make_config(name, **{"sweep": "beta=0.1,0.3", **settings}))
    if calls[-1] == "dry run":
      return "dry run"
    (workdir, members, _), more = calls[-1]
    # The folder's default name changes with almost everything.
    named = workdir if field == "workdir" else None
    return named, members, more, len(drawn), drawn[-1]

  assert call() == call()
  assert call() != call(**{field: OWN[field]})


def test_no_experiment_is_left_out_of_the_walks():
  runnable = {
    path.stem
    for path in (ROOT / "experiments").glob("*.py")
    if 'if __name__ == "__main__"' in path.read_text()
  }
  walked = flag_walk_test.EXPERIMENTS.keys() | flag_walk_lab_test.EXPERIMENTS.keys()
  assert runnable == walked | {"sweep"}
