"""Tests of evaluations: their figures, their samples, and the checks that stop a run at step 0."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl import evaluation
from klrl.algorithm import completions
from klrl.errors import UserError
from klrl.models import DecoderConfig, load_tokenizer, policy_model
from klrl.sampling import Rollout, make_sample_fn
from klrl.tasks import arithmetic, data

STORIES = pathlib.Path(__file__).parents[2] / "shared" / "models" / "stories260K"
TOKENIZER = arithmetic.make_tokenizer()
PROMPT_LEN, MAX_COMPLETION_LEN, BATCH, VOCAB = 3, 4, 1024, TOKENIZER.tokenizer.get_vocab_size()
DECODER = DecoderConfig(
  vocab_size=VOCAB,
  width=16,
  num_layers=1,
  num_heads=2,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=32,
  max_len=16,
)
POLICY = policy_model(DECODER)


@functools.cache
def make_params(seed):
  # Larger than the usual initialisation, so that distributions are far from uniform.
  return jax.tree.map(lambda x: 10 * x, jax.jit(POLICY.init)(jax.random.key(seed)))


SAMPLE = jax.jit(
  make_sample_fn(
    POLICY,
    max_completion_len=MAX_COMPLETION_LEN,
    eos_id=TOKENIZER.eos_id,
    pad_id=TOKENIZER.pad_id,
  )
)


@functools.cache
def evaluate_fn(with_reference):
  return jax.jit(evaluation.make_evaluate_fn(POLICY, POLICY if with_reference else None))


@functools.cache
def evaluate(*, reference_seed=0, temperature=1.0, with_reference=True):
  """Returns the evaluation of the policy of seed 0, on the host."""
  tokens = jax.random.randint(jax.random.key(5), (BATCH, PROMPT_LEN), 3, VOCAB)
  mask = jnp.ones((BATCH, PROMPT_LEN), bool).at[::2, 0].set(False)
  temperature = jnp.float32(temperature)
  rollout = SAMPLE(make_params(0), tokens, mask, jax.random.key(9), temperature=temperature)
  reference_params = make_params(reference_seed) if with_reference else None
  found = evaluate_fn(with_reference)(
    make_params(0), reference_params, rollout, temperature=temperature
  )
  return jax.device_get(found)


def mean_and_stderr(x):
  return x.mean(), x.std(ddof=1) / np.sqrt(len(x))


def check(found, *, starts_as_reference=True, dtype="float32"):
  evaluation.step_zero_checks(found, starts_as_reference=starts_as_reference, dtype=dtype)


def test_figures_match_a_recomputation():
  found = evaluate(reference_seed=3)
  mask = found.rollout.completion_mask
  rng = np.random.default_rng(0)
  scores, gold = rng.normal(size=BATCH).astype(np.float32), rng.integers(2, size=BATCH)
  figures = evaluation.figures(found, scores, gold, ["a b a b", "c"], np.arange(BATCH))

  log_ratio = np.where(mask, found.log_probs - found.ref_log_probs, 0).astype(np.float64)
  per_token = {
    "kl_ref_k1": log_ratio,
    "kl_ref_k3": np.exp(-log_ratio) - 1 + log_ratio,
    "kl_ref_exact": np.where(mask, found.kl_exact, 0),
  }
  expected = {}
  for name, x in {"score": scores, "gold": gold}.items():
    expected[name], expected[f"{name}_stderr"] = mean_and_stderr(x)
  for name, kl in per_token.items():
    expected[name], expected[f"{name}_stderr"] = mean_and_stderr(kl.sum(axis=1))
    expected[f"{name}_per_token"] = kl.sum() / mask.sum()
  expected |= {
    "entropy": found.entropy[mask].mean(),
    "nll": -found.ref_log_probs[mask].mean(),
    "length": mask.sum() / BATCH,
    "finished_fraction": np.any(found.rollout.tokens[:, PROMPT_LEN:] == 2, axis=1).mean(),
    "distinct_1": 3 / 5,
    "distinct_2": 2 / 3,
    "distinct_3": 1.0,
  }
  assert figures == pytest.approx(expected, rel=1e-4)
  assert all(type(x) is float for x in figures.values())
  # Two estimates of one KL, which is far from 0.
  assert figures["kl_ref_exact"] > 0.5
  assert abs(figures["kl_ref_k1"] - figures["kl_ref_exact"]) < 5 * figures["kl_ref_k1_stderr"]


def test_padding_reaches_no_figure():
  found = evaluate(reference_seed=3)
  mask = found.rollout.completion_mask
  assert not mask.all()
  dirty = found._replace(
    **{
      name: np.where(mask, getattr(found, name), np.nan)
      for name in ("log_probs", "entropy", "ref_log_probs", "kl_exact")
    }
  )
  arguments = np.zeros(BATCH), None, ["a b"], np.arange(BATCH)
  assert evaluation.figures(dirty, *arguments) == evaluation.figures(found, *arguments)
  check(dirty, starts_as_reference=False)


def test_without_reference_or_gold_nothing_is_compared():
  found = evaluate(with_reference=False)
  assert found.ref_log_probs is None and found.kl_exact is None
  figures = evaluation.figures(found, np.arange(BATCH), None, ["a"], np.arange(BATCH))
  assert figures["gold"] is None and figures["distinct_2"] is None
  assert not [name for name in figures if "kl" in name or name == "nll"]
  check(found)
  np.testing.assert_array_equal(found.log_probs, evaluate().log_probs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_sound_policy_passes_at_any_temperature(temperature):
  found = evaluate(temperature=temperature)
  check(found)
  figures = evaluation.figures(found, np.zeros(BATCH), None, [], np.arange(BATCH))
  for name in ("kl_ref_k1", "kl_ref_k3", "kl_ref_exact"):
    assert abs(figures[name]) < 1e-5


def with_old_log_probs(found, old_log_probs):
  return found._replace(rollout=found.rollout._replace(old_log_probs=old_log_probs))


@pytest.mark.parametrize(
  ("error", "rows", "dtype", "stopped"),
  [
    (2e-3, [17], "float32", True),
    (5e-4, [17], "float32", False),
    (2e-3, slice(None), "bfloat16", False),
    (0.2, [17], "bfloat16", False),
    (0.2, slice(None), "bfloat16", True),
    (np.nan, [17], "float32", True),
    (np.nan, [17], "bfloat16", True),
  ],
)
def test_sampler_and_scorer_that_disagree_stop_the_run(error, rows, dtype, stopped):
  found = evaluate()
  old_log_probs = found.rollout.old_log_probs.copy()
  old_log_probs[rows, 0] -= error
  perturbed = with_old_log_probs(found, old_log_probs)
  if stopped:
    with pytest.raises(UserError, match="sampler and scorer disagree on tokens' log-probs by"):
      check(perturbed, dtype=dtype)
  else:
    check(perturbed, dtype=dtype)


def test_another_reference_stops_a_run_that_should_start_as_it():
  found = evaluate(reference_seed=3)
  with pytest.raises(UserError, match="the policy starts as its reference, yet their log-probs"):
    check(found)
  check(found, starts_as_reference=False)


def test_few_rows_that_happen_to_be_alike_do_not_stop_a_run():
  found = evaluate()
  mask = found.rollout.completion_mask
  surprise = np.where(mask, -found.log_probs - found.entropy, 0).sum(axis=1)
  alike = np.argsort(surprise)[:6]
  mean, stderr = mean_and_stderr(surprise[alike])
  assert abs(mean) > 6 * stderr
  check(jax.tree.map(lambda x: x[alike], found))


@pytest.mark.parametrize(("num", "stops"), [(2, False), (40, True)])
def test_equal_rows_stop_a_run_where_so_many_would_be_rare(num, stops):
  found = evaluate()
  first = jax.tree.map(lambda x: np.repeat(np.asarray(x)[:1], num, axis=0), found)
  assert np.where(first.rollout.completion_mask, first.rollout.old_log_probs, 0).sum() / num > -7
  if stops:
    with pytest.raises(UserError, match="inf standard errors from 0"):
      check(first)
  else:
    check(first)


@pytest.mark.parametrize("temperature", [1.5, 0.7])
def test_draws_at_another_temperature_than_claimed_stop_the_run(temperature):
  found = evaluate(temperature=temperature)
  # Sampler and scorer both say what the policy would say at temperature 1.
  log_probs, entropy = jax.jit(
    lambda params, rollout: completions.log_probs_and_entropy(
      POLICY, params, rollout, temperature=1.0
    )
  )(make_params(0), found.rollout)
  claimed = with_old_log_probs(found, log_probs)._replace(log_probs=log_probs, entropy=entropy)
  with pytest.raises(UserError, match="the sampler does not draw from the policy") as stop:
    check(claimed, starts_as_reference=False)
  # Flatter draws are more surprising than the entropy says, sharper ones less.
  assert ("log_prob - entropy is -" in str(stop.value)) == (temperature < 1)


def test_distinct_n_by_hand():
  # "a b", "b a", "a b" and "a b", "b c": three different ones of five; none across texts.
  texts = ["a b a b", "a  b\nc", "d", ""]
  assert evaluation.distinct_n(texts, 2) == pytest.approx(3 / 5)
  assert evaluation.distinct_n(texts, 1) == pytest.approx(4 / 8)
  assert evaluation.distinct_n([*texts, "b a b"], 3) == pytest.approx(3 / 4)
  assert evaluation.distinct_n(["a b c"], 2) == 1
  assert evaluation.distinct_n(["a", ""], 2) is None


def test_figures_of_several_completions_are_means_over_prompts():
  texts = ["7", "8", "8", "9", "9", "9"]
  records = [{"answer": "7"}] * 3 + [{"answer": "9"}] * 3
  found = evaluation.repeated_figures(arithmetic.VERIFIER, texts, records, 3)
  assert found == pytest.approx(
    {"pass_at_3": 1.0, "pass_at_3_stderr": 0.0, "majority_at_3": 0.5, "majority_at_3_stderr": 0.5}
  )


def test_figures_before_and_after_have_their_errors_beside_them():
  before, after = ({"pass_at_4": x, "kl_ref_forward_stderr": x} for x in (0.25, 0.5))
  assert evaluation.before_and_after(before, after) == {
    "pass_at_4_before": 0.25,
    "pass_at_4_after": 0.5,
    "kl_ref_forward_before_stderr": 0.25,
    "kl_ref_forward_after_stderr": 0.5,
    "kl_ref_forward_stderr": 0.5,
  }


def test_samples_show_each_real_token_of_the_first_rows():
  found = evaluate(reference_seed=3)
  texts = data.completion_texts(TOKENIZER, found.rollout)
  prompts = [f"prompt {i}" for i in range(BATCH)]
  scores, gold = np.arange(BATCH) / 2, np.ones(BATCH)
  records = evaluation.samples("before", found, scores, gold, texts, prompts, TOKENIZER, 20)
  assert len(records) == 20
  finished = 0
  for i, record in enumerate(records):
    mask = found.rollout.completion_mask[i]
    ids = found.rollout.tokens[i, PROMPT_LEN:][mask]
    assert record["tokens"] == [TOKENIZER.tokenizer.id_to_token(token) for token in ids]
    shown = [token for token in record["tokens"] if not token.startswith("<")]
    assert record["completion"] == texts[i] == "".join(shown)
    np.testing.assert_array_equal(record["kl_ref"], found.kl_exact[i][mask])
    np.testing.assert_array_equal(record["log_prob"], found.log_probs[i][mask])
    assert (record["when"], record["index"], record["prompt"]) == ("before", i, f"prompt {i}")
    assert (record["score"], record["gold"]) == (i / 2, 1.0)
    finished += record["tokens"][-1] == "</s>"
  assert finished > 0
  (record,) = evaluation.samples(
    "after", evaluate(with_reference=False), scores, None, texts, prompts, TOKENIZER, 1
  )
  assert record["kl_ref"] is None and record["gold"] is None
  chosen = np.array(found.rollout.completion_mask)
  chosen[0, 0] = False  # a token that was given is shown, without numbers
  with_hole = found._replace(rollout=found.rollout._replace(completion_mask=chosen))
  (record,) = evaluation.samples("a", with_hole, scores, gold, texts, prompts, TOKENIZER, 1)
  assert record["tokens"] == records[0]["tokens"]
  assert record["kl_ref"] == [None, *records[0]["kl_ref"][1:]]


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K model is not there")
def test_pieces_of_a_sample_keep_their_spaces():
  tokenizer = load_tokenizer(STORIES)
  bos, *ids = tokenizer.tokenizer.encode("Once upon a time").ids
  ids.append(tokenizer.eos_id)
  mask = np.ones((1, len(ids)), bool)
  tokens = np.array([[bos, *ids]], np.int32)
  rollout = Rollout(tokens, np.ones((1, 1), bool), mask, mask[:, -1], None, None)
  found = evaluation.Evaluation(rollout, np.zeros_like(mask, float), None, None, None)
  texts = data.completion_texts(tokenizer, rollout)
  (record,) = evaluation.samples("after", found, [0], None, texts, [""], tokenizer, 1)
  assert record["tokens"] == ["Once", " upon", " a", " time", "</s>"]
  assert record["completion"] == "Once upon a time"


def test_rows_without_a_score_are_in_no_mean():
  scores, prompts = np.float32([1, np.nan, 3, np.nan]), np.array([0, 0, 1, 2])
  found = evaluation.mean_and_stderr("score", scores, prompts)
  assert found == evaluation.mean_and_stderr("score", scores[[0, 2]], prompts[[0, 2]])
  assert evaluation.mean_and_stderr("score", scores[[1, 3]], prompts[[1, 3]]) == {"score": None}


def test_standard_errors_take_prompts_as_the_independent_units():
  found = evaluate()
  prompt_ids = np.arange(BATCH) % 2
  scores = prompt_ids * 2.0  # All completions of a prompt agree: two observations, not BATCH.
  figures = evaluation.figures(found, scores, None, ["a"], prompt_ids)
  assert figures["score"] == pytest.approx(1.0)
  assert figures["score_stderr"] == pytest.approx(np.std([0, 2], ddof=1) / np.sqrt(2))
  one = evaluation.figures(found, scores, None, ["a"], np.zeros(BATCH, int))
  assert one["score_stderr"] is None
