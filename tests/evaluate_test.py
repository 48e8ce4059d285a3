"""The judge on model directories: what it says, side by side, and what it refuses."""

import contextlib
import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from small_decoders import arithmetic_decoder

from experiments import evaluate
from experiments.lab import evaluate_page
from klrl import judging
from klrl.errors import UserError
from klrl.models import policy_model, save_policy
from klrl.tasks import arithmetic, data

REWARD = "def length(prompts, completions, **columns): return [len(x) for x in completions]\n"
OWN = {
  "policy": "runs/one,runs/two",
  "reference": "base",
  "prompts": "own.jsonl",
  "reward": "reward.py:length",
  "max_completion_len": 3,
  "num_eval_rows": 24,
  "num_samples": 2,
  "mesh": "data=1",
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory, compiled_once):
  """The folder of an evaluation of two models, and where it is."""
  with contextlib.chdir(tmp_path_factory.mktemp("evaluate")):
    tokenizer = arithmetic.make_tokenizer()
    config = arithmetic_decoder(num_heads=1, mlp_dim=8, max_len=24)
    model = policy_model(config)
    for seed, name in enumerate(("base", "runs/one/model", "runs/two/model")):
      params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(seed)))
      save_policy(pathlib.Path(name), config, params, tokenizer)
    rows = [{"prompt": f"{i}+{i + 1}="} for i in range(20)]
    pathlib.Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pathlib.Path("reward.py").write_text(REWARD)
    workdir = evaluate.main(evaluate.Config(**OWN, workdir="judged"))
    yield json.loads((workdir / "evaluate.json").read_text())


def test_each_model_is_judged_by_the_same_prompts_against_the_same_reference(judged):
  one, two = judged["models"]
  assert (one["name"], two["name"]) == ("one", "two")
  assert one["directory"] == "runs/one"
  for name in ("score", "kl_ref_exact", "kl_ref_forward", "nll", "length"):
    assert one["figures"][name] != two["figures"][name], name
  assert one["figures"]["kl_ref_exact_stderr"] > 0 and one["figures"]["gold"] is None
  # The reward is the length of the text, of which tokens are characters.
  assert 0 <= one["figures"]["score"] <= one["figures"]["length"]
  prompts = [[sample["prompt"] for sample in model["samples"]] for model in (one, two)]
  assert prompts[0] == prompts[1] and len(prompts[0]) == 2
  # All prompts of the file.
  assert judged["num_prompts"] == 20


def test_a_model_is_its_own_reference_at_no_kl(judged):
  config = evaluate.Config(**OWN | {"policy": "base"})
  sources = evaluate.sources_of(config, "base", "base", "")
  found = evaluate.judgement(config, sources, "base")["figures"]
  assert found["kl_ref_exact"] == pytest.approx(0, abs=1e-6)
  assert found["kl_ref_forward"] == pytest.approx(0, abs=1e-6)


def test_without_reference_and_reward_there_is_neither_kl_nor_score(judged):
  config = evaluate.Config(**OWN | {"reference": "", "reward": "", "held_out": True})
  found = evaluate.judgement(config, evaluate.sources_of(config, "runs/one", "", ""), "one")
  assert found["figures"]["score"] is None and "kl_ref_exact" not in found["figures"]
  assert found["num_prompts"] == 2  # a tenth of 20
  results = {**judged, "models": [found], "reference": ""}
  assert "Nothing scores" in evaluate_page.verdict(results)
  text = evaluate_page.report(results)
  assert "There is no reference" in text and "against KL" not in text


def test_a_finished_evaluation_is_shown_and_edited_weights_are_noticed(judged, capsys):
  config = evaluate.Config(**OWN, workdir="judged")
  evaluate.main(config)
  assert "finished before" in capsys.readouterr().out
  path = pathlib.Path("runs/two/model/model.safetensors")
  before = path.read_bytes()
  path.write_bytes(before + b" ")
  try:
    with pytest.raises(UserError, match=r"two/model.safetensors is not what it was"):
      evaluate.main(config)
  finally:
    path.write_bytes(before)


def test_the_page_has_all_models_in_one_table_and_one_picture(judged):
  hostile = "<script>alert(1)</script>"
  text = evaluate_page.report(
    {**judged, "models": [{**judged["models"][0], "name": hostile}, judged["models"][1]]}
  )
  assert hostile not in text and "&lt;script&gt;" in text
  assert text.count("<svg") == 1 and "Score</b> <span>per completion, against KL" in text
  assert "and what each model writes" in text
  rows = {figure.key: cells for figure, *cells in evaluate_page.rows_of(judged)}
  assert [len(cells) for cells in rows.values()] == [2] * len(rows)
  assert {"score", "kl_ref_exact", "nll", "distinct_1"} <= rows.keys()
  assert "gold" not in rows  # Nothing has one.
  assert next(iter(rows)) == "score"


def figures(**changes):
  return {"name": changes.pop("name"), "figures": changes}


def test_the_verdict_claims_no_more_than_the_errors_allow():
  def verdict(*models):
    return evaluate_page.verdict({"num_prompts": 9, "models": models})

  a = figures(name="a", gold=0.5, gold_stderr=0.01, score=1.0, score_stderr=0.1)
  b = figures(name="b", gold=0.9, gold_stderr=0.01, score=1.1, score_stderr=0.1)
  assert verdict(a, b) == (
    "On 9 prompts, b has the highest gold accuracy, 90.0 ± 1.0%; "
    "b has the highest score, 1.10 ± 0.10 (not beyond its error)."
  )
  assert verdict(a).startswith("On 9 prompts, a has a gold accuracy of 50.0 ± 1.0%; a has a score")
  assert "Nothing scores" in verdict(figures(name="c", nll=1.0))


def test_names_are_short_and_differ():
  assert evaluate.names_of(["runs/a/model", "runs/b"]) == ["a", "b"]
  assert evaluate.names_of(["x/run", "y/run/model"]) == ["x/run", "y/run"]


def test_prompts_of_two_lengths_are_padded_on_the_left():
  parts = [
    data.Prompts(np.ones((2, n), np.int32), np.ones((2, n), bool), [{"prompt": "x"}] * 2)
    for n in (2, 3)
  ]
  found = evaluate.both(*parts, pad_id=7)
  assert found.tokens.tolist() == [[7, 1, 1]] * 2 + [[1, 1, 1]] * 2
  assert (found.mask == (found.tokens == 1)).all() and len(found.records) == 4


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"policy": ""}, "--prompts of yours need models of yours"),
    ({"policy": "a,b,a"}, "names a directory twice"),
    ({"prompts": "", "held_out": True, "policy": ""}, "--held_out is set"),
    ({"reward": "model"}, "say which by --reward_model=DIR"),
    ({"task": "tree"}, "--task is set, but nothing reads it with --prompts=own.jsonl"),
    ({"num_eval_rows": 1}, "--num_eval_rows=1: must be at least 2"),
    ({"sft_iterations": 3}, "--sft_iterations is set, but nothing reads it"),
  ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    evaluate.Config(**OWN | changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"policy": "base,nowhere"}, "nowhere does not exist"),
    ({"policy": "base", "reference": "nowhere"}, "nowhere does not exist"),
    ({"prompts": "nowhere.jsonl"}, "no file nowhere.jsonl"),
    ({"reward": "reward.py:nothing"}, "no function 'nothing'"),
  ],
)
def test_what_cannot_be_judged_is_one_message_at_once(judged, changes, message, monkeypatch):
  monkeypatch.setattr(judging, "make_judge", None)  # Nothing is judged before.
  with pytest.raises(UserError, match=message):
    evaluate.main(evaluate.Config(**OWN | changes, workdir="wrong"))
  assert not pathlib.Path("wrong").exists()


def test_every_field_of_the_judge_is_a_flag():
  names = {field.name for field in dataclasses.fields(evaluate.Config)}
  assert {"policy", "reference", "prompts", "reward", "num_eval_rows", "temperature"} <= names
  assert not {"eval_every", "keep_best", "learning_rate"} & names
