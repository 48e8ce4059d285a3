"""Before and after: a policy on held-out prompts, and the checks that every run makes at step 0."""

import collections
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from klrl import completions, ops
from klrl.errors import UserError
from klrl.sampling import Rollout
from klrl.tasks.data import completion_texts, decode_continuation


class Evaluation(NamedTuple):
  """One sampled completion per row and what the models say of it; [B, T] in nats, or None."""

  rollout: Rollout
  log_probs: jax.Array  # rescored by the trainer's forward pass
  entropy: jax.Array
  ref_log_probs: jax.Array | None
  kl_exact: jax.Array | None  # KL(pi || pi_ref) of each next-token distribution


def make_evaluate_fn(policy, reference, sample):
  """Returns evaluate(params, reference_params, prompts, prompt_mask, key, *, temperature).

  It samples one completion per prompt and returns an `Evaluation`. Pure; to be compiled by the
  caller. `reference` may be None: nothing is then compared with it.
  """

  def evaluate(params, reference_params, prompts, prompt_mask, key, *, temperature):
    rollout = sample(params, prompts, prompt_mask, key, temperature=temperature)
    log_probs, entropy = completions.log_probs_and_entropy(
      policy, params, rollout, temperature=temperature
    )
    if reference is None:
      return Evaluation(rollout, log_probs, entropy, None, None)
    return Evaluation(
      rollout,
      log_probs,
      entropy,
      completions.log_probs(reference, reference_params, rollout, temperature=temperature),
      completions.exact_kl(
        policy, params, reference, reference_params, rollout, temperature=temperature
      ),
    )

  return evaluate


def figures(
  evaluation: Evaluation, scores, gold, texts: list[str], prompt_ids: np.ndarray
) -> dict[str, float | None]:
  """Returns the figures of an evaluation: means over rows, with standard errors for scores and KLs.

  `scores` and `gold` are [B], or None where nothing gives them. `prompt_ids [B]` says which rows
  share a prompt: completions of one prompt are not independent, so a standard error is that of a
  mean over prompts.

  KLs are KL(pi || pi_ref), nats per sequence, with `_per_token` beside each; `nll` is the mean
  negative log-likelihood under the reference, nats per token; `distinct_2` is the share of
  different ones among all pairs of neighbouring words (Li et al., 2016).
  """
  mask = np.asarray(evaluation.rollout.completion_mask)
  num_tokens = max(1, int(mask.sum()))
  found = {
    **_mean_and_stderr("score", scores, prompt_ids),
    **_mean_and_stderr("gold", gold, prompt_ids),
    "entropy": _sums(evaluation.entropy, mask).sum() / num_tokens,
    "length": mask.sum(axis=1).mean(),
    "finished_fraction": np.asarray(evaluation.rollout.finished).mean(),
    "distinct_2": distinct_2(texts),
  }
  if evaluation.ref_log_probs is not None:
    per_token = {
      "kl_ref_k1": ops.k1(evaluation.log_probs, evaluation.ref_log_probs),
      "kl_ref_k3": ops.k3(evaluation.log_probs, evaluation.ref_log_probs),
      "kl_ref_exact": evaluation.kl_exact,
    }
    for name, kl in per_token.items():
      sums = _sums(kl, mask)
      found |= _mean_and_stderr(name, sums, prompt_ids) | {
        f"{name}_per_token": sums.sum() / num_tokens
      }
    found["nll"] = -_sums(evaluation.ref_log_probs, mask).sum() / num_tokens
  return {name: None if x is None else float(x) for name, x in found.items()}


def before_and_after(before: dict, after: dict) -> dict[str, float | None]:
  """Returns the figures of two evaluations as `NAME_before`, `NAME_after`, `NAME_before_stderr`.

  The KLs that a run is known by are those of the trained policy: as `kl_ref_*` they are in it too.
  """
  found = {name: x for name, x in after.items() if name.startswith("kl_ref")}
  for when, figures in (("before", before), ("after", after)):
    for name, x in figures.items():
      stem, stderr, _ = name.partition("_stderr")
      found[f"{stem}_{when}{stderr}"] = x
  return found


def step_zero_checks(evaluation: Evaluation, *, starts_as_reference: bool, dtype: str) -> None:
  """Stops a run whose sampler, scorer and reference disagree before the first update.

  Args:
    evaluation: of the untrained policy.
    starts_as_reference: whether policy and reference hold the same parameters.
    dtype: compute type of the models; decides how far rounding may go.

  Raises:
    UserError: with a diagnosis.
  """
  rollout = evaluation.rollout
  mask = np.asarray(rollout.completion_mask)
  tolerance = 1e-3 if dtype in ("float32", "float64") else 0.05
  sampled, rescored = np.asarray(rollout.old_log_probs), np.asarray(evaluation.log_probs)
  gap = np.abs(np.where(mask, sampled - rescored, 0.0)).max()
  if not gap <= tolerance:
    raise UserError(
      f"Step 0: sampler and scorer disagree on a token's log-prob by {gap:.2g} nats (at most "
      f"{tolerance} expected in {dtype}). Ratios would be wrong from the first update on: check "
      "the model's positions, its cache and the temperature."
    )
  if starts_as_reference and evaluation.ref_log_probs is not None:
    gap = np.abs(np.where(mask, rescored - np.asarray(evaluation.ref_log_probs), 0.0)).max()
    if not gap <= tolerance:
      raise UserError(
        f"Step 0: the policy starts as its reference, yet their log-probs differ by {gap:.2g} "
        "nats, so KL(pi || pi_ref) is not 0. Check that both were loaded from the same files."
      )
  # -log pi(a|s) - H(pi(.|s)) has mean zero at every state if the draws come from pi.
  surprise = np.where(mask, -sampled - np.asarray(evaluation.entropy), 0.0).sum(axis=1)
  stderr = surprise.std(ddof=1) / np.sqrt(len(surprise)) if len(surprise) > 1 else np.inf
  if not abs(surprise.mean()) <= 5 * stderr + tolerance:
    raise UserError(
      f"Step 0: the sampler does not draw from the policy: mean of -log_prob - entropy is "
      f"{surprise.mean():.3g} nats per sequence, {abs(surprise.mean()) / stderr:.1f} standard "
      "errors from 0. Check the sampler's temperature and truncation."
    )


def samples(
  when: str, evaluation: Evaluation, scores, gold, texts, prompts, tokenizer, num: int
) -> list[dict[str, Any]]:
  """Returns the records for `samples.jsonl`: the first `num` rows, token by token."""
  rollout = jax.device_get(evaluation.rollout)
  prompt_len = rollout.prompt_mask.shape[1]
  records = []
  for i in range(min(num, len(texts))):
    prompt = rollout.tokens[i, :prompt_len][rollout.prompt_mask[i]].tolist()
    mask = rollout.completion_mask[i]
    ids = rollout.tokens[i, prompt_len:][mask].tolist()
    pieces = [
      decode_continuation(tokenizer, prompt + ids[:t], ids[t : t + 1])
      or tokenizer.tokenizer.id_to_token(ids[t])
      for t in range(len(ids))
    ]
    kl = None if evaluation.kl_exact is None else np.asarray(evaluation.kl_exact[i])[mask].tolist()
    records.append(
      {
        "when": when,
        "index": i,
        "prompt": prompts[i],
        "completion": texts[i],
        "tokens": pieces,
        "kl_ref": kl,
        "log_prob": np.asarray(evaluation.log_probs[i])[mask].tolist(),
        "score": None if scores is None else float(scores[i]),
        "gold": None if gold is None else float(gold[i]),
      }
    )
  return records


def distinct_2(texts: list[str]) -> float | None:
  """Returns the share of different ones among all pairs of neighbouring words, None without any."""
  pairs: collections.Counter = collections.Counter()
  for text in texts:
    words = text.split()
    pairs.update(itertools.pairwise(words))
  return len(pairs) / pairs.total() if pairs else None


def texts_of(evaluation: Evaluation, tokenizer) -> list[str]:
  """Returns the completions as text."""
  return completion_texts(tokenizer, jax.device_get(evaluation.rollout))


def _sums(per_token, mask) -> np.ndarray:
  return np.where(mask, np.asarray(per_token), 0.0).sum(axis=1)


def _mean_and_stderr(name: str, x, prompt_ids: np.ndarray) -> dict:
  """Returns the mean over rows, and its standard error with prompts as the independent units."""
  if x is None:
    return {name: None}
  x = np.asarray(x)
  sums, counts = (np.bincount(prompt_ids, weights=w) for w in (x, np.ones_like(x)))
  mean, num_prompts = x.mean(), np.count_nonzero(counts)
  if num_prompts < 2:
    return {name: mean, f"{name}_stderr": None}
  # The variance of a ratio of sums, for prompts with different numbers of rows.
  residual = sums - mean * counts
  stderr = np.sqrt((residual**2).sum() * num_prompts / (num_prompts - 1)) / counts.sum()
  return {name: mean, f"{name}_stderr": stderr}
