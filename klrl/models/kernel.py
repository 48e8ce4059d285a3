"""Attention on TPUs by JAX's kernel, which computes mask and logits a block at a time.

What tokens see is told by places in their row (`Places`), so that neither a mask [B, S, S] nor
logits [B, N, S, S] are held, forward or backward, and blocks in which nothing is seen are skipped.
Shapes are those of `attention.py`. Sources: T. Dao, "FlashAttention-2: Faster Attention with Better
Parallelism and Work Partitioning" (2023), algorithms 1 and 2; the kernel is
`jax.experimental.pallas.ops.tpu.splash_attention`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from klrl.devices import parallel
from klrl.models.attention import Fork, Forked, Packed

Array = jax.Array

# In shorter rows the logits are no larger than what is computed around them.
MIN_LEN = 256
_BLOCK, _LANES = 512, 128
_BITS = 16  # of a place, where two places share a number


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["texts", "first"], meta_fields=["branches"]
)
@dataclasses.dataclass(frozen=True)
class Places:
  """What the tokens of rows [B, S] see: those of their text that stand before them."""

  texts: Array  # [B, S] int32, which text a token is of; 0 is padding
  first: Array | None  # [B, S] int32, the place of the first token that each sees; None: any
  branches: tuple[int, int] | None  # (P, T) of rows with branches


def reads(num_rows: int, row_len: int, fork=None, *, has_windows: bool) -> bool:
  """Returns whether the kernel reads rows: long ones, on a TPU, that the devices divide.

  It knows no texts that continue others of their row, as `fork` may say.
  """
  if isinstance(fork, Packed) and fork.prompt is not None:
    return False
  has_room = row_len <= 1 << _BITS or not has_windows
  is_long = row_len >= MIN_LEN
  return is_long and has_room and parallel.platform() == "tpu" and parallel.divides_rows(num_rows)


def places(mask, fork: Fork | Packed | None, seen: Array | Forked | None) -> Places:
  """Returns what tokens see, by places; arguments are those of the decoder.

  `seen` are the masks of a layer with a window, as in `attention.attend`, of which the compiler
  holds none; None is no window.
  """
  texts = jnp.where(mask, fork.text + 1 if isinstance(fork, Packed) else 1, 0)
  row_len, branches = mask.shape[1], None
  if isinstance(fork, Fork):
    branches = fork.prefix_len, (row_len - fork.prefix_len) // fork.num_branches
  first = None
  if seen is not None:
    # Padding sees itself.
    first = jnp.minimum(_first(seen), jnp.arange(row_len)[None])
  return Places(texts, first, branches)


def _first(seen):
  if isinstance(seen, Forked):
    num_rows, num_branches, branch_len, prefix_len = seen.to_prefix.shape
    starts = prefix_len + branch_len * jnp.arange(num_branches)
    of_branches = jnp.minimum(_first(seen.to_prefix), _first(seen.own) + starts[None, :, None])
    return jnp.concatenate([_first(seen.prefix), of_branches.reshape(num_rows, -1)], axis=1)
  keys = jnp.arange(seen.shape[-1]).reshape((1,) * (seen.ndim - 1) + (-1,))
  return jnp.where(seen, keys, 1 << _BITS).min(axis=-1)


def attend(query, key, value, seen: Places, *, scale: float, cap: float) -> Array:
  """Returns what each query reads, [B, S, N H]; see `attention.attend`.

  Queries are multiplied by `scale` first, and so are rounded to their dtype once more. Padding
  reads padding. On a CPU the kernel is interpreted, which is slow.

  Args:
    query: [B, S, N, H].
    key: [B, K, S, H].
    value: [B, K, S, H].
    seen: which keys each query sees.
    scale: multiplies the logits.
    cap: bounds them softly; 0 is no bound.
  """
  num_rows, row_len = query.shape[:2]
  # As few blocks as there can be, and each no longer than it has to be.
  num_blocks = -(-row_len // _BLOCK)
  block = -(-row_len // (num_blocks * _LANES)) * _LANES

  def padded(x):
    axis = 1 if x.ndim == 2 else 2
    missing = num_blocks * block - row_len
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])

  wide = jnp.promote_types(query.dtype, jnp.float32)
  query = (query.astype(wide) * scale).astype(query.dtype).swapaxes(1, 2)

  def read(of_heads, of_rows):
    kernel = _kernel(
      num_blocks,
      block,
      num_heads=of_heads[0].shape[1],
      branches=seen.branches,
      has_first=seen.first is not None,
      cap=cap,
      interpret=parallel.platform() == "cpu",
    )
    num_seen = np.count_nonzero(kernel.fwd_mask_info.block_mask)
    with jax.named_scope(f"blocks({num_seen}x{block})"):  # for cost.hlo
      return jax.vmap(functools.partial(_read_row, kernel))(of_heads, of_rows)

  read = parallel.for_own_rows_and_heads(read, num_heads=key.shape[1])
  y = read(*jax.tree.map(padded, ((query, key, value), (seen.texts, seen.first))))
  return y[:, :, :row_len].swapaxes(1, 2).reshape(num_rows, row_len, -1)


def _read_row(kernel, of_heads, of_row):
  texts, first = of_row
  if first is not None:
    queries = jnp.arange(first.shape[0], dtype=jnp.int32) | first << _BITS
    infos = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
    infos = [info._replace(q_sequence=queries) for info in infos]
    kernel = splash.SplashAttentionKernel(*infos, **kernel.kwargs)
  return kernel(*of_heads, splash.SegmentIds(texts, texts))


class _Mask(masks.CausalMask):
  """Which keys are seen by places alone; blocks without any are skipped.

  A query comes with its place, and in the upper bits with that of the first key that it sees.
  """

  def __init__(self, row_len: int, branches: tuple[int, int] | None, has_first: bool):
    super().__init__((row_len, row_len))
    self._key = row_len, branches, has_first

    def sees(queries, keys):
      lower = (1 << _BITS) - 1
      places = queries & lower if has_first else queries
      seen = keys <= places
      if has_first:
        seen &= keys >= (queries >> _BITS & lower)
      if branches is not None:
        before, own = branches
        seen &= (keys < before) | ((keys - before) // own == (places - before) // own)
      return seen

    self.mask_function = sees

  def __eq__(self, other):
    return isinstance(other, _Mask) and self._key == other._key

  def __hash__(self):
    return hash(self._key)


@functools.cache
def _kernel(num_blocks, block, *, num_heads, branches, has_first, cap, interpret):
  mask = _Mask(num_blocks * block, branches, has_first)
  with jax.ensure_compile_time_eval():
    kernel = splash.make_splash_mha(
      masks.MultiHeadMask([mask] * num_heads),
      block_sizes=splash.BlockSizes(*[block] * 8),
      attn_logits_soft_cap=cap or None,
      head_shards=1,
      q_seq_shards=1,
      interpret=interpret,
    )
  return jax.tree.map(np.asarray, kernel)  # constants of any program, wherever it runs
