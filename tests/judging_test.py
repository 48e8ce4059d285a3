"""The judge: what it draws, what it says of it, and that it says the same each time."""

import collections
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl import judging
from klrl.devices import parallel
from klrl.exact import oracle
from klrl.models import DecoderConfig, policy_model, scalar_model, scalar_params_from
from klrl.tasks import arithmetic, data, rewards
from klrl.tasks.verifier import Verifier

TOKENIZER = arithmetic.make_tokenizer()
VOCAB, HORIZON = TOKENIZER.tokenizer.get_vocab_size(), 2
CONFIG = DecoderConfig(
  vocab_size=VOCAB, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32,
  max_len=16,
)  # fmt: skip
POLICY = policy_model(CONFIG)
NARROW = policy_model(dataclasses.replace(CONFIG, width=8))
TREE = oracle.make_tree(VOCAB, HORIZON, eos_id=TOKENIZER.eos_id)
ROWS = 1024
# References that end a completion at once in a good part of cases.
REFERENCE_SEEDS = {CONFIG.width: 5, NARROW.config.width: 2}
PROMPTS = data.encode_prompts(
  arithmetic.prompt_records(held_out=True)[:7], TOKENIZER, max_prompt_len=10
)
# Each copy counts as a prompt of its own, so that the rows are independent draws of one thing.
COPIES = data.Prompts(
  np.repeat(PROMPTS.tokens[:1], ROWS, axis=0),
  np.repeat(PROMPTS.mask[:1], ROWS, axis=0),
  PROMPTS.records[:1] * ROWS,
)

MESH = parallel.make_mesh("data=1")


@functools.cache
def make_params(model, seed):
  # Larger than the usual initialisation, so that distributions are far from uniform.
  return jax.tree.map(lambda x: 6 * x, jax.jit(model.init)(jax.random.key(seed)))


def make_judge(
  held_out=PROMPTS,
  *,
  reference=POLICY,
  temperature=1.0,
  score=None,
  verifier=arithmetic.VERIFIER,
  num_interim_rows=8,
  drawn_at_once=None,
  read_at_once=None,
  **changes,
):
  settings = {"seed": 0, "num_eval_rows": 16, "num_samples": 2, "eval_completions": 4, **changes}
  return judging.make_judge(
    types.SimpleNamespace(**settings),
    MESH,
    POLICY,
    reference,
    None if reference is None else make_params(reference, REFERENCE_SEEDS[reference.config.width]),
    TOKENIZER,
    held_out,
    max_completion_len=HORIZON,
    temperature=temperature,
    score=score,
    verifier=verifier,
    num_interim_rows=num_interim_rows,
    drawn_at_once=drawn_at_once or settings["num_eval_rows"],
    read_at_once=read_at_once or settings["num_eval_rows"],
  )


def make_judge_fn(*arguments, **named):
  return make_judge(*arguments, **named).judge


def logits_of(model, seed, prompt=0):
  tokens = PROMPTS.tokens[prompt][PROMPTS.mask[prompt]]
  return oracle.decoder_logits(model, make_params(model, seed), TREE, tokens)


@pytest.mark.parametrize(
  ("reference", "temperature", "parts"), [(POLICY, 1.5, (300, 100)), (NARROW, 1.0, (ROWS, ROWS))]
)
def test_both_kls_are_those_of_the_enumeration(reference, temperature, parts):
  judge = make_judge_fn(
    COPIES,
    reference=reference,
    temperature=temperature,
    verifier=None,
    num_eval_rows=ROWS,
    drawn_at_once=parts[0],
    read_at_once=parts[1],
  )
  figures = judge(make_params(POLICY, 0), when="after").figures
  seed = REFERENCE_SEEDS[reference.config.width]
  pi, ref = logits_of(POLICY, 0) / temperature, logits_of(reference, seed) / temperature
  kls = {"kl_ref_exact": (pi, ref), "kl_ref_forward": (ref, pi)}
  exact = {name: float(oracle.sequence_kl(TREE, *logits)) for name, logits in kls.items()}
  lengths = [float(oracle.expected_length(TREE, logits)) for logits in (pi, ref)]
  # Far from 0 and from one another, or a swap would not show.
  errors = {name: 5 * figures[f"{name}_stderr"] for name in exact}
  assert abs(exact["kl_ref_exact"] - exact["kl_ref_forward"]) > 2 * max(errors.values())
  for (name, value), length in zip(exact.items(), lengths, strict=True):
    assert abs(figures[name] - value) < errors[name], name
    per_token = figures[f"{name}_per_token"]
    assert per_token == pytest.approx(figures[name] / length, rel=0.1), name


def most_likely(prompt):
  """Returns the greedy completion of a prompt, from its logits at every prefix."""
  logits, state, text = logits_of(POLICY, 0, prompt), 0, ""
  while state >= 0:
    token = int(jnp.argmax(logits[state]))
    text += TOKENIZER.tokenizer.decode([token])
    state = TREE.children[state, token]
  return text


def test_the_most_likely_completion_is_greedy_and_wins_the_vote():
  expected = {record["prompt"]: most_likely(i) for i, record in enumerate(PROMPTS.records)}
  assert len(set(expected.values())) > 1
  verifier = Verifier(lambda text: text, lambda text, record: text == expected[record["prompt"]])
  judge = make_judge_fn(
    verifier=verifier,
    score=lambda rollout, texts, records: np.arange(float(len(texts))),
    temperature=0.2,
    num_eval_rows=224,
    eval_completions=32,
  )
  figures = judge(make_params(POLICY, 0), when="after").figures
  assert 0.5 < figures["gold"] < 1 == figures["gold_greedy"]
  # 32 completions of each of the seven prompts, each held against its own.
  assert figures["pass_at_32"] == 1 and figures["majority_at_32"] > 0.85
  # Each prompt counts once, though they fill all rows.
  assert figures["score_greedy"] == np.arange(7).mean() != figures["score"]
  assert figures["score_greedy_stderr"] == pytest.approx(np.arange(7).std(ddof=1) / np.sqrt(7))


def test_completions_of_one_prompt_are_drawn_apart():
  seen = collections.defaultdict(list)

  def answer_of(text):
    seen["text"].append(text)
    return text

  def is_right(text, record):
    seen["prompt"].append(record["prompt"])
    return False

  verifier = Verifier(answer_of, is_right)
  prompts = PROMPTS._replace(records=[record | {"prefill": "7"} for record in PROMPTS.records])
  judge = make_judge_fn(prompts, verifier=verifier, num_eval_rows=14)
  figures = judge(make_params(POLICY, 0), when="after").figures
  # 14 rows have room for four completions of three prompts.
  assert seen["prompt"][-12:] == [PROMPTS.records[i]["prompt"] for i in range(3) for _ in range(4)]
  assert len(seen["text"]) == 12
  assert all(text[0] == "7" for text in seen["text"])
  assert any(len(set(seen["text"][i : i + 4])) > 1 for i in (0, 4, 8))
  assert figures["pass_at_4"] == figures["majority_at_4"] == 0


def test_more_completions_than_rows_are_those_of_one_prompt():
  verifier = Verifier(lambda text: text, lambda text, record: True)
  judge = make_judge_fn(verifier=verifier, num_eval_rows=2, eval_completions=3)
  figures = judge(make_params(POLICY, 0), when="after").figures
  assert figures["pass_at_3"] == figures["majority_at_3"] == 1
  assert figures["pass_at_3_stderr"] is None


@pytest.fixture(scope="module")
def judge():
  return make_judge_fn(score=lambda rollout, texts, records: np.array(rollout.old_log_probs[:, 0]))


def test_a_judge_says_the_same_each_time(judge):
  first = judge(make_params(POLICY, 0), when="before")
  other = judge(make_params(POLICY, 1), when="after")
  again = judge(make_params(POLICY, 0), when="before")
  assert again.figures == first.figures and again.samples == first.samples
  changed = {name for name, x in first.figures.items() if x != other.figures[name]}
  assert {"score", "score_greedy", "entropy", "kl_ref_exact", "kl_ref_forward"} <= changed
  assert [sample["when"] for sample in first.samples] == ["before"] * 2


def test_models_compute_a_part_of_the_rows_at_once_and_draw_each_anew(monkeypatch):
  seen, scored = collections.Counter(), []

  def counted(program):
    def of_rows(*arguments, **named):
      found = program(*arguments, **named)
      seen[len(jax.tree.leaves(found)[0])] += 1
      return found

    return of_rows

  make_programs = judging.make_judge_programs

  def counting(*arguments):
    return judging.Programs(*map(counted, make_programs(*arguments)))

  monkeypatch.setattr(judging, "make_judge_programs", counting)

  def score(rollout, texts, records):
    scored.append(len(texts))
    return np.array([len(text) for text in texts], float)

  prompts = data.Prompts(*(x[:16] for x in COPIES[:3]))
  parts, whole = (
    make_judge_fn(prompts, score=score, drawn_at_once=drawn, read_at_once=read)(
      make_params(POLICY, 0), when="after"
    )
    for drawn, read in ((6, 4), (16, 16))
  )
  # One completion of each row by both models, the likeliest, and four of some prompts are drawn in
  # three parts; the first two are read in four parts. The other judge does each at once.
  assert seen == {6: 4 * 3, 4: 2 * 4, 16: 6} and scored == [16] * 4
  tokens = parts.evaluation.rollout.tokens
  np.testing.assert_array_equal(tokens[:6], whole.evaluation.rollout.tokens[:6])
  assert len(tokens) == 16 and np.any(tokens[:6] != tokens[6:12])
  for name in ("score_greedy", "gold_greedy"):
    assert parts.figures[name] == whole.figures[name]


def test_a_prompt_that_is_not_judged_makes_no_row_longer():
  long = data.encode_prompts(
    [*PROMPTS.records, {"prompt": "10+10+10="}], TOKENIZER, max_prompt_len=10
  )
  assert long.tokens.shape[1] > PROMPTS.tokens.shape[1]
  judged = [
    make_judge_fn(prompts, num_eval_rows=7)(make_params(POLICY, 0), when="after")
    for prompts in (PROMPTS, long)
  ]
  first, other = (judgement.evaluation.rollout.tokens for judgement in judged)
  np.testing.assert_array_equal(first, other)


def test_while_it_trains_fewer_rows_are_drawn_with_the_same_noise():
  few = make_judge(num_eval_rows=14, num_interim_rows=7)
  figures = few.evaluate(make_params(POLICY, 0))
  assert figures == few.evaluate(make_params(POLICY, 0))
  # They are the first rows of those that are judged before and after.
  first = make_judge_fn(num_eval_rows=7)(make_params(POLICY, 0), when="after").figures
  known = {name: x for name, x in figures.items() if x is not None}
  assert known == pytest.approx({name: first[name] for name in known}, rel=1e-5)
  assert {"kl_ref_exact", "kl_ref_forward_stderr", "nll", "gold", "length"} <= figures.keys()
  assert not [name for name in figures if "greedy" in name or "_at_" in name]


def test_what_nothing_gives_is_not_in_the_figures_and_another_seed_draws_anew(judge):
  bare = make_judge_fn(reference=None, verifier=None, seed=1)(make_params(POLICY, 0), when="after")
  named = bare.figures
  assert not [name for name in named if "kl" in name or "_at_" in name or name == "nll"]
  for name in ("score", "gold", "score_greedy", "gold_greedy"):
    assert named[name] is None
  assert bare.evaluation.kl_exact is None and bare.samples[0]["kl_ref"] is None
  assert named["entropy"] != judge(make_params(POLICY, 0), when="after").figures["entropy"]


def test_a_completion_is_scored_by_function_else_by_model_else_0(judge):
  rollout = judge(make_params(POLICY, 0), when="after").evaluation.rollout
  model = scalar_model(CONFIG)
  params = scalar_params_from(make_params(POLICY, 0))
  params["head"] = jnp.ones_like(params["head"])
  make_score = functools.partial(judging.make_completion_score_fn, MESH, rows_at_once=5)
  texts, records = [str(i) for i in range(16)], [{"prompt": ""}] * 16

  def reward_fn(prompts, completions):
    return [float(text) for text in completions]

  own = rewards.Reward("own", 2.0, reward_fn)
  of_function = make_score([own], model, params)
  np.testing.assert_array_equal(of_function(rollout, texts, records), 2 * np.arange(16))
  of_model = make_score([], model, params)(rollout, None, None)
  mask = np.concatenate([rollout.prompt_mask, rollout.completion_mask], axis=1)
  np.testing.assert_allclose(of_model, model.scores(params, rollout.tokens, mask), rtol=1e-5)
  assert np.ptp(of_model) > 0
  both = [own, rewards.Reward(rewards.MODEL, -1.0, None)]
  of_both = make_score(both, model, params)(rollout, texts, records)
  np.testing.assert_allclose(of_both, 2 * np.arange(16) - of_model, rtol=1e-5)
  of_nothing = make_score([], None, None)(rollout, None, None)
  np.testing.assert_array_equal(of_nothing, np.zeros(16))
