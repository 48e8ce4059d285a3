"""What a run writes of the policy while it trains: each line once, and the best model whole."""

import json
import os
import pathlib
import shutil
import signal

import jax
import jax.numpy as jnp
import pytest

from klrl.errors import UserError
from klrl.run import evaluations, loop
from klrl.run.evaluations import Evaluations, cadence

# What the judge says after so many iterations; the best gold score is not the last.
GOLD = {0: 0.1, 2: 0.5, 4: 0.9, 6: 0.3, 7: 0.2}


def step(state, iteration):
  key, noise = jax.random.split(state["key"])
  x = state["x"] + jax.random.normal(noise)
  return {"key": key, "x": x, "done": state["done"] + 1}, {"score/mean": (x, 1.0)}


def fresh_state():
  return {"key": jax.random.key(0), "x": jnp.float32(0), "done": jnp.int32(0)}


def evaluate(state):
  gold = GOLD[int(state["done"])]
  return {"gold": gold, "gold_stderr": 0.01, "x": float(state["x"]), "nll": float("nan")}


def save(directory, state):
  directory.mkdir(parents=True)
  (directory / "weights").write_text(str(float(state["x"])))


def run(workdir, *, evaluate=evaluate, save=save, step=step, save_every=3, every=2, **changes):
  workdir.mkdir(exist_ok=True)
  start, state = loop.restore_or_init(workdir, fresh_state(), keep=2)
  settings = {"num_iterations": 7, "workdir": workdir, **changes}
  judged = Evaluations(
    workdir, evaluate, every=every, num_iterations=7, keep_best="gold" if every else "", save=save
  )
  return list(
    loop.iterate(
      step, state, start=start, save_every=save_every, keep=2, evaluations=judged, **settings
    )
  )


def lines_of(workdir):
  return [json.loads(line) for line in (workdir / evaluations.FILE).read_text().splitlines()]


def files_of(workdir):
  """Returns what may not depend on how often a run was stopped."""
  paths = [workdir / "metrics.jsonl", workdir / evaluations.FILE]
  paths += sorted(path for path in (workdir / evaluations.BEST).rglob("*") if path.is_file())
  return {str(path.relative_to(workdir)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("evaluated") / "run"
  run(workdir)
  return workdir


def test_a_policy_is_evaluated_at_the_start_at_the_cadence_and_at_the_end(whole):
  lines = lines_of(whole)
  assert [line["iteration"] for line in lines] == [0, 2, 4, 6, 7]
  assert [line["gold"] for line in lines] == list(GOLD.values())
  assert lines[0]["nll"] is None  # What is not finite is no figure.


def test_the_best_model_stays_though_the_run_goes_on(whole):
  best = evaluations.read_best(whole)
  assert best["iteration"] == 4 and best["gold"] == 0.9
  assert float((whole / "model_best/weights").read_text()) == lines_of(whole)[2]["x"]
  assert evaluations.best_figures(whole, "gold") == {
    "best_iteration": 4, "gold_best": 0.9, "gold_best_stderr": 0.01,
  }  # fmt: skip
  assert not [path for path in whole.iterdir() if path.name.startswith("model_best.")]


def test_evaluations_change_nothing_in_the_metrics(whole, tmp_path):
  run(tmp_path / "run", every=0)
  metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
  assert metrics == (whole / "metrics.jsonl").read_bytes()
  assert not (tmp_path / "run" / evaluations.FILE).exists()


def test_the_time_of_an_evaluation_is_not_that_of_an_iteration(whole):
  timing = [json.loads(line) for line in (whole / "timing.jsonl").read_text().splitlines()]
  # It stands with the iteration that follows; none follows the last.
  assert ["evaluation_seconds" in line for line in timing] == [True, False] * 3 + [True]
  assert timing[-1]["elapsed_seconds"] == pytest.approx(
    sum(line["seconds"] for line in timing), abs=1e-5
  )


class Killed(BaseException):
  """Ends a run as no handler of ours does."""


@pytest.mark.parametrize("at", GOLD)
@pytest.mark.parametrize("where", ["evaluate", "save", "after saving"])
def test_a_run_killed_in_an_evaluation_writes_the_same_in_the_end(whole, tmp_path, where, at):
  killed = []

  def kill(state, here):
    if here == where and int(state["done"]) == at and not killed:
      killed.append(at)
      raise Killed

  def evaluate_or_die(state):
    kill(state, "evaluate")
    return evaluate(state)

  def save_or_die(directory, state):
    directory.mkdir(parents=True)
    (directory / "weights").write_text("half")
    kill(state, "save")
    shutil.rmtree(directory)
    save(directory, state)
    kill(state, "after saving")

  chances = {"evaluate_or_die": evaluate_or_die, "save_or_die": save_or_die}
  settings = {"evaluate": chances["evaluate_or_die"], "save": chances["save_or_die"]}
  if where == "evaluate" or at in (0, 2, 4):  # The others save nothing.
    with pytest.raises(Killed):
      run(tmp_path / "run", **settings)
    assert at in (0, 2) or evaluations.read_best(tmp_path / "run")["iteration"] >= 2
  run(tmp_path / "run", **settings)
  assert files_of(tmp_path / "run") == files_of(whole)


@pytest.mark.parametrize("moment", ["old is aside", "new is there"])
def test_an_exchange_of_models_that_was_broken_off_loses_neither(tmp_path, moment):
  best, old, fresh = (tmp_path / f"model_best{suffix}" for suffix in ("", ".old", ".partial"))
  for folder, iteration in ((old, 2), (fresh if moment == "old is aside" else best, 4)):
    folder.mkdir()
    (folder / evaluations.RECORD).write_text(json.dumps({"iteration": iteration, "gold": 0.5}))
  Evaluations(tmp_path, evaluate, every=2, num_iterations=7, keep_best="gold", save=save).resume(4)
  assert evaluations.read_best(tmp_path)["iteration"] == 4
  assert not old.exists() and not fresh.exists()


def test_a_half_written_model_is_not_taken_for_the_best(tmp_path):
  (tmp_path / "model_best.partial").mkdir()
  judged = Evaluations(tmp_path, evaluate, every=2, num_iterations=7, keep_best="gold", save=save)
  judged.resume(0)
  assert evaluations.read_best(tmp_path) is None
  assert not (tmp_path / "model_best.partial").exists()


def test_ctrl_c_in_an_evaluation_stops_after_it_with_everything_saved(whole, tmp_path):
  def interrupted(state):
    if int(state["done"]) == 4:
      os.kill(os.getpid(), signal.SIGINT)
    return evaluate(state)

  with pytest.raises(loop.Interrupted, match="Stopped after iteration 4 of 7"):
    run(tmp_path / "run", evaluate=interrupted)
  assert [line["iteration"] for line in lines_of(tmp_path / "run")] == [0, 2, 4]
  assert len(run(tmp_path / "run")) == 3
  assert files_of(tmp_path / "run") == files_of(whole)


def test_an_evaluation_that_fails_loses_no_iteration(tmp_path, whole):
  def failing(state):
    if int(state["done"]) == 2:
      raise UserError("The server is gone.")
    return evaluate(state)

  message = r"evaluation after iteration 2: The server is gone\. The state after iteration 2 is sav"
  with pytest.raises(UserError, match=message):
    run(tmp_path / "run", evaluate=failing)
  assert len(run(tmp_path / "run")) == 5
  assert files_of(tmp_path / "run") == files_of(whole)


def test_damaged_lines_are_told_and_those_of_later_iterations_are_dropped(tmp_path, capsys):
  path = tmp_path / evaluations.FILE
  lines = [f'{{"iteration": {i}, "gold": 0.5}}\n' for i in (0, 2, 2, 4, 6)]
  path.write_text("".join([*lines, "garbage\n", '{"iter']))
  judged = Evaluations(tmp_path, evaluate, every=2, num_iterations=7)
  judged.resume(4)
  assert [line["iteration"] for line in lines_of(tmp_path)] == [0, 2, 4]
  said = " ".join(capsys.readouterr().out.split())
  assert "evaluations.jsonl should have one record" in said
  assert "1 broken, 1 there twice" in said
  assert judged.after(4, None) == {"gold": 0.5}  # It is not made again.


def test_a_damaged_record_of_the_best_model_is_one_message(tmp_path):
  (tmp_path / evaluations.BEST).mkdir()
  (tmp_path / evaluations.BEST / evaluations.RECORD).write_text('{"iteration": "x"}')
  with pytest.raises(UserError, match=r"evaluation\.json"):
    evaluations.read_best(tmp_path)
  assert evaluations.best_figures(pathlib.Path(tmp_path), "") == {}


def test_a_run_whose_evaluations_have_no_such_figure_says_that_no_model_was_kept(tmp_path, capsys):
  run(tmp_path / "run", evaluate=lambda state: {"gold": None})
  assert not (tmp_path / "run" / evaluations.BEST).exists()
  assert evaluations.best_figures(tmp_path / "run", "gold") == {}
  said = " ".join(capsys.readouterr().out.split())
  assert "--keep_best=gold: no evaluation had a gold, so no model is kept in model_best." in said


def test_about_ten_evaluations_are_made_in_a_run():
  assert [cadence(-1, n) for n in (1, 4, 10, 80, 95)] == [1, 1, 1, 8, 10]
  assert cadence(0, 80) == 0 and cadence(3, 80) == 3
