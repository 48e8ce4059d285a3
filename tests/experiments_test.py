"""Whole experiments at tiny size: what they leave behind, and how they say no."""

import functools
import json
import os
import pathlib
import textwrap

import forked
import jax
import pytest

from experiments import distill, grpo, ppo, reward_model, sft
from experiments.settings import training
from klrl.errors import UserError
from klrl.models import load_policy, load_scalar
from klrl.run import loop
from klrl.tasks import arithmetic

ROOT = pathlib.Path(__file__).parents[1]
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
STAGES = {"sft_iterations": 3, "reward_model_iterations": 3}
TINY = {
  "num_iterations": 4,
  "batch_size": 16,
  "num_eval_rows": 16,
  "num_samples": 2,
  "num_epochs": 1,
  "num_minibatches": 2,
  "save_every": 2,
  "kl_every": 2,
  # One device: what several do is the business of learner_test.
  "mesh": "data=1",
}


def few(make, seed, num, **settings):
  return make(seed, min(num, 300), **settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, compiled_once):
  """The folder in which one embedded run has finished; every test of this file works in it."""
  directory = tmp_path_factory.mktemp("experiments")
  before = pathlib.Path.cwd()
  os.chdir(directory)
  with pytest.MonkeyPatch.context() as patch:
    # The stages make 110 000 examples, and judge a tenth of them before and after.
    for name in ("demonstrations", "preferences"):
      patch.setattr(arithmetic, name, functools.partial(few, getattr(arithmetic, name)))
    ppo.main(ppo.Config(**TINY, **STAGES, workdir="embedded"))
  yield directory
  os.chdir(before)


@pytest.fixture(scope="module")
def own(runs):
  """Settings of a run with a policy, prompts and a reward of one's own."""
  with (runs / "prompts.jsonl").open("w") as file:
    for i, record in enumerate(arithmetic.prompt_records(held_out=False)[:40]):
      file.write(json.dumps({**record, "number": i}) + "\n")
  (runs / "reward.py").write_text(
    textwrap.dedent("""
      def sevens(prompts, completions, answer, number, **columns):
        assert all(isinstance(i, int) for i in number) and len(answer) == len(prompts)
        return [completion.count("7") for completion in completions]

      def length(prompts, completions, **columns):
        return [len(completion) for completion in completions]
    """)
  )
  (policy,) = (runs / "runs/stages").glob("sft-*")
  return {
    **TINY,
    "policy": str(policy),
    "prompts": "prompts.jsonl",
    "reward": "reward.py:sevens",
    "max_completion_len": 3,
  }


def read_lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_embedded_run_leaves_everything_behind(runs):
  workdir = runs / "embedded"
  for name in ("config.json", "flags.txt", "report.html", "samples.jsonl", "timing.jsonl"):
    assert (workdir / name).stat().st_size, name
  summary = json.loads((workdir / "summary.json").read_text())
  for name in ("score_before", "score_after", "gold_before", "gold_after", "wall_seconds"):
    assert isinstance(summary[name], float), name
  for name in ("kl_ref_k1", "kl_ref_k3", "kl_ref_exact"):
    assert summary[name] != 0 and summary[f"{name}_stderr"] > 0
    assert summary[f"{name}_before"] == pytest.approx(0, abs=1e-5)
  assert summary["num_iterations"] == TINY["num_iterations"]
  lines = read_lines(workdir / "metrics.jsonl")
  assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
  assert [line["kl/ref_exact"] is None for line in lines] == [False, True, False, True]
  whens = [(sample["when"], sample["index"]) for sample in read_lines(workdir / "samples.jsonl")]
  assert whens == [("before", 0), ("before", 1), ("after", 0), ("after", 1)]
  load_policy(workdir)
  load_scalar(workdir / "value_model")


def test_evaluations_change_nothing_in_training(runs):
  workdir = ppo.main(ppo.Config(**TINY, **STAGES, eval_every=0, workdir="unjudged"))
  judged = (runs / "embedded/metrics.jsonl").read_bytes()
  assert (workdir / "metrics.jsonl").read_bytes() == judged
  assert len(read_lines(runs / "embedded/evaluations.jsonl")) == TINY["num_iterations"] + 1
  assert not (workdir / "evaluations.jsonl").exists()
  assert "while it trained" not in (workdir / "report.html").read_text()


def test_a_finished_run_is_shown_and_not_run_again(runs, capsys):
  before = (runs / "embedded/timing.jsonl").read_bytes()
  ppo.main(ppo.Config(**TINY, **STAGES, workdir="embedded"))
  assert "finished before" in capsys.readouterr().out
  assert (runs / "embedded/timing.jsonl").read_bytes() == before


def test_stages_are_found_again_by_another_run(runs):
  stages = sorted(path.name for path in (runs / "runs/stages").iterdir())
  config = ppo.Config(**TINY, **STAGES)
  training.model_directories(config)
  assert sorted(path.name for path in (runs / "runs/stages").iterdir()) == stages
  assert len(stages) == 2


def test_workdir_of_another_config_is_refused(runs):
  with pytest.raises(UserError, match=r"beta is 0\.5 there and 0\.7 here"):
    ppo.main(ppo.Config(**TINY, **STAGES, beta=0.7, workdir="embedded"))


# With all that a state can hold.
REMEMBERING = {
  "lora_rank": 2,
  "reference_update": "ema",
  "reference_decay": 0.5,
  "staleness": 1,
  "normalise_scores": True,
  "sampler_correction": "sequence",
  "reward": "2*reward.py:sevens,-0.5*reward.py:length",
  "reward_model": "",
  "keep_best": "score",
  "num_interim_rows": 8,
}


def test_interrupted_run_with_own_rewards_goes_on_bit_for_bit(runs, own, monkeypatch):
  settings = {**own, **REMEMBERING}
  ppo.main(ppo.Config(**settings, workdir="whole"))
  real_step, calls = loop._check_finite, []

  def interrupt_once(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
      os.kill(os.getpid(), 2)
    return real_step(*arguments)

  monkeypatch.setattr(loop, "_check_finite", interrupt_once)
  with pytest.raises(loop.Interrupted, match="after iteration 3 of 4"):
    ppo.main(ppo.Config(**settings, workdir="parts"))
  assert not (runs / "parts/summary.json").exists()
  reward = (runs / "reward.py").read_text()
  (runs / "reward.py").write_text(reward + "# edited\n")
  with pytest.raises(UserError, match=r"reward\.py is not what it was when the run in .*parts"):
    ppo.main(ppo.Config(**settings, workdir="parts"))
  (runs / "reward.py").write_text(reward)
  ppo.main(ppo.Config(**settings, workdir="parts"))
  best = [f"model_best/{name}" for name in ("evaluation.json", "model.safetensors")]
  for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", *best):
    assert (runs / "whole" / name).read_bytes() == (runs / "parts" / name).read_bytes(), name
  whole, parts = (
    json.loads((runs / name / "summary.json").read_text()) for name in ("whole", "parts")
  )
  timed = ("wall_seconds", "tokens_per_second")
  assert {k: v for k, v in whole.items() if k not in timed} == {
    k: v for k, v in parts.items() if k not in timed
  }
  scores = {x["iteration"]: x["score"] for x in read_lines(runs / "whole/evaluations.jsonl")}
  assert list(scores) == [0, 1, 2, 3, 4]
  assert whole["score_best"] == max(scores.values()) == scores[whole["best_iteration"]]
  load_policy(runs / "whole/model_best")
  for line in read_lines(runs / "whole/metrics.jsonl"):
    total = 2 * line["score/sevens"] - 0.5 * line["score/length"]
    assert line["score/mean"] == pytest.approx(total, rel=1e-5)
    assert line["controller/effective_beta"] != line["controller/beta"]
  # Adapters are merged: what is saved is a model like the one that came in.
  (config, params), (_, start) = (load_policy(path) for path in ("whole", own["policy"]))
  assert config.lora_rank == 0
  assert jax.tree.structure(params) == jax.tree.structure(start)
  moved = jax.tree.map(lambda x, y: float(abs(x - y).max()), params, start)
  assert moved["decoder"]["layers"]["mlp"]["up"]["kernel"] > 0
  assert moved["decoder"]["embed"]["embedding"] == 0


def test_nan_score_stops_the_run_and_keeps_what_was_saved(runs, own):
  (runs / "nan.py").write_text(
    textwrap.dedent("""
      calls = []

      def reward(prompts, completions, **columns):
        calls.append(1)
        # The first two evaluate, sampled and greedy; the fifth is the third iteration.
        return [float("nan") if len(calls) == 5 else 0.0 for _ in completions]
    """)
  )
  with pytest.raises(UserError, match=r"Iteration 3: .* returned nan for completion"):
    ppo.main(ppo.Config(**{**own, "reward": "nan.py:reward"}, eval_every=0, workdir="nan"))
  assert len(read_lines(runs / "nan/metrics.jsonl")) == 2
  assert (runs / "nan/checkpoints/2").is_dir() and (runs / "nan/rollout-2.npz").exists()
  assert not (runs / "nan/summary.json").exists()


def test_reference_and_value_model_of_ones_own(runs, own):
  workdir = ppo.main(
    ppo.Config(
      **{**own, "num_iterations": 1},
      reference="0.4*start,0.6*embedded",
      value_model="embedded/value_model",
      workdir="own-models",
    )
  )
  assert json.loads((workdir / "summary.json").read_text())["kl_ref_exact_before"] > 0


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"policy": "nowhere"}, "nowhere does not exist"),
    ({"prompts": "nowhere.jsonl"}, "no file nowhere.jsonl"),
    ({"prompts": "empty.jsonl"}, "empty.jsonl is empty"),
    ({"prompts": "broken.jsonl"}, "broken.jsonl line 2"),
    ({"prompts": "long.jsonl"}, r"Prompt \d has 61 tokens"),
    ({"reward": "reward.py:nothing"}, "no function 'nothing'"),
    ({"reward": "nowhere.py:f"}, "no such Python file"),
    ({"max_completion_len": 32}, "leaves no room for a prompt"),
    ({"max_prompt_len": 1}, "every prompt is longer"),
    ({"mesh": "data=3"}, "batch_size=16 cannot be split over 3"),
    ({"mesh": "data=400"}, "needs 400 devices"),
    ({"reward": "", "reward_model": "embedded"}, "score"),
  ],
)
def test_wrong_use_is_one_clear_message(runs, own, changes, message):
  (runs / "empty.jsonl").write_text("\n")
  (runs / "broken.jsonl").write_text('{"prompt": "01+02="}\n{"prompt": \n')
  (runs / "long.jsonl").write_text(
    '{"prompt": "%s", "answer": "1", "number": 1}\n' % ("1" * 60) * 3
  )
  with pytest.raises(UserError, match=message):
    ppo.main(ppo.Config(**{**own, **changes}, workdir="wrong"))
  assert not (runs / "wrong").exists()


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the shared model")
def test_models_with_different_tokenizers_are_refused(runs, own):
  with pytest.raises(UserError, match="another vocabulary than the policy"):
    ppo.main(ppo.Config(**own, reference=str(STORIES), workdir="wrong"))


def test_dapo_trains_no_value_model_and_without_kl_no_reference_is_loaded(runs, own):
  dapo = {
    "num_epochs": 2,
    "group_size": 4,
    "oversampling": 2,
    "overlong_buffer": 2,
    "kl_placement": "none",
    "kl_every": 0,
  }
  workdir = grpo.main(grpo.Config(**{**own, **dapo}, workdir="dapo"))
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["num_iterations"] == TINY["num_iterations"]
  assert summary["kl_ref_k1"] is None and summary["score_after"] is not None
  assert not (workdir / "value_model").exists()
  assert "kl_penalty" in summary
  load_policy(workdir)
  lines = read_lines(workdir / "metrics.jsonl")
  assert all(0 <= line["rollout/informative_groups"] <= 1 for line in lines)


def test_a_student_comes_closer_to_its_teacher(runs, own):
  names = ("policy", "prompts", "max_completion_len", "num_eval_rows", "mesh", "batch_size")
  settings = {name: own[name] for name in names}
  workdir = distill.main(
    distill.Config(
      **settings,
      teacher="embedded",
      kl_divergence="jensen_shannon",
      num_iterations=20,
      learning_rate=1e-3,
      workdir="distilled",
    )
  )
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["kl_ref_exact_after"] < 0.5 * summary["kl_ref_exact_before"]
  assert "Jensen-Shannon" in summary["kl_penalty"]


def test_distillation_wants_a_teacher(own):
  with pytest.raises(UserError, match="--teacher=DIR"):
    distill.Config(policy=own["policy"], prompts=own["prompts"])


def test_pretraining_texts_are_mixed_into_the_loss(runs, own):
  (runs / "texts.txt").write_text("<|endoftext|>".join(["12+34=46", "1"] * 8))
  settings = {**own, "num_iterations": 2, "max_prompt_len": 8, "learning_rate": 1e-2}
  workdir = ppo.main(
    ppo.Config(**settings, pretrain_data="texts.txt", ptx_coef=50.0, workdir="texts")
  )
  first, last = (line["policy/pretraining_loss"] for line in read_lines(workdir / "metrics.jsonl"))
  assert last < first - 0.1


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"beta": -1.0}, "--beta=-1.0: must be at least 0"),
    ({"beta": float("nan")}, "--beta=nan"),
    ({"policy": "somewhere"}, "needs prompts: --prompts=FILE.jsonl, and something to score with"),
    (
      {"policy": "d", "prompts": "file", "reward": "model,f.py:f"},
      "--reward_model=DIR, which `model` in --reward stands for",
    ),
    ({"prompts": "file"}, "--prompts of yours need a model of yours"),
    ({"kl_placement": "none", "beta": 0.3}, "--beta is set, but nothing reads it"),
    ({"kl_target": 3.0}, "--kl_target is set, but nothing reads it"),
    ({"trust_region": "none", "clip_eps_low": 0.1}, "--clip_eps_low is set"),
    ({"num_minibatches": 3}, "not a multiple"),
    ({"reward": "f.py:f", "reward_model": "d"}, "give one of them"),
    ({"prompt_template": "Q: {question}"}, "nothing reads it without --prompts"),
    ({"accumulation": 3}, "--batch_size = 512 is not a multiple of --accumulation=3"),
    (
      {"accumulation": 256},
      "--batch_size / --num_minibatches = 128 is not a multiple of --accumulation=256",
    ),
    ({"warmup_iterations": 100}, "leaves nothing of"),
    ({"reference_update": "ema", "reference": "uniform"}, "leave --reference out"),
    ({"reference_update": "ema", "kl_placement": "none"}, "no KL is penalised"),
    ({"reference_decay": 0.5}, "--reference_decay is set, but nothing reads it"),
    ({"value_trunk": "shared", "value_init": "policy"}, "starts as the policy"),
    ({"sampler_cap": 3.0}, "--sampler_cap is set, but nothing reads it"),
    ({"trust_region": "hope"}, "must be one of clip"),
  ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    ppo.Config(**settings)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--trust_region=hope"], "value should be one of"),
    (["--kl_placement=none", "--beta=0.1"], "Error: --beta is set, but nothing reads it"),
  ],
)
def test_command_line_says_no_without_a_traceback(tmp_path, arguments, message):
  process = forked.Process(["-m", "experiments.ppo", *arguments], tmp_path, dict(os.environ))
  status, output = process.finished()
  assert status == 1, output
  assert message in output
  assert "Traceback" not in output
  assert not list(tmp_path.iterdir())


def test_sft_and_reward_model_train_on_files(runs, own):
  with (runs / "demonstrations.jsonl").open("w") as file:
    for prompt, completion in arithmetic.demonstrations(0, 40, quality=1.0):
      file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
  with (runs / "pairs.jsonl").open("w") as file:
    for prompt, chosen, rejected in arithmetic.preferences(0, 40, label_noise=0.0):
      line = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
      file.write(json.dumps(line) + "\n")
  shared = {"policy": own["policy"], "num_iterations": 2, "batch_size": 8, "mesh": "data=1"}
  shared |= {"lora_rank": 2, "accumulation": 2}
  workdir = sft.main(sft.Config(**shared, data="demonstrations.jsonl"))
  load_policy(workdir)
  assert json.loads((workdir / "summary.json").read_text())["held_out_cross_entropy"] > 0
  workdir = reward_model.main(reward_model.Config(**shared, data="pairs.jsonl"))
  load_scalar(workdir)
  assert json.loads((workdir / "summary.json").read_text())["held_out_loss"] > 0
