"""An iteration compiles each of its programs once, and nothing in it waits for the host."""

import collections
import contextlib
import functools
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_decoders import BAG, BAG_VALUE, bag_params, bag_value_params

from experiments import grpo, sweep
from klrl import inputs, population, programs, sampling
from klrl.algorithm import completions
from klrl.devices import parallel
from klrl.tasks import arithmetic, data, widths
from klrl.tasks.rewards import Reward

COMPILED = "/jax/core/compile/backend_compile_duration"
NUM_ITERATIONS = 3
# Exact KL in every second iteration, so that both branches of it run.
SETTINGS = {"batch_size": 12, "group_size": 4, "num_minibatches": 1, "kl_every": 2}


def setup_of(config, rewards, max_completion_len=4):
  """Returns what a run of GRPO on small models starts from."""
  tokenizer = arithmetic.make_tokenizer()
  size = tokenizer.tokenizer.get_vocab_size()
  records = arithmetic.prompt_records(held_out=False)[:12]
  prompts = data.encode_prompts(records, tokenizer, max_prompt_len=8)
  policy, reference = (bag_params(size, seed=seed) for seed in (0, 1))
  scorer = BAG_VALUE, bag_value_params(size, seed=2)
  models = inputs.Models(tokenizer, BAG, policy, {}, BAG, BAG, reference, None, None, *scorer)
  task = inputs.Task(prompts, prompts, max_completion_len, rewards, None, None)
  return programs.set_up(config, parallel.make_mesh("data=2"), models, task)


def run_of(rewards, *, is_ahead=False):
  """Returns (step, state) of a run by itself."""
  setup = setup_of(grpo.Config(**SETTINGS), rewards)
  state = programs.init_run(setup)
  shardings = parallel.state_shardings(setup.mesh, state)
  return programs.make_step_fn(setup, shardings, ahead_of=state if is_ahead else None), state


@pytest.mark.parametrize(
  ("batch_size", "ends", "expected"),
  [(12, 1 / 2, "jit(shortened)"), (24, 1 / 3, "jit(fitting)")],
  ids=["all are short", "some are short"],
)
def test_an_update_of_short_completions_is_that_of_the_whole_width(
  batch_size, ends, expected, monkeypatch
):
  monkeypatch.setattr(widths, "_FEWEST_COLUMNS", 4)
  config = grpo.Config(**SETTINGS | {"batch_size": batch_size})
  setup, compiled, found = setup_of(config, [], max_completion_len=16), [], []
  # A share of the tokens ends a completion.
  size = setup.models.tokenizer.tokenizer.get_vocab_size()
  limits = {"max_completion_len": 16, "eos_id": range(int(ends * size)), "pad_id": 0}
  setup = setup._replace(sample=sampling.make_sample_fn(BAG, **limits))
  packings, packed = set(), completions._packed

  def noting_packed(fn, rollout, *columns):
    packings.add(rollout.packing)
    return packed(fn, rollout, *columns)

  monkeypatch.setattr(completions, "_packed", noting_packed)
  for _ in range(2):
    state = programs.init_run(setup)
    with noted(compiled.append):
      step = programs.make_step_fn(setup, parallel.state_shardings(setup.mesh, state))
      state, pairs = step(state, 0)
    found.append(jax.device_get((state.params, pairs)))
    monkeypatch.setattr(programs, "widths_of_completions", lambda setup: [16])
  assert {expected, "jit(scored_update)", "jit(iteration)"} <= set(compiled)
  assert len(packings) == (expected == "jit(fitting)")
  chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-4)


def test_a_run_whose_lengths_change_compiles_an_update_for_few_of_them(monkeypatch):
  """They are, for each width of prompts, three widths of completions and four packings."""
  max_len, prompt_lens = 32, np.where(np.arange(64) % 16 == 7, 8, 3)
  monkeypatch.setattr(widths, "_FEWEST_COLUMNS", 4)
  config = grpo.Config(**SETTINGS | {"batch_size": 32, "group_size": 2})
  setup, compiled = setup_of(config, [], max_len), collections.Counter()
  drawn = setup.sample
  mask = np.arange(8) >= 8 - prompt_lens[:, None]
  prompts = data.Prompts(mask.astype(np.int32), mask, [{}] * len(mask))

  def sample(*arguments, temperature):
    """Draws completions of two tokens and some longer ones; how many and how long is drawn too."""
    keys = jax.random.split(arguments[-1], 3)
    share, longest = jax.random.uniform(keys[0]), 2 ** jax.random.randint(keys[1], (), 2, 6)
    is_long = jax.random.uniform(keys[2], (config.batch_size,)) < share
    lengths = jnp.where(is_long, longest, 2).at[0].set(longest)
    chosen = jnp.arange(max_len)[None] < lengths[:, None]
    return drawn(*arguments, temperature=temperature)._replace(completion_mask=chosen)

  def make_update_fn(*parts, **options):
    def scored_update(state, frozen, rollout, rows, pretraining):
      state = state._replace(key=jax.random.fold_in(state.key, 1), iteration=state.iteration + 1)
      return state, {"policy/loss": (rollout.completion_mask.sum(), 1.0)}

    return scored_update

  # What is compiled depends on what an update is given; the learner's own takes long.
  monkeypatch.setattr(programs.learner, "make_scored_update_fn", make_update_fn)
  setup = setup._replace(task=setup.task._replace(training=prompts), sample=sample)
  state = programs.init_run(setup)
  step = programs.make_step_fn(setup, parallel.state_shardings(setup.mesh, state))
  with noted(lambda name: compiled.update([name])):
    for iteration in range(100):
      state, _ = step(state, iteration)
  assert compiled == {
    "jit(rollout)": 2,
    "jit(used_columns)": 1,
    "jit(fitting)": 2,
    "jit(shortened)": 2 * 2,
    "jit(scored_update)": 2 * (3 + 4),
  }


def members():
  """Returns (step, state) of two members of a sweep."""
  config = sweep.config_class("grpo")(sweep="beta=0.1,0.5", mesh="sweep=2", **SETTINGS)
  found = [member.config for member in sweep.members_of(config)]
  setup = setup_of(found[0], [])
  setup = setup._replace(mesh=parallel.sweep_mesh("sweep=2", len(found)))
  frozen = {"base": {}, "reference": setup.models.reference_params}
  frozen["reward_model"] = setup.models.reward_params
  setup = setup._replace(frozen=parallel.put_once(setup.mesh, frozen))
  state, shardings = population.init_members(setup, found)
  lift = functools.partial(parallel.map_members, setup.mesh, members_per_batch=1)
  step = programs.make_step_fn(setup, shardings, lift=lift, guard=population.guarded)
  return step, state


def of_the_host(completions, **columns):
  return np.arange(len(completions)) / 10


@contextlib.contextmanager
def noted(note):
  """Calls `note(name)` for each program that is compiled."""

  def listener(event, _, *, fun_name="", **more):
    if event == COMPILED:
      note(fun_name)

  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    yield
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)


def test_what_is_compiled_ahead_is_not_compiled_again_and_leaves_no_memory(monkeypatch):
  compiled, given_back = [], []
  monkeypatch.setattr(programs.free_memory, "give_back", lambda: given_back.append(len(compiled)))
  with noted(lambda name: compiled.append((name, threading.current_thread().name))):
    step, state = run_of([Reward("own", 1.0, of_the_host)], is_ahead=True)
    step(state, 0)
  expected = ["jit(rollout)", "jit(update_after_sampling)"]
  assert sorted(name for name, thread in compiled if thread == "compile ahead") == expected
  assert not {name for name, thread in compiled if thread != "compile ahead"} & set(expected)
  assert len(given_back) == 2


@pytest.mark.parametrize(
  ("made", "expected"),
  [
    (lambda: run_of([]), ["jit(iteration)"]),
    (
      lambda: run_of([Reward("own", 1.0, of_the_host)]),
      ["jit(rollout)", "jit(update_after_sampling)"],
    ),
    (members, ["jit(iteration)"]),
  ],
  ids=["scores of the device", "scores of the host", "members of a sweep"],
)
def test_an_iteration_compiles_its_programs_once_and_moves_nothing_unasked(made, expected):
  step, state = made()
  compiled = [[] for _ in range(NUM_ITERATIONS)]
  iteration = 0

  with noted(lambda name: compiled[iteration].append(name)):
    for iteration in range(NUM_ITERATIONS):
      # What is put or fetched by name is allowed: rows, and what a reward of the host reads.
      with jax.transfer_guard("disallow"):
        state, pairs = step(state, iteration)
  assert sorted(compiled[0]) == sorted(expected)
  assert compiled[1:] == [[]] * (NUM_ITERATIONS - 1)
  assert "kl/ref_exact" in pairs
