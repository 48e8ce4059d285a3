"""Trackers get every figure once, in order, and none of them ends a run."""

import glob
import json
import pathlib
import sys
import time
import types

import jax.numpy as jnp
import pytest

from experiments import ppo
from experiments.settings import common
from klrl.errors import UserError
from klrl.run import loop, trackers
from klrl.run.evaluations import Evaluations
from klrl.run.trackers import Kind, Tracker


def step(state, iteration):
  pairs = {"score/mean": (10.0 * iteration, 1.0), "kl/ref_exact": (0.0, 0.0)}
  return {"done": state["done"] + 1}, pairs


def run(workdir, *, num_iterations=5, stop_at=None, total=5, **settings):
  """Runs iterations with a checkpoint every second; `stop_at` is the last one that is begun."""
  workdir.mkdir(exist_ok=True)
  start, state = loop.restore_or_init(workdir, {"done": jnp.int32(0)}, keep=2)
  evaluations = Evaluations(
    workdir,
    lambda state: {"gold": float(state["done"]), "nll": None},
    every=2,
    num_iterations=total,
  )

  def killing(state, iteration):
    if iteration == stop_at:
      raise SystemExit("killed")
    return step(state, iteration)

  return list(
    loop.iterate(
      killing, state, start=start, num_iterations=num_iterations, workdir=workdir, save_every=2,
      keep=2, evaluations=evaluations, **settings,
    )
  )  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
  """Lets a tracker write down what it is told; returns that, and the calls that shall fail."""
  told, failing = [], set()

  def maybe_fail(call):
    if call in failing:
      raise RuntimeError(f"no {call} today\nwith a second line")

  def opened(workdir, setting, start):
    maybe_fail("open")
    told.append(("open", workdir.name, setting, start))

    def log(step, figures):
      maybe_fail("log")
      told.append((step, figures))

    def close():
      told.append("close")
      maybe_fail("close")

    return Tracker(log, close)

  monkeypatch.setitem(trackers.TRACKERS, "wandb_project", Kind("json", "json", opened))
  return told, failing


def test_a_tracker_gets_iterations_and_evaluations_by_the_names_of_the_files(tmp_path, fake):
  run(tmp_path / "run", wandb_project="mine")
  told, _ = fake
  assert told[0] == ("open", "run", "mine", 0) and told[-1] == "close"
  assert told[1:-1] == [
    (0, {"score/mean": 0.0, "evaluation/gold": 0.0}),
    (1, {"score/mean": 10.0}),
    (2, {"score/mean": 20.0, "evaluation/gold": 2.0}),
    (3, {"score/mean": 30.0}),
    (4, {"score/mean": 40.0, "evaluation/gold": 4.0}),
    (5, {"evaluation/gold": 5.0}),
  ]


@pytest.mark.parametrize("call", ["open", "log", "close"])
def test_a_tracker_that_fails_is_told_once_and_ends_nothing(tmp_path, fake, call, capsys):
  told, failing = fake
  failing.add(call)
  assert len(run(tmp_path / "run", wandb_project="mine")) == 5
  assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 5
  said = " ".join(capsys.readouterr().out.split())
  assert said.count("--wandb_project failed and is left out") == 1
  assert f"no {call} today All figures are in metrics.jsonl" in said
  assert ("close" in told) == (call == "close")


def test_a_run_that_stops_half_way_sends_its_evaluation_when_it_goes_on(tmp_path, fake):
  told, _ = fake
  with pytest.raises(SystemExit):
    run(tmp_path / "run", wandb_project="mine", stop_at=4)
  assert told[-2:] == [(3, {"score/mean": 30.0}), "close"]
  told.clear()
  run(tmp_path / "run", wandb_project="mine")
  assert told[:2] == [
    ("open", "run", "mine", 4),
    (4, {"score/mean": 40.0, "evaluation/gold": 4.0}),
  ]


@pytest.mark.parametrize(
  ("package", "settings", "extra"),
  [
    ("tensorboardX", {"tensorboard": True}, "tensorboard"),
    ("wandb", {"wandb_project": "x"}, "wandb"),
  ],
)
def test_a_package_that_is_not_there_is_told_before_anything_runs(
  monkeypatch, package, settings, extra
):
  monkeypatch.setitem(sys.modules, package, None)
  (name,) = settings
  with pytest.raises(UserError, match=rf"--{name} needs: pip install 'klrl\[{extra}\]'"):
    common.check_machine(ppo.Config(**settings))


def test_tensorboard_writes_again_what_came_after_the_checkpoint(tmp_path, monkeypatch):
  told = []

  class SummaryWriter:
    def __init__(self, directory, purge_step):
      told.append((directory, purge_step))

    def add_scalar(self, *arguments):
      told.append(arguments)

    def close(self):
      told.append("closed")

  module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
  monkeypatch.setitem(sys.modules, "tensorboardX", module)
  with pytest.raises(SystemExit):
    run(tmp_path / "run", tensorboard=True, stop_at=3)
  assert told[0] == (str(tmp_path / "run/tensorboard"), None) and told[-1] == "closed"
  told.clear()
  run(tmp_path / "run", tensorboard=True)
  assert told[:3] == [
    (str(tmp_path / "run/tensorboard"), 2),
    ("score/mean", 20.0, 2),
    ("evaluation/gold", 2.0, 2),
  ]


def test_tensorboard_itself_writes_into_the_folder_of_the_run(tmp_path):
  pytest.importorskip("tensorboardX")
  run(tmp_path / "run", tensorboard=True)
  (path,) = (tmp_path / "run/tensorboard").iterdir()
  content = path.read_bytes()
  assert b"score/mean" in content and b"evaluation/gold" in content


class FakeWandb:
  """What is used of the package, which keeps steps as the service does."""

  def __init__(self):
    self.runs, self.calls = {}, []

  def init(self, *, id, **settings):
    self.calls.append(settings)
    history = self.runs.setdefault(id, [])

    def log(figures, *, step):
      assert not history or step > history[-1][0], "a step went backwards"
      history.append((step, dict(figures)))

    next_step = history[-1][0] + 1 if history else 0
    return types.SimpleNamespace(step=next_step, log=log, finish=lambda: None)

  @staticmethod
  def Settings(**settings):
    return settings


def test_wandb_goes_on_with_the_same_run_and_no_step_goes_back(tmp_path, monkeypatch, capsys):
  service = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", service)
  for stop_at in (3, 4, None):
    try:
      run(tmp_path / "run", wandb_project="mine", stop_at=stop_at)
    except SystemExit:
      assert stop_at
  assert "failed" not in capsys.readouterr().out
  (history,) = service.runs.values()
  assert [step for step, _ in history] == [0, 1, 2, 3, 4, 5]
  assert history[4] == (4, {"score/mean": 40.0, "evaluation/gold": 4.0})
  assert {call["dir"] for call in service.calls} == {str(tmp_path / "run")}
  assert {call["resume"] for call in service.calls} == {"allow"}
  # Another folder is another run.
  run(tmp_path / "other", wandb_project="mine")
  assert len(service.runs) == 2


def test_a_damaged_memory_of_wandb_ends_no_run(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
  (tmp_path / "run/wandb").mkdir(parents=True)
  (tmp_path / "run/wandb/klrl.json").write_text('{"id": 7}')
  assert len(run(tmp_path / "run", wandb_project="mine")) == 5
  assert "klrl.json" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # of the package, on whatever Python
def test_wandb_offline_keeps_all_in_the_folder_of_the_run(tmp_path, monkeypatch, capsys):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.chdir(tmp_path)
  (tmp_path / "run").mkdir()
  (tmp_path / "run/config.json").write_text(json.dumps({"experiment": "ppo", "beta": 0.5}))
  with pytest.raises(SystemExit):
    run(tmp_path / "run", wandb_project="mine", stop_at=3)
  time.sleep(1.1)  # Its folders are named by the second.
  run(tmp_path / "run", wandb_project="mine")
  known = json.loads((tmp_path / "run/wandb/klrl.json").read_text())
  assert known["next"] == 6
  found = glob.glob(f"{tmp_path}/run/wandb/offline-run-*-{known['id']}/*.wandb")
  assert len(found) == 2  # Two commands, one run.
  assert [path.name for path in tmp_path.iterdir()] == ["run"]
  assert any(b"evaluation/gold" in pathlib.Path(path).read_bytes() for path in found)
  assert "failed" not in capsys.readouterr().out
