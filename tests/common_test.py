"""Tests of the way from a command line to a config: ranges, unread settings, absl flags."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from absl import flags

from experiments import (
  distill,
  estimators,
  grpo,
  kl_audit,
  kl_directions,
  mode_seeking,
  ppo,
  reward_model,
  sft,
  sweep,
)
from experiments.settings import common
from klrl.devices import processes
from klrl.errors import UserError
from klrl.run.workdir import config_hash, create_workdir, find_workdir

EXPERIMENTS = (sft, reward_model, ppo, kl_audit, mode_seeking, kl_directions, estimators)


def config_of_command_line(config_class, *arguments):
  """Returns the config that an experiment would make of `arguments`; leaves no flag behind."""
  before = set(flags.FLAGS)
  common.define_flags(config_class)
  try:
    flags.FLAGS(["program", *arguments])
    return common.config_from_flags(config_class)
  finally:
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


def test_importing_experiments_defines_no_flag():
  by_module = flags.FLAGS.flags_by_module_dict()
  assert not [name for name, defined in by_module.items() if defined and "experiments" in name]
  assert not {field.name for field in dataclasses.fields(ppo.Config)} & set(flags.FLAGS)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda module: module.__name__)
def test_every_field_is_a_flag_with_help(experiment):
  for field in dataclasses.fields(experiment.Config):
    assert field.metadata["help"].strip(), field.name
    assert type(field.default).__name__ == getattr(field.type, "__name__", field.type), field.name
    if field.metadata["read_when"]:
      other, values = field.metadata["read_when"]
      other_field = experiment.Config.__dataclass_fields__[other]
      assert {type(value) for value in values} == {type(other_field.default)}, field.name
      assert set(values) <= set(other_field.metadata["choices"] or values), field.name
  assert config_of_command_line(experiment.Config) == experiment.Config()


def test_command_line_reaches_the_config():
  config = config_of_command_line(
    ppo.Config, "--seed=3", "--beta=1e-2", "--profile", "--nowhiten_advantages", "--mesh=data=2"
  )
  assert config == ppo.Config(
    seed=3, beta=0.01, profile=True, whiten_advantages=False, mesh="data=2"
  )


@pytest.mark.parametrize(
  "argument", ["--seed=1.5", "--beta=much", "--kl_placement=nowhere", "--x=1"]
)
def test_absl_refuses_what_is_of_another_type(argument):
  with pytest.raises(flags.Error):
    config_of_command_line(ppo.Config, argument)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch_size": 0}, "--batch_size=0: must be at least 1"),
    ({"seed": -1}, "--seed=-1: must be at least 0"),
    ({"gamma": 1.01}, r"--gamma=1\.01: must be at most 1"),
    ({"beta": float("nan")}, "--beta=nan: must be at least 0"),
    ({"max_kl_old": float("nan")}, "--max_kl_old=nan: must be at least 0"),
    ({"temperature": 0.0}, r"--temperature=0\.0: must be at least 0\.001"),
    ({"controller": "doubling", "beta": 200.0}, r"--beta=200.0 is above --beta_max=100.0"),
    ({"controller": "proportional", "beta_min": 1.0}, r"--beta=0.5 is below --beta_min=1.0"),
    ({"controller": "dual_ascent", "beta_max": 0.1}, r"--beta=0.5 is above --beta_max=0.1"),
    ({"controller": "dual_ascent", "beta_max": float("inf")}, r"--beta_max=inf"),
    ({"controller": "doubling", "beta_min": 0.0}, r"--beta_min=0.0"),
    (
      {"trust_region": "centred", "staleness": 1},
      "--staleness=1: --trust_region=centred reads .* which a late rollout has not kept",
    ),
    (
      {"trust_region": "centred", "sampler_correction": "token"},
      "--sampler_correction=token: --trust_region=centred .* without weights",
    ),
    (
      {"trust_region": "kl_new_old", "trust_region_adaptive": True, "trust_region_beta": 0.0},
      "--trust_region_beta=0.0: .* from 0.0001 to 10000",
    ),
    ({"trust_region": "regression", "trust_region_beta": 0.0}, "--trust_region=regression divides"),
    ({"ptx_divergence": "forward"}, "--ptx_divergence is set, but nothing reads it"),
    ({"controller": "pid"}, "--controller=pid: must be one of fixed, doubling"),
    ({"kl_placement": ""}, "--kl_placement=: must be one of reward"),
  ],
)
def test_what_is_out_of_range_is_refused_with_the_range(changes, message):
  with pytest.raises(UserError, match=message):
    ppo.Config(**changes)


def test_a_horizon_in_which_beta_would_turn_negative_is_refused_before_anything_runs():
  settings = {"controller": "proportional", "batch_size": 128}
  message = r"--kl_horizon=25: .*must be positive. Write a --kl_horizon above 25\.6"
  with pytest.raises(UserError, match=message):
    ppo.main(ppo.Config(**settings, kl_horizon=25.0))
  grid = sweep.config_class("ppo")(**settings, sweep="kl_horizon=25,1000")
  with pytest.raises(UserError, match=f"Member kl_horizon=25,seed=0: {message}"):
    sweep.members_of(grid)
  ppo.Config(**settings, kl_horizon=26.0).check_horizon()


def test_bounds_themselves_are_allowed():
  ppo.Config(batch_size=1, num_minibatches=1, gamma=0.0, gae_lambda=1.0, max_kl_old=float("inf"))


@pytest.mark.parametrize(
  ("config_class", "changes", "message"),
  [
    (ppo.Config, {"kl_target": 3.0}, r"kl_target is set.*controller=fixed; it is .*dual_ascent"),
    (
      ppo.Config,
      {"kl_placement": "none", "beta": 0.7},
      "nothing reads it with --kl_placement=none",
    ),
    (ppo.Config, {"trust_region": "none", "clip_eps_low": 0.1}, "--trust_region=none"),
    (ppo.Config, {"trust_region_adaptive": True}, "--trust_region=clip"),
    (ppo.Config, {"trust_region_target": 0.1}, "with --trust_region_adaptive=False"),
    (
      sft.Config,
      {"policy": "d", "data": "f", "width": 32},
      "nothing reads it with --policy=d; it is read without --policy",
    ),
    (reward_model.Config, {"data": "f", "label_noise": 0.5}, "nothing reads it with --data=f"),
  ],
)
def test_a_setting_that_nothing_reads_is_refused(config_class, changes, message):
  with pytest.raises(UserError, match=message):
    config_class(**changes)


def test_a_flag_that_nothing_reads_is_refused_even_at_its_default():
  with pytest.raises(UserError, match="--kl_target is set, but nothing reads it"):
    config_of_command_line(ppo.Config, "--kl_target=6.0")
  config = config_of_command_line(ppo.Config, "--kl_target=6.0", "--controller=doubling")
  assert config == ppo.Config(controller="doubling")
  with pytest.raises(UserError, match="--trust_region_adaptive is set"):
    config_of_command_line(ppo.Config, "--notrust_region_adaptive")


@pytest.mark.parametrize(
  ("experiment", "config"),
  [
    ("ppo", ppo.Config()),
    (
      "ppo",
      ppo.Config(
        controller="doubling",
        kl_target=1 / 3,
        beta=1e-7,
        beta_min=1e-9,
        max_kl_old=float("inf"),
        trust_region="kl_old_new",
        trust_region_adaptive=True,
        trust_region_target=0.07,
        whiten_advantages=False,
        mesh="data=2,fsdp=2",
      ),
    ),
    ("ppo", ppo.Config(policy="a dir", prompts="p.jsonl", reward="r.py:f", kl_placement="none")),
    ("sft", sft.Config(policy="d", data="d.jsonl", learning_rate=3e-5)),
    ("reward_model", reward_model.Config(label_noise=0.0)),
  ],
)
def test_flags_of_a_run_make_the_same_configuration_again(tmp_path, experiment, config):
  config = dataclasses.replace(config, workdir=str(tmp_path / "run"))
  directory = find_workdir(experiment, config)
  create_workdir(directory, experiment, config)
  again = config_of_command_line(type(config), f"--flagfile={directory}/flags.txt")
  assert again == config
  changed = config_of_command_line(type(config), f"--flagfile={directory}/flags.txt", "--seed=9")
  assert changed == dataclasses.replace(config, seed=9)


def test_loop_settings_are_fields_of_the_same_names():
  settings = ppo.Config(num_iterations=3, save_every=4, keep=5).loop_settings()
  assert settings == {
    "num_iterations": 3,
    "save_every": 4,
    "keep": 5,
    "profile": False,
    "tensorboard": False,
    "wandb_project": "",
  }
  json.dumps(settings)


def run_main(monkeypatch, main, *arguments):
  """Returns the exit status of an experiment's main guard."""
  monkeypatch.setattr("sys.argv", ["program", *arguments])
  # Processes are joined before anything is computed; here other tests have computed.
  monkeypatch.setattr(processes, "connect", lambda flags: None)
  before, on_ctrl_c = set(flags.FLAGS), signal.getsignal(signal.SIGINT)
  try:
    with pytest.raises(SystemExit) as stop:
      common.launch(main, common.RunConfig)
    return stop.value.code or 0
  finally:
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    signal.signal(signal.SIGINT, on_ctrl_c)


def refusing(config):
  raise UserError(f"Batches of {config.batch_size} [rows] are too much.")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--batch_size=9"], "Error: Batches of 9 [rows] are too much."),
    (["--batch_size=0"], "Error: --batch_size=0: must be at least 1."),
    (
      ["--flagfile=nowhere"],
      "Error: Unable to open flagfile: [Errno 2] No such file or directory: 'nowhere'.",
    ),
    (["seed=1"], "Error: Unexpected argument 'seed=1'; every setting is a --flag=value."),
    (["--seed=x"], "Error: flag --seed=x: invalid literal for int() with base 10: 'x'."),
    (["--zzzz=1"], "Error: There is no flag --zzzz; --help lists all."),
  ],
)
def test_what_a_person_can_mend_ends_with_status_1_and_one_line(
  monkeypatch, capsys, arguments, message
):
  assert run_main(monkeypatch, refusing, *arguments) == 1
  assert capsys.readouterr().out == message + "\n"


def test_help_ends_with_status_0(monkeypatch, capsys):
  assert run_main(monkeypatch, refusing, "--help") == 0
  assert "The flags that most runs set:\n  --learning_rate=-1" in capsys.readouterr().out


def test_main_gets_the_config_and_an_interruption_has_its_own_status(monkeypatch, capsys):
  seen = []
  assert run_main(monkeypatch, seen.append, "--seed=4") == 0
  assert seen == [common.RunConfig(seed=4)]

  def interrupted(config):
    raise common.Interrupted("Stopped after iteration 4 of 6.")

  assert run_main(monkeypatch, interrupted) == 130
  assert "Stopped after iteration 4 of 6." in capsys.readouterr().out

  def killed(config):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, "_exit", sys.exit)  # the real one ends the tests too
  assert run_main(monkeypatch, killed) == 130
  assert "goes on from what was saved" in capsys.readouterr().out


def test_a_whole_number_is_the_same_setting_as_its_float():
  assert config_hash(ppo.Config(beta=1)) == config_hash(ppo.Config(beta=1.0))


PROGRAM = """
import sys, threading
from experiments.settings import common
from klrl.devices import processes
from klrl.run.progress import console

def main(config):
  for i in range(config.batch_size):
    console.print(f"line {i} " + "." * 1000, soft_wrap=True)
  if config.seed:
    processes._SECONDS_FOR_THREADS = 1
    threading.Thread(target=threading.Event().wait, name="of the reward").start()

common.launch(main, common.RunConfig)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
  path = tmp_path_factory.mktemp("program") / "program.py"
  path.write_text(PROGRAM)
  return [sys.executable, str(path)]


ROOT = pathlib.Path(common.__file__).parents[2]
HERE = {**os.environ, "PYTHONPATH": str(ROOT)}


def test_output_that_nobody_reads_ends_the_program_with_one_message(program):
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  with subprocess.Popen([*program, "--batch_size=5000"], **pipes, text=True, env=HERE) as process:
    assert process.stdout.readline().startswith("line 0")
    process.stdout.close()
    said = process.stderr.read()
  assert process.returncode == 1
  assert said.startswith("Nobody reads what is printed any more, so this ends.")
  assert len(said.splitlines()) == 1


def test_output_that_a_full_disk_takes_no_more_of_is_one_message(program):
  with open("/dev/full", "w") as full:
    done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, env=HERE)
  assert done.returncode
  assert done.stderr.startswith("Error: No space left on device")
  assert "Traceback" not in done.stderr


def test_a_thread_that_never_ends_is_left_behind(program):
  done = subprocess.run(
    [*program, "--seed=1", "--batch_size=1"], capture_output=True, text=True, env=HERE, timeout=60
  )
  assert done.returncode == 0
  assert done.stdout.startswith("line 0")
  assert done.stderr.endswith("perhaps of a reward, are ended: of the reward.\n")


OWN = {
  ppo: {"policy": "d", "prompts": "p.jsonl", "reward": "r.py:f"},
  sft: {"policy": "d", "data": "d.jsonl"},
  reward_model: {"policy": "d"},
}


@pytest.mark.parametrize("experiment", OWN, ids=lambda module: module.__name__)
def test_a_model_of_the_users_is_not_trained_at_the_embedded_models_learning_rate(experiment):
  embedded, own = experiment.Config(), experiment.Config(**OWN[experiment])
  assert own.fitted({}).learning_rate < embedded.learning_rate / 5
  given = experiment.Config(**OWN[experiment], learning_rate=embedded.learning_rate)
  assert given.learning_rate == embedded.learning_rate
  assert experiment.Config(learning_rate=0.0).learning_rate == 0
  with pytest.raises(UserError, match=r"--learning_rate=-0\.5: must be at least 0, or -1"):
    experiment.Config(learning_rate=-0.5)


@pytest.mark.parametrize(
  ("experiment", "changes", "message"),
  [
    (ppo, {"eval_every": 0, "keep_best": "gold"}, "--keep_best is set, but nothing reads it"),
    (ppo, {"eval_every": 0, "num_interim_rows": 9}, "--num_interim_rows is set, but nothing"),
    (ppo, {"eval_every": -2}, "--eval_every=-2: must be at least -1"),
    (ppo, {"keep_best": "kl"}, "--keep_best=kl: must be one of , score, gold"),
    (distill, {"keep_best": "score"}, "nothing scores completions"),
  ],
)
def test_settings_of_evaluations_that_nothing_reads_are_refused(experiment, changes, message):
  with pytest.raises(UserError, match=message):
    experiment.Config(**changes)


def test_while_a_model_of_the_users_trains_fewer_completions_are_judged():
  assert ppo.Config().interim_rows() == ppo.Config().num_eval_rows == 512
  own = ppo.Config(**OWN[ppo])
  assert own.interim_rows() == 128
  assert dataclasses.replace(own, num_eval_rows=16).interim_rows() == 16
  assert dataclasses.replace(own, num_interim_rows=300).interim_rows() == 300


def test_no_more_completions_are_judged_at_once_than_an_iteration_has_prompts():
  def at_once(config):
    return config.drawn_at_once(), config.read_at_once()

  assert at_once(ppo.Config()) == (512, 512)
  own = ppo.Config(**OWN[ppo], batch_size=256, accumulation=4, num_minibatches=1)
  assert at_once(own) == (256, 64)
  assert at_once(dataclasses.replace(own, batch_size=8)) == (128, 32)
  assert at_once(dataclasses.replace(own, num_eval_rows=30)) == (30, 8)
  assert at_once(dataclasses.replace(own, eval_batch_size=9)) == (9, 3)
  groups = grpo.Config(batch_size=2048, group_size=8, num_minibatches=1)
  assert at_once(groups) == (256, 256)
