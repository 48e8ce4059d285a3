"""Tests of where a run's arrays are made, and of whose scores a completion is taught by."""

import collections
import dataclasses
import math
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_decoders import BAG, BAG_VALUE, arithmetic_decoder, bag_params, bag_value_params

from experiments import distill, grpo, ppo
from klrl import inputs, population, programs, rlhf, supervised
from klrl.devices import parallel
from klrl.errors import UserError
from klrl.models import policy_model, scalar_model, scalar_params_from
from klrl.run import pending
from klrl.tasks import arithmetic, data
from klrl.tasks.rewards import Reward

# Wide, so that what is never split, norms and biases, is little.
DECODER = dataclasses.replace(arithmetic_decoder(num_heads=2, mlp_dim=256, max_len=32), width=64)
MESH = parallel.make_mesh("fsdp=4")


def zeros(shapes):
  """Returns arrays on the host of these shapes, as a model directory gives them."""
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


@pytest.fixture(scope="module")
def models():
  """Returns the models of a run whose policy and value model are trained."""
  policy, scalar = (
    zeros(jax.eval_shape(model.init, jax.random.key(0)))
    for model in (policy_model(DECODER), scalar_model(DECODER))
  )
  loaders = inputs.Loaders(
    lambda path: (DECODER, policy),
    lambda path: (DECODER, scalar),
    lambda path: arithmetic.make_tokenizer(),
  )
  config = ppo.Config(reference_update="ema", value_init="policy")
  return config, inputs.load_models(
    config.sources(), loaders=loaders, policy="policy", reward_model="reward"
  )


def peaks_of(fn):
  """Returns (fn(), {device: the most bytes that it held at a time of what `fn` made})."""
  before = {id(array) for array in jax.live_arrays()}
  peaks = collections.Counter()

  def look(frame, event, _):
    if event != "return" or "klrl" not in frame.f_code.co_filename:
      return
    held = collections.Counter()
    for array in jax.live_arrays():
      if id(array) not in before:
        shape = array.sharding.shard_shape(array.shape)
        for device in array.sharding.device_set:
          held[device] += math.prod(shape) * array.dtype.itemsize
    for device, size in held.items():
      peaks[device] = max(peaks[device], size)

  sys.setprofile(look)
  try:
    made = fn()
  finally:
    sys.setprofile(None)
  return made, peaks


def assert_no_device_held_more_than_its_share(arrays, peaks, mesh=MESH):
  leaves = jax.tree.leaves(arrays)
  assert all(leaf.sharding.mesh == mesh for leaf in leaves)
  assert len(peaks) == MESH.size
  share = sum(leaf.nbytes for leaf in leaves) / MESH.size
  for size in peaks.values():
    assert share < size < 1.2 * share


def test_parameters_moments_and_a_moving_reference_are_made_in_shards(models):
  config, found = models
  setup = programs.Setup(config, config.algorithm(), found, None, MESH, {}, None)
  state, peaks = peaks_of(lambda: programs.init_run(setup))
  policy = state.params["policy"]
  assert "value" in state.params
  arrays = state.params, state.opt_state, state.reference
  assert_no_device_held_more_than_its_share(arrays, peaks)
  # An update donates both, so they must not be one.
  for own, reference in zip(jax.tree.leaves(policy), jax.tree.leaves(state.reference), strict=True):
    buffers = [x.addressable_shards[0].data.unsafe_buffer_pointer() for x in (own, reference)]
    assert buffers[0] != buffers[1]


def test_what_the_members_of_a_sweep_start_with_is_made_in_shards(models):
  config, found = models
  mesh = parallel.make_mesh("sweep=2,fsdp=2")
  setup = programs.Setup(config, config.algorithm(), found, None, mesh, {}, None)
  (state, _), peaks = peaks_of(lambda: population.init_members(setup, [config] * 2))
  assert_no_device_held_more_than_its_share(state, peaks, mesh)


def test_what_a_supervised_run_starts_with_is_made_in_shards(models):
  config, found = models
  params = scalar_params_from(found.policy_params)
  state, peaks = peaks_of(
    lambda: supervised.init_supervised_state(parallel.put_own(MESH, params), config)
  )
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
  assert_no_device_held_more_than_its_share((state.params, moments), peaks)


def test_a_head_on_a_policy_copies_nothing_to_a_device(models):
  _, found = models
  head, peaks = peaks_of(lambda: scalar_params_from(found.policy_params)["head"])
  assert head.shape == (64, 1) and not peaks


def begun(rewards, *, seed=0, **settings):
  """Returns (setup, state, its shardings) of a run of GRPO with these rewards of the host."""
  tokenizer = arithmetic.make_tokenizer()
  size = tokenizer.tokenizer.get_vocab_size()
  records = arithmetic.prompt_records(held_out=False)[:12]
  prompts = data.encode_prompts(records, tokenizer, max_prompt_len=8)
  policy, reference = (bag_params(size, seed=seed) for seed in (0, 1))
  scorer = BAG_VALUE, bag_value_params(size, seed=2)
  models = inputs.Models(tokenizer, BAG, policy, {}, BAG, BAG, reference, None, None, *scorer)
  task = inputs.Task(prompts, prompts, 4, rewards, None, None)
  settings = {"batch_size": 12, "num_minibatches": 1, "kl_every": 0, "seed": seed} | settings
  config = grpo.Config(group_size=4, **settings)
  setup = programs.set_up(config, parallel.make_mesh("data=1"), models, task)
  state = programs.init_run(setup)
  return setup, state, parallel.state_shardings(setup.mesh, state)


def trained(rewards):
  """Returns (parameters before, after two iterations of GRPO) with these rewards of the host."""
  setup, state, shardings = begun(rewards)
  before = jax.device_get(state.params["policy"])
  step = programs.make_step_fn(setup, shardings)
  for iteration in range(2):
    state, _ = step(state, iteration)
  return before, jax.device_get(state.params["policy"])


def test_scores_of_the_host_teach_what_the_same_scores_of_the_device_teach():
  calls = []

  def noted(prompts, completions, prompt_ids, **columns):
    calls.append((prompts, prompt_ids))
    return np.zeros(len(prompts))

  before, by_device = trained([])
  _, by_host = trained([Reward("model", 1.0, None), Reward("noted", 1.0, noted)])
  for of_device, of_host in zip(*map(jax.tree.leaves, (by_device, by_host)), strict=True):
    np.testing.assert_allclose(of_device, of_host, atol=1e-6)
  assert np.abs(by_device["unembedding"] - before["unembedding"]).max() > 1e-4
  # Those of a group continue one prompt, and it is the one whose columns the reward is given.
  encode = arithmetic.make_tokenizer().tokenizer.encode
  for prompts, prompt_ids in calls:
    groups = np.reshape(prompts, (3, 4))
    assert (groups == groups[:, :1]).all() and len({*groups[:, 0]}) == 3
    assert prompt_ids == [encode(prompt).ids for prompt in prompts]
  assert len(calls) == 2


def test_what_no_reward_scores_teaches_nothing_and_is_told_once(capsys):
  before, after = trained([Reward("none", 1.0, lambda prompts, **columns: [None] * len(prompts))])
  jax.tree.map(np.testing.assert_array_equal, before, after)
  told = " ".join(capsys.readouterr().out.split())
  assert told.count("Every reward abstained, by None, from 12 of 12 completions") == 1


def test_what_was_sampled_outlives_a_reward_that_fails(tmp_path, monkeypatch, capsys):
  calls, written = [], []

  def counts(prompts, completions, **columns):
    calls.append(completions)
    if len(calls) == 4:
      raise ConnectionError("server gone")
    return [len(set(completion)) for completion in completions]

  rewards = [Reward("counts", 1.0, counts)]
  _, undisturbed = trained(rewards)
  keep = pending.keep
  monkeypatch.setattr(
    pending, "keep", lambda path, *rest: written.append(path) or keep(path, *rest)
  )
  setup, state, shardings = begun(rewards)
  step = programs.make_step_fn(setup, shardings, workdir=tmp_path)
  state, _ = step(state, 0)
  assert not any(tmp_path.iterdir())
  with pytest.raises(UserError, match="server gone"):
    step(state, 1)
  (path,) = tmp_path.iterdir()
  assert path == written[1] == pending.path_of(tmp_path, 1)
  # A state that would sample something else takes no notice of it.
  for name, other in {
    "key": state._replace(key=jax.random.key(1)),
    "policy": state._replace(params=jax.tree.map(lambda x: 1.01 * x, state.params)),
  }.items():
    shutil.copytree(path.parent, tmp_path.with_name(name))
    step = programs.make_step_fn(setup, shardings, workdir=tmp_path.with_name(name))
    step(jax.tree.map(jnp.copy, other), 1)
  assert len(written) == 4 and calls[4] != calls[3]
  # The next command goes on from here.
  state, _ = programs.make_step_fn(setup, shardings, workdir=tmp_path)(state, 1)
  assert len(written) == 4 and calls[6] == calls[3] == calls[1] and not path.exists()
  assert "What was sampled before is scored: rollout-1.npz" in capsys.readouterr().out
  jax.tree.map(np.testing.assert_array_equal, state.params["policy"], undisturbed)


def test_a_run_of_late_rollouts_goes_on_bit_for_bit_and_needs_no_file(tmp_path):
  calls = []

  def counts(prompts, completions, **columns):
    calls.append(completions)
    if len(calls) == 3:
      raise ConnectionError("server gone")
    return [len(set(completion)) for completion in completions]

  setup, state, shardings = begun([Reward("counts", 1.0, counts)], staleness=1)
  step = programs.make_step_fn(setup, shardings, workdir=tmp_path)
  for iteration in range(2):
    state, _ = step(state, iteration)
  # The first one is trained on twice. What the failed call was given waits in the state.
  assert calls[1] == calls[0]
  with pytest.raises(UserError, match="server gone"):
    step(state, 2)
  assert not any(tmp_path.iterdir())
  saved = jax.device_get(state)
  found = []
  for goes_on in (False, True):
    if goes_on:
      state = parallel.put(saved, shardings)
      step = programs.make_step_fn(setup, shardings, workdir=tmp_path)
    for iteration in (2, 3):
      state, pairs = step(state, iteration)
    found.append(jax.device_get((state.params, pairs)))
  jax.tree.map(np.testing.assert_array_equal, *found)
  assert calls[2] == calls[3] == calls[5] != calls[1] and calls[4] == calls[6]


def test_a_damaged_rollout_is_sampled_again(tmp_path):
  path, arrays = pending.path_of(tmp_path, 3), {"tokens": np.arange(300), "finished": np.ones(3)}
  assert pending.kept(path, "mark") is None
  pending.keep(path, "mark", arrays)
  assert pending.kept(path, "another") is None
  content, num_whole = path.read_bytes(), 0
  for place in range(0, len(content), 7):
    changed = bytearray(content)
    changed[place] ^= 1 << place % 8
    path.write_bytes(changed)
    if (found := pending.kept(path, "mark")) is not None:
      jax.tree.map(np.testing.assert_array_equal, found, arrays)
      num_whole += 1
  assert num_whole < 50  # They differ in what nobody reads, such as the time.
  path.write_bytes(content[:1000])
  assert pending.kept(path, "mark") is None
  path.write_bytes(content)
  jax.tree.map(np.testing.assert_array_equal, pending.kept(path, "mark"), arrays)
  pending.drop(path)
  assert not any(tmp_path.iterdir())


def test_the_divergence_of_a_distillation_is_told_by_name():
  class Own(distill.Config):
    def algorithm(self):
      return dataclasses.replace(super().algorithm(), divergence=lambda *_: 0.0)

  told = [
    rlhf.announce(config)["kl_penalty"]
    for config in (
      distill.Config(),
      distill.Config(kl_divergence="forward"),
      distill.Config(kl_divergence="jensen_shannon"),
      Own(),
    )
  ]
  names = ("loss/exact/none/token", "KL(ref||pi)", "Jensen-Shannon", "divergence of its own")
  assert all(name in text for name, text in zip(names, told, strict=True))
