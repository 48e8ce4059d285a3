"""Texts that share rows are read as if each had its own, and only as many rows are computed."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import grpo
from klrl.algorithm import completions, epochs, learner, shared_rows
from klrl.cost import hlo
from klrl.devices import parallel
from klrl.models import DecoderConfig, policy_model, scalar_model
from klrl.models.blocks import LayerKind
from klrl.sampling import Packing, Rollout

BATCH, GROUP_SIZE, PROMPT_LEN, MAX_LEN, VOCAB, WIDTH = 64, 4, 6, 16, 23, 16
ROW_LEN = PROMPT_LEN + MAX_LEN
DECODER = DecoderConfig(
  vocab_size=VOCAB,
  width=WIDTH,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=32,
  max_len=32,
  # Only a token that knows its place in its own text sees what is in the window.
  kinds=(LayerKind(window=4), LayerKind()),
  kind_of_layer=(0, 1),
  learned_positions=True,
  dtype="float64",
  param_dtype="float64",
)
with jax.enable_x64(True):
  POLICY, SCALAR = policy_model(DECODER), scalar_model(DECODER)
HALF = Packing(0.5, GROUP_SIZE)


@pytest.fixture(autouse=True)
def in_float64():
  with jax.enable_x64(True):
    yield


@functools.cache
def make_rollout(seed=0, mean=4) -> Rollout:
  """Returns a rollout with one completion of the whole width, shorter ones, and some holes."""
  rng = np.random.default_rng(seed)
  prompt_lens = rng.integers(1, PROMPT_LEN + 1, BATCH // GROUP_SIZE).repeat(GROUP_SIZE)
  lengths = np.minimum(rng.geometric(1 / mean, BATCH), MAX_LEN)
  lengths[5] = MAX_LEN
  tokens = rng.integers(VOCAB, size=(BATCH, ROW_LEN), dtype=np.int32)
  tokens[:, :PROMPT_LEN] = tokens[::GROUP_SIZE, :PROMPT_LEN].repeat(GROUP_SIZE, axis=0)
  mask = np.arange(MAX_LEN) < lengths[:, None]
  mask[:, 1] &= lengths < 3
  old = np.where(mask, rng.normal(-3, 0.3, mask.shape), 0)
  prompt_mask = np.arange(PROMPT_LEN) >= PROMPT_LEN - prompt_lens[:, None]
  return Rollout(tokens, prompt_mask, mask, lengths < MAX_LEN, old, old)


@functools.cache
def params():
  """Returns those of a policy and of a value model, whose outputs are far from constant."""
  policy = jax.tree.map(lambda x: 10 * x, jax.jit(POLICY.init)(jax.random.key(0)))
  head = jax.random.normal(jax.random.key(1), (WIDTH, 1))
  return {"policy": policy, "value": {"decoder": policy["decoder"], "head": head}}


@jax.jit
def read(params, rollout):
  """Returns what models say of a rollout, and the gradient of a sum of all of it."""

  def total(params):
    mask, policy, value = rollout.completion_mask, params["policy"], params["value"]
    groups = {"group_size": GROUP_SIZE}
    log_probs = completions.log_probs(POLICY, policy, rollout, temperature=0.7, **groups)
    values = completions.values(SCALAR, value, rollout, **groups)
    scores = completions.reward_model_scores(SCALAR, value, rollout)
    log_probs, values = (jnp.where(mask, x, 0.0) for x in (log_probs, values))
    weights = jnp.sin(jnp.arange(mask.size).reshape(mask.shape))
    loss = (weights * (log_probs + values)).sum() + (weights[:, 0] * scores).sum()
    return loss, (log_probs, values, scores)

  return jax.grad(total, has_aux=True)(params)


def read_on(mesh, rollout):
  own = jax.device_put(params(), parallel.state_shardings(mesh, params()))
  rows = parallel.put(rollout, parallel.by_rows(mesh))
  return jax.device_get(jax.jit(parallel.on_mesh(mesh, read.__wrapped__))(own, rows))


@pytest.mark.parametrize("spec", ["data=1", "data=2,fsdp=2"])
def test_packed_rows_have_the_values_and_gradients_of_plain_ones(spec):
  plain = jax.device_get(read(params(), make_rollout()))
  found = read_on(parallel.make_mesh(spec), make_rollout()._replace(packing=HALF))
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11 * np.abs(y).max())


def test_texts_that_have_no_room_are_not_numbers():
  _, found = read(params(), make_rollout()._replace(packing=Packing(0.125, GROUP_SIZE)))
  for x in found:
    assert np.isnan(x).any()


@pytest.mark.parametrize("group_size", [1, 4])
def test_every_text_is_whole_in_one_row_and_groups_share_their_prompt(group_size):
  rollout = make_rollout()
  rows_of = functools.partial(shared_rows.packed, packing=Packing(1.0, group_size))
  tokens, mask, ids, places = jax.device_get(
    jax.jit(rows_of)(rollout.tokens, rollout.prompt_mask, packing_mask(rollout))
  )
  real = np.concatenate([rollout.prompt_mask, packing_mask(rollout)], axis=1)
  held, prompts = 0, set()
  for b in range(BATCH):
    own, is_prompt = places[b, real[b]], np.flatnonzero(real[b]) < PROMPT_LEN
    np.testing.assert_array_equal(tokens.reshape(-1)[own], rollout.tokens[b, real[b]])
    assert len(set(own // ROW_LEN)) == 1 and (np.diff(own) > 0).all()
    assert (ids.text.reshape(-1)[own[~is_prompt]] == b + 1).all()
    of_prompt = ids.text if ids.prompt is None else ids.prompt
    assert len(set(of_prompt.reshape(-1)[own])) == 1
    held += (~is_prompt).sum()
    prompts |= set(own[is_prompt].tolist())
  # What no text has is padding, and nothing is there twice.
  assert mask.sum() == held + len(prompts)
  siblings = places[:, PROMPT_LEN - 1].reshape(-1, group_size)
  assert (len(set(siblings.ravel().tolist())) < BATCH) == (group_size > 1)


def packing_mask(rollout):
  return np.asarray(completions.attention_mask(rollout))[:, PROMPT_LEN:]


def test_no_text_opens_a_row_while_it_fits_into_one_before():
  # Longest first: 10 and 9 open rows, 6 joins the first, 5 the second, and 4 opens a third.
  lengths = jnp.array([4, 9, 5, 10, 6]) - 1
  rows, begins, starts = shared_rows.placed(jnp.ones(5, int), lengths, row_len=16, group_size=1)
  np.testing.assert_array_equal(rows, [2, 1, 1, 0, 0])
  np.testing.assert_array_equal(begins, [0, 0, 9, 0, 10])
  np.testing.assert_array_equal(starts, begins + 1)
  # With its prompt in a row, a text needs less there.
  rows, begins, starts = shared_rows.placed(
    jnp.full(4, 3), jnp.array([5, 4, 5, 2]), row_len=12, group_size=2
  )
  np.testing.assert_array_equal(rows, [0, 0, 1, 1])
  np.testing.assert_array_equal(begins, [0, 0, 0, 0])
  np.testing.assert_array_equal(starts, [3, 8, 3, 8])


CONFIG = grpo.Config(
  batch_size=BATCH, group_size=GROUP_SIZE, num_minibatches=2, num_epochs=2, kl_every=0
)
SPEC = "data=2,fsdp=2"


def test_a_minibatch_keeps_its_rows_and_each_device_has_about_as_many_tokens():
  mesh, rollout = parallel.make_mesh(SPEC), make_rollout()
  algorithm = CONFIG.algorithm()
  before = epochs.minibatch_rows(algorithm, BATCH, 1, jax.random.key(0))
  deal = parallel.on_mesh(mesh, functools.partial(epochs.dealt, num_parts=1, group_size=4))
  cells = np.asarray(deal(before, rollout=rollout))
  assert cells.shape == (4, 1, 4, 8)  # two groups each
  np.testing.assert_array_equal(
    np.sort(cells.reshape(4, -1), axis=1), np.sort(np.asarray(before), axis=1)
  )
  groups = cells.reshape(-1, 4)
  np.testing.assert_array_equal(groups, groups[:, :1] // 4 * 4 + np.arange(4))
  lengths = np.asarray(completions.attention_mask(rollout)).sum(axis=1)
  # The longest group is beside the shortest one, and so on.
  of_groups = np.sort(lengths[cells].reshape(4, 8, 4).sum(axis=-1), axis=1)
  expected = of_groups[:, ::-1][:, :4] + of_groups[:, :4]
  np.testing.assert_array_equal(lengths[cells].sum(axis=(1, 3)), expected)


@functools.cache
def updated(packing, **settings):
  """Returns (costs of a device, f(rollout) -> (state, metrics)) of an update on four devices.

  If it trains on late rollouts, the given one has waited in its state, and the new one is long.
  """
  mesh, algorithm = parallel.make_mesh(SPEC), dataclasses.replace(CONFIG, **settings).algorithm()
  update = learner.make_update_after_sampling_fn(algorithm, POLICY, None, POLICY)
  own = params()["policy"]
  frozen = {"base": {}, "reference": parallel.put_once(mesh, own)}
  state = before(own, mesh)

  def given(rollout):
    nonlocal state
    if algorithm.staleness:
      replay = jax.tree.map(lambda x: x[None], rollout)
      state = state._replace(replay=replay, iteration=jnp.int32(1))
      state = parallel.put(state, parallel.state_shardings(mesh, state))
      rollout = make_rollout(1, mean=MAX_LEN)
    rows = rollout._replace(packing=packing), np.arange(BATCH, dtype=np.float32) % 7
    return state, frozen, *parallel.put(rows, parallel.by_rows(mesh))

  fn = jax.jit(parallel.on_mesh(mesh, update)).lower(*given(make_rollout())).compile()
  costs = hlo.costs(fn.as_text(), dict(mesh.shape))
  return costs, lambda rollout: jax.device_get(fn(*given(rollout)))


def before(own, mesh):
  state = learner.init_state(
    CONFIG.algorithm(), CONFIG.hypers(), {"policy": own}, jax.random.key(3)
  )
  return parallel.put(state, parallel.state_shardings(mesh, state))


def test_an_update_fits_where_it_is_said_to_and_is_the_plain_one():
  mesh = parallel.make_mesh(SPEC)
  fitting = functools.partial(learner.fitting, CONFIG.algorithm(), packings=[HALF])
  fitting, state = jax.jit(parallel.on_mesh(mesh, fitting)), before(params()["policy"], mesh)
  fits = []
  for seed in range(40):
    rollout = make_rollout(seed, mean=7)
    fits.append(bool(fitting(state, parallel.put(rollout, parallel.by_rows(mesh)))[0]))
    found, metrics = updated(HALF)[1](rollout)
    assert fits[-1] == bool(np.isfinite(metrics["policy/loss"][0]))
    if fits[-1] and sum(fits) < 3:
      expected, figures = updated(None)[1](rollout)
      chex.assert_trees_all_close(metrics, figures, rtol=1e-5, atol=1e-6)
      for name in ("mu", "nu"):
        x, y = (optax.tree.get(state.opt_state, name) for state in (found, expected))
        chex.assert_trees_all_close(x, y, rtol=1e-5, atol=1e-6 * optax.tree.norm(y, ord=jnp.inf))
  assert 3 < sum(fits) < 37


def test_a_late_rollout_is_read_in_fewer_rows_and_the_new_one_in_all():
  plain, expected = updated(None)
  costs, update = updated(HALF, staleness=1, sampler_correction="token")
  state, metrics = update(make_rollout())
  # The long one would not fit: what it got from the trainer would be no numbers.
  assert np.isfinite(state.replay.old_log_probs).all()
  state_of_plain, figures = expected(make_rollout())
  for name, pair in figures.items():
    np.testing.assert_allclose(metrics[name], pair, rtol=1e-5, atol=1e-6, err_msg=name)
  for name in ("mu", "nu"):
    x, y = (optax.tree.get(each.opt_state, name) for each in (state, state_of_plain))
    chex.assert_trees_all_close(x, y, rtol=1e-5, atol=1e-6 * optax.tree.norm(y, ord=jnp.inf))
  # The log-probs of the new one are a pass; an update of two epochs has more than six of them.
  packed = updated(HALF)[0].flops
  assert packed < costs.flops < packed + plain.flops / 6


def test_a_device_computes_its_share_of_the_rows_and_sends_no_more():
  plain, packed = updated(None)[0], updated(HALF)[0]
  # A plain row has a quarter of a prompt, a packed one has as much room as a whole.
  body = HALF.share * ROW_LEN / (PROMPT_LEN / GROUP_SIZE + MAX_LEN)
  assert 0.9 * HALF.share < packed.flops / plain.flops < 1.05 * body
  assert sum(packed.collectives.values()) < sum(plain.collectives.values()) + 2**12
