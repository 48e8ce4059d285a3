"""Figures of next-token distributions, computed where the table of the vocabulary is.

`klrl.ops` knows no devices. Left alone, the compiler for TPUs gathers the table for every chunk of
rows wherever `fsdp` splits it, and sends the gradient of the whole table as often. Here the logits
of a chunk are split by vocabulary as the table is: each device of `fsdp` multiplies the rows of all
of them with its part, so that hidden states and sums over the vocabulary are sent, and the gradient
of the table stays at home (M. Shoeybi et al., "Megatron-LM", 2019, section 3).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from klrl import ops
from klrl.devices import parallel
from klrl.ops.vocabulary import LOGITS_PER_CHUNK


def over_vocabulary(
  fn: Callable,
  models: Sequence[tuple[jax.Array, ops.Unembedding]],
  rows: Sequence[jax.Array] = (),
  coefficients: Sequence[Any] = (),
  *,
  temperature: jax.Array | float = 1.0,
) -> Any:
  """Returns what `ops.over_vocabulary` of the same arguments does; no table is sent for a chunk.

  Arrays have an axis of rows first, of which each device of `data` computes its own.
  """
  num_devices = parallel.devices_of_vocabulary()

  def split(*arguments):
    log_probs, others = arguments[: len(models)], arguments[len(models) :]
    return fn(*map(parallel.split_vocabulary, log_probs), *others)

  def of_rows(hidden_and_rows, others):
    hidden, rows = hidden_and_rows
    tables, temperature, coefficients = others
    tables = parallel.split_vocabulary(tables)
    vocab_size = jax.tree.leaves(tables)[0].shape[1]
    # Of a chunk each device holds as many logits as one device alone would.
    chunk_size = max(1, num_devices * LOGITS_PER_CHUNK // (vocab_size * len(models)))
    return ops.over_vocabulary(
      split,
      list(zip(hidden, tables, strict=True)),
      rows,
      coefficients,
      temperature=temperature,
      chunk_size=chunk_size,
    )

  hidden, tables = zip(*models, strict=True)
  of_rows = parallel.for_own_rows_of_vocabulary(of_rows)
  return of_rows((hidden, tuple(rows)), (tables, temperature, tuple(coefficients)))


def log_probs_and_entropy_of(log_probs: jax.Array, tokens: jax.Array) -> tuple:
  """Returns the log-probs of `tokens` [C] and the entropies [C] of distributions [C, V], nats."""
  return ops.taken(log_probs, tokens), ops.entropy_of(log_probs)
