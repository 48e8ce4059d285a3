"""Measures the claims that `klrl.sampling` makes about cost.

    python -m benchmarks.sampling_bench

1. Cost follows the tokens drawn, not the room left for them.
2. The work ends with the last row.
3. What drawing and the log-probs add to a step, against taking the most likely token.

Prints medians over interleaved repetitions, with the fastest and slowest, and ratios to the first
line of each group. --record writes the ratios into benchmarks/results.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp

from benchmarks import results
from klrl.models.decoder import DecoderConfig, policy_model
from klrl.sampling import make_greedy_fn, make_sample_fn

# The shape of stories260K, with room for long completions.
CONFIG = DecoderConfig(
  vocab_size=512,
  width=64,
  num_layers=5,
  num_heads=8,
  num_kv_heads=4,
  head_dim=8,
  mlp_dim=172,
  max_len=8192,
)
PROMPT_LEN = 16
NUM_TOKENS = 64
ROOMS = (64, 256, 1024, 4096)  # tokens that a completion may have
EOS_ID = CONFIG.vocab_size - 1


def ending_policy(policy, num_tokens):
  """Returns the policy made to say EOS_ID in all rows as token `num_tokens`."""

  def decode(params, tokens, t, prompts, cache):
    hidden, cache = policy.decode(params, tokens, t, prompts, cache)
    end = policy.unembedding(params)[:, EOS_ID][None] * 1e6
    return jnp.where(t == num_tokens - 2, end, hidden), cache

  return dataclasses.replace(policy, decode=decode)


def measure(calls, repetitions):
  """Returns {name: seconds per call}, all calls compiled first, then taken in turn."""
  seconds = {name: [] for name in calls}
  for call in calls.values():
    jax.block_until_ready(call())
  for _ in range(repetitions):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      seconds[name].append(time.perf_counter() - start)
  return seconds


def report(title, calls, repetitions):
  """Prints a group of figures, and returns {name: {"time": median over that of the first}}."""
  print(title)
  first, ratios = None, {}
  for name, seconds in measure(calls, repetitions).items():
    ms = sorted(1e3 * s for s in seconds)
    median = statistics.median(ms)
    first = first or median
    print(f"  {name:16} {median:8.2f} ms  [{ms[0]:.2f}, {ms[-1]:.2f}]  x{median / first:.2f}")
    ratios[name] = {"time": round(median / first, 2)}
  return ratios


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch_size", type=int, default=32)
  parser.add_argument("--repetitions", type=int, default=7)
  parser.add_argument("--record", action="store_true", help="write benchmarks/results")
  args = parser.parse_args()
  policy = policy_model(CONFIG)
  params = jax.jit(policy.init)(jax.random.key(0))
  prompts = jnp.ones((args.batch_size, PROMPT_LEN), jnp.int32)
  mask = jnp.ones(prompts.shape, bool)
  key = jax.random.key(1)

  def sampler(policy, max_completion_len):
    settings = {"max_completion_len": max_completion_len, "eos_id": EOS_ID, "pad_id": 0}
    sample = jax.jit(make_sample_fn(policy, **settings))
    return lambda: sample(params, prompts, mask, key, temperature=1.0)

  ending = ending_policy(policy, NUM_TOKENS)
  longest = sampler(ending, ROOMS[-1])().completion_mask.sum(axis=1).max()
  print(f"{jax.devices()[0]}, batch {args.batch_size}, longest completion {longest}")
  rooms = {f"room for {n}": sampler(ending, n) for n in ROOMS}
  figures = report(f"1. {NUM_TOKENS} tokens in a larger room", rooms, args.repetitions)
  ends = {
    f"all rows end after {n}": sampler(ending_policy(policy, n), NUM_TOKENS) for n in (64, 32, 8)
  }
  figures |= report("2. all rows end early", ends, args.repetitions)
  settings = {"max_completion_len": NUM_TOKENS, "eos_id": EOS_ID, "pad_id": 0}
  greedy = jax.jit(make_greedy_fn(policy, **settings))
  drawing = {
    "greedy": lambda: greedy(params, prompts, mask),
    "sample": sampler(policy, NUM_TOKENS),
  }
  figures |= report("3. drawing", drawing, args.repetitions)
  if args.record:
    results.record("sampling_bench", figures)


if __name__ == "__main__":
  main()
