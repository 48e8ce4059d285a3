"""The judge of a run: each policy on the same held-out prompts, with the same noise.

For each policy the judge draws

* one completion for each of `num_eval_rows` rows, which repeat the held-out prompts in order;
* the most likely completion of each prompt;
* `eval_completions` completions of some prompts, where the task has a verifier: of as many prompts
  as fit into the same number of rows.

From the reference it draws one completion for each row, once, for the KL in the other direction.
Models compute all of this for a part of the rows at once, so that the devices need no more memory
than for training.

While a policy trains, the judge draws one completion for each of fewer rows, and nothing else.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from klrl import evaluation
from klrl.algorithm import completions
from klrl.devices import parallel
from klrl.models import Policy, ScalarModel, TokenizerInfo
from klrl.run import progress
from klrl.sampling import beginning_with, make_greedy_fn, make_sample_fn
from klrl.tasks import data, reward_calls, rewards, widths
from klrl.tasks.verifier import Verifier, right

_PARTS = 2**16  # The noise of the parts after the first is counted from here.


class Judgement(NamedTuple):
  """What the judge finds of one policy."""

  evaluation: evaluation.Evaluation  # one completion of each row
  figures: dict[str, float | None]
  samples: list[dict[str, Any]]  # records for `samples.jsonl`


class Judge(NamedTuple):
  """What is said of a policy, given all its parameters, on the devices."""

  judge: Callable[..., Judgement]  # judge(params, *, when), before and after training
  evaluate: Callable[[Any], dict[str, float | None]]  # evaluate(params), while it trains


class Programs(NamedTuple):
  """The compiled functions of a judge. Each device computes its share of the rows and gets all.

  `sample`, `greedy` and `evaluate` are those of `sampling` and `evaluation` for the policy;
  `sample_reference` and `evaluate_reference` have policy and reference exchanged.
  """

  sample: Callable
  greedy: Callable
  evaluate: Callable
  sample_reference: Callable | None
  evaluate_reference: Callable | None


def make_judge_programs(
  mesh,
  policy: Policy,
  reference: Policy | None,
  tokenizer: TokenizerInfo,
  max_completion_len: int,
  prefill: Sequence[int] = (),
) -> Programs:
  """Returns the programs of a judge; arguments as in `make_judge`."""
  limits = {
    "max_completion_len": max_completion_len,
    "eos_id": tokenizer.eos_ids,
    "pad_id": tokenizer.pad_id,
    "given": beginning_with(prefill),
  }

  def jit(fn):
    # Results are replicated, since each process reads all of them.
    return jax.jit(parallel.on_mesh(mesh, fn), out_shardings=parallel.replicated(mesh))

  sample = jit(make_sample_fn(policy, **limits))
  greedy = jit(make_greedy_fn(policy, **limits))
  evaluate = jit(evaluation.make_evaluate_fn(policy, reference))
  if reference is None:
    return Programs(sample, greedy, evaluate, None, None)
  # If both models have one shape, the same programs serve with the parameters exchanged.
  if reference.config == policy.config:
    return Programs(sample, greedy, evaluate, sample, evaluate)
  sample_reference = jit(make_sample_fn(reference, **limits))
  evaluate_reference = jit(evaluation.make_evaluate_fn(reference, policy))
  return Programs(sample, greedy, evaluate, sample_reference, evaluate_reference)


def make_judge(
  config,
  mesh,
  policy: Policy,
  reference: Policy | None,
  reference_params,
  tokenizer: TokenizerInfo,
  held_out: data.Prompts,
  *,
  max_completion_len: int,
  temperature: float,
  score: Callable | None,
  verifier: Verifier | None,
  num_interim_rows: int,
  drawn_at_once: int,
  read_at_once: int,
  prefill: Sequence[int] = (),
) -> Judge:
  """Returns the judge of a run; everything is compiled once.

  The figures of `evaluate` are those of `evaluation.figures`, and `kl_ref_forward`,
  KL(pi_ref || pi) in nats per sequence: the exact KL of each next token, summed along completions
  of the reference, which is unbiased. They are of `num_interim_rows` rows with the same prompts and
  the same noise each time, so that figures of two policies differ by less than their errors tell.
  Those of `judge` are of `num_eval_rows` rows, and in addition `score_greedy` and `gold_greedy` of
  the most likely completions, and those of `evaluation.repeated_figures`.

  Args:
    config: its `seed`, `num_eval_rows`, `eval_completions` and `num_samples` are read.
    mesh: the devices.
    policy: the model that is judged.
    reference: the model to compare with, or None.
    reference_params: its parameters, on the devices.
    tokenizer: of both models.
    held_out: the prompts.
    max_completion_len: the limit of every completion, in tokens.
    temperature: of sampling, and of every log-prob.
    score: score(rollout, texts, records) -> [B], or None.
    verifier: of the task, or None.
    num_interim_rows: of `evaluate`, at most `num_eval_rows`.
    drawn_at_once: completions that a model draws at once. Each such part has noise of its own.
    read_at_once: completions that models read at once.
    prefill: tokens with which every completion begins.
  """
  progress.console.print("Compiling what judges the policy on held-out prompts ...")
  # The noise is the same each time, and never that of training.
  key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)
  num_prompts, k = len(held_out.tokens), config.eval_completions
  rows = np.arange(config.num_eval_rows) % num_prompts
  interim_rows = rows[:num_interim_rows]
  repeated = np.repeat(np.arange(min(num_prompts, max(1, config.num_eval_rows // k))), k)
  programs = make_judge_programs(mesh, policy, reference, tokenizer, max_completion_len, prefill)

  # A prompt that is not judged makes none longer, unless a rotation is chosen by the width.
  is_long = any(model is not None and model.config.short_len for model in (policy, reference))
  width = held_out.mask.shape[1] if is_long else widths.longest(held_out.mask[rows, ::-1])

  def prompts_of(rows):
    return held_out.tokens[rows, -width:], held_out.mask[rows, -width:]

  def records_of(rows):
    return [held_out.records[row] for row in rows]

  def draw(sample, params, rows, noise):
    def of_part(first, part):
      own = jax.random.fold_in(noise, _PARTS + first) if first else noise
      return sample(params, *part, own, temperature=temperature)

    return _in_parts(mesh, of_part, prompts_of(rows), drawn_at_once)

  def read(program, *params_of_both, rollout):
    def of_part(_, part):
      return program(*params_of_both, part, temperature=temperature)

    return _in_parts(mesh, of_part, rollout, read_at_once)

  @functools.cache
  def of_reference(num_rows):
    """Returns a completion of the reference for each of the first rows."""
    noise = jax.random.fold_in(key, 1)
    return draw(programs.sample_reference, reference_params, rows[:num_rows], noise)

  def texts_of(rollout, records):
    return data.with_prefill(data.completion_texts(tokenizer, rollout), records)

  def scored(rollout, rows):
    """Returns texts, scores and gold scores of a rollout."""
    records = records_of(rows)
    texts = texts_of(rollout, records)
    scores = score and np.asarray(score(rollout, texts, records))
    return texts, scores, verifier and right(verifier, texts, records)

  def evaluated(params, rows):
    """Returns an evaluation of one completion of each row, its texts and scores, and figures."""
    rollout = draw(programs.sample, params, rows, key)
    found = read(programs.evaluate, params, reference_params, rollout=rollout)
    texts, scores, gold = scored(rollout, rows)
    figures = evaluation.figures(found, scores, gold, texts, rows)
    if reference is not None:
      rollout = of_reference(len(rows))
      back = read(programs.evaluate_reference, reference_params, params, rollout=rollout)
      mask = rollout.completion_mask
      figures |= evaluation.kl_figures("kl_ref_forward", back.kl_exact, mask, rows)
    return found, (scores, gold, texts), figures

  def other_figures(params):
    distinct = rows[:num_prompts]
    rollout = _in_parts(
      mesh, lambda _, part: programs.greedy(params, *part), prompts_of(distinct), drawn_at_once
    )
    _, *found = scored(rollout, distinct)
    for name, x in zip(("score_greedy", "gold_greedy"), found, strict=True):
      yield evaluation.mean_and_stderr(name, x, distinct)
    if verifier is not None:
      rollout = draw(programs.sample, params, repeated, jax.random.fold_in(key, 2))
      records = records_of(repeated)
      yield evaluation.repeated_figures(verifier, texts_of(rollout, records), records, k)

  def judge(params, *, when: str) -> Judgement:
    found, read, figures = evaluated(params, rows)
    for more in other_figures(params):
      figures |= more
    prompt_texts = [record["prompt"] for record in records_of(rows)]
    samples = evaluation.samples(when, found, *read, prompt_texts, tokenizer, config.num_samples)
    return Judgement(found, figures, samples)

  return Judge(judge, lambda params: evaluated(params, interim_rows)[-1])


def _in_parts(mesh, fn: Callable, arrays, rows_at_once: int):
  """Returns fn(first row, part) of all parts of `arrays` [B, ...], as one tree on the host.

  Each part is `rows_at_once` rows, so that fn is compiled once; the last has some rows again to be
  as many. Each device gets all of a part.
  """
  num_rows = len(jax.tree.leaves(arrays)[0])

  def of_part(rows):
    part = jax.tree.map(lambda x: x[rows], arrays)
    return fn(rows[0], parallel.put(part, parallel.replicated(mesh)))

  return parallel.in_chunks(of_part, num_rows, rows_at_once)


def make_completion_score_fn(
  mesh,
  weighted: list[rewards.Reward],
  reward_model: ScalarModel | None,
  reward_params,
  *,
  rows_at_once: int,
) -> Callable[..., np.ndarray]:
  """Returns score(rollout, texts, records) -> [B], the weighted sum of rewards.

  Without rewards it is the score of the reward model, and without that it is 0. Only the rewards
  read the texts. The devices of `mesh` share the rows of a rollout, `rows_at_once` at once.
  """

  def model_score(params, rollout):
    return completions.reward_model_scores(reward_model, params, parallel.split_rows(rollout))

  model_score = jax.jit(
    parallel.on_mesh(mesh, model_score), out_shardings=parallel.replicated(mesh)
  )
  reward_params = parallel.put_once(mesh, reward_params)
  reads_model = reward_model is not None and (
    not weighted or any(reward.fn is None for reward in weighted)
  )

  def score(rollout, texts, records):
    model_scores, rollout = None, jax.device_get(rollout)
    if reads_model:
      model_scores = _in_parts(
        mesh, lambda _, part: model_score(reward_params, part), rollout, rows_at_once
      )
    if weighted:
      ids = reward_calls.Ids(*data.token_ids(rollout))
      return rewards.shared_scores(weighted, records, texts, model_scores, ids)[0]
    return np.zeros(rollout.finished.shape, np.float32) if model_scores is None else model_scores

  return score
