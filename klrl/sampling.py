"""Draws completions from a policy: prefill, then one token at a time with a cache.

Prompts [B, P] are left-padded, and completions [B, T] are right-padded with `pad_id`. The functions
are pure and are meant to run inside the caller's `jax.jit`. Log-probs are in nats per token, in at
least float32, and carry no gradient.

A rollout has two log-probs. `old_log_probs` are those of the trainer: the log-softmax of
logits / temperature over the whole vocabulary. `sampler_log_probs` are those of the distribution
from which the tokens were drawn: the same, unless top-k or top-p cut it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from klrl.devices import parallel
from klrl.models.decoder import Policy
from klrl.ops.logits import logits_of

Array = jax.Array
SAMPLER_MESHES = ("auto", "gathered", "split")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Packing:
  """Says that models read a rollout in this share of its rows, with several texts in a row."""

  share: float
  group_size: int = 1  # neighbouring rows that have the same prompt

  def of(self, number: int) -> int:
    """Returns this share of a number of rows or tokens, rounded up."""
    return math.ceil(self.share * number)


class Rollout(NamedTuple):
  """A batch of completions.

  tokens: [B, P+T] int32, prompt then completion.
  prompt_mask: [B, P] bool.
  completion_mask: [B, T] bool, True at the tokens that were drawn, EOS included. It has holes where
    tokens were given (`given` of `make_sample_fn`); those are read like all others.
  finished: [B] bool, whether an EOS was drawn.
  old_log_probs: [B, T] log-prob of each token by the trainer; 0 where none was drawn.
  sampler_log_probs: [B, T] log-prob under the distribution drawn from; 0 where none was drawn.
  packing: how models read it, which is compiled in; None is each text in a row of its own.
  """

  tokens: Array
  prompt_mask: Array
  completion_mask: Array
  finished: Array
  old_log_probs: Array
  sampler_log_probs: Array
  packing: Packing | None = None


# given(completions [B, T], t) -> (tokens [B], bool [B]): what stands at place t in place of a drawn
# token, and in which rows; the completions are known before t. It is traced, and may depend on what
# was written: it is where an environment or a prefilled beginning of the answer has its say.
Given = Callable[[Array, Array], tuple[Array, Array]]


def beginning_with(ids: Sequence[int]) -> Given | None:
  """Returns what gives every completion its first tokens; None if there are none.

  The completions of a rollout begin with `ids`, and their mask with as many holes.
  """
  if not ids:
    return None
  tokens = jnp.asarray(ids, jnp.int32)

  def given(completions, t):
    shape = completions.shape[:1]
    first = tokens[jnp.minimum(t, len(ids) - 1)]
    return jnp.broadcast_to(first, shape), jnp.broadcast_to(t < len(ids), shape)

  return given


def top_k_logits(logits: Array, k: int) -> Array:
  """Returns logits [..., V] with all but the k largest at -inf; ties with the k-th stay."""
  if k < 1:
    raise ValueError(f"top_k={k} must be at least 1.")
  kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
  return jnp.where(logits < kth, -jnp.inf, logits)


def top_p_logits(logits: Array, p: float) -> Array:
  """Returns logits [..., V] with the tail at -inf: the largest head of probability <= p stays.

  The most likely token always stays, even for p = 0; p = 1 keeps all tokens. Ties with the least
  likely token that stays do so too. This is the rule of D. Ziegler et al., "Fine-Tuning Language
  Models from Human Preferences" (2019, its code); A. Holtzman et al., "The Curious Case of Neural
  Text Degeneration" (2020), equation 2, keep one more token, the one that reaches p.
  """
  if not 0 <= p <= 1:
    raise ValueError(f"top_p={p} must lie between 0 and 1.")
  if p == 1:
    return logits
  descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
  cumulative = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
  kept = (cumulative <= p).at[..., 0].set(True)
  threshold = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits < threshold, -jnp.inf, logits)


def make_sample_fn(
  policy: Policy,
  *,
  max_completion_len: int,
  eos_id: int | Sequence[int] | None,
  pad_id: int,
  top_k: int = 0,
  top_p: float = 1.0,
  group_size: int = 1,
  sampler_mesh: str = "auto",
  given: Given | None = None,
) -> Callable[..., Rollout]:
  """Returns `sample(params, prompts [B, P], prompt_mask [B, P], key, *, temperature) -> Rollout`.

  Each `group_size` neighbouring rows hold the same prompt, which the model reads once for them all.

  `temperature` may be traced and must be positive. `top_k=0` and `top_p=1.0` cut nothing; top-k
  acts first. Any of several `eos_id` ends a completion; with None no token does. The draws at token
  t come from `fold_in(key, t)`, so the same key gives the same completions, and a row does not
  depend on the content of other rows. The work ends when every row has ended, and its cost follows
  the number of tokens that are drawn.

  Weights that the mesh in scope splits over `fsdp` are never gathered for a token. With `gathered`
  each device has all of them during the rollout, gathered once; with `split` they stay where they
  are, and rows move to them (`parallel.weights_stay`). `auto` is `split` where a step of all rows
  of `fsdp` sends less than the weights take to read, see `_weights_stay`.

  A token that is `given` takes the place of the one that was drawn, and ends nothing.
  """
  generate = _make_generate_fn(
    policy, max_completion_len, eos_id, pad_id, group_size, sampler_mesh=sampler_mesh, given=given
  )

  def sample(params, prompts, prompt_mask, key, *, temperature):
    def draw(logits, t):
      logits = logits / temperature
      kept = top_k_logits(logits, top_k) if top_k else logits
      kept = top_p_logits(kept, top_p)
      tokens, sampler_log_probs = _drawn(jax.random.fold_in(key, t), kept)
      log_probs = sampler_log_probs if kept is logits else _log_prob_of(logits, tokens)
      return tokens, log_probs, sampler_log_probs

    return generate(params, prompts, prompt_mask, draw)

  return sample


def make_greedy_fn(
  policy: Policy,
  *,
  max_completion_len: int,
  eos_id: int | Sequence[int] | None,
  pad_id: int,
  given: Given | None = None,
) -> Callable[..., Rollout]:
  """Returns `greedy(params, prompts [B, P], prompt_mask [B, P]) -> Rollout` of most likely tokens.

  `old_log_probs` are those of the policy at temperature 1; `sampler_log_probs` are 0, because
  nothing is drawn. `given` is as in `make_sample_fn`.
  """
  generate = _make_generate_fn(policy, max_completion_len, eos_id, pad_id, given=given)

  def greedy(params, prompts, prompt_mask):
    def draw(logits, t):
      tokens = jnp.argmax(logits, axis=-1)
      log_probs = _log_prob_of(logits, tokens)
      return tokens, log_probs, jnp.zeros_like(log_probs)

    return generate(params, prompts, prompt_mask, draw)

  return greedy


# Slots of the first cache, unless the prompt is longer. With fewer, to compile another loop would
# cost more than the attention that is saved.
_FIRST_SLOTS = 128


def _cache_lens(prompt_len: int, needed: int, short_len: int) -> list[int]:
  """Returns growing cache lengths: each is twice the one before, and the last is `needed`.

  There are none if nothing is needed. Where the last is long enough for the long divisors of a
  rotation, all are, so that no key is turned in another way than its query.
  """
  lens = [max(prompt_len, _FIRST_SLOTS)]
  if prompt_len + needed >= short_len:
    lens[0] = max(lens[0], short_len - prompt_len)
  while lens[-1] < needed:
    lens.append(2 * lens[-1])
  return [*lens[:-1], needed] if needed else []


class _State(NamedTuple):
  """The state between steps: `t` tokens are written, and `tokens[:, t-1]` is yet to be read."""

  t: Array
  last: Array
  finished: Array
  tokens: Array
  mask: Array
  log_probs: Array
  sampler_log_probs: Array


def _weights_stay(sampler_mesh: str, num_rows: int, config) -> bool:
  """Returns whether weights stay split while rows are sampled.

  A step of B rows sends two sums of B D numbers per layer, each twice, of 12 D^2 weights. Links are
  about four times slower than the main memory of TPUs v4 to v6e and of an H100, so that sending is
  faster than reading all weights on each device where B < 3 D / 4. It takes the least memory, too.
  """
  if sampler_mesh == "auto":
    return parallel.splits_weights() and 4 * parallel.rows_of_fsdp(num_rows) <= 3 * config.width
  return sampler_mesh == "split"


def _make_generate_fn(
  policy, max_completion_len, eos_id, pad_id, group_size=1, sampler_mesh="auto", given=None
):
  eos_ids = np.array([] if eos_id is None else eos_id, np.int32).reshape(-1)

  def generate(params, prompts, prompt_mask, draw):
    batch_size, prompt_len = prompts.shape
    total_len = prompt_len + max_completion_len
    if max_completion_len < 1 or prompt_len < 1:
      raise ValueError(
        f"prompt length {prompt_len} and max_completion_len={max_completion_len} must be at least"
        " 1; begin an empty prompt with the BOS token."
      )
    if total_len > policy.config.max_len:
      raise ValueError(
        f"prompt length {prompt_len} + max_completion_len={max_completion_len} exceed the model's"
        f" max_len={policy.config.max_len}; shorten one of them."
      )
    prompts, prompt_mask = parallel.split_rows((prompts, prompt_mask))
    stay = _weights_stay(sampler_mesh, batch_size, policy.config)
    params = (parallel.gather_for_rows if stay else parallel.gather_weights)(params)
    unembedding = policy.unembedding(params)
    if stay:  # Devices that do not divide the vocabulary have kept it split by the width.
      unembedding = parallel.split_vocabulary(unembedding)
    step_params = policy.unstack(params)

    def append(state, hidden):
      with parallel.weights_stay(stay):
        logits = logits_of(parallel.rows_together(hidden), unembedding)
        logits = parallel.rows_apart(parallel.rows_at_weights(logits))
      tokens, log_probs, sampler_log_probs = draw(logits, state.t)
      alive = chosen = ~state.finished
      if given is not None:
        others, are_given = given(state.tokens, state.t)
        tokens, chosen = jnp.where(are_given, others, tokens), alive & ~are_given
      tokens = jnp.where(alive, tokens, pad_id).astype(jnp.int32)

      def write(buffer, column):
        return jax.lax.dynamic_update_slice_in_dim(buffer, column[:, None], state.t, 1)

      return _State(
        t=state.t + 1,
        last=tokens,
        finished=state.finished | (chosen & jnp.isin(tokens, eos_ids)),
        tokens=write(state.tokens, tokens),
        mask=write(state.mask, chosen),
        log_probs=write(state.log_probs, jnp.where(chosen, log_probs, 0)),
        sampler_log_probs=write(state.sampler_log_probs, jnp.where(chosen, sampler_log_probs, 0)),
      )

    # As many neighbouring rows share what was read of their prompt as one device has together.
    num_branches = math.gcd(group_size, parallel.rows_per_device(batch_size))
    # The last token is never read, so it gets no slot.
    cache_lens = _cache_lens(prompt_len, max_completion_len - 1, policy.config.short_len)
    distinct = parallel.split_rows((prompts[::group_size], prompt_mask[::group_size]))
    hidden, read = policy.prefill(params, *distinct, total_len)
    hidden = parallel.repeat_rows(hidden, group_size)
    read = parallel.repeat_rows(read, group_size // num_branches)

    def run(state, cache, filled, cache_len):
      """Draws until a cache with `filled` slots in use is full, or all rows have ended."""

      def unfinished(carry):
        state, _ = carry
        return (state.t <= cache_len) & ~jnp.all(state.finished)

      def step(carry):
        state, cache = carry
        with parallel.weights_stay(stay):
          hidden, cache = policy.decode(step_params, state.last, state.t - 1, read, cache)
        return append(state, hidden), cache

      with jax.named_scope(f"at_most({cache_len - filled})"):  # what `cost.hlo` counts
        return jax.lax.while_loop(unfinished, step, (state, policy.grow(cache, cache_len - filled)))

    shape = (batch_size, max_completion_len)
    log_prob_dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    state = _State(
      t=jnp.zeros((), jnp.int32),
      last=jnp.zeros(batch_size, jnp.int32),
      finished=jnp.zeros(batch_size, bool),
      tokens=jnp.full(shape, pad_id, jnp.int32),
      mask=jnp.zeros(shape, bool),
      log_probs=jnp.zeros(shape, log_prob_dtype),
      sampler_log_probs=jnp.zeros(shape, log_prob_dtype),
    )
    state = append(state, hidden)

    # A step reads its whole cache, so the cache of a loop is at most twice as long as the prompt or
    # its content, and no cache grows for rows that have ended.
    def run_all(state, cache, filled, cache_lens):
      if not cache_lens:
        return state
      state, cache = run(state, cache, filled, cache_lens[0])
      if len(cache_lens) == 1:
        return state
      return jax.lax.cond(
        jnp.all(state.finished),
        lambda state, cache: state,
        lambda state, cache: run_all(state, cache, cache_lens[0], cache_lens[1:]),
        state,
        cache,
      )

    state = run_all(state, policy.empty_cache(read, num_branches), 0, cache_lens)
    return Rollout(
      tokens=jnp.concatenate([prompts, state.tokens], axis=1),
      prompt_mask=prompt_mask,
      completion_mask=state.mask,
      finished=state.finished,
      old_log_probs=state.log_probs,
      sampler_log_probs=state.sampler_log_probs,
    )

  return generate


def _drawn(key, logits):
  """Returns (tokens [B] drawn from softmax(logits [B, V]), their log-probs [B]).

  The largest of V logits is a draw if a Gumbel number is added to each, but to make these numbers
  would take longer than the rest of a step. So a group of about sqrt(V) tokens is drawn first, by
  its log-sum-exp, and then a token in it. The distribution is the same, and 2 sqrt(V) numbers do.
  A logit of -inf is -inf whatever is added to it, so a token without probability is never drawn.
  """
  batch_size, vocab_size = logits.shape
  num = math.isqrt(vocab_size - 1) + 1
  padding = ((0, 0), (0, num * num - vocab_size))
  # Token v is in group v % num: a group's sum then runs over the slower axis, which is vectorised.
  groups = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(batch_size, num, num)
  group_key, token_key = jax.random.split(key)
  group_logits = jax.nn.logsumexp(groups, axis=1)
  group = jax.random.categorical(group_key, group_logits)
  members = jnp.take_along_axis(groups, group[:, None, None], axis=2)[..., 0]
  member = jax.random.categorical(token_key, members)
  chosen = jnp.take_along_axis(members, member[:, None], axis=-1)[:, 0]
  return member * num + group, chosen - jax.nn.logsumexp(group_logits, axis=-1)


def _log_prob_of(logits, tokens):
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)
