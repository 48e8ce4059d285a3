"""Lays the texts of a rollout out in fewer rows, where short completions leave room.

A packed row is as wide as a plain one and holds whole texts: prompts, and completions that see
their own prompt alone. Completions of one prompt that share a row share the prompt too. Each device
packs the rows that it has, so that none moves. The number of rows is compiled in, so the host must
know before that the texts fit (`fits`). What does not fit is NaN rather than left out.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from klrl import ops
from klrl.devices import parallel
from klrl.models.attention import Packed
from klrl.sampling import Packing, Rollout


def lengths(rollout: Rollout) -> tuple[jax.Array, jax.Array]:
  """Returns how many tokens of prompt and of completion are read in each row, [B] int32 each."""
  return rollout.prompt_mask.sum(axis=1), ops.until_last(rollout.completion_mask).sum(axis=1)


def by_device(x: jax.Array) -> jax.Array:
  """Returns x [B, ...] as [devices, rows of each, ...]."""
  return x.reshape(-1, parallel.rows_per_device(len(x)), *x.shape[1:])


def placed(prompts, completions, *, row_len: int, group_size: int):
  """Returns (the row, where the prompt begins in it, where the completion does) of each of n texts.

  First fit by falling length: a text goes to the first row that has its prompt and room for its
  completion, and otherwise to the first that has room for both (David Johnson, "Near-Optimal Bin
  Packing Algorithms", 1973). Rows are opened in turn, so fewer of them change no place.

  Args:
    prompts: [n] tokens of each prompt; `group_size` neighbours have the same one.
    completions: [n] tokens of each completion.
    row_len: tokens of a row, as many as those of any one text.
    group_size: divides n.
  """
  num_texts = len(prompts)

  def place(carry, i):
    used, rows, begins, starts = carry
    siblings = i // group_size * group_size + jnp.arange(group_size)
    is_beside = rows[siblings][:, None] == jnp.arange(num_texts)[None]
    has_prompt = is_beside.any(axis=0)
    needed = jnp.where(has_prompt, 0, prompts[i]) + completions[i]
    row = jnp.argmax((used + needed <= row_len) * (1 + has_prompt))
    known = jnp.where(is_beside[:, row], begins[siblings], 0).max()
    begin = jnp.where(has_prompt[row], known, used[row])
    used = used.at[row].add(needed[row])
    start = used[row] - completions[i]
    return (used, rows.at[i].set(row), begins.at[i].set(begin), starts.at[i].set(start)), None

  longest_first = jnp.argsort(-(prompts + completions), stable=True)
  nothing = jnp.zeros_like(prompts)
  (_, *places), _ = jax.lax.scan(place, (nothing, nothing - 1, nothing, nothing), longest_first)
  return places


def packed(tokens, prompt_mask, read, *, packing: Packing):
  """Returns (tokens [R, P + T], mask, `Packed`, places [n, P + T]) of the n rows of a device.

  A place is that of a token in the R rows one after the other; R (P + T) if it has none.
  """
  num_texts, row_len = tokens.shape
  num_rows, group_size = packing.of(num_texts), math.gcd(packing.group_size, num_texts)
  rows, begins, starts = placed(
    prompt_mask.sum(axis=1), read.sum(axis=1), row_len=row_len, group_size=group_size
  )

  def beside(of_prompt, of_completion):
    """Returns [n, P + T]."""
    pairs = (of_prompt, prompt_mask), (of_completion, read)
    return jnp.concatenate([jnp.broadcast_to(x, y.shape) for x, y in pairs], axis=1)

  ranks = beside(jnp.cumsum(prompt_mask, axis=1), jnp.cumsum(read, axis=1)) - 1
  columns = beside(begins[:, None], starts[:, None]) + ranks
  has_place = beside(prompt_mask, read) & (rows < num_rows)[:, None]
  places = jnp.where(has_place, rows[:, None] * row_len + columns, num_rows * row_len)
  text = jnp.arange(1, num_texts + 1)[:, None]
  prompt = -1 - (text - 1) // group_size

  def put(x):
    row = jnp.zeros(num_rows * row_len, x.dtype).at[places].set(x, mode="drop")
    return row.reshape(num_rows, row_len)

  if group_size == 1:  # Prompt and completion are one text.
    ids = Packed(put(beside(text, text)))
  else:
    ids = Packed(put(beside(prompt, text)), put(beside(prompt, prompt)))
  return put(tokens), ids.text != 0, ids, places


class Need(NamedTuple):
  """What the texts of a cell need."""

  texts: int
  columns: int  # of each completion
  rows: jax.Array  # int, in which the texts are packed
  tokens: jax.Array  # int, that were chosen


def need_of(rollout: Rollout, cells, *, group_size: int) -> Need:
  """Returns the most that a cell needs if the texts of each of `cells` [cells, n] are packed alone.

  A cell is some rows of the rollout, such as those that a device has.
  """
  num_texts = cells.shape[1]
  group_size = math.gcd(group_size, num_texts)
  place = functools.partial(placed, row_len=rollout.tokens.shape[1], group_size=group_size)
  rows, *_ = jax.vmap(place)(*(x[cells] for x in lengths(rollout)))
  chosen = rollout.completion_mask.sum(axis=1)[cells].sum(axis=1)
  return Need(num_texts, rollout.completion_mask.shape[1], rows.max() + 1, chosen.max())


def fits(packing: Packing, need: Need) -> jax.Array:
  """Returns whether a packing has what is needed.

  It has not if its share of the rows is no whole number: more rows would then be computed.
  """
  num_rows, num_tokens = packing.of(need.texts), packing.of(need.texts * need.columns)
  is_whole = num_rows == packing.share * need.texts
  return is_whole & (need.rows <= num_rows) & (need.tokens <= num_tokens)


def taken(x: jax.Array, index: jax.Array) -> jax.Array:
  """Returns x [devices, N, ...] at `index` [devices, K], and NaN where it is N or more."""
  fill = jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0
  return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=fill))(x, index)
