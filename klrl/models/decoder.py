"""One decoder-only transformer as pure functions of plain nested dicts.

Flax NNX describes the modules (`blocks.py`, with their sources). `policy_model` and `scalar_model`
split them once and return pure functions; the rest of the library sees only these.

Shapes: B rows, S tokens, C cache slots, D width, V vocabulary, N query heads, K key/value heads,
H head width, L layers. Masks are bool, True for real tokens, and may have holes anywhere: positions
count real tokens only, and no real position attends to padding, so padding changes no real output.
Outputs at padding are finite and have no meaning. With `segment_ids` a row holds several texts:
tokens attend within their own segment, and positions count from its start. With a `Fork` they have
a common beginning, which each of them sees; `Packed`, some of them may continue others.

Layers are stacked on a leading axis. If there are many, or if they keep less than all (`REMAT`),
the full forward pass scans over them. The step of one token is unrolled over a tuple of layers
(`unstack`), with one cache entry per layer, so that a loop of steps updates the cache in place and
slices no weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from klrl.devices import parallel
from klrl.models import heads, kernel
from klrl.models.attention import Continued, Fork, Forked, Packed
from klrl.models.blocks import INIT, Block, DecoderConfig, Ends
from klrl.models.rotations import cos_sin
from klrl.ops.logits import CappedUnembedding, Unembedding

Array = jax.Array
Params = dict[str, Any]
# What a layer keeps for the backward pass, which computes the rest anew: all; the products with
# weights, and not attention; or its inputs alone.
REMAT = {
  "none": lambda step: step,
  "dots": functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
  "full": jax.checkpoint,
}
# One (keys, values) pair per layer, each [G, K, g, C, H] for g rows of each of G prompts: the order
# in which attention multiplies them, so that a decoding step transposes no cache. Where rows share
# no prompt they are [B, K, P + C, H], since a second source of keys takes longer than it saves.
Cache = tuple[tuple[Array, Array], ...]


class Prompts(NamedTuple):
  """Prompts that were read, once for all of the rows that continue them."""

  keys_values: tuple[tuple[Array, Array], ...]  # one pair per layer, each [G, K, P, H]
  mask: Array  # [G, P] bool


@dataclasses.dataclass(frozen=True)
class Policy:
  """A language model as pure functions; see `policy_model`."""

  config: DecoderConfig
  init: Callable[[Array], Params]
  hidden: Callable[..., Array]
  unembedding: Callable[[Params], Unembedding]
  prefill: Callable[[Params, Array, Array, int], tuple[Array, Prompts]]
  unstack: Callable[[Params], Params]
  empty_cache: Callable[[Prompts, int], Cache]
  grow: Callable[[Cache, int], Cache]
  decode: Callable[[Params, Array, Array, Prompts, Cache], tuple[Array, Cache]]


@dataclasses.dataclass(frozen=True)
class ScalarModel:
  """A model with one number per token as pure functions; see `scalar_model`."""

  config: DecoderConfig
  init: Callable[[Array], Params]
  head: Callable[[Params, Array], Array]
  values: Callable[..., Array]
  scores: Callable[[Params, Array, Array], Array]


def policy_model(config: DecoderConfig) -> Policy:
  """Returns the pure functions of a language model.

  The params are `{"decoder": {...}}`, and `"unembedding" [D, V]` beside it unless it is tied.

  * `init(key) -> params`.
  * `hidden(params, tokens [B, S] int32, mask [B, S], segment_ids=None, fork=None) -> [B, S, D]`,
    the hidden state after the final norm, in `config.dtype`; `segment_ids` [B, S] int32 say which
    text of the row a token belongs to. With a `Fork` a row holds several texts that begin alike,
    and their common beginning once. In place of it there may be a `Packed`.
  * `unembedding(params) -> [D, V]` in `config.dtype`; logits are `hidden @ unembedding`, also where
    it is an `ops.CappedUnembedding`. V is `config.num_tokens` if that is given, so sampler, scorer
    and every KL see the same tokens.
  * `prefill(params, tokens [G, P], mask [G, P], row_len) -> (hidden [G, D] of the last real token,
    prompts)`, for rows that will have up to `row_len` tokens.
  * `unstack(params) -> params` with the layers in a tuple: do it once before a loop of `decode`.
    `decode` takes either form.
  * `empty_cache(prompts, num_branches) -> cache` without empty slots, for rows of which
    `num_branches` neighbours continue each prompt; with one, it begins with the prompt.
  * `grow(cache, num_slots) -> cache` with so many empty slots added.
  * `decode(params, tokens [B], t, prompts, cache) -> (hidden [B, D], cache)`: the token at place t
    behind the prompt, of all rows, which is written at slot t behind what the cache began with.
    What is before it is read.

  Gradient flows into params through `hidden` and `unembedding`.
  """
  decoder = _decoder(config)

  def init(key):
    decoder_key, unembedding_key = jax.random.split(key)
    params = {"decoder": decoder.init(decoder_key)}
    if not config.tie_embeddings:
      shape = (config.width, config.vocab_size)
      params["unembedding"] = INIT(unembedding_key, shape, jnp.dtype(config.param_dtype))
    return params

  def hidden(params, tokens, mask, segment_ids=None, fork=None):
    if segment_ids is not None:
      fork = Packed(segment_ids)
    return decoder.hidden(params["decoder"], tokens, mask, fork)

  def unembedding(params):
    # By tokens up to the end, since `ops.over_vocabulary` reads it so: nothing is then transposed.
    if config.tie_embeddings:
      table = params["decoder"]["embed"]["embedding"]
    else:
      table = params["unembedding"].T
    if 0 < config.num_tokens < config.vocab_size:
      table = table[: config.num_tokens]
    table = table.astype(config.dtype)
    if config.logits_divisor != 1:
      table /= config.logits_divisor
    table = table.T
    return CappedUnembedding(table, config.logits_cap) if config.logits_cap else table

  def prefill(params, tokens, mask, row_len):
    return decoder.prefill(params["decoder"], tokens, mask, row_len)

  def unstack(params):
    return params | {"decoder": _unstack(params["decoder"])}

  def decode(params, *args):
    return decoder.decode(_unstack(params["decoder"]), *args)

  return Policy(config, init, hidden, unembedding, prefill, unstack, _empty_cache, _grow, decode)


def scalar_model(config: DecoderConfig) -> ScalarModel:
  """Returns the pure functions of a value or reward model: a decoder with a linear head.

  The params are `{"decoder": {...}, "head": [D, 1]}`; the head has no bias and starts at zero, so a
  fresh model returns 0 everywhere. The head of a model that was read may have more parameters, see
  `heads.py`.

  * `head(params, hidden [..., D]) -> [...] float32`, of hidden states after the final norm. It
    reads the head alone, so the hidden states may be those of a policy.
  * `values(params, tokens [B, S] int32, mask [B, S], fork=None) -> [B, S] float32`, one number per
    token; see `hidden` of `policy_model`.
  * `scores(params, tokens, mask) -> [B] float32`, the value at the last real token.
  """
  decoder = _decoder(config)

  def init(key):
    head = jnp.zeros((config.width, 1), config.param_dtype)
    return {"decoder": decoder.init(key), "head": head}

  def head(params, hidden):
    return heads.apply(config.head, params["head"], hidden)

  def values(params, tokens, mask, fork=None):
    return head(params, decoder.hidden(params["decoder"], tokens, mask, fork))

  def scores(params, tokens, mask):
    return _at_last_real(values(params, tokens, mask), mask)

  return ScalarModel(config, init, head, values, scores)


def scalar_params_from(params: Params) -> Params:
  """Returns value or reward params that start from those of another model, with the same arrays.

  The head is that of `params` if there is one (a value model from a reward model), and otherwise
  zeros on the host (from a policy). If you train and donate them, use `parallel.put_own` first.
  """
  if "head" in params:
    return {"decoder": params["decoder"], "head": params["head"]}
  scale = params["decoder"]["final_norm"]["scale"]
  return {"decoder": params["decoder"], "head": np.zeros((scale.shape[0], 1), scale.dtype)}


class _Decoder(NamedTuple):
  """The pure functions that policies and scalar models share, on the params under "decoder"."""

  init: Callable
  hidden: Callable
  prefill: Callable
  decode: Callable


def _decoder(config):
  ends_graph = nnx.graphdef(nnx.eval_shape(lambda: Ends(config, nnx.Rngs(0))))
  block_graph = nnx.graphdef(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))

  def split(params):
    """Returns the module of the ends and the params of the layers."""
    ends = {name: value for name, value in params.items() if name != "layers"}
    return nnx.merge(ends_graph, ends), params["layers"]

  def init(key):
    ends_key, layers_key = jax.random.split(key)

    def init_block(key):
      return nnx.to_pure_dict(nnx.state(Block(config, nnx.Rngs(key))))

    params = nnx.to_pure_dict(nnx.state(Ends(config, nnx.Rngs(ends_key))))
    params["layers"] = jax.vmap(init_block)(jax.random.split(layers_key, config.num_layers))
    return params

  def forward(params, tokens, mask, keep, fork=None, row_len=None):
    """Returns the final hidden states and `keep(keys_values)` stacked over layers."""
    ends, layers = split(params)
    sight = _forked(mask, fork) if isinstance(fork, Fork) else _causal(mask, fork)
    kinds = _of_kinds(config, sight, row_len or _text_len(tokens, fork))
    has_windows = any(0 < kind.window < _text_len(tokens, fork) for kind in config.kinds)
    if kernel.reads(*tokens.shape, fork, has_windows=has_windows):

      def places(seen):
        return kernel.places(mask, fork, seen if has_windows else None)

      kinds = [(rotation, places(seen)) for rotation, seen in kinds]
    positions = sight.positions

    def step(x, layer_and_kind):
      layer, kind = layer_and_kind
      rotation, seen = kinds[0] if kind is None else jax.tree.map(lambda x: x[kind], stacked)
      x, keys_values = nnx.merge(block_graph, layer)(x, rotation, seen)
      return parallel.split_rows(x), keep(keys_values)

    step = REMAT[config.remat](step)
    index = None
    if len(kinds) > 1:
      stacked = jax.tree.map(lambda *x: jnp.stack(x), *_with_rotations(kinds))
      index = jnp.array(config.kind_of_layer)
    # A few layers are faster unrolled and compile as fast; many would take minutes to compile. What
    # is computed anew saves memory in a loop alone: the CPU's compiler would compute it too early.
    x = parallel.split_rows(ends.embedded(tokens, positions))
    unrolled = config.num_layers <= 8 and config.remat == "none"
    x, kept = jax.lax.scan(step, x, (layers, index), unroll=unrolled)
    return ends.final_norm(x), kept

  def hidden(params, tokens, mask, fork=None):
    return forward(params, tokens, mask, lambda keys_values: None, fork)[0]

  def prefill(params, tokens, mask, row_len):
    x, (keys, values) = forward(
      params, tokens, mask, lambda keys_values: keys_values, row_len=row_len
    )
    prompts = tuple((keys[i], values[i]) for i in range(config.num_layers))
    return _at_last_real(x, mask), Prompts(prompts, mask)

  def decode(params, tokens, t, prompts, cache):
    ends, layers = split(params)
    mask, num_slots = prompts.mask, cache[0][0].shape[-2]
    num_prompts, prompt_len = mask.shape
    if shares_prompts := cache[0][0].ndim == 5:
      sight = _continued(mask, t, cache[0][0].shape[2], num_slots)
    else:
      sight = _alone(mask, t, num_slots)
    tokens = parallel.rows_together(tokens[:, None])
    x = parallel.rows_together(ends.embedded(tokens, parallel.rows_together(sight.positions)))
    # The last token is never read, so a cache has one slot less than the row has tokens.
    kinds = _of_kinds(config, sight, num_slots + 1 + (prompt_len if shares_prompts else 0))
    new_cache = []
    for i, (layer, *of_layer) in enumerate(zip(layers, prompts.keys_values, cache, strict=True)):

      def store(new, of_layer=of_layer):
        def written(read, buffer, column):
          if not shares_prompts:
            return jax.lax.dynamic_update_slice_in_dim(buffer, column, prompt_len + t, axis=2)
          column = column.reshape(num_prompts, -1, *column.shape[1:]).swapaxes(1, 2)
          return read, jax.lax.dynamic_update_slice_in_dim(buffer, column, t, axis=3)

        return tuple(map(written, *of_layer, new))

      block = nnx.merge(block_graph, layer)
      x, keys_values = block(x, *kinds[config.index_of_kind(i)], store)
      new_cache.append(tuple(x[1] if shares_prompts else x for x in keys_values))
    return ends.final_norm(x)[:, 0], tuple(new_cache)

  return _Decoder(init, hidden, prefill, decode)


class _Sight(NamedTuple):
  """What tokens see: everything but the window of their layer.

  `seen` is a mask [B, S, C], and `queries` and `keys` are the positions of both sides. Of rows with
  branches these are a `Forked` each, and of a decoding step of rows that share prompts a
  `Continued`, whose own positions count from the end of the prompt.
  """

  positions: Array  # [B, S]
  queries: Any
  keys: Any
  seen: Any


def _causal(mask, packed=None):
  seen = jnp.tri(mask.shape[1], dtype=bool)[None] & mask[:, None]
  if packed is not None:
    texts = packed.text[:, None]
    own = packed.text[:, :, None] == texts
    seen &= own if packed.prompt is None else own | (packed.prompt[:, :, None] == texts)
  # A token's position is the number of tokens before it that it sees.
  positions = seen.sum(axis=-1) - 1
  return _Sight(positions, positions, positions, seen)


def _forked(mask, fork):
  num_rows, prefix = mask.shape[0], _causal(mask[:, : fork.prefix_len])
  shape = num_rows, fork.num_branches, -1
  own = _causal(mask[:, fork.prefix_len :].reshape(num_rows * fork.num_branches, -1))
  before = mask[:, None, None, : fork.prefix_len]
  positions = own.positions.reshape(shape) + before.sum(axis=-1)
  seen = own.seen.reshape(*positions.shape, -1)
  return _Sight(
    jnp.concatenate([prefix.positions, positions.reshape(num_rows, -1)], axis=1),
    Forked(prefix.positions, positions, positions),
    Forked(prefix.positions, prefix.positions[:, None], positions),
    Forked(prefix.seen, jnp.broadcast_to(before, (*positions.shape, fork.prefix_len)), seen),
  )


def _continued(mask, t, num_branches, cache_len):
  slots, counts = jnp.arange(cache_len)[None], jnp.sum(mask, axis=1, keepdims=True)
  positions = counts + t
  return _Sight(
    jnp.repeat(positions, num_branches, axis=0),
    Continued(positions, jnp.full((1, 1), t)),
    Continued(jnp.cumsum(mask, axis=1) - 1, slots),
    Continued(mask[:, None], (slots <= t)[:, None]),
  )


def _alone(mask, t, num_slots):
  prompt_len, slots = mask.shape[1], jnp.arange(num_slots)
  is_written = (slots >= prompt_len) & (slots <= prompt_len + t)
  seen = jnp.pad(mask, ((0, 0), (0, num_slots - prompt_len))) | is_written[None]
  positions = jnp.sum(mask, axis=1, keepdims=True) + t
  return _Sight(positions, positions, jnp.cumsum(seen, axis=1) - 1, seen[:, None])


def _text_len(tokens, fork):
  """Returns how many tokens the longest text of a row has."""
  if not isinstance(fork, Fork):
    return tokens.shape[1]
  return fork.prefix_len + (tokens.shape[1] - fork.prefix_len) // fork.num_branches


def _of_kinds(config, sight, row_len):
  """Returns (rotation, what is seen) of each kind of layer."""
  kinds = []
  for kind in config.kinds:
    rotation = None
    if kind.rotation:
      rotation = cos_sin(
        kind.rotation,
        sight.positions,
        head_dim=config.head_dim,
        dtype=config.dtype,
        row_len=row_len,
      )
    kinds.append((rotation, _seen_within(sight, kind.window) if kind.window else sight.seen))
  return kinds


def _seen_within(sight, window):
  """Returns what is seen in a layer with a window, which counts real tokens."""

  def within(seen, queries, keys):
    return seen & (queries[..., :, None] - keys[..., None, :] < window)

  return jax.tree.map(within, sight.seen, sight.queries, sight.keys)


def _with_rotations(kinds):
  """Returns `kinds` with a rotation by nothing where there is none, if there is one elsewhere."""
  rotation = next((rotation for rotation, _ in kinds if rotation is not None), None)
  if rotation is None:
    return kinds
  still = jnp.ones_like(rotation[0]), jnp.zeros_like(rotation[1])
  return [(rotation or still, mask) for rotation, mask in kinds]


def _unstack(params):
  layers = params["layers"]
  if isinstance(layers, tuple):
    return params
  num_layers = jax.tree.leaves(layers)[0].shape[0]
  layers = tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(num_layers))
  # Without the barrier XLA moves the slices into the loop and copies every weight at every step.
  return params | {"layers": jax.lax.optimization_barrier(layers)}


def _empty_cache(prompts, num_branches):
  def empty(x):
    if num_branches == 1:
      return x
    num_prompts, num_heads, _, width = x.shape
    return jnp.zeros((num_prompts, num_heads, num_branches, 0, width), x.dtype)

  return jax.tree.map(empty, prompts.keys_values)


def _grow(cache, num_slots):
  def pad(x):
    return jnp.pad(x, (*[(0, 0)] * (x.ndim - 2), (0, num_slots), (0, 0)))

  return jax.tree.map(pad, cache)


def _at_last_real(x, mask):
  """Returns x [B, ...] at the last True of mask [B, S] (at the last column where there is none)."""
  last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
  return x[jnp.arange(x.shape[0]), last]
