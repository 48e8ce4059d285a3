"""Tests of what --help prints, of flags that do not exist, and of what is looked at first."""

import dataclasses
import sys

import pytest

from experiments import distill, dpo, kl_audit, ppo, reward_model, sft, sweep
from experiments.settings import common, usage
from klrl.errors import UserError

EXPERIMENTS = [*(x.Config for x in (ppo, sft, reward_model, dpo, kl_audit))]
EXPERIMENTS += [sweep.config_class("grpo")]


@pytest.mark.parametrize("config_class", EXPERIMENTS, ids=lambda x: x.__module__)
def test_help_has_every_flag_once_and_the_essential_ones_first(config_class):
  text = usage.text(config_class, "What it is.")
  heads = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
  names = [head.removeprefix("--").removeprefix("[no]").split("=")[0] for head in heads]
  assert sorted(names) == sorted(field.name for field in dataclasses.fields(config_class))
  essential = [name for name in usage.ESSENTIAL if name in names]
  assert names[: len(essential)] == essential
  assert text.startswith("What it is.\n\nThe flags that most runs set:\n")
  assert max(map(len, text.splitlines())) <= 100


def test_help_of_a_flag_says_its_default_its_choices_and_what_reads_it():
  text = " ".join(usage.text(ppo.Config, "").split())
  assert "--kl_estimator=k1 how the KL is estimated (k1, k2, k3, exact, centred); read" in text
  assert "--beta_min=0.0001 smallest beta" in text
  assert "--[no]whiten_advantages subtract the mean and divide by the deviation (on by" in text
  assert "The KL penalty and its beta: --" in text
  swept = " ".join(usage.text(sweep.config_class("ppo"), "").split())
  assert "The KL penalty and its beta: --" in swept


def test_a_flag_that_does_not_exist_is_answered_with_those_that_may_be_meant():
  said = usage.unknown(dpo.Config, "pairs")
  assert said.startswith(
    "There is no flag --pairs; --help lists all. Perhaps one of these is meant"
  )
  assert "\n  --data= " in said and "\n  --num_pairs=30000 " in said
  assert "\n  --learning_rate=-1" in usage.unknown(ppo.Config, "learning_rat")
  assert usage.unknown(ppo.Config, "zzzz") == "There is no flag --zzzz; --help lists all."


def takes_no_answer(prompts, completions):
  return [0.0 for _ in completions]


def test_what_the_machine_lacks_is_told_before_anything_runs(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(UserError, match=r"pip install 'klrl\[tensorboard\]'"):
    common.check_machine(ppo.Config(tensorboard=True))
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="file is no folder that can be written to"):
    common.check_machine(ppo.Config(workdir=str(tmp_path / "file/run")))
  common.check_machine(ppo.Config(workdir=str(tmp_path / "new/run")))
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
  ("experiment", "changes", "message"),
  [
    (ppo, {"max_completion_len": 2}, "the embedded task needs 3"),
    (ppo, {"max_completion_len": 40}, "leaves no room for a prompt"),
    (ppo, {"prefill": "1234"}, "prefill=1234 has 4 tokens, which leaves nothing"),
    (ppo, {"pretrain_data": "nowhere.txt", "ptx_coef": 0.1}, r"no file nowhere\.txt"),
    (ppo, {"reward": "nowhere.py:f"}, "no such Python file"),
    (ppo, {"reward": f"{__file__}:takes_no_answer"}, "unexpected keyword argument 'answer'"),
    (distill, {"batch_size": 127, "num_minibatches": 1}, "127"),
    (distill, {"max_completion_len": 2}, "the embedded task needs 3"),
  ],
)
def test_what_is_wrong_is_told_before_a_stage_is_trained(
  experiment, changes, message, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=message):
    experiment.main(experiment.Config(**changes, workdir="run"))
  assert not any(tmp_path.iterdir())


def test_a_sweep_is_told_before_a_stage_is_trained_too(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = sweep.config_class("ppo")(sweep="beta=0.1,1", max_completion_len=2, workdir="run")
  with pytest.raises(UserError, match="the embedded task needs 3"):
    sweep.main(config)
  assert not (tmp_path / "runs").exists()
