"""Figures of a policy on held-out prompts, and the checks that every run makes at step 0."""

import collections
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from klrl import ops
from klrl.algorithm import completions
from klrl.algorithm.distributions import log_probs_and_entropy_of, over_vocabulary
from klrl.devices import parallel
from klrl.errors import UserError
from klrl.sampling import Rollout
from klrl.tasks.data import decode_continuation, token_ids
from klrl.tasks.verifier import Verifier, majority, pass_at_k, right


class Evaluation(NamedTuple):
  """One completion per row, and what the models say of its tokens: [B, T], nats, or None."""

  rollout: Rollout
  log_probs: jax.Array  # rescored by the trainer's forward pass
  entropy: jax.Array
  ref_log_probs: jax.Array | None
  kl_exact: jax.Array | None  # KL(pi || pi_ref) of each next-token distribution


def make_evaluate_fn(policy, reference):
  """Returns evaluate(params, reference_params, rollout, *, temperature) -> Evaluation.

  The function is pure and is compiled by the caller. `reference` may be None.
  """

  def evaluate(params, reference_params, rollout, *, temperature):
    rollout = parallel.split_rows(rollout)
    # Each model runs once for all figures; the compiler would not merge two runs across devices.
    hidden = completions.completion_hidden(policy, params, rollout)
    tokens, unembedding = completions.completion_tokens(rollout), policy.unembedding(params)
    if reference is None:
      log_probs, entropy = over_vocabulary(
        log_probs_and_entropy_of, [(hidden, unembedding)], [tokens], temperature=temperature
      )
      return Evaluation(rollout, log_probs, entropy, None, None)
    ref_hidden = completions.completion_hidden(reference, reference_params, rollout)
    models = (hidden, unembedding), (ref_hidden, reference.unembedding(reference_params))
    of_tokens = over_vocabulary(_of_tokens, models, [tokens], temperature=temperature)
    return Evaluation(rollout, *of_tokens)

  return evaluate


def _of_tokens(log_probs, ref_log_probs, tokens):
  """Returns the fields of an `Evaluation` after the rollout."""
  of_policy = log_probs_and_entropy_of(log_probs, tokens)
  return *of_policy, ops.taken(ref_log_probs, tokens), ops.kl_of(log_probs, ref_log_probs)


def figures(
  evaluation: Evaluation, scores, gold, texts: list[str], prompt_ids: np.ndarray
) -> dict[str, float | None]:
  """Returns the figures of an evaluation: means over rows, with standard errors for scores and KLs.

  `scores` and `gold` are [B], or None where there are none. `prompt_ids [B]` says which rows share
  a prompt. Completions of one prompt are not independent, so a standard error is that of a mean
  over prompts.

  The KLs are KL(pi || pi_ref) in nats per sequence, and with `_per_token` in nats per token. `nll`
  is the mean negative log-likelihood under the reference, in nats per token. `distinct_N` is the
  result of `distinct_n`.
  """
  mask = np.asarray(evaluation.rollout.completion_mask)
  num_tokens = max(1, int(mask.sum()))
  found = {
    **mean_and_stderr("score", scores, prompt_ids),
    **mean_and_stderr("gold", gold, prompt_ids),
    "entropy": _sums(evaluation.entropy, mask).sum() / num_tokens,
    "length": mask.sum(axis=1).mean(),
    "finished_fraction": np.asarray(evaluation.rollout.finished).mean(),
    **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)},
  }
  if evaluation.ref_log_probs is not None:
    per_token = {
      "kl_ref_k1": ops.k1(evaluation.log_probs, evaluation.ref_log_probs),
      "kl_ref_k3": ops.k3(evaluation.log_probs, evaluation.ref_log_probs),
      "kl_ref_exact": evaluation.kl_exact,
    }
    for name, kl in per_token.items():
      found |= kl_figures(name, kl, mask, prompt_ids)
    found["nll"] = -_sums(evaluation.ref_log_probs, mask).sum() / num_tokens
  return {name: None if x is None else float(x) for name, x in found.items()}


def kl_figures(name: str, per_token, mask, prompt_ids: np.ndarray) -> dict[str, float | None]:
  """Returns a KL in nats per sequence, its standard error, and the same per token.

  `per_token` and `mask` are [B, T].
  """
  mask = np.asarray(mask)
  sums = _sums(per_token, mask)
  return mean_and_stderr(name, sums, prompt_ids) | {
    f"{name}_per_token": float(sums.sum() / max(1, int(mask.sum())))
  }


def repeated_figures(
  verifier: Verifier, texts: list[str], records: list[dict[str, Any]], k: int
) -> dict[str, float | None]:
  """Returns `pass_at_K` and `majority_at_K`, means over prompts, from k completions of each.

  `texts` and `records` hold the k rows of a prompt beside one another.
  """
  is_right = right(verifier, texts, records).reshape(-1, k)
  answers = np.array(list(map(verifier.answer_of, texts)), object).reshape(-1, k)
  prompt_ids = np.arange(len(is_right))
  return mean_and_stderr(f"pass_at_{k}", pass_at_k(is_right, k), prompt_ids) | mean_and_stderr(
    f"majority_at_{k}", np.array(list(map(majority, answers, is_right))), prompt_ids
  )


def before_and_after(before: dict, after: dict) -> dict[str, float | None]:
  """Returns the figures of two evaluations as `NAME_before`, `NAME_after`, `NAME_before_stderr`.

  The KLs of the trained policy are in the result as `kl_ref_*` too: a run is known by these.
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
  # In half precision rounding can put one token of many far off, but not the root mean square.
  full = dtype in ("float32", "float64")
  tolerance, which = (1e-3, "largest") if full else (0.05, "root mean square")

  def difference(x, y):
    x = np.abs(np.asarray(x - y, np.float64)[mask])
    return x.max() if full else np.sqrt((x**2).mean())

  sampled, rescored = np.asarray(rollout.old_log_probs), np.asarray(evaluation.log_probs)
  gap = difference(sampled, rescored)
  if not gap <= tolerance:
    raise UserError(
      f"Step 0: sampler and scorer disagree on tokens' log-probs by {gap:.2g} nats ({which}; at "
      f"most {tolerance} expected in {dtype}). Ratios would be wrong from the first update on: "
      "check the model's positions, its cache and the temperature."
    )
  if starts_as_reference and evaluation.ref_log_probs is not None:
    gap = difference(rescored, np.asarray(evaluation.ref_log_probs))
    if not gap <= tolerance:
      raise UserError(
        f"Step 0: the policy starts as its reference, yet their log-probs differ by {gap:.2g} "
        "nats, so KL(pi || pi_ref) is not 0. Check that both were loaded from the same files."
      )
  # -log pi(a|s) - H(pi(.|s)) has mean zero at every state if the draws come from pi.
  surprise = np.where(mask, -sampled - np.asarray(evaluation.entropy), 0.0).sum(axis=1)
  num = len(surprise)
  stderr = surprise.std(ddof=1) / np.sqrt(num) if num > 1 else np.inf
  # A few equal completions deviate by nothing. But as likely as they are together, as likely is
  # what they show, and nothing is rarer than 5 standard errors that has a chance above exp(-14.4).
  is_rare = not -sampled[mask].sum() <= 14.4
  is_far = not abs(surprise.mean()) <= _normal_as_t(5.0, max(1, num - 1)) * stderr + tolerance
  if is_rare and is_far:
    with np.errstate(divide="ignore"):
      errors = np.abs(surprise.mean()) / np.float64(stderr)
    raise UserError(
      f"Step 0: the sampler does not draw from the policy: mean of -log_prob - entropy is "
      f"{surprise.mean():.3g} nats per sequence, {errors:.1f} standard errors from 0. Check the "
      "sampler's temperature and truncation."
    )


def _normal_as_t(errors: float, degrees: int) -> float:
  """Returns how many standard errors are as rare by Student's t as `errors` are of a normal.

  The standard error of few rows is itself uncertain: 5 become 27 with 6 rows. D. L. Wallace,
  "Bounds on normal approximations to Student's and the chi-square distributions" (1959).
  """
  return math.sqrt(degrees * math.expm1(errors**2 / degrees))


def samples(
  when: str, evaluation: Evaluation, scores, gold, texts, prompts, tokenizer, num: int
) -> list[dict[str, Any]]:
  """Returns the records for `samples.jsonl`: the first `num` rows, token by token."""
  rollout = jax.device_get(evaluation.rollout)
  prompts_ids, completions_ids = token_ids(rollout)
  records = []
  for i in range(min(num, len(texts))):
    prompt, ids, chosen = prompts_ids[i], completions_ids[i], rollout.completion_mask[i]
    pieces = [
      decode_continuation(tokenizer, prompt + ids[:t], ids[t : t + 1]) or tokenizer.name(ids[t])
      for t in range(len(ids))
    ]
    kl = None if evaluation.kl_exact is None else evaluation.kl_exact[i]
    records.append(
      {
        "when": when,
        "index": i,
        # Of a chat it is what the template wrote.
        "prompt": prompts[i] if isinstance(prompts[i], str) else tokenizer.decode_marked(prompt),
        "completion": texts[i],
        "tokens": pieces,
        "kl_ref": None if kl is None else _of_chosen(kl, chosen)[: len(ids)],
        "log_prob": _of_chosen(evaluation.log_probs[i], chosen)[: len(ids)],
        "score": None if scores is None or np.isnan(scores[i]) else float(scores[i]),
        "gold": None if gold is None else float(gold[i]),
      }
    )
  return records


def _of_chosen(per_token, chosen) -> list[float | None]:
  """Returns the numbers of tokens [T], None where none was chosen (bool [T])."""
  numbers = zip(np.asarray(per_token).tolist(), chosen.tolist(), strict=True)
  return [x if is_chosen else None for x, is_chosen in numbers]


def distinct_n(texts: list[str], n: int) -> float | None:
  """Returns the share of different ones among all runs of n words, None if there are none.

  Jiwei Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", 2016.
  """
  grams: collections.Counter = collections.Counter()
  for text in texts:
    words = text.split()
    grams.update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
  return len(grams) / grams.total() if grams else None


def _sums(per_token, mask) -> np.ndarray:
  return np.where(mask, np.asarray(per_token), 0.0).sum(axis=1)


def mean_and_stderr(name: str, x, prompt_ids: np.ndarray) -> dict[str, float | None]:
  """Returns the mean over rows, and its standard error with prompts as the independent units.

  Rows that are NaN, from which every reward abstained, are left out.
  """
  found = None if x is None else ~np.isnan(x)
  if found is None or not found.any():
    return {name: None}
  x, prompt_ids = np.asarray(x)[found], np.asarray(prompt_ids)[found]
  sums, counts = (np.bincount(prompt_ids, weights=w) for w in (x, np.ones_like(x)))
  return ratio_and_stderr(name, sums, counts) | {name: float(x.mean())}


def ratio_and_stderr(name: str, sums: np.ndarray, counts: np.ndarray) -> dict[str, float | None]:
  """Returns sum / count over independent units, and its standard error: None for fewer than two.

  `sums` and `counts` are [N]; a unit may have any number of rows, none included.
  """
  sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
  mean, num_units = sums.sum() / max(1.0, counts.sum()), np.count_nonzero(counts)
  if num_units < 2:
    return {name: float(mean), f"{name}_stderr": None}
  # The variance of a ratio of sums, for units with different numbers of rows.
  residual = sums - mean * counts
  stderr = np.sqrt((residual**2).sum() * num_units / (num_units - 1)) / counts.sum()
  return {name: float(mean), f"{name}_stderr": float(stderr)}
