"""Tests of what the programs of an iteration are given."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
from small_decoders import BAG, bag_params

from experiments import grpo
from klrl import inputs, programs
from klrl.devices import parallel
from klrl.sampling import Rollout
from klrl.tasks import arithmetic, data, rewards


def test_few_widths_are_compiled_and_each_is_about_half_the_one_before():
  assert programs.prompt_widths(300) == [300, 150, 75, 38]
  assert programs.prompt_widths(64) == [64, 32]
  assert programs.prompt_widths(62) == [62]
  assert programs.prompt_widths(1) == [1]


def step_of(monkeypatch, made, policy=BAG, rewards=(), **settings):
  """Returns (the step of a run whose compiled programs are `made`, its prompts, their mask)."""
  tokenizer = arithmetic.make_tokenizer()
  # One of 40 prompts is ten times as long as the others.
  length = np.where(np.arange(40) == 7, 100, 10)
  mask = np.arange(100) >= 100 - length[:, None]
  vocab_size = tokenizer.tokenizer.get_vocab_size()
  tokens = np.where(mask, np.arange(4000).reshape(40, 100), 0)
  prompts = data.Prompts(tokens, mask, [{"prompt": ""}] * 40)
  params = bag_params(vocab_size, seed=0)
  models = inputs.Models(
    tokenizer, policy, params, {}, policy, policy, params, None, None, None, None
  )
  task = inputs.Task(prompts, prompts, 4, list(rewards), None, None)
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
  for rows, *columns in batches:
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


def test_a_step_with_a_reward_on_the_host_does_not_wait_for_its_update(monkeypatch):
  def rollout(state, frozen, prompts, mask):
    drawn = jnp.ones((8, 4), jnp.int32)
    tokens = jnp.concatenate([prompts, drawn], axis=1)
    log_probs = jnp.zeros(drawn.shape)
    return Rollout(tokens, mask, drawn > 0, jnp.ones(8, bool), log_probs, log_probs)

  def update(state, frozen, rollout, scores, texts):
    return state + 1, {"policy/loss": (Running(), Running())}

  reward = rewards.Reward("own", 1.0, lambda prompts, completions: [0.5] * len(completions))
  made = {"rollout": rollout, "update": update}
  step, *_ = step_of(monkeypatch, made, rewards=[reward])
  state = 0
  for iteration in range(2):
    state, _ = step(state, iteration)
  assert state == 2
