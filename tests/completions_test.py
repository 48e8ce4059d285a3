"""Tests of what models say about completions, and of the figures of a rollout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl import ops
from klrl.algorithm import completions, diagnostics, gradients
from klrl.models import DecoderConfig, policy_model, scalar_model
from klrl.run.metrics import finalise
from klrl.sampling import Rollout
from klrl.tasks import data

BATCH, PROMPT_LEN, MAX_COMPLETION_LEN, VOCAB, WIDTH = 4, 3, 5, 7, 16
DECODER = DecoderConfig(
  vocab_size=VOCAB,
  width=WIDTH,
  num_layers=1,
  num_heads=2,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=32,
  max_len=32,
)
POLICY, SCALAR = policy_model(DECODER), scalar_model(DECODER)
TEMPERATURE = 0.7
PROMPT_LENS, COMPLETION_LENS = np.array([3, 1, 2, 3]), np.array([5, 3, 1, 4])


@functools.cache
def policy_params(seed=0):
  # Larger than the usual initialisation, so that distributions are far from uniform.
  return jax.tree.map(lambda x: 10 * x, jax.jit(POLICY.init)(jax.random.key(seed)))


@functools.cache
def scalar_params():
  decoder = policy_params()["decoder"]
  return {"decoder": decoder, "head": jax.random.normal(jax.random.key(1), (WIDTH, 1))}


@functools.cache
def make_rollout() -> Rollout:
  rng = np.random.default_rng(0)
  prompt_mask = np.arange(PROMPT_LEN) >= PROMPT_LEN - PROMPT_LENS[:, None]
  mask = np.arange(MAX_COMPLETION_LEN) < COMPLETION_LENS[:, None]
  tokens = rng.integers(VOCAB, size=(BATCH, PROMPT_LEN + MAX_COMPLETION_LEN), dtype=np.int32)
  old_log_probs = np.where(mask, -rng.random(mask.shape, np.float32), 0)
  return Rollout(tokens, prompt_mask, mask, COMPLETION_LENS < 5, old_log_probs, old_log_probs)


def padded_on_the_left(rollout: Rollout) -> Rollout:
  return rollout._replace(
    tokens=np.pad(rollout.tokens, ((0, 0), (2, 0)), constant_values=6),
    prompt_mask=np.pad(rollout.prompt_mask, ((0, 0), (2, 0))),
  )


@jax.jit
def learnt(params, rollout):
  """Returns log-probs [B, T], and the gradient of the sum of those that were chosen."""

  def total(params):
    log_probs = completions.log_probs(POLICY, params, rollout, temperature=TEMPERATURE)
    return ops.zero_padding(log_probs, rollout.completion_mask).sum(), log_probs

  (_, log_probs), gradient = jax.value_and_grad(total, has_aux=True)(params)
  return log_probs, gradient


def test_a_beginning_of_the_answer_is_the_same_in_the_prompt_and_as_a_hole():
  prompts, beginnings, chosen = [[1, 2], [3]], [[4], [5, 6, 0]], [[2, 3], [1]]

  def rollout_of(before, after, holes):
    tokens, prompt_mask = data.pad(before, 0, left=True)
    more, mask = data.pad(after, 0, left=False)
    is_chosen = mask & (np.arange(mask.shape[1]) >= np.array(holes)[:, None])
    unused = np.zeros(mask.shape, np.float32)
    both = np.concatenate([tokens, more], axis=1)
    return Rollout(both, prompt_mask, is_chosen, np.ones(len(both), bool), unused, unused)

  params = policy_params()
  in_prompts = [a + b for a, b in zip(prompts, beginnings, strict=True)]
  log_probs, gradient = learnt(params, rollout_of(in_prompts, chosen, [0, 0]))
  alone = []
  for row in range(2):
    width = [[0] * 2, [0] * 4]  # of the arrays, so that one program serves both
    holes = rollout_of(
      [prompts[row], width[0]], [beginnings[row] + chosen[row], width[1]], [len(beginnings[row]), 4]
    )
    found, of_row = learnt(params, holes)
    first, num = len(beginnings[row]), len(chosen[row])
    np.testing.assert_allclose(found[0, first : first + num], log_probs[row, :num], rtol=1e-4)
    alone.append(of_row)
  jax.tree.map(
    lambda x, *rows: np.testing.assert_allclose(x, sum(rows), rtol=1e-3, atol=1e-4),
    gradient,
    *alone,
  )


@jax.jit
def say(params, reference_params, values_params, rollout, temperature):
  """Returns everything that models say of a rollout, in one program."""
  log_probs, entropy = completions.log_probs_and_entropy(
    POLICY, params, rollout, temperature=temperature
  )
  return {
    "log_probs": log_probs,
    "log_probs_alone": completions.log_probs(POLICY, params, rollout, temperature=temperature),
    "entropy": entropy,
    "exact_kl": completions.exact_kl(
      POLICY, params, POLICY, reference_params, rollout, temperature=temperature
    ),
    "values": completions.values(SCALAR, values_params, rollout),
    "scores": completions.reward_model_scores(SCALAR, values_params, rollout),
    "all_values": SCALAR.values(values_params, rollout.tokens, completions.attention_mask(rollout)),
  }


@functools.cache
def said():
  arguments = policy_params(), policy_params(7), scalar_params(), make_rollout(), TEMPERATURE
  return jax.device_get(say(*arguments))


def vocab_log_probs(params):
  """Returns [B, P + T, V], dense, at every position."""
  rollout = make_rollout()
  mask = np.concatenate([rollout.prompt_mask, rollout.completion_mask], axis=1)
  hidden = np.asarray(jax.jit(POLICY.hidden)(params, rollout.tokens, mask), np.float64)
  logits = hidden @ np.asarray(POLICY.unembedding(params), np.float64) / TEMPERATURE
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_completion_token_t_is_predicted_at_the_position_before_it():
  rollout, found = make_rollout(), said()
  pi, ref = vocab_log_probs(policy_params()), vocab_log_probs(policy_params(7))
  for b, t in np.argwhere(rollout.completion_mask):
    position = PROMPT_LEN - 1 + t
    at = pi[b, position]
    expected = {
      "log_probs": at[rollout.tokens[b, position + 1]],
      "entropy": -(np.exp(at) * at).sum(),
      "exact_kl": (np.exp(at) * (at - ref[b, position])).sum(),
      "values": found["all_values"][b, position],
    }
    expected["log_probs_alone"] = expected["log_probs"]
    for name, value in expected.items():
      np.testing.assert_allclose(found[name][b, t], value, rtol=2e-4, atol=2e-5, err_msg=name)
  assert found["log_probs"].shape == rollout.completion_mask.shape
  assert found["exact_kl"][rollout.completion_mask].min() > 0.01


def test_a_reward_model_is_read_at_the_last_real_token():
  found = said()
  last = PROMPT_LEN + COMPLETION_LENS - 1
  np.testing.assert_array_equal(found["scores"], found["all_values"][np.arange(BATCH), last])
  assert len(set(found["scores"])) == BATCH


def test_padding_on_the_left_changes_nothing():
  arguments = policy_params(), policy_params(7), scalar_params()
  padded = jax.device_get(say(*arguments, padded_on_the_left(make_rollout()), TEMPERATURE))
  mask = make_rollout().completion_mask
  for name, x in said().items():
    if name != "all_values":
      where = mask if x.ndim == 2 else slice(None)
      np.testing.assert_allclose(padded[name][where], x[where], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("group_size", [1, 2])
def test_rows_in_parts_and_prompts_of_groups_are_computed_as_a_whole(group_size, monkeypatch):
  rollout = make_rollout()
  tokens, prompt_mask = np.array(rollout.tokens), np.array(rollout.prompt_mask)
  tokens[1::2, :PROMPT_LEN], prompt_mask[1::2] = tokens[::2, :PROMPT_LEN], prompt_mask[::2]
  rollout = rollout._replace(tokens=tokens, prompt_mask=prompt_mask)

  def found(group_size):
    def loss(params, scalar):
      hidden = completions.completion_hidden(POLICY, params, rollout, group_size=group_size)
      values = completions.values(SCALAR, scalar, rollout, group_size=group_size)
      total = jnp.where(rollout.completion_mask, hidden.sum(axis=-1) + values, 0.0).sum()
      return total, (hidden, values)

    fn = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    lowered = jax.jit(fn).lower(policy_params(), scalar_params())
    (_, values), gradient = lowered.compile()(policy_params(), scalar_params())
    mask = rollout.completion_mask
    return lowered.as_text(), jax.tree.map(lambda x: x[mask], values), gradient

  whole = found(1)
  monkeypatch.setattr(gradients, "TOKENS_PER_PART", 13)
  parts = found(group_size)
  assert parts[0].count("while") > whole[0].count("while")
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * (1 + np.abs(y).max())),
    parts[1:],
    whole[1:],
  )


def test_tokens_in_the_padding_change_nothing():
  rollout = make_rollout()
  real = np.concatenate([rollout.prompt_mask, rollout.completion_mask], axis=1)
  other = rollout._replace(tokens=np.where(real, rollout.tokens, (rollout.tokens + 1) % VOCAB))
  arguments = policy_params(), policy_params(7), scalar_params()
  found = jax.device_get(say(*arguments, other, TEMPERATURE))
  for name in ("log_probs", "entropy", "exact_kl", "values"):
    np.testing.assert_array_equal(
      found[name][rollout.completion_mask], said()[name][rollout.completion_mask], err_msg=name
    )
    assert np.all(np.isfinite(found[name]))
  np.testing.assert_array_equal(found["scores"], said()["scores"])


def test_a_model_has_no_kl_to_itself():
  kl = say(policy_params(), policy_params(), scalar_params(), make_rollout(), TEMPERATURE)
  np.testing.assert_allclose(kl["exact_kl"], 0, atol=1e-6)


def test_masks_and_tokens_are_those_of_the_rollout():
  rollout = make_rollout()
  mask = completions.attention_mask(rollout)
  np.testing.assert_array_equal(mask.sum(axis=1), PROMPT_LENS + COMPLETION_LENS)
  assert mask.dtype == bool
  np.testing.assert_array_equal(
    completions.completion_tokens(rollout), rollout.tokens[:, PROMPT_LEN:]
  )


def test_figures_of_a_sequence_by_hand():
  x = jnp.array([[1.0, 2.0, jnp.nan], [5.0, jnp.nan, jnp.inf]])
  mask = jnp.array([[True, True, False], [True, False, False]])
  # Sums 3 and 5: mean 4, deviation sqrt(2), over sqrt(2) rows; 8 nats on 3 tokens.
  assert finalise(diagnostics.sequence_stats("kl/ref_k1", x, mask)) == pytest.approx(
    {"kl/ref_k1": 4.0, "kl/ref_k1_stderr": 1.0, "kl/ref_k1_per_token": 8 / 3}
  )
  assert finalise({"x": diagnostics.per_sequence(x, mask)}) == {"x": 4.0}


def test_one_sequence_has_no_standard_error():
  found = finalise(diagnostics.sequence_stats("x", jnp.ones((1, 2)), jnp.ones((1, 2), bool)))
  assert found == {"x": 2.0, "x_per_token": 1.0, "x_stderr": None}


def test_figures_of_a_rollout_by_hand():
  scores = jnp.array([1.0, 2.0, 3.0, 6.0])
  assert finalise(diagnostics.rollout_metrics(make_rollout(), scores)) == pytest.approx(
    {
      "score/mean": 3.0,
      "score/std": np.sqrt(3.5),
      "rollout/length": 13 / 4,
      "rollout/finished_fraction": 0.75,
      "rollout/tokens": 13,
    }
  )


def test_explained_variance_of_perfect_constant_and_opposite_values():
  returns = jnp.array([[1.0, -1.0, jnp.nan]])
  mask = jnp.array([[True, True, False]])

  def explained(values, returns=returns):
    return finalise({"x": diagnostics.explained_variance(values, returns, mask)})["x"]

  assert explained(returns) == 1
  assert explained(returns + 3) == 1  # The mean is no variance.
  assert explained(jnp.zeros_like(returns)) == 0
  assert explained(-returns) == -3  # Twice as far off: 1 - 4.
  assert explained(returns, jnp.ones_like(returns)) is None


def test_sums_over_parts_add_up_to_the_whole():
  rollout, found = make_rollout(), said()
  whole = diagnostics.sequence_stats("kl", found["exact_kl"], rollout.completion_mask)
  parts = [
    diagnostics.sequence_stats("kl", found["exact_kl"][rows], rollout.completion_mask[rows])
    for rows in (slice(0, 3), slice(3, 4))
  ]
  for name in ("kl", "kl_per_token"):
    total, count = (sum(part[name][i] for part in parts) for i in range(2))
    np.testing.assert_allclose(ops.divide(total, count), ops.divide(*whole[name]), rtol=1e-6)
