"""Tests of dry runs: what a compiled program's text is read as, and what no sweep may do."""

import importlib.util
import json
import math
import os
import pathlib
import types

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_decoders import arithmetic_decoder

from experiments import dpo, ppo, sft, sweep
from experiments.settings import training
from experiments.sweep import config_class
from klrl.cost import ahead, dry_run, hlo
from klrl.devices import parallel, processes
from klrl.errors import UserError
from klrl.models import policy_model, save_policy
from klrl.tasks import arithmetic

TINY = {"batch_size": 8, "num_minibatches": 2, "num_epochs": 1}


def costs_of(mesh, fn, *arguments):
  compiled = jax.jit(fn).lower(*arguments).compile()
  return hlo.costs(compiled.as_text(), dict(mesh.shape))


def placed(mesh, shape, *axes):
  sharding = NamedSharding(mesh, PartitionSpec(*axes))
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def test_loops_count_as_often_as_they_run():
  mesh = parallel.make_mesh("data=1")

  def fn(x, weights):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
    with jax.named_scope("at_most(7)"):
      go_on = lambda carry: (carry[0] < 7) & (carry[1].sum() < 9e9)  # noqa: E731
      step = lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ weights[0]))  # noqa: E731
      return jax.lax.while_loop(go_on, step, (0, x))

  found = costs_of(mesh, fn, placed(mesh, (8, 256)), placed(mesh, (5, 256, 256)))
  assert found.flops == (5 + 7) * 2 * 8 * 256 * 256
  assert found.unknown_loops == 0 and not found.collectives
  # Each step reads one layer's weights, and not all of the stack.
  layer = 256 * 256 * 4
  assert (5 + 7) * layer < found.bytes < 4 * (5 + 7) * layer


def test_a_loop_whose_length_depends_on_data_is_said_to_be_unknown():
  mesh = parallel.make_mesh("data=1")

  def fn(x):
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x)

  assert costs_of(mesh, fn, placed(mesh, (8,))).unknown_loops == 1


def test_collectives_have_their_axes_and_what_they_send():
  mesh = parallel.make_mesh("data=2,fsdp=2")
  x, w = placed(mesh, (64, 128), "data"), placed(mesh, (128, 32), "fsdp")
  whole = NamedSharding(mesh, PartitionSpec())

  def gathered(w):
    return jax.lax.with_sharding_constraint(w * 2, whole)

  # Of 2 halves each sends its own to the other.
  assert costs_of(mesh, gathered, w).collectives == {("all-gather", "fsdp"): 64 * 32 * 4}
  # Over 2 devices a ring sends the sum's bytes once: 2 n (2 - 1) / 2.
  assert costs_of(mesh, lambda x: x.sum(0), x).collectives == {("all-reduce", "data"): 128 * 4}


def test_a_collective_that_a_tpu_spreads_over_other_work_is_sent_once():
  def gathered(name, channel):
    groups = f"channel_id={channel}, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}"
    return f"  %{name} = f32[16]{{0}} all-gather(%p), {groups}"

  def fused(name, target):
    call = f'  ROOT %end.{name} = f32[16]{{0}} custom-call(%g{name}), custom_call_target="{target}"'
    head = f"%fused.{name} (p: f32[4]) -> f32[16] {{", "  %p = f32[4]{0} parameter(0)"
    return "\n".join([*head, gathered(f"g{name}", 7), call, "}"])

  steps = ("AsyncCollectiveStart", "ConcatBitcast", "AsyncCollectiveDone")
  entry = ["ENTRY %main (p: f32[4]) -> f32[16] {", "  %p = f32[4]{0} parameter(0)"]
  entry += [f"  %f{i} = f32[16]{{0}} fusion(%p), kind=kCustom, calls=%fused.{i}" for i in range(3)]
  text = [fused(i, target) for i, target in enumerate(steps)]
  text += ["\n".join([*entry, gathered("other", 8), "}"])]
  # 16 bytes to each of 3 others: once in steps, and once alone.
  found = hlo.costs("\n\n".join(text), {"fsdp": 4}).collectives
  assert found == {("all-gather", "fsdp"): 2 * 3 * 16}


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
    ("source_target_pairs={{0,3},{3,0}}", [[0, 3], [3, 0]]),
    ("replica_groups={}, x", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
  ],
)
def test_groups_are_read_in_all_their_forms(text, groups):
  np.testing.assert_array_equal(hlo._groups(text, 4), groups)


def test_products_with_a_batch_count_once_though_a_tpu_dilates_them():
  text = """
ENTRY %main (a: bf16[8,16,32], b: bf16[8,32,64]) -> bf16[8,16,64] {
  %a = bf16[8,16,32]{2,1,0} parameter(0)
  %b = bf16[8,32,64]{2,1,0} parameter(1)
  ROOT %c = bf16[8,16,64]{2,1,0:T(8,128)S(1)} convolution(%a, %b), \
window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf
}
"""
  found = hlo.costs(text, {"data": 1})
  assert found.flops == 2 * 8 * 16 * 32 * 64
  assert found.bytes == 2 * 8 * (16 * 32 + 32 * 64)  # The result stays in a faster memory.


def test_a_run_is_costed_and_leaves_one_file(tmp_path):
  config = ppo.Config(dry_run=True, mesh="data=2,fsdp=2", workdir=str(tmp_path / "run"), **TINY)
  workdir = ppo.main(config)
  assert [path.name for path in workdir.iterdir()] == ["dry_run.json"]
  reports = json.loads((workdir / "dry_run.json").read_text())
  assert [report["program"] for report in reports] == ["iterate", "judge_draw", "judge_evaluate"]
  for report in reports:
    assert report["num_devices"] == 4 and report["unknown_loops"] == 0
    assert report["flops"] > 0 and report["seconds"] is None  # Nobody knows what a CPU can do.
    axes = {axis for found in report["collectives"] for axis in found["axes"].split(",")}
    assert axes <= {"data", "fsdp"}
  # The devices hold the models, the value model's moments too, whichever program runs.
  held = [x["memory"]["arguments"] + x["memory"]["beside"] for x in reports]
  assert held[1:] == pytest.approx(held[:1] * 2, rel=0.05)
  assert reports[1]["memory"]["arguments"] < held[0] / 4


def model_without_weights(directory):
  tokenizer = arithmetic.make_tokenizer()
  decoder = arithmetic_decoder(num_heads=2, mlp_dim=32, max_len=32)
  save_policy(directory, decoder, policy_model(decoder).init(jax.random.key(0)), tokenizer)
  (directory / "model.safetensors").unlink()
  return decoder


def test_a_step_of_sft_and_of_dpo_is_costed_without_weights(tmp_path):
  decoder = model_without_weights(tmp_path)
  params = policy_model(decoder).init(jax.random.key(0))
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  rows = {"completion": "2"}, {"chosen": "2", "rejected": "3"}
  shared = {"policy": str(tmp_path), "dry_run": True, "mesh": "fsdp=2", "batch_size": 4}
  for module, columns in zip((sft, dpo), rows, strict=True):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+1=", **columns}) + "\n" for i in range(9)))
    workdir = tmp_path / module.__name__
    module.main(module.Config(data=str(data), workdir=str(workdir), **shared))
    assert [path.name for path in workdir.iterdir()] == ["dry_run.json"]
    (report,) = json.loads((workdir / "dry_run.json").read_text())
    memory = report["memory"]
    assert report["program"] == "step" and report["flops"] > 0
    # Half of the parameters and of two moments; DPO's reference stays beside them.
    assert memory["arguments"] == pytest.approx(3 * size / 2, rel=0.1)
    assert memory["beside"] == pytest.approx(size / 2 if module is dpo else 0, rel=0.1)
    assert memory["total"] == sum(x for name, x in memory.items() if name not in ("total", "of"))


def test_a_program_that_the_compiler_cannot_show_is_said_to_fit():
  class Compiled:
    def memory_analysis(self):
      return jax.jit(jnp.sin).lower(jnp.zeros(2**20)).compile().memory_analysis()

    def as_text(self):
      raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nand what led to it")

  compiled = types.SimpleNamespace(compile=lambda compiler_options: Compiled())
  program = types.SimpleNamespace(lower=lambda: compiled)
  with pytest.raises(UserError, match=r"`update` fits: it takes 0.01 GiB.*RET_CHECK failure$"):
    dry_run._report("update", program, (parallel.make_mesh(""), ""))


@pytest.mark.parametrize(
  ("said", "message"),
  [
    ("RESOURCE_EXHAUSTED: 20G exceed 16G.\nSee a page.\nAnd more", "`update` does not fit on a "),
    ("A log\nINTERNAL: none", "The compiler fails at the program `update`: INTERNAL: none$"),
  ],
)
def test_what_the_compiler_says_is_one_message(said, message, monkeypatch):
  def refuse(lowered, topology):
    raise jax.errors.JaxRuntimeError(said)

  monkeypatch.setattr(ahead, "optimised", refuse)
  program = types.SimpleNamespace(lower=lambda: None)
  with pytest.raises(UserError, match=message):
    dry_run._report("update", program, (parallel.make_mesh(""), "v5e:2x2"))


def test_the_text_that_a_compiler_writes_is_read_once_all_of_it_is_there(tmp_path):
  path = tmp_path / "module_0000.jit_step.after_optimizations_after_buffer_assignment.txt"
  (tmp_path / path.name.replace("0000", "0044")).write_text("ENTRY %part () -> () {\n}\n")
  whole = "HloModule m\n\n%f () -> () {\n}\n\nENTRY %main () -> () {\n}\n\n"
  assert ahead.dumped(tmp_path) is None
  path.write_text(whole.removesuffix("}\n\n"))
  assert ahead.dumped(tmp_path) is None
  path.write_text(whole)
  assert ahead.dumped(tmp_path) == whole


def test_the_memory_of_a_program_is_that_of_its_main_buffers():
  assigned = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <5 x @0> (size=512,offset=0): bf16[]
allocation 1: size 32, page 0, parameter 1, shape |bf16[16]| at ShapeIndex {}:
allocation 2: size 16, page 0, parameter 0, shape |bf16[8]| at ShapeIndex {}, maybe-live-out:
allocation 3: size 8, page 0, output shape is |bf16[4]|, maybe-live-out:
allocation 4: size 4096, color 1, page 0, preallocated-temp:
allocation 5: size 64, page 0, preallocated-temp:
"""
  assert ahead.memory_of(assigned) == {"arguments": 48, "temporaries": 64, "outputs": 8}


OF_A_TPU = """
import json, jax, jax.numpy as jnp
from klrl.cost import ahead, hlo
from klrl.devices import parallel
from klrl.errors import UserError
mesh = parallel.make_mesh("fsdp=16", parallel.topology_devices("v5e:4x4"))
def matrix(size, *axes):
  sharding = jax.NamedSharding(mesh, jax.P(*axes))
  return jax.ShapeDtypeStruct((size, size), jnp.float32, sharding=sharding)
def program(x, w):
  return jax.lax.fori_loop(0, 7, lambda i, x: jnp.tanh(x @ w), x)
lowered = jax.jit(program).lower(matrix(1024, "fsdp"), matrix(1024))
text, memory = ahead.optimised(lowered, "v5e:4x4")
print(hlo.costs(text, {"fsdp": 16}).flops)
print(json.dumps(memory))
try:
  parallel.make_mesh("fsdp=15", list(mesh.devices.flat))
except UserError as error:
  print(error)
try:
  ahead.optimised(jax.jit(program).lower(matrix(2**18, "fsdp"), matrix(2**18)), "v5e:4x4")
except jax.errors.JaxRuntimeError as error:
  print(str(error).splitlines()[0])
"""


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the compiler for TPUs")
def test_a_program_for_tpus_is_read_before_it_is_machine_code():
  # The compiler for TPUs knows no flags of CPUs.
  environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
  root = pathlib.Path(__file__).parents[1]
  status, said = forked.Process(["-c", OF_A_TPU], root, environment).finished()
  assert status == 0, said[-3000:]
  flops, memory, mesh, refused = said.splitlines()
  assert float(flops) == 7 * 2 * 64 * 1024**2
  # 64 rows of one matrix, and all of the other.
  assert json.loads(memory)["arguments"] == 4 * (64 + 1024) * 1024
  assert mesh.startswith("--mesh=fsdp=15 cannot be laid over the links of 16 TPU chips.")
  assert refused.startswith("RESOURCE_EXHAUSTED")


def test_no_collective_of_a_sweep_crosses_members(tmp_path, monkeypatch):
  # The judge knows no members.
  monkeypatch.setattr(dry_run, "_judge_reports", lambda *arguments, **named: [])
  config = config_class("grpo")(
    experiment="grpo",
    sweep="beta=0.1,0.3,1",
    dry_run=True,
    mesh="sweep=2,fsdp=2",
    members_per_batch=2,
    sampler_mesh="split",
    group_size=4,
    workdir=str(tmp_path / "sweep"),
    **TINY,
  )
  (report,) = json.loads((sweep.main(config) / "dry_run.json").read_text())
  assert {found["axes"] for found in report["collectives"]} == {"fsdp"}


def test_models_need_no_weights_and_equal_ones_are_one_argument(tmp_path):
  model_without_weights(tmp_path)
  prompts = tmp_path / "p.jsonl"
  prompts.write_text('{"prompt": "1+1="}\n')
  settings = {"prompts": str(prompts), "reward": "f.py:f"}
  config = ppo.Config(policy=str(tmp_path), lora_rank=2, value_init="policy", **settings)
  models = dry_run.shapes_of_models(
    config.sources(), dry_run.FROM_CONFIGS, policy=str(tmp_path), reward_model=""
  )
  kernel = ("decoder", "embed", "embedding")
  base, reference = models.base["policy"], models.reference_params
  for name in kernel:
    base, reference = base[name], reference[name]
  assert isinstance(base, jax.ShapeDtypeStruct) and base is reference
  frozen, whole = parallel.distinct((models.base["policy"], models.reference_params))
  assert sum(math.prod(leaf.shape) for leaf in frozen) == sum(
    math.prod(leaf.shape) for leaf in jax.tree.leaves(models.reference_params)
  )
  assert whole(frozen)[1]["decoder"]["embed"]["embedding"] is base


def test_several_processes_agree_on_shapes_outside_of_what_is_traced(monkeypatch):
  """As every run on the embedded task does before its stages."""
  asked = []

  def gather(failed):
    asked.append(failed)
    assert not isinstance(jnp.ones(()) + 1, jax.core.Tracer)
    return np.array([failed])

  monkeypatch.setattr(processes, "is_alone", lambda: False)
  monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
  models, _ = training.shapes_of_inputs(ppo.Config())
  assert isinstance(jax.tree.leaves(models.policy_params)[0], jax.ShapeDtypeStruct) and asked


def test_a_topology_needs_its_compiler(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'klrl\[tpu\]'"):
    parallel.topology_devices("v5e:2x2")
  with pytest.raises(UserError, match="--topology is set, but nothing reads it"):
    ppo.Config(topology="v5e:2x2")
