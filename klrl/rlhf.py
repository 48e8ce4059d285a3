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

from klrl import completions, evaluation, learner, loop, objective, parallel, progress
from klrl.inputs import Models, Task
from klrl.models import ScalarModel, TokenizerInfo, save_policy, save_scalar
from klrl.ops import ControllerState
from klrl.optimizer import copy, init_optimizer
from klrl.report import write_report
from klrl.sampling import make_sample_fn
from klrl.summary import write_summary
from klrl.tasks import arithmetic, data, rewards

_SLOW_REWARD_SHARE = 0.5


def init_state(config, models: Models) -> learner.TrainState:
  """Returns the state before the first iteration; its buffers are its own."""
  params = {"policy": models.policy_params}
  if models.value_model is not None:
    params["value"] = models.value_params
  params = copy(params)
  return learner.TrainState(
    params=params,
    opt_state=init_optimizer(params),
    controller=ControllerState(
      jnp.float32(config.beta if config.kl_placement != "none" else 0.0), jnp.int32(0)
    ),
    trust_region=ControllerState(jnp.float32(config.trust_region_beta), jnp.int32(0)),
    hypers=learner.hypers_from_config(config),
    key=jax.random.key(config.seed),
    iteration=jnp.int32(0),
  )


# Figures shown while a run goes on: metric, label.
_SHOWN = (
  ("score/mean", "score"),
  ("gold/mean", "gold"),
  ("kl/ref_k1", "KL to reference, nats/sequence"),
  ("controller/beta", "beta"),
  ("rollout/length", "length"),
)


def run(config, workdir: pathlib.Path, models: Models, task: Task, *, title: str) -> dict[str, Any]:
  """Trains, evaluates before and after, writes all files of a run and returns the summary.

  Args:
    config: the experiment's config.
    workdir: the run's folder.
    models: what `inputs.load_models` returned.
    task: what `inputs.load_task` returned.
    title: what the progress display calls the run.
  """
  warnings = objective.warnings_of(config)
  description = objective.description(objective.penalty_of(config), kl_refresh=config.kl_refresh)
  if config.divergence == "forward":
    description = "KL penalty: token KL(ref||pi), exact, at the prefixes that the policy writes."
  progress.console.print(description, markup=False, soft_wrap=True)
  for warning in warnings:
    progress.console.print(f"[bold yellow]Warning:[/] {warning}", soft_wrap=True)
  mesh = parallel.make_mesh(config.mesh)
  state = init_state(config, models)
  shardings = parallel.state_shardings(mesh, state)
  state = jax.device_put(state, shardings)
  frozen = {"reference": models.reference_params, "reward_model": models.reward_params}
  frozen = jax.device_put(frozen, parallel.state_shardings(mesh, frozen))
  start, state = loop.restore_or_init(workdir, state, keep=config.keep)
  sample = make_sample_fn(
    models.policy,
    max_completion_len=task.max_completion_len,
    eos_id=models.tokenizer.eos_id,
    pad_id=models.tokenizer.pad_id,
  )
  judge = _Judge(config, mesh, models, task, sample, frozen)
  before = judge(jax.device_put(models.policy_params, shardings.params["policy"]), when="before")
  if start == 0:
    evaluation.step_zero_checks(
      before.evaluation,
      starts_as_reference=not config.reference,
      dtype=models.policy.config.dtype,
    )
  step = _make_step(config, mesh, models, task, sample, frozen, shardings)
  iterations = loop.run(step, state, start=start, workdir=workdir, **config.loop_settings())
  state = progress.watch(
    iterations, state, title=title, start=start, total=config.num_iterations, keys=_SHOWN
  )
  after = judge(state.params["policy"], when="after")
  params = jax.device_get(state.params)
  save_policy(workdir / "model", models.policy.config, params["policy"], models.tokenizer)
  if models.value_model is not None:
    value_config = models.value_model.config
    save_scalar(workdir / "value_model", value_config, params["value"], models.tokenizer)
  (workdir / "samples.jsonl").write_text(
    "".join(json.dumps(record) + "\n" for record in before.samples + after.samples)
  )
  figures = evaluation.before_and_after(before.figures, after.figures)
  figures["kl_penalty"] = description
  if warnings:
    figures["warnings"] = warnings
  summary = write_summary(workdir, figures)
  write_report(workdir)
  return summary


def _make_step(config, mesh, models: Models, task: Task, sample, frozen, shardings):
  """Returns step(state, iteration) -> (state, metrics) for `loop.run`; compiled, state donated."""
  rows_sharding = parallel.by_rows(mesh)
  prompts, prompt_mask = jax.device_put(
    (task.training.tokens, task.training.mask), parallel.replicated(mesh)
  )
  out_shardings = (shardings, None)
  parts = (config, task.max_completion_len, models.policy, models.value_model, models.reference)
  jit = functools.partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)

  def rows_of(iteration):
    num_prompts = config.oversampling * config.batch_size // config.group_size
    rows = data.batch_rows(config.data_seed, iteration, num_prompts, len(task.training.tokens))
    return np.repeat(rows, config.group_size)

  def pretraining_of(iteration):
    if task.pretraining is None:
      return None
    num_texts = len(task.pretraining.tokens)
    rows = data.batch_rows(config.data_seed + 1, iteration, config.batch_size, num_texts)
    return jax.device_put(data.take(task.pretraining, rows), rows_sharding)

  gold = make_gold_fn(task.training, models.tokenizer)
  if task.reward_fn is None:
    score = make_score_fn(models.reward_model)
    iterate = jit(learner.make_iteration_fn(*parts, sample, score, gold))

    def step(state, iteration):
      rows = jax.device_put(rows_of(iteration), rows_sharding)
      return iterate(state, frozen, prompts, prompt_mask, rows, pretraining_of(iteration))

    return step

  rollout_fn = jit(functools.partial(learner.sample_rollout, sample))
  update = jit(learner.make_update_fn(*parts))
  notice_slow = _SlowRewardNotice()

  def step_with_host_reward(state, iteration):
    rows = rows_of(iteration)
    began = time.monotonic()
    state, rollout = rollout_fn(state, prompts, prompt_mask, jax.device_put(rows, rows_sharding))
    texts = data.completion_texts(models.tokenizer, jax.device_get(rollout))
    sampled = time.monotonic()
    scores = rewards.scores(task.reward_fn, [task.training.records[row] for row in rows], texts)
    scored = time.monotonic()
    scores = jax.device_put(scores, rows_sharding)
    state, pairs = update(state, frozen["reference"], rollout, scores, pretraining_of(iteration))
    jax.block_until_ready(pairs)
    if gold is not None:
      pairs["gold/mean"] = (gold(rollout, rows).sum(), len(rows))
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


class _Judgement(NamedTuple):
  evaluation: evaluation.Evaluation
  figures: dict[str, float | None]
  samples: list[dict[str, Any]]


class _Judge:
  """Evaluates policies on the same held-out prompts with the same keys; compiles once."""

  def __init__(self, config, mesh, models: Models, task: Task, sample, frozen):
    self._config, self._models, self._task, self._frozen = config, models, task, frozen
    self._rows = np.arange(config.num_eval_rows) % len(task.held_out.tokens)
    self._prompts = jax.device_put(
      (task.held_out.tokens[self._rows], task.held_out.mask[self._rows]),
      parallel.replicated(mesh),
    )
    self._evaluate = jax.jit(evaluation.make_evaluate_fn(models.policy, models.reference, sample))
    self._gold = make_gold_fn(task.held_out, models.tokenizer)
    if task.reward_fn is None:
      self._score = jax.jit(make_score_fn(models.reward_model))

  def __call__(self, params, *, when: str) -> _Judgement:
    task, tokenizer = self._task, self._models.tokenizer
    evaluated = self._evaluate(
      params,
      self._frozen["reference"],
      *self._prompts,
      # The same noise before and after, and never the training's.
      jax.random.fold_in(jax.random.key(self._config.seed), 2**31 - 1),
      temperature=jnp.float32(self._config.temperature),
    )
    texts = evaluation.texts_of(evaluated, tokenizer)
    records = [task.held_out.records[row] for row in self._rows]
    if task.reward_fn is None:
      scores = np.asarray(self._score(self._frozen, evaluated.rollout, None))
    else:
      scores = rewards.scores(task.reward_fn, records, texts)
    gold = self._gold and np.asarray(self._gold(evaluated.rollout, self._rows))
    prompts = [record["prompt"] for record in records]
    return _Judgement(
      evaluated,
      evaluation.figures(evaluated, scores, gold, texts, self._rows),
      evaluation.samples(
        when,
        evaluated,
        scores,
        gold,
        texts,
        prompts,
        tokenizer,
        self._config.num_samples,
      ),
    )
