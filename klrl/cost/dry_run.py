"""Compiles the programs of a run, for devices that may not be there, and reads what they cost.

    shapes of models -> shapes of the state -> compile for a mesh -> memory, work, traffic, time

No parameter is made, so a model of any size fits, and no weights have to be on the disk. The judge
is two programs, one draw for each of its rows and what the models say of them; a run computes each
a few times. Reward functions on the host are left out.
"""

import dataclasses
import functools
import inspect
import json
import math
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.table import Table

from klrl import inputs, judging, population, programs, supervised
from klrl.cost import ahead, hlo
from klrl.devices import parallel, processes
from klrl.devices.unread import stored_as
from klrl.errors import UserError
from klrl.models import add_lora, file_dtype, join, load_config, policy_model, scalar_model
from klrl.run import progress
from klrl.run.workdir import DRY_RUN, write_text


class Chip(NamedTuple):
  """The figures of one device, by its maker."""

  memory: float  # bytes
  flops: float  # per second, bfloat16
  bandwidth: float  # bytes per second, of the main memory
  links: float  # bytes per second that leave over all links to other chips


# cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, "key chip specifications". What they give for the
# interconnect in GBps is both directions together, in Gbps one. A chip is one device to JAX.
_GIB = 2**30
CHIPS = {
  "TPU v4": Chip(32 * _GIB, 275e12, 1228e9, 300e9),
  "TPU v5 lite": Chip(16 * _GIB, 197e12, 819e9, 200e9),
  "TPU v5": Chip(95 * _GIB, 459e12, 2765e9, 600e9),
  "TPU v6 lite": Chip(32 * _GIB, 918e12, 1600e9, 400e9),
  # NVIDIA's data sheets, without sparsity; NVLink's figures are both directions together.
  "NVIDIA A100-SXM4-80GB": Chip(80e9, 312e12, 2039e9, 300e9),
  "NVIDIA H100 80GB HBM3": Chip(80e9, 989e12, 3350e9, 450e9),
  "NVIDIA H200": Chip(141e9, 989e12, 4800e9, 450e9),
}


def _fresh_policy(path):
  config = load_config(path)
  return config, policy_model(_as_in_files(config)).init(jax.random.key(0))


def _fresh_scalar(path):
  config = load_config(path)
  return config, scalar_model(_as_in_files(config)).init(jax.random.key(0))


def _as_in_files(config):
  return dataclasses.replace(config, param_dtype=file_dtype(config) or config.param_dtype)


# Models as config.json describes them, without their weights.
FROM_CONFIGS = inputs.Loaders(
  _fresh_policy, _fresh_scalar, checkpoint=lambda folder, params: params
)


@processes.together
def shapes_of_models(
  sources: inputs.Sources, loaders: inputs.Loaders, **directories: str
) -> inputs.Models:
  """Returns `inputs.load_models` of the same arguments, with shapes in place of arrays.

  An array that two models would share is one shape that both share.
  """
  traced = whole = None
  # Processes tell one another how loading went; what is traced here can only load.
  load_models = inspect.unwrap(inputs.load_models)

  def load():
    nonlocal traced, whole
    traced = load_models(sources, loaders=loaders, **directories)
    arrays, whole = parallel.distinct(_arrays(traced))
    return arrays

  shapes = jax.eval_shape(load)
  return traced._replace(**whole(shapes))


def shapes_of_start(config, load: Callable[[inputs.Loaders], tuple]) -> tuple:
  """Returns (model config, trained, frozen, tokenizer) of a supervised stage; arrays are shapes.

  Args:
    config: its `init_seed` and `lora_rank` are read.
    load: load(loaders) -> (model config, params, tokenizer), such as `inputs.load_start`.
  """
  model_config = tokenizer = None

  def params():
    nonlocal model_config, tokenizer
    loaded_config, loaded, tokenizer = load(FROM_CONFIGS)
    key = jax.random.key(config.init_seed)
    model_config, trained, frozen = add_lora(loaded_config, loaded, key, rank=config.lora_rank)
    return trained, frozen

  trained, frozen = jax.eval_shape(params)
  return model_config, trained, frozen, tokenizer


def _arrays(models: inputs.Models) -> dict[str, Any]:
  fields = ("policy_params", "base", "reference_params", "value_params", "reward_params")
  return {name: getattr(models, name) for name in fields}


def of_run(config, models: inputs.Models, task: inputs.Task) -> list[dict[str, Any]]:
  """Returns the cost of each program of a run, as `_report` returns it.

  Args:
    config: the experiment's; reads `mesh` and `topology`.
    models: what `shapes_of_models` returned.
    task: what `inputs.load_task` returned.
  """
  setup = _setup_of_run(config, models, task)
  state, shardings = _state(setup)
  made = programs.make_programs(setup, shardings)
  return [*_reports(setup, state, made), *_judge_reports(setup, state.params, beside=state)]


def of_iteration(config, models: inputs.Models, task: inputs.Task) -> list[dict[str, Any]]:
  """Returns `of_run` without the programs of the judge."""
  setup = _setup_of_run(config, models, task)
  state, shardings = _state(setup)
  return _reports(setup, state, programs.make_programs(setup, shardings))


def _setup_of_run(config, models, task) -> programs.Setup:
  return _set_up(config, parallel.make_mesh(config.mesh, devices_of(config)), models, task)


def of_members(
  configs: list, models: inputs.Models, task: inputs.Task, *, mesh: str, members_per_batch: int
) -> list[dict[str, Any]]:
  """Returns the cost of each program of a group of a sweep's members; see `of_run`."""
  config = configs[0]
  mesh = parallel.sweep_mesh(mesh, len(configs), devices_of(config))
  setup = _set_up(config, mesh, models, task)
  num_places = parallel.places(mesh, len(configs), members_per_batch=members_per_batch)

  def stack(leaf):
    return jax.ShapeDtypeStruct((num_places, *leaf.shape), leaf.dtype)

  diverged_at = jax.ShapeDtypeStruct((), jnp.int32)
  of_one, _ = _state(setup)
  state = jax.tree.map(stack, population.SweepState(of_one, diverged_at))
  shardings = parallel.state_shardings(mesh, state, members=True)
  state = _placed(state, shardings)
  lift = functools.partial(parallel.map_members, mesh, members_per_batch=members_per_batch)
  made = programs.make_programs(setup, shardings, lift=lift, guard=population.guarded)
  # The judge gets a copy of the parameters of a member.
  return [*_reports(setup, state, made), *_judge_reports(setup, of_one.params, beside=state)]


def of_supervised(
  config, loss_fn, params, training: NamedTuple, *, frozen, coefficients=None, beside=None
) -> list[dict[str, Any]]:
  """Returns the cost of a step of `supervised.train` as the only report; see `of_run`.

  Args:
    config: the experiment's; its `mesh`, `topology` and what the step reads of it.
    loss_fn: the loss.
    params: shapes of what is trained, in the dtype of its files.
    training: the examples.
    frozen: shapes of the parameters that are not trained.
    coefficients: of the loss, by name.
    beside: shapes of what the devices hold during a step that does not read it.
  """
  mesh = parallel.make_mesh(config.mesh, devices_of(config))
  parallel.check_batch_size(mesh, config.batch_size)

  def init(params):
    params = stored_as(params, config.param_dtype)
    return supervised.init_supervised_state(params, config, coefficients or {})

  def placed(tree):
    return _placed(tree, parallel.state_shardings(mesh, tree))

  state = jax.eval_shape(init, params)
  shardings = parallel.state_shardings(mesh, state)
  step, _ = supervised.make_supervised_programs(mesh, loss_fn, config, shardings)
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (config.batch_size, *x.shape[1:]), x.dtype, sharding=parallel.by_rows(mesh)
    ),
    training,
  )
  on, beside = (mesh, config.topology), placed(beside or {})
  return [_report("step", step, on, placed(state), placed(frozen), batch, beside=beside)]


def devices_of(config) -> list | None:
  """Returns the devices of `--topology`, or None for the devices of this machine."""
  return parallel.topology_devices(config.topology) if config.topology else None


def _set_up(config, mesh, models, task) -> programs.Setup:
  parallel.check_batch_size(mesh, config.batch_size)
  return programs.set_up(config, mesh, models, task)


def _placed(tree, shardings):
  return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), tree, shardings)


def _state(setup: programs.Setup):
  """Returns (shapes of a run's state on the devices, their shardings)."""
  arrays, whole = parallel.distinct(_arrays(setup.models))

  def init(arrays):
    return programs.init_run(setup._replace(models=setup.models._replace(**whole(arrays))))

  state = jax.eval_shape(init, arrays)
  shardings = parallel.state_shardings(setup.mesh, state)
  return _placed(state, shardings), shardings


def _reports(setup, state, made) -> list[dict[str, Any]]:
  """Returns the cost of the programs `made` of an iteration, whose `state` has these shapes."""
  algorithm, mesh, training = setup.algorithm, setup.mesh, setup.task.training
  on, by_rows = (mesh, setup.config.topology), parallel.by_rows(mesh)

  def shape_of(array, sharding, *leading):
    shape = (*leading, *array.shape[len(leading) :])
    return jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding)

  frozen, _ = parallel.distinct(setup.frozen)
  prompts = tuple(shape_of(x, by_rows, algorithm.samples) for x in (training.tokens, training.mask))
  rows = jax.ShapeDtypeStruct((algorithm.samples,), jnp.int32, sharding=by_rows)
  num_texts = algorithm.batch_size
  texts = jax.tree.map(lambda x: shape_of(x, by_rows, num_texts), setup.task.pretraining)
  if "iterate" in made:
    return [_report("iterate", made["iterate"], on, state, frozen, *prompts, rows, texts)]
  sampling = _report("rollout", made["rollout"], on, state, frozen, *prompts)
  rollout = jax.eval_shape(made["rollout"], state, frozen, *prompts)
  shape = rollout.finished.shape
  by_rows = parallel.by_rows(mesh, members=len(shape) > 1)
  rollout = jax.tree.map(lambda x: x.update(sharding=by_rows), rollout)
  scores = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=by_rows)
  scores = scores if setup.task.rewards else rows
  update = _report("update", made["update"], on, state, frozen, rollout, scores, texts)
  return [sampling, update]


def _judge_reports(setup, trained, *, beside) -> list[dict[str, Any]]:
  """Returns the cost of the programs of the judge; in a sweep it is that of one member.

  Args:
    setup: of the run.
    trained: shapes of the parameters that are judged.
    beside: shapes of the state, which the devices hold all the while.
  """
  models, task, mesh = setup.models, setup.task, setup.mesh
  tokenizer, horizon = models.tokenizer, task.max_completion_len
  judge = judging.make_judge_programs(
    mesh, models.policy, models.reference, tokenizer, horizon, task.prefill
  )
  params = join(setup.frozen["base"], trained)["policy"]
  config = setup.config

  def prompts(num_rows):
    shape, sharding = (num_rows, task.held_out.tokens.shape[1]), parallel.replicated(mesh)
    dtypes = jnp.int32, jnp.bool_
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in dtypes]

  key = jax.eval_shape(lambda: jax.random.key(0))
  on, options = (mesh, config.topology), {"temperature": config.temperature}
  # It holds all of this, of which a program reads a part.
  report = functools.partial(_report, beside=(beside, setup.frozen), **options)
  drawn, read = prompts(config.drawn_at_once()), prompts(config.read_at_once())
  draw = report("judge_draw", judge.sample, on, params, *drawn, key)
  rollout = jax.eval_shape(judge.sample, params, *read, key, **options)
  rollout = jax.tree.map(lambda x: x.update(sharding=parallel.replicated(mesh)), rollout)
  reference = setup.frozen["reference"]
  return [draw, report("judge_evaluate", judge.evaluate, on, params, reference, rollout)]


def _report(name: str, program, on, *arguments, beside=(), **named) -> dict[str, Any]:
  """Returns what `program` costs one device in one run.

  Bytes, floating-point operations and seconds. Time is that of a roofline: the work at the chip's
  peak in bfloat16, its memory's traffic and what it sends, each at full rate and all at once, so
  that nothing is faster.

  Args:
    name: of the program.
    program: jitted.
    on: (mesh, name of the TPU slice whose devices it has, or "").
    *arguments: their shapes, with shardings.
    beside: shapes of what the devices hold meanwhile. It is in the figures as what is not read,
      with the arguments that the program does not read; what is an argument too counts once.
    **named: more arguments.
  """
  mesh, topology = on
  progress.console.print(f"{name}: compiling ...")
  began = time.monotonic()
  lowered = program.lower(*arguments, **named)
  try:
    text, used = ahead.optimised(lowered, topology) if topology else _compiled(name, lowered, mesh)
  except jax.errors.JaxRuntimeError as error:
    # The first lines say how much memory is used, and the others what uses it.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise UserError(f"The compiler fails at the program `{name}`: {lines[-1][:500]}") from error
    raise UserError(
      f"The program `{name}` does not fit on a device: {' '.join(lines[:2])} Use --lora_rank, "
      "--remat=full, --accumulation, --dtype=bfloat16, a smaller --batch_size or "
      "--eval_batch_size, or --mesh with more devices on fsdp."
    ) from error
  seconds = time.monotonic() - began
  found = hlo.costs(text, dict(mesh.shape))
  kind = mesh.devices.flat[0].device_kind
  chip = CHIPS.get(kind)
  used["beside"] = max(0, _bytes_held((beside, arguments)) - used["arguments"])
  report = {
    "program": name,
    "device": kind,
    "num_devices": mesh.size,
    "mesh": dict(mesh.shape),
    "compile_seconds": round(seconds, 1),
    "memory": {**used, "total": sum(used.values()), "of": chip and chip.memory},
    "flops": float(found.flops),
    "bytes": float(found.bytes),
    "collectives": [
      {"kind": kind, "axes": axes, "bytes": float(sent)}
      for (kind, axes), sent in sorted(found.collectives.items())
    ],
    "unknown_loops": found.unknown_loops,
    "seconds": None,
  }
  if chip is not None:
    parts = {
      "compute": found.flops / chip.flops,
      "memory": found.bytes / chip.bandwidth,
      "interconnect": sum(found.collectives.values()) / chip.links,
    }
    report["seconds"] = {**parts, "at_least": max(parts.values())}
  return report


def _bytes_held(tree) -> int:
  """Returns the bytes of each device in the distinct arrays of these shapes."""
  once = {id(x): x for x in jax.tree.leaves(tree)}.values()
  return sum(math.prod(_shard_shape(x)) * x.dtype.itemsize for x in once)


def _shard_shape(x) -> tuple[int, ...]:
  return x.sharding.shard_shape(x.shape) if x.sharding else x.shape


def _compiled(name: str, lowered, mesh) -> tuple[str, dict[str, int]]:
  """Returns what `ahead.optimised` does, of a program that is compiled for this machine's devices.

  Its machine code is counted too.
  """
  is_tpu = mesh.devices.flat[0].platform == "tpu"
  with tempfile.TemporaryDirectory() as folder:
    compiled = lowered.compile(compiler_options={"xla_dump_to": folder} if is_tpu else None)
    text = ahead.dumped(pathlib.Path(folder))
  memory = compiled.memory_analysis()
  used = {
    "arguments": memory.argument_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    "program": memory.generated_code_size_in_bytes,
  }
  try:
    # JAX cannot read some programs of libtpu 0.0.51, whose own text can be read.
    return text or compiled.as_text(), used
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      f"The program `{name}` fits: it takes {sum(used.values()) / _GIB:.2f} GiB of each device. "
      "But the compiler cannot show it, so its work and its traffic are unknown: "
      f"{str(error).partition(chr(10))[0][:200]}"
    ) from error


def tell(workdir: pathlib.Path, reports: list[dict[str, Any]]) -> pathlib.Path:
  """Prints and writes what the programs of a run cost, and returns its folder."""
  show(reports)
  write(workdir, reports)
  return workdir


def show(reports: list[dict[str, Any]]) -> None:
  """Prints what each program costs a device."""
  for report in reports:
    mesh = ", ".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1)
    table = Table(
      title=f"{report['program']} on {report['num_devices']} x {report['device']}"
      f" ({mesh or 'one device'}), each of them",
      title_justify="left",
      show_header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    memory = report["memory"]
    for name in ("arguments", "temporaries", "outputs", "program", "beside", "total"):
      if name in memory:
        table.add_row(f"memory: {name}", f"{memory[name] / _GIB:.3f} GiB")
    if memory["of"]:
      share = memory["total"] / memory["of"]
      table.add_row("memory: of the chip's", f"{share:.0%} of {memory['of'] / _GIB:.0f} GiB")
    table.add_section()
    table.add_row("products of matrices", f"{report['flops'] / 1e12:.4g} TFLOP")
    table.add_row("main memory, read and written", f"{report['bytes'] / 1e9:.4g} GB")
    for found in report["collectives"]:
      sent = f"{found['bytes'] / 1e6:.4g} MB"
      table.add_row(f"sent by {found['kind']} over {found['axes']}", sent)
    if not report["collectives"]:
      table.add_row("sent", "nothing")
    if report["unknown_loops"]:
      table.add_row("loops of unknown length, counted once", str(report["unknown_loops"]))
    if report["seconds"]:
      table.add_section()
      for name in ("compute", "memory", "interconnect"):
        table.add_row(f"time: {name}", f"{report['seconds'][name]:.4g} s")
      table.add_row("time: at least", f"{report['seconds']['at_least']:.4g} s")
    progress.console.print(table)


def write(workdir: pathlib.Path, reports: list[dict[str, Any]]) -> None:
  """Writes `dry_run.json`, beside which a run may be made later."""
  workdir.mkdir(parents=True, exist_ok=True)
  write_text(workdir / DRY_RUN, json.dumps(reports, indent=2) + "\n")
  progress.console.print(f"Dry run: {workdir / DRY_RUN}", soft_wrap=True)
