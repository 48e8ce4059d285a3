"""What DPO starts from: a model, and pairs of completions with the reference's log-probs.

The pairs are those of a file, or drawn from the policy of the embedded task and labelled by its
reward model. `config` is that of `experiments.dpo`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from experiments.settings import rl, training
from klrl import inputs, judging, ops
from klrl.algorithm.distributions import over_vocabulary
from klrl.cost import dry_run
from klrl.devices import parallel
from klrl.models import (
  Policy,
  TokenizerInfo,
  policy_model,
)
from klrl.run import progress
from klrl.tasks import arithmetic, data
from klrl.tasks.verifier import Verifier

_CHUNK = 1024  # pairs drawn at once


class Pairs(NamedTuple):
  """Two completions of one prompt each, the chosen one first."""

  tokens: np.ndarray  # [N, 2, S] int32, prompt and completion
  mask: np.ndarray  # [N, 2, S] bool, real tokens
  completion_mask: np.ndarray  # [N, 2, S] bool, tokens of the completion
  ref_log_probs: np.ndarray  # [N, 2], of whole completions under the reference, nats


class Start(NamedTuple):
  """What a run starts from; the reference is the same model."""

  policy: Policy
  params: dict
  tokenizer: TokenizerInfo
  training: Pairs
  held_out: Pairs
  prompts: data.Prompts  # to judge by
  max_completion_len: int
  score: Callable | None  # score(rollout, texts, records) -> [B], where there is a reward model
  verifier: Verifier | None


def completion_log_probs(policy: Policy, params, tokens, mask, completion_mask) -> jax.Array:
  """Returns [N, 2], the log-probs of whole completions, nats; carries gradient to `params`.

  Args:
    policy: the model.
    params: of the policy.
    tokens: [N, 2, S] int32, as the next two in `Pairs`.
    mask: [N, 2, S] bool.
    completion_mask: [N, 2, S] bool.
  """
  flat, mask, completion_mask = (
    x.reshape(-1, x.shape[-1]) for x in (tokens, mask, completion_mask)
  )
  hidden = policy.hidden(params, flat, mask)[:, :-1]
  per_token = over_vocabulary(ops.taken, [(hidden, policy.unembedding(params))], [flat[:, 1:]])
  per_token = ops.zero_padding(per_token, completion_mask[:, 1:])
  return per_token.sum(axis=-1).reshape(tokens.shape[:-1])


def make_pairs(config, policy: Policy, params, arrays) -> Pairs:
  """Returns the pairs with their log-probs under `params`, the reference's.

  Args:
    config: reads `batch_size` and `mesh`.
    policy: the model.
    params: of the reference.
    arrays: tokens, mask and completion mask, [N, 2, S] each.
  """
  mesh = parallel.make_mesh(config.mesh)
  params = parallel.put_once(mesh, params)
  log_probs = jax.jit(lambda params, *arrays: completion_log_probs(policy, params, *arrays))

  def chunk(rows):
    batch = parallel.put([x[rows] for x in arrays], parallel.by_rows(mesh))
    return log_probs(params, *batch)

  return Pairs(*arrays, parallel.in_chunks(chunk, len(arrays[0]), config.batch_size))


def own_start(config) -> Start:
  """Returns the model and the pairs that the config names; judged by prompts of held-out pairs."""
  model_config, params, tokenizer = inputs.load_start(
    config, config.policy, data.read_pairs, has_reference=True
  )
  policy = policy_model(model_config)
  pairs, arrays = encode_pairs(config, tokenizer, context=model_config.max_len)
  both = make_pairs(config, policy, params, arrays)
  rows, held_out_rows = data.split_indices(len(pairs), config.data_seed)
  held_out_prompts = [pairs[row].prompt for row in held_out_rows]
  data.warn_of_shared_prompts([pairs[row].prompt for row in rows], held_out_prompts)
  max_completion_len = config.max_completion_len or 64
  prompts = data.encode_prompts(
    [{"prompt": prompt} for prompt in data.distinct(held_out_prompts)],
    tokenizer,
    max_prompt_len=model_config.max_len - max_completion_len,
  )
  training, held_out = (data.take(both, part) for part in (rows, held_out_rows))
  return Start(
    policy, params, tokenizer, training, held_out, prompts, max_completion_len, None, None
  )


def own_shapes(config):
  """Returns what a dry run starts from: model config, trained, frozen, of arrays the shapes; pairs.

  Nothing reads weights, and the pairs have no log-probs.
  """
  load = functools.partial(
    inputs.load_start, config, config.policy, data.read_pairs, has_reference=True
  )
  model_config, params, frozen, tokenizer = dry_run.shapes_of_start(
    config, lambda loaders: load(loaders=loaders)
  )
  _, arrays = encode_pairs(config, tokenizer, context=model_config.max_len)
  pairs = Pairs(*arrays, np.zeros(arrays[0].shape[:2], np.float32))
  return model_config, params, frozen, pairs


def encode_pairs(config, tokenizer: TokenizerInfo, *, context: int):
  """Returns the pairs of the file, and their tokens, mask and completion mask, [N, 2, S] each."""
  pairs = data.read_pairs(config.data, inputs.asking(config))
  chosen, rejected = (
    data.encode_texts([(pair.prompt, getattr(pair, name)) for pair in pairs], tokenizer)
    for name in ("chosen", "rejected")
  )
  max_len = data.row_len(config.max_len, context)
  if config.max_len:
    kept = data.fitting_rows(chosen, rejected, max_len=max_len)
    progress.console.print(f"{len(kept)} of {len(pairs)} pairs are short enough")
    pairs, chosen, rejected = ([column[i] for i in kept] for column in (pairs, chosen, rejected))
  for texts in (chosen, rejected):
    data.check_lengths(texts, max_len)
  examples = data.examples_of([*chosen, *rejected], tokenizer.pad_id)
  arrays = examples.tokens, examples.mask, examples.completion_mask
  return pairs, [np.stack(np.split(x, 2), axis=1) for x in arrays]


def stages_config(config) -> rl.RLConfig:
  """Returns the settings of the embedded stages and task."""
  return rl.RLConfig(
    max_completion_len=config.max_completion_len,
    sft_iterations=config.sft_iterations,
    reward_model_iterations=config.reward_model_iterations,
    init_seed=config.init_seed,
    mesh=config.mesh,
    dtype=config.dtype,
    remat=config.remat,
  )


def embedded_start(config) -> Start:
  """Returns the embedded task, with pairs of which the SFT policy drew both completions."""
  embedded = stages_config(config)
  models = inputs.load_models(embedded.sources(), **training.model_directories(embedded))
  task = inputs.load_task(embedded.sources(), models)
  mesh = parallel.make_mesh(config.mesh)
  score = judging.make_completion_score_fn(
    mesh,
    None,
    models.reward_model,
    models.reward_params,
    rows_at_once=config.read_at_once(),
  )
  programs = judging.make_judge_programs(
    mesh, models.policy, None, models.tokenizer, task.max_completion_len
  )
  params = parallel.put_once(mesh, models.policy_params)
  draw = functools.partial(programs.sample, params, temperature=1.0)
  arrays = draw_pairs(task.training, draw, score, num_pairs=config.num_pairs, seed=config.seed)
  pairs = make_pairs(config, models.policy, models.policy_params, arrays)
  return Start(
    models.policy,
    models.policy_params,
    models.tokenizer,
    *data.split_held_out(pairs, config.data_seed),
    task.held_out,
    task.max_completion_len,
    score,
    arithmetic.VERIFIER,
  )


def draw_pairs(prompts: data.Prompts, draw, score, *, num_pairs: int, seed: int):
  """Returns tokens, mask and completion mask of drawn pairs, [N, 2, S] each, chosen first.

  The Bradley-Terry model of the scores draws which one is chosen. Two equal completions teach
  nothing and are left out.

  Args:
    prompts: to draw from.
    draw: draw(prompts, prompt_mask, key) -> rollout.
    score: score(rollout, texts, records) -> [B]; it gets no texts.
    num_pairs: drawn, equal ones included.
    seed: of all draws.
  """
  rng = np.random.default_rng((seed, 4))
  drawn = rng.integers(len(prompts.tokens), size=num_pairs)

  def chunk(rows):
    twice = np.repeat(drawn[rows], 2)
    key = jax.random.fold_in(jax.random.key(seed), rows[0])
    rollout = draw(prompts.tokens[twice], prompts.mask[twice], key)
    masks = rollout.prompt_mask, rollout.completion_mask
    arrays = (
      rollout.tokens,
      np.concatenate(masks, axis=1),
      np.concatenate([np.zeros_like(masks[0]), masks[1]], axis=1),
      score(rollout, None, None),
    )
    return [np.asarray(x).reshape(-1, 2, *x.shape[1:]) for x in arrays]

  *arrays, scores = parallel.in_chunks(chunk, num_pairs, _CHUNK)
  first_wins = rng.random(len(scores)) < 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))
  order = np.where(first_wins[:, None], [0, 1], [1, 0])
  kept = np.flatnonzero((arrays[0][:, 0] != arrays[0][:, 1]).any(axis=-1))
  return [x[kept[:, None], order[kept]] for x in arrays]
