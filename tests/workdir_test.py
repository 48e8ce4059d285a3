"""Tests of a run's folder: which configuration it holds, and the summary of a run."""

import contextlib
import dataclasses
import json

import pytest

from experiments import best_of_n, ppo, sft
from klrl.errors import UserError
from klrl.run import lock, summary
from klrl.run.metrics import append_line
from klrl.run.workdir import (
  NOT_PART_OF_THE_RESULT,
  config_hash,
  create_workdir,
  find_workdir,
  write_text,
)


def open_workdir(experiment, config, *, root="runs"):
  """What an experiment does on its way to its first iteration."""
  directory = find_workdir(experiment, config, root=root)
  create_workdir(directory, experiment, config)
  return directory


def begin(directory):
  (directory / "anything.json").write_text("{}")


def test_default_folder_is_named_by_the_configuration(tmp_path):
  config = ppo.Config(seed=3)
  directory = open_workdir("ppo", config, root=str(tmp_path / "runs"))
  assert directory == tmp_path / "runs" / f"ppo-{config_hash(config)}"
  assert len(config_hash(config)) == 8
  assert json.loads((directory / "config.json").read_text()) == {
    "experiment": "ppo",
    **dataclasses.asdict(config),
  }


def test_the_same_configuration_goes_on_in_its_folder(tmp_path):
  workdir = str(tmp_path / "run")
  directory = open_workdir("ppo", ppo.Config(workdir=workdir, save_every=10))
  (directory / "metrics.jsonl").write_text("kept")
  assert open_workdir("ppo", ppo.Config(workdir=workdir, save_every=20)) == directory
  assert (directory / "metrics.jsonl").read_text() == "kept"
  assert json.loads((directory / "config.json").read_text())["save_every"] == 20
  assert "--save_every=20\n" in (directory / "flags.txt").read_text()


def test_another_configuration_is_refused_and_every_field_named(tmp_path):
  workdir = str(tmp_path)
  begin(open_workdir("ppo", ppo.Config(workdir=workdir, beta=0.1)))
  before = (tmp_path / "config.json").read_bytes()
  message = r"another configuration: beta is 0\.1 there and 0\.7 here; seed is 0 there and 1 here\."
  with pytest.raises(UserError, match=message):
    open_workdir("ppo", ppo.Config(workdir=workdir, beta=0.7, seed=1, keep=9))
  with pytest.raises(UserError, match="experiment is 'ppo' there and 'sft' here"):
    open_workdir("sft", sft.Config(workdir=workdir))
  assert (tmp_path / "config.json").read_bytes() == before


def test_a_run_that_never_began_does_not_hold_its_folder(tmp_path):
  open_workdir("ppo", ppo.Config(workdir=str(tmp_path), beta=0.1))
  open_workdir("ppo", ppo.Config(workdir=str(tmp_path), beta=0.7))
  assert json.loads((tmp_path / "config.json").read_text())["beta"] == 0.7


def test_nor_does_one_that_saved_nothing(tmp_path):
  directory = open_workdir("ppo", ppo.Config(workdir=str(tmp_path / "run")))
  (directory / "checkpoints").mkdir()
  open_workdir("ppo", ppo.Config(beta=0.7, workdir=str(directory)))
  (directory / "checkpoints/2").mkdir()
  with pytest.raises(UserError, match="another configuration"):
    find_workdir("ppo", ppo.Config(workdir=str(directory)))


def test_finding_a_folder_writes_nothing(tmp_path):
  assert not find_workdir("ppo", ppo.Config(workdir=str(tmp_path / "new"))).exists()


def test_a_field_that_was_added_since_is_named(tmp_path):
  config = ppo.Config(workdir=str(tmp_path), beta=0.7)
  begin(open_workdir("ppo", config))
  record = json.loads((tmp_path / "config.json").read_text())
  del record["beta"]
  (tmp_path / "config.json").write_text(json.dumps(record | {"removed": 1}))
  with pytest.raises(UserError, match=r"beta is None there and 0\.7.*removed is 1 there and None"):
    open_workdir("ppo", config)


def test_a_place_that_holds_something_else_is_refused(tmp_path):
  (tmp_path / "thesis.tex").write_text("precious")
  for workdir in (tmp_path, tmp_path / "thesis.tex"):
    with pytest.raises(UserError, match="is no empty folder and holds no run"):
      open_workdir("ppo", ppo.Config(workdir=str(workdir)))
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
  (tmp_path / "empty").mkdir()
  open_workdir("ppo", ppo.Config(workdir=str(tmp_path / "empty")))


def test_the_folder_of_a_model_is_refused_and_left_as_it_is(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  with pytest.raises(UserError, match="holds no run"):
    find_workdir("ppo", ppo.Config(workdir=str(tmp_path)))
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(UserError, match="holds no run"):
    find_workdir("ppo", ppo.Config(workdir=str(tmp_path)))


@pytest.mark.parametrize("left", [".shared-f10f49f4", "config.json.partial", ".lock"])
def test_what_a_killed_command_left_blocks_no_folder(tmp_path, left):
  (tmp_path / left).touch()
  open_workdir("ppo", ppo.Config(workdir=str(tmp_path)))
  (tmp_path / left).touch()
  open_workdir("ppo", ppo.Config(workdir=str(tmp_path), beta=0.7))  # It has not begun.
  assert not list(tmp_path.glob(".shared-*")) and not list(tmp_path.glob("*.partial"))


def test_a_rollout_that_waits_for_its_scores_stays(tmp_path):
  config = ppo.Config(workdir=str(tmp_path))
  begin(open_workdir("ppo", config))
  (tmp_path / "rollout-3.npz").touch()
  open_workdir("ppo", config)
  assert (tmp_path / "rollout-3.npz").exists()


def test_a_command_that_is_killed_while_it_makes_its_folder_can_be_given_again(
  tmp_path, monkeypatch
):
  written = []

  def killed(path, text):
    if len(written) == at:
      raise KeyboardInterrupt
    written.append(path)
    write_text(path, text)

  for at in range(3):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
      patched.setattr("klrl.run.workdir.write_text", killed)
      open_workdir("ppo", ppo.Config(workdir=str(tmp_path / str(at))))
    assert len(written) == at
    written.clear()
    open_workdir("ppo", ppo.Config(workdir=str(tmp_path / str(at))))


@pytest.mark.parametrize("content", [None, b"", b"{", b"\0" * 9, b"[" * 10**5])
def test_a_run_without_its_configuration_is_named(tmp_path, content):
  config = ppo.Config(workdir=str(tmp_path))
  (open_workdir("ppo", config) / "metrics.jsonl").touch()
  (tmp_path / "config.json").unlink()
  if content is not None:
    (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(UserError, match=r"holds a run, but its config\.json is missing or damaged"):
    find_workdir("ppo", config)


@pytest.mark.parametrize("module", [ppo, sft, best_of_n])
def test_edited_inputs_are_refused_unless_a_flag_accepts_them(tmp_path, module):
  (tmp_path / "p.jsonl").write_text("prompts")
  name = "data" if module is sft else "prompts"
  reward = {} if module is sft else {"reward": "math"}
  settings = {name: str(tmp_path / "p.jsonl"), "policy": "policy", **reward}
  config = module.Config(workdir=str(tmp_path / "run"), **settings)
  (open_workdir("x", config) / "metrics.jsonl").touch()
  (tmp_path / "p.jsonl").write_text("other prompts")
  with pytest.raises(UserError, match=r"p\.jsonl is not what it was"):
    open_workdir("x", config)
  open_workdir("x", dataclasses.replace(config, accept_changed_inputs=True))


def test_a_folder_is_found_wherever_the_program_goes(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert find_workdir("ppo", ppo.Config(workdir="run")) == tmp_path / "run"


def begun(tmp_path, *, learning_rate_schedule="constant", **settings):
  config = ppo.Config(
    workdir=str(tmp_path),
    num_iterations=12,
    learning_rate_schedule=learning_rate_schedule,
    **settings,
  )
  directory = open_workdir("ppo", config)
  (directory / "checkpoints/12").mkdir(parents=True)
  write_text(directory / "summary.json", '{"num_iterations": 12}')
  return config


def test_a_run_can_be_made_longer(tmp_path):
  def trained(config):
    return "trained" in summary.once(tmp_path, config, "PPO", lambda: {"trained": True})

  config = begun(tmp_path)
  assert not trained(config)
  longer = dataclasses.replace(config, num_iterations=20)
  open_workdir("ppo", longer)
  assert trained(longer)
  with pytest.raises(UserError, match="num_iterations is 20 there and 12 here"):
    find_workdir("ppo", config)
  with pytest.raises(UserError, match=r"beta is .*; num_iterations is"):
    find_workdir("ppo", dataclasses.replace(longer, num_iterations=30, beta=0.7))


@pytest.mark.parametrize(
  ("name", "value"), [("learning_rate_schedule", "cosine"), ("controller", "linear")]
)
def test_but_not_where_it_was_led_to_its_end(tmp_path, name, value):
  config = begun(tmp_path, **{name: value})
  with pytest.raises(UserError, match=f"--{name}={value} has led the run in .* after 12 iterat"):
    find_workdir("ppo", dataclasses.replace(config, num_iterations=20))


def test_nor_without_a_checkpoint_to_go_on_from(tmp_path):
  config = begun(tmp_path)
  (tmp_path / "checkpoints/12").rmdir()
  with pytest.raises(UserError, match="cannot be made longer, since"):
    find_workdir("ppo", dataclasses.replace(config, num_iterations=20))


def test_hash_follows_everything_that_can_change_a_result():
  base = config_hash(ppo.Config())
  for change in ({"seed": 1}, {"init_seed": 1}, {"beta": 0.7}, {"mesh": "data=1"}):
    assert config_hash(ppo.Config(**change)) != base, change
  free = {
    "workdir": "w",
    "save_every": 7,
    "keep": 7,
    "profile": True,
    "tensorboard": True,
    "wandb_project": "mine",
  }
  free |= {"dry_run": True, "topology": "v5e:2x2", "accept_changed_inputs": True}
  free |= {"compilation_cache": "none", "reward_timeout": 9.0, "reward_retries": 1}
  fields = {field.name for field in dataclasses.fields(ppo.Config)}
  assert set(free) == set(NOT_PART_OF_THE_RESULT) & fields
  own = {"reward": "reward.py:score"}
  assert config_hash(ppo.Config(**own, **free)) == config_hash(ppo.Config(**own))


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
  path = tmp_path / "a.json"
  write_text(path, "old")
  with pytest.raises(UnicodeEncodeError):
    write_text(path, "new \ud800")
  assert path.read_text() == "old"


def test_who_waits_for_another_that_trains_has_its_result(tmp_path, monkeypatch, capsys):
  @contextlib.contextmanager
  def held(directory, *, wait):
    assert wait == (not config.workdir)
    write_text(directory / "summary.json", '{"num_iterations": 12}')  # by the other
    yield

  monkeypatch.setattr(lock, "held", held)
  for workdir in ("", str(tmp_path)):
    config = ppo.Config(workdir=workdir, num_iterations=12)
    found = summary.once(tmp_path, config, "PPO", lambda: pytest.fail("trained twice"))
    assert found == {"num_iterations": 12}
    assert "PPO: finished before" in capsys.readouterr().out
    (tmp_path / "summary.json").unlink()


def test_summary_has_every_promised_figure_and_marks_the_run_as_finished(tmp_path):
  assert summary.read_summary(tmp_path) is None
  rates = [100.0, 30.0, 10.0, 20.0]  # The first one compiled: the median is of the others.
  for i, rate in enumerate(rates):
    append_line(
      tmp_path / "timing.jsonl",
      {"iteration": i, "elapsed_seconds": 2.0 * (i + 1), "tokens_per_second": rate},
    )
  written = summary.write_summary(tmp_path, {"score_after": 0.5, "extra": 1}, 4)
  assert summary.read_summary(tmp_path) == written
  expected = {"score_after": 0.5, "extra": 1, "score_before": None, "gold_after": None}
  expected |= {"kl_ref_k1": None, "kl_ref_exact_stderr": None}
  expected |= {"tokens_per_second": 20.0, "wall_seconds": 8.0, "num_iterations": 4}
  assert {name: written[name] for name in expected} == expected
  assert written["versions"]["jax"] and written["device"]


@pytest.mark.parametrize("value", ['"x"', "[1]", "{}", "1" + "0" * 400, "true"])
@pytest.mark.parametrize("name", ["score_before", "kl_ref_k1_after", "kl_ref_k1_stderr"])
def test_a_figure_that_is_no_number_is_named(tmp_path, name, value):
  (tmp_path / "summary.json").write_text(f'{{"{name}": {value}}}')
  with pytest.raises(UserError, match=rf"summary\.json: {name} is .*Remove it: the same command"):
    summary.read_summary(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"score_after": 0.', b"[]", b"\0", b"[" * 10**5])
def test_a_damaged_summary_is_named_with_what_to_do(tmp_path, content):
  (tmp_path / "summary.json").write_bytes(content)
  with pytest.raises(UserError, match=r"summary\.json.*Remove it: the same command"):
    summary.read_summary(tmp_path)


def test_a_summary_that_is_no_file_is_named(tmp_path):
  (tmp_path / "summary.json").symlink_to("summary.json")
  with pytest.raises(UserError, match=r"summary\.json"):
    summary.read_summary(tmp_path)


def test_summary_of_a_run_without_iterations(tmp_path):
  written = summary.write_summary(tmp_path, {}, 0)
  assert written["tokens_per_second"] is None
  assert (written["num_iterations"], written["wall_seconds"]) == (0, 0.0)
