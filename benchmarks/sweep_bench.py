"""Measures what a sweep as one program saves, and when members are better computed together.

    python -m benchmarks.sweep_bench

1. Sixteen PPO runs on the embedded task as one sweep and as sixteen processes one after another,
   start and compilation included, at several lengths.
2. A sweep of one member and `experiments.ppo`, whole processes in turn.
3. An iteration of sixteen members in the sweep's program, on one device and on one for each core,
   and of sixteen runs one after another in a process that has compiled their program.
4. The same for batches of members (--members_per_batch) on one device, for decoders of several
   widths.

JAX's compilation cache is off. Ratios are of medians; behind each figure the least and the most.
The stages before PPO are trained before anything is timed, unless runs/stages has them.
--parts=3,4 leaves out the others.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax

from experiments import sweep as experiment
from experiments.settings import training
from klrl import inputs, population, programs
from klrl.devices import parallel
from klrl.models import DecoderConfig, policy_model, save_policy, save_scalar, scalar_model
from klrl.tasks import arithmetic

ROOT = pathlib.Path(__file__).parents[1]
NUM_MEMBERS = 16
BETAS = "0,0.03,0.1,0.3,0.5,1,2,4"
GRID = (f"--sweep=beta={BETAS}", "--seeds=2")
ALONE = "--nobest_of_n"  # A single run has none beside it.


def run(module: str, *flags: str) -> float:
  """Returns the seconds of a whole process."""
  command = [sys.executable, "-m", f"experiments.{module}", *flags]
  environment = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_ENABLE_COMPILATION_CACHE": "false",
  }
  began = time.monotonic()
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  seconds = time.monotonic() - began
  if done.returncode:
    sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
  return seconds


def text_of(seconds: list[float]) -> str:
  return f"{statistics.median(seconds):8.3f} s  [{min(seconds):.3f}, {max(seconds):.3f}]"


def whole_processes(directory: str, lengths: list[int], num_separate: int) -> None:
  print(f"1. {NUM_MEMBERS} members, whole processes")
  for length in lengths:
    iterations = f"--num_iterations={length}"
    one = run("sweep", *GRID, ALONE, iterations, f"--workdir={directory}/sweep-{length}")
    betas = BETAS.split(",")
    each = []
    for i in range(num_separate):
      beta, seed = betas[i % len(betas)], i // len(betas)
      flags = (f"--beta={beta}", f"--seed={seed}", f"--workdir={directory}/run-{length}-{i}")
      each.append(run("ppo", *flags, iterations))
    total = statistics.mean(each) * NUM_MEMBERS
    print(
      f"  {length:4} iterations: one sweep {one:.1f} s, {NUM_MEMBERS} processes {total:.1f} s "
      f"({num_separate} were run, {text_of(each).strip()} each), x{total / one:.2f}",
      flush=True,
    )


def one_member(directory: str, repetitions: int) -> None:
  print("2. one member, whole processes, 20 iterations")
  seconds = {"ppo": [], "sweep": []}
  for i in range(repetitions):
    for name in seconds:
      grid = ("--sweep=beta=0.5", ALONE) if name == "sweep" else ("--beta=0.5",)
      workdir = f"--workdir={directory}/one-{name}-{i}"
      seconds[name].append(run(name, *grid, "--num_iterations=20", workdir))
  for name, each in seconds.items():
    print(f"  {name:8} {text_of(each)}")
  ratios = [b / a for a, b in zip(seconds["ppo"], seconds["sweep"], strict=True)]
  print(
    f"  ratio, in pairs: {statistics.median(ratios):.3f}  [{min(ratios):.3f}, {max(ratios):.3f}]"
  )


class Programs:
  """The compiled step of a sweep's members, together and one after another."""

  def __init__(self, config):
    self.config = config
    self.members = [member.config for member in experiment.members_of(config)]
    first = self.members[0]
    self.models = inputs.load_models(first.sources(), **training.model_directories(first))
    self.task = inputs.load_task(first.sources(), self.models)

  def together(self, members_per_batch: int, mesh: str = "sweep=1"):
    """Returns iterate(), which does one iteration of all members."""
    mesh = parallel.sweep_mesh(mesh, len(self.members))
    setup = programs.set_up(self.members[0], mesh, self.models, self.task)
    state, shardings = population.init_members(setup, self.members)
    lift = functools.partial(parallel.map_members, mesh, members_per_batch=members_per_batch)
    step = programs.make_step_fn(setup, shardings, lift=lift, guard=population.guarded)
    iteration = 0

    def iterate():
      nonlocal state, iteration
      state, pairs = step(state, iteration)
      parallel.fetch((pairs, state.diverged_at))
      iteration += 1

    return iterate

  def one_after_another(self):
    """Returns iterate(), which does one iteration of each member by a single run's program."""
    mesh = parallel.make_mesh("data=1")
    setup = programs.set_up(self.members[0], mesh, self.models, self.task)
    shardings = parallel.state_shardings(mesh, programs.init_run(setup))
    step = programs.make_step_fn(setup, shardings)
    states = [
      parallel.put(programs.init_run(setup._replace(config=member)), shardings)
      for member in self.members
    ]
    iteration = 0

    def iterate():
      nonlocal iteration
      for i, state in enumerate(states):
        states[i], pairs = step(state, iteration)
        parallel.fetch(pairs)
      iteration += 1

    return iterate


def in_turn(calls: dict, repetitions: int) -> dict[str, list[float]]:
  """Returns {name: seconds of each call}, taken in turn after two that compile and warm up."""
  seconds = {name: [] for name in calls}
  for _ in range(2):
    for call in calls.values():
      call()
  for _ in range(repetitions):
    for name, call in calls.items():
      began = time.monotonic()
      call()
      seconds[name].append(time.monotonic() - began)
  return seconds


def show(seconds: dict[str, list[float]]) -> None:
  first = next(iter(seconds.values()))
  for name, each in seconds.items():
    ratio = statistics.median(a / b for a, b in zip(first, each, strict=True))
    print(f"  {name:26} {text_of(each)}  speed x{ratio:.3f}", flush=True)


def warm(config, repetitions: int) -> None:
  print(f"3. an iteration of {NUM_MEMBERS} members, compiled before")
  programs = Programs(config)
  calls = {"one after another": programs.one_after_another(), "one program": programs.together(1)}
  calls[f"one program on {jax.device_count()} devices"] = programs.together(1, "")
  show(in_turn(calls, repetitions))


def write_models(directory: pathlib.Path, width: int) -> dict[str, str]:
  """Writes a fresh policy and reward model of `width`; returns the flags that name them."""
  tokenizer = arithmetic.make_tokenizer()
  config = DecoderConfig(
    vocab_size=tokenizer.tokenizer.get_vocab_size(),
    width=width,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=width // 2,
    mlp_dim=4 * width,
    max_len=16,
  )
  key = jax.random.key(0)
  save_policy(directory / "policy", config, policy_model(config).init(key), tokenizer)
  save_scalar(directory / "reward", config, scalar_model(config).init(key), tokenizer)
  return {"policy": str(directory / "policy"), "reward_model": str(directory / "reward")}


def batches_of_members(config, directory: str, widths, batch_sizes, repetitions: int) -> None:
  print(f"4. an iteration of {NUM_MEMBERS} members, by members per batch")
  prompts = pathlib.Path(directory) / "prompts.jsonl"
  records = arithmetic.prompt_records(held_out=False)
  prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
  task = {"prompts": str(prompts), "max_completion_len": 4}
  for width in widths:
    directories = write_models(pathlib.Path(directory) / f"width-{width}", width)
    programs = Programs(dataclasses.replace(config, **directories, **task))
    for batch_size in batch_sizes:
      programs.members = [
        dataclasses.replace(member, batch_size=batch_size) for member in programs.members
      ]
      print(f" width {width}, {batch_size} rows per member")
      calls = {f"{n} at a time": programs.together(n) for n in (1, 2, 4, 8, 16)}
      show(in_turn(calls, repetitions))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--parts", default="1,2,3,4")
  parser.add_argument("--lengths", default="5,20,80")
  parser.add_argument("--separate", type=int, default=NUM_MEMBERS, help="processes run in part 1")
  parser.add_argument("--widths", default="16,64,256")
  parser.add_argument("--rows", default="32,128", help="rows per member in part 4")
  parser.add_argument("--repetitions", type=int, default=7)
  args = parser.parse_args()
  parts = args.parts.split(",")

  def numbers(text):
    return [int(number) for number in text.split(",")]

  jax.config.update("jax_enable_compilation_cache", False)
  config = experiment.config_class("ppo")(sweep=f"beta={BETAS}", seeds=2)
  parallel.use_every_core()
  print(f"{jax.device_count()} x {jax.devices()[0].device_kind}")
  with tempfile.TemporaryDirectory() as directory:
    run("ppo", "--num_iterations=1", f"--workdir={directory}/first")  # trains the stages
    if "1" in parts:
      whole_processes(directory, numbers(args.lengths), args.separate)
    if "2" in parts:
      one_member(directory, args.repetitions)
    if "3" in parts:
      warm(config, args.repetitions)
    if "4" in parts:
      batches_of_members(
        config, directory, numbers(args.widths), numbers(args.rows), args.repetitions
      )


if __name__ == "__main__":
  main()
