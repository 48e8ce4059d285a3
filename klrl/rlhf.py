"""A whole RLHF run around a learner: models, prompts, scores, before and after.

    inputs.load_models, inputs.load_task -> run: evaluate, iterate, evaluate, save, summarise

The learner decides how a rollout changes the state; everything here is the same for all of them.
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from klrl import evaluation, judging
from klrl.algorithm import completions, learner, memory, objective
from klrl.algorithm.epochs import value_params
from klrl.devices import parallel, processes
from klrl.figures import labels
from klrl.inputs import Models, Task
from klrl.models import ScalarModel, TokenizerInfo, join, merge_lora, save_policy, save_scalar
from klrl.run import loop, progress
from klrl.run.summary import write_summary
from klrl.run.workdir import write_text
from klrl.sampling import Rollout, make_sample_fn
from klrl.tasks import arithmetic, data, reward_calls, rewards

_SLOW_REWARD_SHARE = 0.5
_LARGEST_KL_OLD = 5.0
_TOO_FAR = (
  "The steps of iteration {done} took the policy far from the one that had sampled: KL(old||pi) is "
  "{value} nats per sequence. Such steps rarely help. Try a lower --learning_rate, or fewer steps "
  "on a rollout."
)


# Figures shown while a run goes on.
_SHOWN = labels(
  "score/mean", "gold/mean", "kl/ref_k1", "controller/beta", "controller/at_bound", "rollout/length"
)


class Setup(NamedTuple):
  """What does not change during a run, nor between the members of a sweep."""

  config: Any
  models: Models
  task: Task
  mesh: jax.sharding.Mesh
  frozen: dict  # parameters on the devices: of the base, the reference, the reward model
  sample: Callable[..., Rollout]


def set_up(config, mesh, models: Models, task: Task) -> Setup:
  """Returns the setup of a run, its frozen parameters on the devices."""
  frozen = {
    "base": models.base,
    "reference": models.reference_params,
    "reward_model": models.reward_params,
  }
  sample = make_sample_fn(
    models.sampler,
    max_completion_len=task.max_completion_len,
    eos_id=models.tokenizer.eos_ids,
    pad_id=models.tokenizer.pad_id,
  )
  return Setup(config, models, task, mesh, parallel.put_once(mesh, frozen), sample)


def init_state(setup: Setup) -> learner.TrainState:
  """Returns the state before the first iteration, on the devices, by `parallel.state_shardings`.

  Its buffers are its own, and no device ever holds more of parameters and moments than its shard.
  """
  config, models = setup.config, setup.models
  params = {"policy": models.policy_params}
  if models.value_model is not None:
    params["value"] = models.value_params
  own = functools.partial(parallel.put_own, setup.mesh)
  state = learner.init_state(config, own(params), jax.random.key(config.seed))
  replay = config.staleness and memory.empty_replay(_rollout_shapes(setup), config.staleness)
  state = state._replace(
    reference=None if config.reference_update == "frozen" else own(params["policy"]),
    replay=replay or None,
  )
  return parallel.put(state, parallel.state_shardings(setup.mesh, state))


def run(config, workdir: pathlib.Path, models: Models, task: Task, *, title: str) -> dict[str, Any]:
  """Trains, evaluates before and after, writes a run's files but the report; returns the summary.

  Args:
    config: the experiment's config.
    workdir: the run's folder.
    models: what `inputs.load_models` returned.
    task: what `inputs.load_task` returned.
    title: what the progress display calls the run.
  """
  figures = announce(config)
  setup = set_up(config, parallel.make_mesh(config.mesh), models, task)
  state = init_state(setup)
  shardings = parallel.state_shardings(setup.mesh, state)
  start, state = loop.restore_or_init(workdir, state, keep=config.keep)
  judge = make_judge_fn(setup)
  before = judge_start(setup, judge, start)
  step = make_step_fn(setup, shardings)
  iterations = loop.run(step, state, start=start, workdir=workdir, **config.loop_settings())
  iterations = progress.warned(iterations, "kl/old_k1", _LARGEST_KL_OLD, _TOO_FAR)
  state = progress.watch(
    iterations, state, title=title, start=start, total=config.num_iterations, keys=_SHOWN
  )
  after = judge(state.params, when="after")
  return write_results(workdir, setup, state.params, before, after, figures)


def announce(config) -> dict[str, Any]:
  """Says on screen what the KL penalty is and what is wrong with it; returns that as figures."""
  warnings = objective.warnings_of(config)
  description = objective.description(objective.penalty_of(config), kl_refresh=config.kl_refresh)
  if config.divergence != "reverse":
    name = {"forward": "KL(ref||pi)", "jensen_shannon": "Jensen-Shannon divergence"}
    description = (
      f"KL penalty: token {name[config.divergence]}, exact, at the prefixes that the policy writes."
    )
  progress.console.print(description, soft_wrap=True)
  for warning in warnings:
    progress.warn(warning)
  return {"kl_penalty": description} | ({"warnings": warnings} if warnings else {})


def make_judge_fn(setup: Setup) -> Callable[..., judging.Judgement]:
  """Returns judge(params, *, when) of trained parameters that are on the devices."""
  config, models, task, mesh, frozen, _ = setup
  score = judging.make_completion_score_fn(
    mesh, task.rewards, models.reward_model, frozen["reward_model"]
  )
  judge = judging.make_judge_fn(
    config,
    mesh,
    models.policy,
    models.reference,
    frozen["reference"],
    models.tokenizer,
    task.held_out,
    max_completion_len=task.max_completion_len,
    temperature=config.temperature,
    score=score,
    verifier=task.verifier,
  )
  return lambda params, *, when: judge(join(frozen["base"], params)["policy"], when=when)


def judge_start(setup: Setup, judge, start: int) -> judging.Judgement:
  """Returns the judgement of the untrained policy; a run that starts here is checked by it."""
  params = {"policy": setup.models.policy_params}
  params = parallel.put(params, parallel.state_shardings(setup.mesh, params))
  before = judge(params, when="before")
  if start == 0:
    evaluation.step_zero_checks(
      before.evaluation,
      starts_as_reference=not setup.config.reference,
      dtype=setup.config.dtype,
    )
  return before


def write_results(workdir: pathlib.Path, setup: Setup, params, before, after, figures) -> dict:
  """Writes models, samples and `summary.json` of a trained run, and returns the summary.

  Where the task is enumerated the summary also has `tree.Exact.figures`, and `optimum.json` the
  frontier of the best policies.

  Args:
    workdir: the run's folder.
    setup: of the run.
    params: what was trained.
    before: the judgement at the start.
    after: the judgement of `params`.
    figures: what else the summary is to hold.
  """
  models = setup.models
  params = parallel.fetch(join(setup.frozen["base"], params))
  policy = merge_lora(models.policy.config, params["policy"])
  processes.on_writer(save_policy)(workdir / "model", *policy, models.tokenizer)
  if models.value_model is not None:
    value = merge_lora(models.value_model.config, value_params(setup.config, params))
    processes.on_writer(save_scalar)(workdir / "value_model", *value, models.tokenizer)
  samples = "".join(json.dumps(record) + "\n" for record in before.samples + after.samples)
  write_text(workdir / "samples.jsonl", samples)
  found = evaluation.before_and_after(before.figures, after.figures)
  if (exact := setup.task.exact) is not None:
    config, temperature = setup.config, setup.config.temperature
    beta = config.beta if config.controller == "fixed" else config.beta_final
    found |= exact.figures(params["policy"], beta=beta, temperature=temperature)
    frontier = exact.frontier(temperature=temperature)
    write_text(workdir / "optimum.json", json.dumps(frontier) + "\n")
  return write_summary(workdir, found | figures, setup.config.num_iterations)


def _rollout_shapes(setup: Setup):
  """Returns the shapes of what is sampled in an iteration."""
  config, models, training = setup.config, setup.models, setup.task.training
  params = join(models.base, {"policy": models.policy_params})["policy"]
  num_rows = config.oversampling * config.batch_size
  prompts = training.tokens[:1].repeat(num_rows, axis=0)
  mask = training.mask[:1].repeat(num_rows, axis=0)
  return jax.eval_shape(setup.sample, params, prompts, mask, jax.random.key(0), temperature=1.0)


def _alone(fn: Callable, in_axes) -> Callable:
  """Returns `fn`: the `lift` of a run by itself."""
  del in_axes
  return fn


def make_programs(
  setup: Setup, shardings, *, lift=_alone, guard=lambda fn: fn
) -> dict[str, Callable]:
  """Returns the compiled functions of an iteration; those that change the state donate it.

  `iterate(state, frozen, prompts, prompt_mask, rows, pretraining) -> (state, metrics)` alone, or
  where the host scores `rollout(state, frozen, prompts, prompt_mask, rows) -> rollout` and
  `update(state, frozen, rollout, scores, pretraining) -> (state, metrics)`. `frozen` are the
  distinct arrays in that of `setup`.

  Args:
    setup: of the run.
    shardings: of the state.
    lift: lift(fn, in_axes) makes `fn` of one run one of several, as `vmap` does; by default there
      is one. Metrics then have a leading axis.
    guard: made of each function (state, ...) -> (state, ...) before it is lifted.
  """
  config, models, task, mesh, frozen, sample = setup
  # A reference that follows the policy is of its making.
  reference = models.reference if config.reference_update == "frozen" else models.policy
  parts = (config, task.max_completion_len, models.policy, models.value_model, reference)
  _, whole = parallel.distinct(frozen)

  def lifted(fn, in_axes):
    of_whole = lift(guard(fn), in_axes)

    @functools.wraps(fn)
    def of_distinct(state, distinct, *arguments):
      return of_whole(state, whole(distinct), *arguments)

    return parallel.on_mesh(mesh, of_distinct)

  jit = functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))

  if not task.rewards:
    score = make_score_fn(models.reward_model)
    gold = make_gold_fn(task.training, models.tokenizer)
    iterate = learner.make_iteration_fn(*parts, sample, score, gold)
    return {"iterate": jit(lifted(iterate, (0, None, None, None, None, None)))}
  update = learner.make_update_fn(*parts)

  def rollout(state, *arguments):
    return state, learner.sample_rollout(sample, state, *arguments)

  def update_after_sampling(state, *arguments):
    return update(learner.after_sampling(state), *arguments)

  sampling = lifted(rollout, (0, None, None, None, None))
  return {
    "rollout": jax.jit(lambda *arguments: sampling(*arguments)[1]),
    "update": jit(lifted(update_after_sampling, (0, None, 0, 0, None))),
  }


def prompt_rows(config, iteration: int, num_prompts: int) -> np.ndarray:
  """Returns which prompt each completion of an iteration continues, int.

  The `group_size` completions of a prompt stand side by side, as `advantages` reads them. `config`
  is read for data_seed, batch_size, oversampling and group_size.
  """
  num_groups = config.oversampling * config.batch_size // config.group_size
  rows = data.batch_rows(config.data_seed, iteration, num_groups, num_prompts)
  return np.repeat(rows, config.group_size)


def make_step_fn(setup: Setup, shardings, *, lift=_alone, guard=lambda fn: fn) -> Callable:
  """Returns step(state, iteration) -> (state, metrics) for `loop.run`; arguments as above."""
  config, models, task, mesh, frozen, _ = setup
  programs = make_programs(setup, shardings, lift=lift, guard=guard)
  distinct, _ = parallel.distinct(frozen)
  rows_sharding = parallel.by_rows(mesh)
  prompts, prompt_mask = parallel.put(
    (task.training.tokens, task.training.mask), parallel.replicated(mesh)
  )

  def rows_of(iteration):
    return prompt_rows(config, iteration, len(task.training.tokens))

  def pretraining_of(iteration):
    if task.pretraining is None:
      return None
    num_texts = len(task.pretraining.tokens)
    rows = data.batch_rows(config.data_seed + 1, iteration, config.batch_size, num_texts)
    return parallel.put(data.take(task.pretraining, rows), rows_sharding)

  if not task.rewards:

    def step(state, iteration):
      rows = parallel.put(rows_of(iteration), rows_sharding)
      texts = pretraining_of(iteration)
      return programs["iterate"](state, distinct, prompts, prompt_mask, rows, texts)

    return step

  score = lift(make_score_fn(models.reward_model), (None, 0, None))
  score = jax.jit(parallel.on_mesh(mesh, score))
  gold = make_gold_fn(task.training, models.tokenizer)
  gold = gold and jax.jit(lift(gold, (0, None)))
  reads_model = any(reward.fn is None for reward in task.rewards)
  notice_slow = _SlowRewardNotice()

  def step_with_host_reward(state, iteration):
    rows = rows_of(iteration)
    began = time.monotonic()
    device_rows = parallel.put(rows, rows_sharding)
    rollout = programs["rollout"](state, distinct, prompts, prompt_mask, device_rows)
    # One call scores everything: rows of all members beneath each other.
    shape = rollout.finished.shape
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(shape) :]), parallel.fetch(rollout))
    texts = data.completion_texts(models.tokenizer, flat)
    sampled = time.monotonic()
    records = [task.training.records[row] for row in rows] * (len(texts) // len(rows))
    model_scores = None
    if reads_model:
      model_scores = parallel.fetch(score(frozen, rollout, device_rows)).reshape(-1)
    weighted = processes.on_writer(rewards.weighted_scores)
    ids = reward_calls.Ids(*data.token_ids(flat))
    scores, each = weighted(task.rewards, records, texts, model_scores, ids)
    scored = time.monotonic()
    scores = parallel.put(scores.reshape(shape), parallel.by_rows(mesh, members=len(shape) > 1))
    state, pairs = programs["update"](state, distinct, rollout, scores, pretraining_of(iteration))
    jax.block_until_ready(pairs)
    if len(each) > 1:
      sums = {name: x.reshape(shape).sum(axis=-1) for name, x in each.items()}
      pairs |= {f"score/{name}": (x, len(rows)) for name, x in sums.items()}
    if gold is not None:
      pairs["gold/mean"] = (gold(rollout, device_rows).sum(axis=-1), len(rows))
    notice_slow(scored - sampled, time.monotonic() - began, len(texts))
    return state, pairs

  return step_with_host_reward


def make_score_fn(reward_model: ScalarModel | None) -> Callable:
  """Returns score(frozen, rollout, rows) -> [B], the reward model's score; 0 without one."""
  if reward_model is None:
    return lambda frozen, rollout, rows: jnp.zeros(rollout.finished.shape)
  return lambda frozen, rollout, rows: completions.reward_model_scores(
    reward_model, frozen["reward_model"], rollout
  )


def make_gold_fn(prompts: data.Prompts, tokenizer: TokenizerInfo) -> Callable | None:
  """Returns gold(rollout, rows) -> [B], 1 for a right completion, else 0; None without answers."""
  if prompts.answers is None:
    return None
  answers = jnp.asarray(prompts.answers)
  return lambda rollout, rows: arithmetic.accuracy(
    completions.completion_tokens(rollout),
    rollout.completion_mask,
    answers[rows],
    pad_id=tokenizer.pad_id,
  )


class _SlowRewardNotice:
  """Says once when the user's reward function takes most of an iteration."""

  def __init__(self):
    self._said = False

  def __call__(self, reward_seconds: float, iteration_seconds: float, num: int) -> None:
    slow = reward_seconds > 1.0 and reward_seconds > _SLOW_REWARD_SHARE * iteration_seconds
    if slow and not self._said:
      self._said = True
      progress.console.print(
        f"The reward function takes {reward_seconds:.1f} s for {num} completions, "
        f"{reward_seconds / iteration_seconds:.0%} of an iteration."
      )
