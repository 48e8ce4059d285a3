"""Tests of what the programs of an iteration are given."""

import dataclasses
import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest
from small_decoders import BAG, bag_params

from experiments import grpo
from klrl import inputs, programs
from klrl.devices import parallel
from klrl.sampling import Rollout
from klrl.tasks import arithmetic, data, rewards, widths


def test_few_widths_are_compiled_and_each_is_about_half_the_one_before():
  assert widths.below(300) == [300, 150, 75, 38]
  assert widths.below(64) == [64, 32]
  assert widths.below(62) == [62]
  assert widths.below(1) == [1]


def step_of(monkeypatch, made, policy=BAG, rewards=(), max_completion_len=4, **settings):
  """Returns (the step of a run whose compiled programs are `made`, its prompts, their mask)."""
  tokenizer = arithmetic.make_tokenizer()
  # One of 40 prompts is ten times as long as the others.
  length = np.where(np.arange(40) == 7, 100, 10)
  mask = np.arange(100) >= 100 - length[:, None]
  vocab_size = tokenizer.tokenizer.get_vocab_size()
  tokens = np.where(mask, np.arange(4000).reshape(40, 100), 0)
  prompts = data.Prompts(tokens, mask, [{"prompt": "", "prefill": "7"}] * 40)
  params = bag_params(vocab_size, seed=0)
  models = inputs.Models(
    tokenizer, policy, params, {}, policy, policy, params, None, None, None, None
  )
  task = inputs.Task(prompts, prompts, max_completion_len, list(rewards), None, None)
  config = grpo.Config(batch_size=8, group_size=2, num_minibatches=1, **settings)
  setup = programs.set_up(config, parallel.make_mesh("data=1"), models, task)
  monkeypatch.setattr(programs, "make_programs", lambda *_, **__: made)
  return programs.make_step_fn(setup, None), tokens, mask


def given(monkeypatch, **settings):
  """Returns, of 20 iterations, (the prompts of the batch, what the program was given of them)."""
  batches = []

  def iterate(state, frozen, prompts, mask, rows, texts):
    batches.append((np.asarray(rows), np.asarray(prompts), np.asarray(mask)))
    return state, {}

  step, tokens, mask = step_of(monkeypatch, {"iterate": iterate}, **settings)
  for iteration in range(20):
    step(None, iteration)
  # The rows are those of what is trained on.
  late = settings.get("staleness", 0)
  for (rows, *_), (_, *columns) in zip(batches[late:], batches, strict=False):
    for whole, some in zip((tokens, mask), columns, strict=True):
      np.testing.assert_array_equal(whole[rows][:, -some.shape[1] :], some)
      assert not whole[rows][:, : -some.shape[1]].any()
  return [(7 in rows, columns[0].shape[1]) for rows, *columns in batches]


def test_a_long_prompt_costs_only_the_batches_that_hold_it(monkeypatch):
  widths = given(monkeypatch)
  assert set(widths) == {(False, 50), (True, 100)}


def test_what_depends_on_the_width_of_rollouts_has_one(monkeypatch):
  assert {width for _, width in given(monkeypatch, staleness=1)} == {100}
  turned = dataclasses.replace(BAG, config=types.SimpleNamespace(max_len=64, short_len=64))
  assert {width for _, width in given(monkeypatch, policy=turned)} == {100}


class Running:
  """A metric that the devices have not computed yet."""

  def block_until_ready(self):
    raise AssertionError("The step has waited for its update.")

  __array__ = __float__ = block_until_ready


def rollout_of(prompts, mask, max_len, *, length):
  """Returns a rollout whose last completion has `length` tokens, and the others have three."""
  lengths = np.where(np.arange(8) == 7, length, 3)
  drawn = jnp.asarray(np.arange(max_len) < lengths[:, None], jnp.int32)
  tokens = jnp.concatenate([prompts, drawn], axis=1)
  log_probs = -1.0 * drawn
  return Rollout(tokens, mask, drawn > 0, jnp.ones(8, bool), log_probs, log_probs)


def own_reward(score):
  def scores(prompts, completions, **columns):
    return list(map(score, completions))

  return rewards.Reward("own", 1.0, scores)


@pytest.mark.parametrize("scores", ["host", "device"])
def test_the_padding_of_completions_that_are_short_is_not_trained_on(scores, monkeypatch):
  given, lengths = [], iter([3, 64, 65, 256, 20])
  length_of = functools.partial(next, lengths)

  def update(state, frozen, rollout, scores_or_rows, texts):
    given.append(rollout)
    return state, {}

  def sampled(state, frozen, prompts, mask):
    return rollout_of(prompts, mask, 256, length=length_of())

  def fitting(state, frozen, rollout):
    return jnp.zeros(4, bool)

  made = {"rollout": sampled, "update": update, "fitting": fitting}
  own = [own_reward(len)] if scores == "host" else []
  step, *_ = step_of(monkeypatch, made, rewards=own, max_completion_len=256)
  for iteration in range(5):
    step(None, iteration)
  assert [x.completion_mask.shape[1] for x in given] == [64, 64, 128, 256, 64]
  for rollout, length in zip(given, [3, 64, 65, 256, 20], strict=True):
    prompt_len = rollout.prompt_mask.shape[1]
    for x in (rollout.completion_mask, rollout.tokens[:, prompt_len:], -rollout.old_log_probs):
      np.testing.assert_array_equal(x.sum(axis=1), [3] * 7 + [length])


@pytest.mark.parametrize("scores", ["host", "device"])
def test_texts_are_packed_where_they_fit_and_it_saves_tokens(scores, monkeypatch):
  given, asked = [], []
  # A prompt of 50 tokens is shared by two: a plain row has 25 + 256, a packed one 50 + 256.
  cases = {  # (longest completion, what fits): what is expected
    (256, (True, True, True, True)): 0.25,
    (256, (False, False, True, True)): 0.5,
    (256, (False, False, False, True)): 0.75,
    (256, (False, False, False, False)): None,
    (128, (False, True, True, True)): 0.375,  # 0.375 * 306 is much less than 25 + 128,
    (128, (False, False, True, True)): None,  # and 0.5 * 306 is not.
    (64, (True, True, True, True)): None,  # Narrow rows are as good.
  }
  turns = iter(cases)

  def sampled(state, frozen, prompts, mask):
    state.append(next(turns))
    return rollout_of(prompts, mask, 256, length=state[-1][0])

  def fitting(state, frozen, rollout):
    asked.append(state[-1])
    return jnp.array(state[-1][1])

  def update(state, frozen, rollout, scores_or_rows, texts):
    given.append(rollout)
    return state, {}

  made = {"rollout": sampled, "update": update, "fitting": fitting}
  own = [own_reward(len)] if scores == "host" else []
  step, *_ = step_of(monkeypatch, made, rewards=own, max_completion_len=256)
  monkeypatch.setattr(programs, "prompt_rows", lambda *_, **__: np.arange(8, 16))  # of 50 tokens
  for _ in cases:
    step([], 0)
  found = [rollout.packing and rollout.packing.share for rollout in given]
  assert found == list(cases.values())
  assert [case[0] for case in asked] == [256] * 4 + [128] * 2  # No other might save enough.
  widths = [rollout.completion_mask.shape[1] for rollout in given]
  assert widths == [256, 256, 256, 256, 256, 128, 64]


def test_what_no_reward_scored_is_not_packed(monkeypatch):
  given = []

  def update(state, frozen, rollout, scores, texts):
    given.append(rollout.packing)
    return state, {}

  def sampled(state, frozen, prompts, mask):
    return rollout_of(prompts, mask, 256, length=256)

  made = {"rollout": sampled, "update": update, "fitting": lambda *_: jnp.ones(4, bool)}
  for own in (len, lambda text: None):
    step, *_ = step_of(monkeypatch, made, rewards=[own_reward(own)], max_completion_len=256)
    step(None, 0)
  assert given == [programs.Packing(0.25, 2), None]


def test_late_rollouts_are_scored_while_the_next_are_drawn(monkeypatch):
  """The state says which rollout waits in it, and a rollout shows its iteration by its length."""
  events = []

  def rollout(state, frozen, prompts, mask):
    events.append(f"draw {state}")
    return rollout_of(prompts, mask, 16, length=4 + state)

  def update(state, frozen, rollout, scores, texts):
    drawn = int(rollout.completion_mask[7].sum()) - 4
    events.append(f"train {state}: {drawn} waits, scores of {int(scores[7]) - 4}")
    return state + 1, {}

  def waiting(state, frozen):
    events.append("read the state")
    return made_of(state - 1)

  def made_of(number):
    tokens, mask = jnp.zeros((8, 100), jnp.int32), jnp.ones((8, 100), bool)
    return rollout_of(tokens, mask, 16, length=4 + number)

  def score(completions, **columns):
    events.append(f"score {len(completions[7].split()) - 4}")
    return [len(x.split()) for x in completions]

  def words(tokenizer, rollout):
    return [" ".join("x" * n) for n in rollout.completion_mask.sum(axis=1)]

  monkeypatch.setattr(data, "completion_texts", words)
  made = {"rollout": rollout, "update": update, "waiting": waiting}
  settings = {"rewards": [rewards.Reward("own", 1.0, score)], "staleness": 1}
  settings["max_completion_len"] = 16
  step, *_ = step_of(monkeypatch, made, **settings)
  for iteration in range(3):
    step(iteration, iteration)
  first = ["draw 0", "score 0", "train 0: 0 waits, scores of 0"]
  second = ["draw 1", "score 0", "train 1: 1 waits, scores of 0"]
  third = ["draw 2", "score 1", "train 2: 2 waits, scores of 1"]
  assert events == [*first, *second, *third]
  # A run that goes on has nothing in memory but its state.
  events.clear()
  step, *_ = step_of(monkeypatch, made, **settings)
  step(2, 2)
  assert events == ["read the state", *third]


def test_a_late_rollout_is_packed_as_it_fits_itself_once_it_is_scored(monkeypatch):
  """A rollout shows its iteration by the length of its first row; that of 1 fits nowhere."""
  events = []

  def drawn_in(rollout):
    return int(rollout.completion_mask[0].sum())

  def rollout(state, frozen, prompts, mask):
    events.append(f"draw {state}")
    chosen = jnp.arange(256)[None] < jnp.where(jnp.arange(8) < 7, state, 256)[:, None]
    return rollout_of(prompts, mask, 256, length=256)._replace(completion_mask=chosen)

  def fitting(state, frozen, rollout):
    events.append(f"ask {drawn_in(rollout)}")
    return jnp.full(4, drawn_in(rollout) != 1)

  def update(state, frozen, rollout, scores, texts):
    share = rollout.packing and rollout.packing.share
    events.append(f"train {drawn_in(rollout)} waits, {share}")
    return state + 1, {}

  def score(completions, **columns):
    events.append("score")
    return [0.0] * len(completions)

  made = {"rollout": rollout, "fitting": fitting, "update": update}
  own = [rewards.Reward("own", 1.0, score)]
  step, *_ = step_of(monkeypatch, made, rewards=own, max_completion_len=256, staleness=1)
  for iteration in range(4):
    step(iteration, iteration)
  assert events == [
    *("draw 0", "ask 0", "score", "train 0 waits, 0.25"),
    *("draw 1", "score", "ask 0", "train 1 waits, 0.25"),
    *("draw 2", "score", "ask 1", "train 2 waits, None"),
    *("draw 3", "score", "ask 2", "train 3 waits, 0.25"),
  ]


def test_a_step_with_a_reward_on_the_host_does_not_wait_for_its_update(monkeypatch):
  def rollout(state, frozen, prompts, mask):
    return rollout_of(prompts, mask, 4, length=4)

  def update(state, frozen, rollout, scores, texts):
    return state + 1, {"policy/loss": (Running(), Running())}

  made, read = {"rollout": rollout, "update": update}, []
  step, *_ = step_of(monkeypatch, made, rewards=[own_reward(lambda x: read.append(x) or len(x))])
  state = 0
  for iteration in range(2):
    state, _ = step(state, iteration)
  assert state == 2
  assert len(read) == 16 and all(text[0] == "7" for text in read)  # how the answer begins
