"""What an update may not depend on: parts, the order of rows, padding, devices, how many rows texts
share, and whether what stands before the first choice is called prompt or completion.

One update of the learner in float64, off-policy, on completions of 1 to 5 tokens: the gradient is
read from Adam's first moment. Between them the cases have every aggregation and kind of loss.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_decoders import BAG as POLICY
from small_decoders import BAG_VALUE as VALUE
from small_decoders import bag_params, bag_value_params

from experiments import grpo, ppo
from klrl import ops
from klrl.algorithm import learner
from klrl.algorithm.terms import texts_of
from klrl.devices import parallel
from klrl.sampling import Packing, Rollout

BATCH, GROUP_SIZE, PROMPT_LEN, MAX_LEN, VOCAB = 8, 4, 3, 5, 5
PADDING = 2
# No two quarters of the batch have as many tokens.
LENGTHS = np.array([1, 5, 2, 1, 4, 1, 5, 3])
ONCE = {
  "batch_size": BATCH,
  "num_epochs": 1,
  "num_minibatches": 1,
  "max_grad_norm": np.inf,
  "kl_every": 0,
  "entropy_coef": 0.1,
}
EXACT_LOSS = {"kl_placement": "loss", "kl_estimator": "exact", "kl_correction": "prefix"}


def group_method(**settings):
  return functools.partial(grpo.Config, **ONCE, group_size=GROUP_SIZE, **settings)


CASES = {
  "clip": functools.partial(
    ppo.Config, **ONCE, pretrain_data="texts", ptx_coef=0.5, loss_aggregation="token_mean"
  ),
  "gspo": group_method(
    trust_region="sequence_clip",
    loss_aggregation="sequence_mean_token_mean",
    **EXACT_LOSS,
  ),
  "cispo": group_method(
    trust_region="truncated",
    advantage="group_centred",
    loss_aggregation="constant",
    overlong_buffer=4.0,
    sampler_correction="token",
  ),
  "kl_penalty": functools.partial(
    ppo.Config,
    **ONCE,
    trust_region="kl_new_old",
    kl_placement="both",
    kl_estimator="exact",
    value_trunk="shared",
    loss_aggregation="sequence_mean_token_sum",
  ),
}


@pytest.fixture(autouse=True)
def in_float64():
  with jax.enable_x64(True):
    yield


@functools.cache
def models():
  """Returns (params, those of the reference)."""
  value = bag_value_params(VOCAB, seed=2)
  return {"policy": bag_params(VOCAB, seed=1), "value": value}, bag_params(VOCAB, seed=3)


def make_batch(*, order=None, padding=0, given=0):
  """Returns (rollout, scores, texts) with rows in `order` and `padding` more columns at each end.

  Old and sampler's log-probs are others than the policy's; the padding is NaN and token 0. The last
  `given` tokens of the prompt are a hole at the beginning of the completion, whose limit stays.
  """
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, VOCAB, (BATCH, PROMPT_LEN + MAX_LEN))
  prompt_mask, mask = np.ones((BATCH, PROMPT_LEN), bool), np.arange(MAX_LEN) < LENGTHS[:, None]
  # A group has one prompt.
  tokens[:, :PROMPT_LEN] = tokens[::GROUP_SIZE, :PROMPT_LEN].repeat(GROUP_SIZE, axis=0)
  prompt_mask[GROUP_SIZE:, 0] = False
  old, sampler = np.where(mask, rng.normal(-1.5, 0.3, (2, BATCH, MAX_LEN)), np.nan)
  scores, text_mask = rng.normal(size=BATCH), mask[::-1]
  after, around = ((0, 0), (0, padding)), ((0, 0), (given, padding - given))
  rollout = Rollout(
    tokens=np.pad(tokens, ((0, 0), (padding, padding - given))),
    prompt_mask=np.pad(prompt_mask, ((0, 0), (padding, 0)))[:, : padding + PROMPT_LEN - given],
    completion_mask=np.pad(mask, around),
    finished=LENGTHS < MAX_LEN,
    old_log_probs=np.pad(old, around, constant_values=np.nan),
    sampler_log_probs=np.pad(sampler, around, constant_values=np.nan),
  )
  texts = texts_of(np.pad(tokens[:, :MAX_LEN], after), np.pad(text_mask, after))
  rows = np.arange(BATCH) if order is None else order
  return jax.tree.map(lambda x: jnp.asarray(x)[rows], (rollout, scores, texts))


@functools.cache
def update_fn(name, accumulation):
  """Returns (f(state, reference, batch) -> (gradients, metrics), state before)."""
  config = CASES[name](accumulation=accumulation)
  value_model, params = VALUE, models()[0]
  if not config.sources().has_value_model:
    value_model, params = None, {"policy": params["policy"]}
  elif config.value_trunk == "shared":
    params = params | {"value": {"head": params["value"]["head"]}}
  # Dr. GRPO and an overlong buffer read the limit, which the padded batch alone shows.
  algorithm = dataclasses.replace(config.algorithm(), max_completion_len=MAX_LEN + PADDING)
  update = learner.make_update_after_sampling_fn(algorithm, POLICY, value_model, POLICY)

  @jax.jit
  def f(state, reference, batch):
    rollout, scores, texts = batch
    texts = texts if config.hypers().ptx_coef else None
    state, metrics = update(state, {"reference": reference, "base": {}}, rollout, scores, texts)
    gradients = jax.tree.map(lambda x: x / 0.1, optax.tree.get(state.opt_state, "mu"))
    return gradients, {key: ops.divide(*pair) for key, pair in metrics.items()}

  return f, learner.init_state(config.algorithm(), config.hypers(), params, jax.random.key(3))


def run(name, batch, accumulation=1, *, mesh=None):
  f, state = update_fn(name, accumulation)
  reference = models()[-1]
  if mesh is not None:
    state = jax.device_put(state, parallel.state_shardings(mesh, state))
    reference = parallel.put_once(mesh, reference)
    batch = jax.device_put(batch, parallel.by_rows(mesh))
  return jax.device_get(f(state, reference, batch))


@functools.cache
def whole(name):
  return run(name, make_batch())


def assert_same_update(found, expected):
  for name, gradients in expected[0].items():
    size = optax.tree.norm(gradients)
    error = optax.tree.norm(jax.tree.map(np.subtract, found[0][name], gradients)) / size
    assert size > 1e-2 and error < 1e-6, (name, size, error)
  assert found[1].keys() == expected[1].keys()
  for name, value in expected[1].items():
    np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("accumulation", "padding"), [(2, 0), (4, PADDING)])
def test_parts_add_up_and_padding_and_a_given_beginning_are_nothing(name, accumulation, padding):
  # An overlong buffer alone counts what is given: the limit does.
  given = 1 if padding and name != "cispo" else 0
  assert_same_update(run(name, make_batch(padding=padding, given=given), accumulation), whole(name))


@pytest.mark.parametrize("name", CASES)
def test_the_order_of_rows_and_groups_is_nothing(name):
  order = np.array([6, 4, 7, 5, 2, 3, 1, 0])  # the second group first
  assert_same_update(run(name, make_batch(order=order)), whole(name))


@pytest.mark.parametrize("name", CASES)
def test_texts_that_share_rows_are_nothing(name):
  rollout, *others = make_batch(padding=PADDING)
  packing = Packing(0.75, CASES[name]().algorithm().group_size)
  packed = rollout._replace(packing=packing), *others
  assert_same_update(run(name, packed, accumulation=2), whole(name))


def test_pretraining_texts_count_by_their_real_tokens_after_the_first():
  params, (_, _, texts) = models()[0]["policy"], make_batch()
  mask = np.concatenate([texts.prompt_mask, texts.completion_mask], axis=1)
  embedded = np.where(mask[..., None], params["decoder"]["embedding"][texts.tokens], 0)
  logits = np.tanh(embedded.cumsum(axis=1)) @ params["unembedding"]
  log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  losses = [
    -log_probs[i, t - 1, texts.tokens[i, t]]
    for i, length in enumerate(LENGTHS[::-1])
    for t in range(1, length)
  ]
  found = whole("clip")[1]["policy/pretraining_loss"]
  np.testing.assert_allclose(found, np.mean(losses), rtol=1e-5)


def test_a_group_may_lie_on_several_devices_in_parts():
  mesh = parallel.make_mesh("data=2,fsdp=2")
  assert_same_update(run("gspo", make_batch(), 2, mesh=mesh), whole("gspo"))
