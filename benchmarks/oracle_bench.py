"""Seconds that the oracle takes on trees of about a million completions, compilation included.

    python -m benchmarks.oracle_bench

Each tree is made, and of two random policies on it: KL, its gradient, entropy, expected length, the
log-probabilities of all completions, and the optimal policy for random scores. One call each; wall
and CPU seconds.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import results
from klrl.exact import oracle

TREES = ((10, 6, None), (11, 6, 0), (2, 20, None), (3, 19, 0))  # vocabulary, horizon, EOS


def everything(vocab_size: int, horizon: int, eos_id: int | None) -> int:
  """Returns the number of completions of a tree, after all exact quantities were computed."""
  tree = oracle.make_tree(vocab_size, horizon, eos_id=eos_id)
  rng = np.random.default_rng(0)
  logits, ref_logits = rng.normal(size=(2, *tree.children.shape))
  scores = rng.normal(size=len(tree.tokens))

  @jax.jit
  def f(logits, ref_logits, scores):
    return (
      jax.value_and_grad(lambda x: oracle.sequence_kl(tree, x, ref_logits))(logits),
      oracle.entropy(tree, logits),
      oracle.expected_length(tree, logits),
      oracle.log_probs(tree, logits),
      oracle.optimal_policy(tree, ref_logits, scores, beta=jnp.float64(0.5)),
    )

  jax.block_until_ready(f(logits, ref_logits, scores))
  return len(tree.tokens)


def main() -> None:
  """Prints one line for each tree."""
  parser = argparse.ArgumentParser(description="Seconds that the oracle takes on large trees.")
  parser.add_argument("--record", action="store_true", help="write benchmarks/results")
  args = parser.parse_args()
  figures = {}
  with jax.enable_x64(True):
    for tree in TREES:
      wall, cpu = time.monotonic(), time.process_time()
      num = everything(*tree)
      wall, cpu = time.monotonic() - wall, time.process_time() - cpu
      print(f"{tree}: {num:,} completions, {wall:.1f} s, {cpu:.1f} s of CPU")
      vocab_size, horizon, eos_id = tree
      name = f"{vocab_size} tokens x {horizon}{'' if eos_id is None else ', EOS'}"
      figures[name] = {"seconds": round(wall, 1)}
  if args.record:
    results.record("oracle_bench", figures)


if __name__ == "__main__":
  main()
