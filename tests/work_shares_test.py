"""Tests that devices share the work: none of them computes what the others compute too.

Counted are the products of matrices of compiled programs, of one device and of what all have to do.
Nothing is run. Eight devices take a process of their own, which is this file.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys

import forked
import jax
import numpy as np
import pytest
from quick_compilation import QUICK
from small_decoders import arithmetic_decoder

from experiments import grpo, ppo, reward_model, sft
from klrl import inputs, supervised
from klrl.algorithm import terms
from klrl.cost import dry_run, hlo
from klrl.devices import parallel
from klrl.models import policy_model, scalar_model
from klrl.tasks import arithmetic, data, rewards

ALONE = ("data=2,fsdp=4",)
PLAIN_ON = ("data=1", "fsdp=8", "data=2,fsdp=4")
SWEPT = ("sweep=2,data=2,fsdp=2",)
SUPERVISED_ON = ("data=2,fsdp=4",)  # More take a second each, and were found to be alike.
JUDGE = ("judge_draw", "judge_evaluate")
SUPERVISED = ("sft_step", "sft_held_out", "reward_model_step", "reward_model_held_out")
DECODER = arithmetic_decoder(num_heads=2, mlp_dim=32, max_len=32)
# Wide enough for eight devices to have a matrix each.
WIDER = dataclasses.replace(DECODER, width=32, head_dim=16)


def loaders_of(decoder):
  return inputs.Loaders(
    lambda path: (decoder, policy_model(decoder).init(jax.random.key(0))),
    lambda path: (decoder, scalar_model(decoder).init(jax.random.key(0))),
    lambda path: arithmetic.make_tokenizer(),
  )


class Everything(ppo.Config):
  """A run whose rows are gathered in every way: kept, late, in minibatches and in their parts."""

  def algorithm(self):
    return dataclasses.replace(super().algorithm(), group_size=4, oversampling=2)


RUN = Everything(
  batch_size=128,  # So that a part of a minibatch has a whole group on each device.
  num_minibatches=2,
  num_epochs=1,
  accumulation=2,
  staleness=1,
  kl_placement="both",
  kl_estimator="exact",  # Each minibatch reads hidden states of the reference.
  reference_update="ema",
  num_eval_rows=64,
)
# Nothing but what GRPO needs: the exact KL, which is measured now and then, is left out.
PLAIN = grpo.Config(batch_size=64, group_size=4, num_minibatches=1, kl_every=0)


def arithmetic_of_plain() -> dict[str, float]:
  """Returns {program: operations of all devices} of `PLAIN`, two for each multiply-add.

  A prompt is read once for all completions of its group, by the sampler and by the update, where a
  completion attends to the prompt and itself. The update is a pass of the reference and one that is
  trained, which counts thrice, and its logits are computed once more for their gradient.
  """
  prompt_len, horizon = 7, 4
  num_groups, num_rows = PLAIN.batch_size // PLAIN.group_size, PLAIN.batch_size
  width = WIDER.width
  linear = 2 * WIDER.num_layers * (4 * width**2 + 3 * width * WIDER.mlp_dim)
  attention = 4 * WIDER.num_layers * width  # of a query with one key
  head = 2 * WIDER.vocab_size * width * num_rows * horizon
  # The last token is drawn and not read.
  read = num_groups * prompt_len + num_rows * (horizon - 1)
  seen = num_groups * prompt_len**2 + num_rows * (horizon - 1) * (prompt_len + horizon - 1)
  rollout = read * linear + seen * attention + head
  tokens = num_groups * prompt_len + num_rows * horizon
  seen = num_groups * prompt_len**2 + num_rows * horizon * (prompt_len + horizon)
  update = (1 + 3) * (tokens * linear + seen * attention) + (1 + 4) * head
  return {"rollout": rollout, "update": update}


@functools.cache
def models_and_task():
  models = dry_run.shapes_of_models(
    RUN.sources(), loaders_of(DECODER), policy="policy", reward_model="reward"
  )
  texts = terms.texts_of(np.zeros((4, 8), np.int32), np.ones((4, 8), bool))
  own = [rewards.Reward("own", 1.0, len)]  # Of the host, so that rollout and update are apart.
  return models, inputs.load_task(RUN.sources(), models)._replace(pretraining=texts, rewards=own)


def reports(spec):
  """Returns what the dry run says of the run's programs, or of those of two members."""
  models, task = models_and_task()
  config = RUN.__class__(**{**vars(RUN), "mesh": spec})
  if "sweep" not in spec:
    return dry_run.of_run(config, models, task)
  return dry_run.of_members([config] * 2, models, task, mesh=spec, members_per_batch=1)


def plain_flops(spec):
  """Returns {program: operations of one device} of `PLAIN`."""
  sources = PLAIN.sources()
  models = dry_run.shapes_of_models(sources, loaders_of(WIDER), policy="policy", reward_model="")
  _, task = models_and_task()
  config = dataclasses.replace(PLAIN, mesh=spec)
  task = task._replace(pretraining=None)
  assert task.training.tokens.shape[1] == 7 and task.max_completion_len == 4
  found = dry_run.of_run(config, models, task)
  return {report["program"]: report["flops"] for report in found}


def supervised_flops(spec, num_rows):
  """Returns {program: operations of one device} of supervised runs on `num_rows` rows."""
  mesh, found = parallel.make_mesh(spec), {}
  tokens, mask = (
    jax.ShapeDtypeStruct((num_rows, 16), dtype, sharding=parallel.replicated(mesh))
    for dtype in (np.int32, bool)
  )
  margins = jax.ShapeDtypeStruct((num_rows,), np.float32, sharding=tokens.sharding)
  policy, scalar = policy_model(DECODER), scalar_model(DECODER)
  examples = data.Examples(tokens, mask, mask, tokens)
  pairs = reward_model.Pairs(*(x.update(shape=(num_rows, 2, 16)) for x in (tokens, mask)), margins)
  of_pairs = {"margin": 0.0, "label_smoothing": 0.0, "centring_coef": 0.0}
  runs = {
    "sft": (sft.Config(), policy.init, sft.make_cross_entropy_fn(policy), examples, {}),
    "reward_model": (
      reward_model.Config(),
      scalar.init,
      reward_model.make_preference_fn(scalar),
      pairs,
      of_pairs,
    ),
  }
  for name, (config, init, loss_fn, batch, coefficients) in runs.items():
    params = jax.eval_shape(init, jax.random.key(0))
    state = jax.eval_shape(
      functools.partial(supervised.init_supervised_state, config=config, coefficients=coefficients),
      params,
    )
    shardings = parallel.state_shardings(mesh, state)
    state = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, shardings)
    step, measure = supervised.make_supervised_programs(mesh, loss_fn, config, shardings)
    rows = jax.tree.map(lambda x: x.update(sharding=parallel.by_rows(mesh)), batch)
    programs = {
      "step": step.lower(state, {}, rows),
      "held_out": measure.lower(state.params, batch, state.coefficients),
    }
    for what, lowered in programs.items():
      costs = hlo.costs(lowered.compile().as_text(), dict(mesh.shape))
      found[f"{name}_{what}"] = costs.flops
  return found


def main():
  found = {
    spec: {report["program"]: report["flops"] for report in reports(spec)}
    for spec in ("data=1", *ALONE, *SWEPT)
  }
  for spec in ("data=1", *SUPERVISED_ON):
    found[spec] |= supervised_flops(spec, 16)
  with pytest.MonkeyPatch.context() as patch:
    # The judge is measured above.
    patch.setattr(dry_run, "_judge_reports", lambda *arguments, **named: [])
    plain = {spec: plain_flops(spec) for spec in PLAIN_ON}
  json.dump({**found, "plain": plain}, sys.stdout)


@pytest.fixture(scope="module")
def flops():
  """Returns {mesh: {program: operations of one device}}."""
  root = pathlib.Path(__file__).parents[1]
  flags = f"--xla_force_host_platform_device_count=8 {QUICK}"
  code = "import work_shares_test; work_shares_test.main()"
  status, said = forked.Process(["-c", code], root, os.environ | {"XLA_FLAGS": flags}).finished()
  assert status == 0, said[-3000:]
  return json.loads(said.splitlines()[-1])


@pytest.mark.parametrize("program", ["rollout", "update"])
@pytest.mark.parametrize("spec", PLAIN_ON)
def test_a_device_computes_its_share_of_what_the_algorithm_needs(flops, spec, program):
  num_devices = 1 if spec == "data=1" else 8
  needed = arithmetic_of_plain()[program] / num_devices
  assert 0.9 < flops["plain"][spec][program] / needed < 1.1


def share(flops, spec, program):
  """Returns a device's part of the work times the devices of a member; 1 is ideal."""
  sizes = dict(part.split("=") for part in spec.split(","))
  num_devices = np.prod([int(size) for axis, size in sizes.items() if axis != "sweep"])
  return flops[spec][program] / flops["data=1"][program] * num_devices


@pytest.mark.parametrize("program", ["rollout", "update"])
@pytest.mark.parametrize("spec", [*ALONE, *SWEPT])
def test_the_devices_of_a_run_share_its_work(flops, spec, program):
  assert 0.9 < share(flops, spec, program) < 1.1


@pytest.mark.parametrize("program", JUDGE)
@pytest.mark.parametrize("spec", [*ALONE, *SWEPT])
def test_the_devices_of_a_run_share_its_judge(flops, spec, program):
  # All members' devices judge one member after another.
  members = 2 if "sweep" in spec else 1
  assert 0.9 < share(flops, spec, program) * members < 1.1


@pytest.mark.parametrize("program", SUPERVISED)
@pytest.mark.parametrize("spec", SUPERVISED_ON)
def test_the_devices_of_a_supervised_run_share_its_work(flops, spec, program):
  assert 0.9 < share(flops, spec, program) < 1.1
