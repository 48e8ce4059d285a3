"""Sampling: what is drawn, under which distribution, when it ends, and how much work it does."""

import dataclasses
import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from klrl import sampling
from klrl.cost import hlo
from klrl.devices import parallel
from klrl.models import add_lora, hf, join, load_tokenizer
from klrl.models.decoder import DecoderConfig, Policy, policy_model
from klrl.models.uniform import uniform_policy
from klrl.sampling import (
  beginning_with,
  make_greedy_fn,
  make_sample_fn,
  top_k_logits,
  top_p_logits,
)

SHARED = pathlib.Path(__file__).parents[2] / "shared"
TINY = DecoderConfig(
  vocab_size=7,
  width=8,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=12,
  max_len=512,
)
PROMPTS = np.array([[0, 0, 4], [2, 5, 3], [0, 6, 1]])
PROMPT_MASK = np.array([[0, 0, 1], [1, 1, 1], [0, 1, 1]], bool)


@functools.cache
def tiny():
  """Returns a small policy whose distributions are far from uniform, and its params."""
  policy = policy_model(TINY)
  params = jax.jit(policy.init)(jax.random.key(0))
  return policy, jax.tree.map(lambda x: x if x.ndim == 1 else 20 * x, params)


@functools.cache
def sample_fn(**settings):
  return jax.jit(make_sample_fn(tiny()[0], **{"eos_id": None, "pad_id": 0} | settings))


def rescored(rollout, temperature):
  """Returns log-probs [B, T, V] of every token at each place of the completion."""
  policy, params = tiny()

  @jax.jit
  def score(params, tokens, mask):
    logits = policy.hidden(params, tokens, mask) @ policy.unembedding(params)
    return jax.nn.log_softmax(logits / temperature)

  mask = np.concatenate([rollout.prompt_mask, rollout.completion_mask], axis=1)
  prompt_len = rollout.prompt_mask.shape[1]
  return np.asarray(score(params, rollout.tokens, mask))[:, prompt_len - 1 : -1]


def completions(rollout):
  return np.asarray(rollout.tokens)[:, rollout.prompt_mask.shape[1] :]


def counting_policy(steps, cache_lens, vocab_size=50):
  """Returns a policy that always goes on with the last token + 1.

  It notes (cache length, slot) of each decoding step, and each cache length that it allocates.
  """

  def one_hot(tokens):
    return 9.0 * jax.nn.one_hot((tokens + 1) % vocab_size, vocab_size)

  def prefill(params, tokens, mask, row_len):
    return one_hot(tokens[:, -1]), ()

  def decode(params, tokens, t, prompts, cache):
    jax.debug.callback(lambda t: steps.append((len(cache), int(t))), t, ordered=True)
    return one_hot(tokens), cache

  def grow(cache, num_slots):
    cache_len = len(cache) + num_slots
    jax.debug.callback(lambda: cache_lens.append(cache_len), ordered=True)
    return jnp.zeros(cache_len)

  return Policy(
    config=dataclasses.replace(TINY, vocab_size=vocab_size, max_len=10**5),
    init=None,
    hidden=None,
    unembedding=lambda params: jnp.eye(vocab_size),
    prefill=prefill,
    unstack=lambda params: params,
    empty_cache=lambda prompts, num_branches: jnp.zeros(0),
    grow=grow,
    decode=decode,
  )


def count_up(prompts, **settings):
  """Returns the greedy rollout of the counting policy, and what it noted."""
  steps, cache_lens = [], []
  greedy = jax.jit(make_greedy_fn(counting_policy(steps, cache_lens), **settings))
  rollout = greedy({}, np.array(prompts), np.ones_like(prompts, bool))
  jax.effects_barrier()
  return rollout, steps, cache_lens


def test_each_row_ends_at_its_own_eos():
  rollout, *_ = count_up([[5], [3], [8], [1]], max_completion_len=5, eos_id=6, pad_id=0)
  np.testing.assert_array_equal(
    completions(rollout),
    [[6, 0, 0, 0, 0], [4, 5, 6, 0, 0], [9, 10, 11, 12, 13], [2, 3, 4, 5, 6]],
  )
  np.testing.assert_array_equal(np.sum(rollout.completion_mask, axis=1), [1, 3, 5, 5])
  np.testing.assert_array_equal(rollout.finished, [True, True, False, True])
  assert np.all(np.asarray(rollout.old_log_probs)[np.asarray(rollout.completion_mask)] < 0)
  assert np.all(np.asarray(rollout.old_log_probs)[~np.asarray(rollout.completion_mask)] == 0)


def test_a_given_beginning_is_read_and_not_drawn_and_ends_nothing():
  settings = {"max_completion_len": 5, "eos_id": 6, "pad_id": 0, "given": beginning_with([6, 3])}
  rollout, *_ = count_up([[4], [9]], **settings)
  np.testing.assert_array_equal(completions(rollout), [[6, 3, 4, 5, 6]] * 2)
  np.testing.assert_array_equal(rollout.completion_mask, [[False] * 2 + [True] * 3] * 2)
  assert np.all(rollout.finished) and beginning_with([]) is None
  np.testing.assert_array_equal(np.asarray(rollout.old_log_probs) == 0, ~rollout.completion_mask)


def test_no_eos_id_means_full_length_even_through_padding_ids():
  rollout, *_ = count_up([[48]], max_completion_len=4, eos_id=None, pad_id=0)
  np.testing.assert_array_equal(completions(rollout), [[49, 0, 1, 2]])
  assert np.all(rollout.completion_mask) and not np.any(rollout.finished)


def test_the_model_is_not_called_after_the_last_token():
  assert len(count_up([[1]], max_completion_len=1, eos_id=None, pad_id=0)[1]) == 0
  assert len(count_up([[1]], max_completion_len=6, eos_id=None, pad_id=0)[1]) == 5


def test_work_stops_when_all_rows_have_ended():
  rollout, steps, cache_lens = count_up([[3], [5]], max_completion_len=9000, eos_id=7, pad_id=0)
  assert len(steps) == 3
  assert max(cache_lens) < 200
  np.testing.assert_array_equal(np.sum(rollout.completion_mask, axis=1), [4, 2])


def test_a_step_reads_at_most_twice_the_slots_in_use_plus_the_first_cache():
  _, steps, _ = count_up([[1, 2]], max_completion_len=1200, eos_id=None, pad_id=0)
  assert [slot for _, slot in steps] == list(range(1199))
  assert all(slot < length <= max(2 * slot, 128) for length, slot in steps)


def test_caches_double_so_that_few_loops_are_compiled():
  _, _, cache_lens = count_up([[1, 2]], max_completion_len=1200, eos_id=None, pad_id=0)
  assert cache_lens == [128, 256, 512, 1024, 1199]


@pytest.mark.parametrize(
  ("max_completion_len", "message"),
  [(510, r"max_completion_len=510.*max_len=512"), (0, "max_completion_len=0")],
)
def test_impossible_lengths_are_refused(max_completion_len, message):
  policy, params = tiny()
  sample = make_sample_fn(policy, max_completion_len=max_completion_len, eos_id=None, pad_id=0)
  with pytest.raises(ValueError, match=message):
    sample(params, PROMPTS, PROMPT_MASK, jax.random.key(0), temperature=1.0)


def test_log_probs_equal_rescoring_across_growing_caches():
  # 300 tokens run through caches of 128, 256 and 299 slots.
  sample = sample_fn(max_completion_len=300)
  rollout = sample(tiny()[1], PROMPTS, PROMPT_MASK, jax.random.key(1), temperature=0.7)
  tokens = completions(rollout)[..., None]
  expected = np.take_along_axis(rescored(rollout, 0.7), tokens, axis=-1)[..., 0]
  np.testing.assert_allclose(rollout.old_log_probs, expected, atol=3e-4)
  np.testing.assert_array_equal(rollout.sampler_log_probs, rollout.old_log_probs)
  np.testing.assert_array_equal(rollout.tokens[:, :3], PROMPTS)
  assert rollout.tokens.dtype == jnp.int32 and rollout.old_log_probs.dtype == jnp.float32


def test_log_probs_equal_rescoring_with_eos():
  sample = sample_fn(max_completion_len=20, eos_id=3)
  prompts, mask = np.repeat(PROMPTS, 20, axis=0), np.repeat(PROMPT_MASK, 20, axis=0)
  rollout = sample(tiny()[1], prompts, mask, jax.random.key(1), temperature=1.5)
  tokens, real = completions(rollout), np.asarray(rollout.completion_mask)
  expected = np.take_along_axis(rescored(rollout, 1.5), tokens[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(rollout.old_log_probs, np.where(real, expected, 0), atol=1e-4)
  ends = (tokens == 3) & real
  np.testing.assert_array_equal(ends.sum(axis=1), rollout.finished)
  assert ends.sum() > 0 and len(set(real.sum(axis=1))) > 3


def test_truncation_draws_from_the_renormalised_head_and_says_both_log_probs():
  sample = sample_fn(max_completion_len=12, top_k=4, top_p=0.8)
  rollout = sample(tiny()[1], PROMPTS, PROMPT_MASK, jax.random.key(2), temperature=1.2)
  log_probs = rescored(rollout, 1.2)
  tokens = completions(rollout)
  for b, t in np.ndindex(tokens.shape):
    probs = np.exp(log_probs[b, t])
    order = np.argsort(-probs)[:4]
    head = probs[order] / probs[order].sum()
    kept = order[: max(1, np.sum(np.cumsum(head) <= 0.8))]
    assert tokens[b, t] in kept
    chosen = log_probs[b, t, tokens[b, t]]
    np.testing.assert_allclose(rollout.old_log_probs[b, t], chosen, atol=1e-4)
    expected = chosen - np.log(probs[kept].sum())
    np.testing.assert_allclose(rollout.sampler_log_probs[b, t], expected, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_pairs_of_tokens_have_the_frequencies_of_the_softmax(temperature):
  num_rows, vocab = 4000, TINY.vocab_size
  sample = sample_fn(max_completion_len=2)
  prompts, mask = np.tile(PROMPTS[2:], (num_rows, 1)), np.tile(PROMPT_MASK[2:], (num_rows, 1))
  rollout = sample(tiny()[1], prompts, mask, jax.random.key(3), temperature=temperature)
  first, second = completions(rollout).T
  frequencies = np.bincount(vocab * first + second, minlength=vocab**2) / num_rows
  pairs = rollout._replace(
    tokens=np.concatenate(
      [prompts[: vocab**2], np.indices((vocab, vocab)).reshape(2, -1).T], axis=1
    ),
    prompt_mask=mask[: vocab**2],
    completion_mask=np.ones((vocab**2, 2), bool),
  )
  log_probs = np.take_along_axis(
    rescored(pairs, temperature), pairs.tokens[:, 3:, None], axis=-1
  ).sum(axis=(1, 2))
  probs = np.exp(log_probs)
  stderr = np.sqrt(probs * (1 - probs) / num_rows)
  np.testing.assert_allclose(probs.sum(), 1, atol=1e-4)
  # One draw of slack for the cells where less than one is expected.
  assert np.all(np.abs(frequencies - probs) < 5 * stderr + 1 / num_rows)
  assert np.max(probs) > 3 / vocab**2


@functools.cache
def draws_fn(vocab_size, num_rows, num_draws):
  policy = dataclasses.replace(
    uniform_policy(vocab_size, 2),
    unembedding=lambda params: params[None],
    prefill=lambda params, tokens, mask, row_len: (jnp.ones((len(tokens), 1)), ()),
  )
  sample = make_sample_fn(policy, max_completion_len=1, eos_id=None, pad_id=0)
  prompts = jnp.zeros((num_rows, 1), jnp.int32)

  @jax.jit
  def draws(logits):
    def draw(key):
      rollout = sample(logits, prompts, prompts == 0, key, temperature=1.0)
      return rollout.tokens[:, 1], rollout.old_log_probs[:, 0]

    return jax.lax.map(draw, jax.random.split(jax.random.key(7), num_draws))

  return draws


def drawn(logits, num_rows, num_draws):
  """Returns (tokens, log-probs), [num_draws, num_rows] each, where the logits are these [V]."""
  draws = draws_fn(len(logits), num_rows, num_draws)
  return map(np.asarray, draws(jnp.asarray(logits, jnp.float32)))


def test_tokens_of_a_large_vocabulary_have_the_frequencies_of_the_softmax():
  # Probabilities fall as the words of a language do, in an order that has nothing to do with ids,
  # and a third of the tokens has none; 4099 is a prime number.
  vocab_size, num_rows, num_draws = 4099, 200, 250
  rng = np.random.default_rng(0)
  probs = rng.permutation(1 / np.arange(1, vocab_size + 1))
  probs[rng.permutation(vocab_size)[: vocab_size // 3]] = 0
  probs /= probs.sum()
  tokens, log_probs = drawn(
    np.log(probs, where=probs > 0, out=np.full(vocab_size, -np.inf)), num_rows, num_draws
  )
  counts = np.bincount(tokens.ravel(), minlength=vocab_size)
  assert not counts[probs == 0].any()
  expected = probs * tokens.size
  common = expected >= 5
  seen = np.append(counts[common], counts[~common].sum())
  wanted = np.append(expected[common], expected[~common].sum())
  assert common.sum() > 500
  assert stats.chisquare(seen, wanted).pvalue > 1e-3
  # Neighbouring rows and draws are independent: the commonest token follows itself by chance.
  commonest = tokens == probs.argmax()
  for first, second in ((commonest[:, :-1], commonest[:, 1:]), (commonest[:-1], commonest[1:])):
    share, size = (first & second).mean(), first.size
    assert abs(share - probs.max() ** 2) < 5 * probs.max() / size**0.5
  np.testing.assert_allclose(log_probs, np.log(probs[tokens]), atol=1e-5)


@pytest.mark.parametrize("vocab_size", [1, 9, 10])
def test_the_only_token_with_probability_is_always_drawn(vocab_size):
  for token in range(vocab_size):
    logits = np.where(np.arange(vocab_size) == token, -80.0, -np.inf)
    tokens, log_probs = drawn(logits, 20, 20)
    assert np.all(tokens == token) and np.all(log_probs == 0)


def test_the_completions_of_a_prompt_share_the_reading_of_it():
  policy, params = tiny()
  num_read, shared_by = [], []

  def prefill(params, tokens, *arguments):
    num_read.append(len(tokens))
    return policy.prefill(params, tokens, *arguments)

  def empty_cache(prompts, num_branches):
    shared_by.append((len(prompts.mask), num_branches))
    return policy.empty_cache(prompts, num_branches)

  limits = {"max_completion_len": 12, "eos_id": 3, "pad_id": 0}
  counted = dataclasses.replace(policy, prefill=prefill, empty_cache=empty_cache)
  shared = jax.jit(make_sample_fn(counted, group_size=4, **limits))
  prompts, mask = np.repeat(PROMPTS, 4, axis=0), np.repeat(PROMPT_MASK, 4, axis=0)
  arguments = params, prompts, mask, jax.random.key(1)
  rollout = shared(*arguments, temperature=1.0)
  assert num_read == [3] and shared_by == [(3, 4)]
  chex.assert_trees_all_close(rollout, sample_fn(**limits)(*arguments, temperature=1.0), atol=1e-5)


@functools.cache
def adapted(width):
  """Returns a policy with adapters, and its params; four devices do not divide its vocabulary."""
  config = DecoderConfig(
    vocab_size=510,
    width=width,
    num_layers=1,
    num_heads=width // 16,
    num_kv_heads=width // 64,
    head_dim=16,
    mlp_dim=4 * width,
    max_len=256,
  )
  params = jax.jit(policy_model(config).init)(jax.random.key(0))
  config, adapters, base = add_lora(config, params, jax.random.key(1), rank=2)
  return policy_model(config), join(base, jax.tree.map(lambda x: x + 0.1, adapters))


def rollout_on(spec, sampler_mesh, width, num_rows):
  """Returns (a rollout of 129 tokens on a mesh, the bytes that a device sends by kind)."""
  policy, params = adapted(width)
  sample = make_sample_fn(
    policy, max_completion_len=129, eos_id=None, pad_id=0, group_size=2, sampler_mesh=sampler_mesh
  )
  mesh = parallel.make_mesh(spec)
  sample = jax.jit(parallel.on_mesh(mesh, functools.partial(sample, temperature=1.0)))
  params = jax.device_put(params, parallel.state_shardings(mesh, params))
  rows = np.repeat(np.resize([1, 2], num_rows // 2), 2)
  prompts = jax.device_put((PROMPTS[rows], PROMPT_MASK[rows]), parallel.by_rows(mesh))
  arguments = params, *prompts, jax.random.key(2)
  compiled = sample.lower(*arguments).compile()
  sent = hlo.costs(compiled.as_text(), dict(mesh.shape)).collectives
  sent = {kind: size for (kind, _), size in sent.items()}  # There is one axis.
  return jax.device_get(compiled(*arguments)), sent


def assert_alike(found, alone):
  np.testing.assert_array_equal(found.tokens, alone.tokens)
  np.testing.assert_allclose(found.old_log_probs, alone.old_log_probs, atol=5e-4)


def test_weights_are_gathered_once_for_a_rollout():
  alone, _ = rollout_on("data=1", "auto", 128, 64)
  found, sent = rollout_on("fsdp=4", "gathered", 128, 64)
  assert_alike(found, alone)
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(adapted(128)[1]))
  # Of four quarters each device sends its own to three others.
  assert sent["all-gather"] < 0.76 * weights


def test_of_rows_that_move_to_weights_a_layer_sends_two_sums():
  width, num_rows, num_steps = 512, 4, 128
  alone, _ = rollout_on("data=1", "auto", width, num_rows)
  found, sent = rollout_on("fsdp=4", "split", width, num_rows)
  assert_alike(found, alone)
  # A ring of four sends 3/4 of its numbers to sum them and as many to tell the sums. A step has the
  # sums behind attention and behind the MLP of its one layer, and embeddings.
  step = 3 * 2 * 0.75 * num_rows * width * 4
  assert num_steps * step <= sum(sent.values()) < 1.2 * num_steps * step


@pytest.mark.parametrize(
  ("spec", "num_rows", "stay"),
  [
    ("data=4", 8, False),
    ("fsdp=4", 384, True),
    ("fsdp=4", 385, False),
    ("fsdp=2,data=2", 768, True),
  ],
)
def test_weights_stay_where_rows_are_smaller(spec, num_rows, stay):
  config = dataclasses.replace(TINY, width=512)
  ask = lambda: sampling._weights_stay("auto", num_rows, config)  # noqa: E731
  assert parallel.on_mesh(parallel.make_mesh(spec), ask)() is stay


def test_the_same_key_repeats_and_another_differs():
  sample = functools.partial(sample_fn(max_completion_len=12), tiny()[1], PROMPTS, PROMPT_MASK)
  first, again, other = (sample(jax.random.key(k), temperature=1.0) for k in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert not np.array_equal(first.tokens, other.tokens)


def test_a_row_does_not_depend_on_what_other_rows_hold():
  sample = functools.partial(sample_fn(max_completion_len=20, eos_id=3), tiny()[1])
  key = jax.random.key(5)
  first = sample(PROMPTS, PROMPT_MASK, key, temperature=1.0)
  others = np.where(np.arange(3)[:, None] == 1, PROMPTS, 5)
  second = sample(others, np.ones_like(PROMPT_MASK), key, temperature=1.0)
  np.testing.assert_array_equal(first.tokens[1], second.tokens[1])
  assert not np.array_equal(completions(first)[0], completions(second)[0])


PUBLISHED_LOGITS = np.array([1, 1.01, 1.001, 0, 0, 0, 2], np.float32)


@pytest.mark.parametrize(
  ("k", "kept"),
  [(1, [6]), (2, [1, 6]), (3, [1, 2, 6]), (4, [0, 1, 2, 6]), (5, [0, 1, 2, 3, 4, 5, 6])],
)
def test_top_k_of_the_published_case(k, kept):
  """Case openai.top_k: lm-human-preferences, utils/test_core_utils.py (OpenAI, 2019)."""
  logits = top_k_logits(PUBLISHED_LOGITS, k)
  np.testing.assert_array_equal(np.flatnonzero(np.isfinite(logits)), kept)
  np.testing.assert_array_equal(np.asarray(logits)[kept], PUBLISHED_LOGITS[kept])


@pytest.mark.parametrize(
  ("p", "kept"),
  [(1.0, [0, 1, 2, 3, 4, 5, 6]), (0.7, [1, 2, 6]), (0.6, [1, 6]), (0.5, [6]), (0.0, [6])],
)
def test_top_p_of_the_published_case(p, kept):
  """Case openai.top_p: lm-human-preferences, utils/test_core_utils.py (OpenAI, 2019)."""
  logits = top_p_logits(PUBLISHED_LOGITS, p)
  np.testing.assert_array_equal(np.flatnonzero(np.isfinite(logits)), kept)
  np.testing.assert_array_equal(np.asarray(logits)[kept], PUBLISHED_LOGITS[kept])


def test_a_head_of_exactly_p_stays_whole():
  logits = jnp.array([0.0, 2.0, 1.0, -1.0])
  head = float(jnp.cumsum(jax.nn.softmax(-jnp.sort(-logits)))[1])
  kept = np.isfinite(top_p_logits(logits, head))
  np.testing.assert_array_equal(kept, [False, True, True, False])


def test_bad_truncation_is_refused():
  with pytest.raises(ValueError, match="top_k=-1"):
    top_k_logits(PUBLISHED_LOGITS, -1)
  with pytest.raises(ValueError, match=r"top_p=1\.5"):
    top_p_logits(PUBLISHED_LOGITS, 1.5)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared model")
def test_greedy_text_of_a_trained_model_is_the_published_one():
  """Case llama2c.stories260K_greedy: A. Karpathy's llama2.c, doc/stories260K.md."""
  cases = json.loads((SHARED / "facts" / "published_cases.json").read_text())["cases"]
  (case,) = [case for case in cases if case["id"] == "llama2c.stories260K_greedy"]
  directory = SHARED / "models" / "stories260K"
  config, params = hf.load_policy(directory)
  greedy = make_greedy_fn(
    policy_model(config),
    max_completion_len=case["inputs"]["new_tokens"],
    eos_id=None,
    pad_id=0,
  )
  rollout = jax.jit(greedy)(params, np.array([[case["inputs"]["bos_id"]]]), np.ones((1, 1), bool))
  text = load_tokenizer(directory).tokenizer.decode(rollout.tokens[0].tolist())
  assert text == case["expected"]
  assert np.all(rollout.sampler_log_probs == 0) and np.all(rollout.old_log_probs < 0)
