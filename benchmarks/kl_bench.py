"""Measures what `klrl.ops.exact_kl_from_hidden` costs, in time and in compiled memory.

    python -m benchmarks.kl_bench

It is compared with two other ways to the same numbers: `dense` holds all logits, and
`jax.checkpoint` computes the logits of a chunk again and lets JAX differentiate the formula. Each
computes the value; value and gradient of the policy's arrays, with a reference that `stop_gradient`
freezes; and value and gradient of all four arrays and the temperature.

A second part compares log-probs of tokens alone with log-probs, entropy and KL against a frozen
reference: by three functions, and in one pass over the vocabulary.

Prints medians over interleaved repetitions, with the fastest and slowest, ratios to the first line
of each group, and the temporary memory of the compiled program. --record writes the figures into
benchmarks/results.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp

from benchmarks import results
from benchmarks.sampling_bench import measure
from klrl import ops
from klrl.ops.logits import matmul
from klrl.ops.vocabulary import chunk_rows, num_chunks_of, unchunk_rows

MIB = 2**20


def dense(hidden, unembedding, ref_hidden, ref_unembedding, *, temperature):
  logits, ref_logits = matmul(hidden, unembedding), matmul(ref_hidden, ref_unembedding)
  return ops.exact_kl(logits, ref_logits, temperature=temperature)


def checkpointed(hidden, unembedding, ref_hidden, ref_unembedding, *, temperature):
  @jax.checkpoint
  def chunk(rows, weights, temperature):
    logits, ref_logits = matmul(rows[0], weights[0]), matmul(rows[1], weights[1])
    return ops.exact_kl(logits, ref_logits, temperature=temperature)

  weights = (unembedding, ref_unembedding)
  # As many as the pass over the vocabulary takes, which counts the logits of both models.
  num_chunks = num_chunks_of(len(hidden), 2 * unembedding.shape[1], None)
  rows = tuple(chunk_rows(x, num_chunks).swapaxes(0, 1) for x in (hidden, ref_hidden))
  kl = jax.lax.map(lambda rows: chunk(rows, weights, temperature), rows)
  return unchunk_rows(kl.T, len(hidden))


WAYS = {"dense": dense, "jax.checkpoint": checkpointed, "custom VJP": ops.exact_kl_from_hidden}


def total(way, frozen):
  """Returns f(hidden, unembedding, ref_hidden, ref_unembedding, temperature) -> sum of the KL."""

  def fn(hidden, unembedding, ref_hidden, ref_unembedding, temperature):
    ref = (ref_hidden, ref_unembedding)
    ref = jax.lax.stop_gradient(ref) if frozen else ref
    return way(hidden, unembedding, *ref, temperature=temperature).sum()

  return fn


def alone(hidden, unembedding, ref_hidden, ref_unembedding, tokens):
  del ref_hidden, ref_unembedding
  return [ops.token_log_probs_from_hidden(hidden, unembedding, tokens)]


def by_functions(hidden, unembedding, ref_hidden, ref_unembedding, tokens):
  of_tokens = ops.token_log_probs_and_entropy_from_hidden(hidden, unembedding, tokens)
  return *of_tokens, ops.exact_kl_from_hidden(hidden, unembedding, ref_hidden, ref_unembedding)


def in_one_pass(hidden, unembedding, ref_hidden, ref_unembedding, tokens):
  def figures(log_probs, ref_log_probs, tokens):
    of_tokens = ops.taken(log_probs, tokens), ops.entropy_of(log_probs)
    return *of_tokens, ops.kl_of(log_probs, ref_log_probs)

  models = (hidden, unembedding), (ref_hidden, ref_unembedding)
  return ops.over_vocabulary(figures, models, [tokens])


FIGURES = {
  "log-probs alone": alone,
  "with entropy and KL, by functions": by_functions,
  "with entropy and KL, in one pass": in_one_pass,
}


def of_policy(way):
  """Returns f(hidden, unembedding, ref_hidden, ref_unembedding, tokens), value and gradient."""

  def fn(hidden, unembedding, *others):
    return sum(x.sum() for x in way(hidden, unembedding, *others))

  return jax.value_and_grad(fn, (0, 1))


QUESTIONS = {
  "value": lambda way: total(way, frozen=True),
  "value and gradient, frozen reference": lambda way: jax.value_and_grad(total(way, True), (0, 1)),
  "value and gradient of everything": lambda way: jax.value_and_grad(total(way, False), range(5)),
}


def arrays(rows, vocab_size, *widths):
  """Returns hidden states [rows, D] and unembedding [D, V] of each model, one after the other."""
  keys = iter(jax.random.split(jax.random.key(0), 2 * len(widths)))
  found = []
  for width in widths:
    found.append(jax.random.normal(next(keys), (rows, width)))
    found.append(jax.random.normal(next(keys), (width, vocab_size)) / width**0.5)
  return found


def compared(title, fns, inputs, repetitions):
  """Prints what each function takes, and returns {figure: seconds, or MiB}."""
  compiled = {name: jax.jit(fn).lower(*inputs).compile() for name, fn in fns.items()}
  calls = {name: lambda fn=fn: fn(*inputs) for name, fn in compiled.items()}
  print(title)
  first, figures = None, {}
  for name, seconds in measure(calls, repetitions).items():
    median = statistics.median(seconds)
    first = first or median
    memory = compiled[name].memory_analysis().temp_size_in_bytes / MIB
    print(
      f"  {name:33} {median:6.2f} s  [{min(seconds):.2f}, {max(seconds):.2f}]  "
      f"x{median / first:.2f}  {memory:7.1f} MiB"
    )
    figures[f"{name}, s"] = [round(x, 2) for x in (median, min(seconds), max(seconds))]
    figures[f"{name}, MiB"] = round(memory)
  return figures


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=4096)
  parser.add_argument("--vocab_size", type=int, default=32_000)
  parser.add_argument("--width", type=int, default=64)
  parser.add_argument("--ref_width", type=int, default=96)
  parser.add_argument("--wide", type=int, default=512, help="width of the second part")
  parser.add_argument("--repetitions", type=int, default=5)
  parser.add_argument("--record", action="store_true", help="write benchmarks/results")
  args = parser.parse_args()
  logits = args.rows * args.vocab_size * 4 / MIB
  print(f"{jax.devices()[0]}, {args.rows} rows of {args.vocab_size}: {logits:.0f} MiB of logits")
  inputs = (*arrays(args.rows, args.vocab_size, args.width, args.ref_width), jnp.float32(0.9))
  figures = {}
  for title, question in QUESTIONS.items():
    fns = {name: question(way) for name, way in WAYS.items()}
    figures[title] = compared(title, fns, inputs, args.repetitions)
  title = f"value and gradient, width {args.wide}"
  tokens = jax.random.randint(jax.random.key(1), (args.rows,), 0, args.vocab_size)
  inputs = (*arrays(args.rows, args.vocab_size, args.wide, args.wide), tokens)
  fns = {name: of_policy(way) for name, way in FIGURES.items()}
  figures[title] = compared(title, fns, inputs, args.repetitions)
  if args.record:
    results.record("kl_bench", figures)


if __name__ == "__main__":
  main()
