"""How time, memory and work of a GRPO iteration grow with each of its sizes, as a picture.

    python -m benchmarks.scaling

Sizes are the tokens of a completion, the vocabulary, the prompts of a batch, the completions of a
prompt, the members of a sweep and the devices, which are fakes of the CPU's. One grows, the others
stay. Of each point both programs of an iteration are compiled: work is their products of matrices
on one device and memory is what they hold beside their arguments, both read from what was compiled;
time is the least of several iterations. A slope is that of the logarithms, over the larger half of
the sizes, where fixed costs are small: at 1 a figure doubles with the size. Where time or memory is
steeper than the work, something is computed or held that the algorithm does not need. Devices share
a CPU, so of these the work and memory of each should fall with a slope of -1, and the time says
nothing.
"""

import argparse
import dataclasses
import functools
import pathlib
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
import tokenizers

from benchmarks import results
from benchmarks.contenders import workload
from experiments import grpo
from klrl import inputs, population, programs
from klrl.cost import hlo
from klrl.devices import parallel
from klrl.models import (
  DecoderConfig,
  TokenizerInfo,
  policy_model,
  scalar_model,
  scalar_params_from,
)
from klrl.tasks import data, rewards

MIB = 2**20
NUM_DEVICES = 8
PICTURE = pathlib.Path(__file__).parent / "results" / "scaling.png"
BASE = workload.Size(2, 64, 4, 128, 512, prompt_len=16, completion_len=32, num_prompts=8)
AXES = {
  "completion_len": (16, 32, 64, 128),
  "vocab_size": (512, 2048, 8192, 32768),
  "num_prompts": (4, 8, 16, 32),
  "group_size": (2, 4, 8, 16),
  "members": (1, 2, 4, 8),
  "devices": (1, 2, 4, 8),
}
LABELS = {
  "completion_len": "tokens of a completion",
  "vocab_size": "tokens of the vocabulary",
  "num_prompts": "prompts of a batch",
  "group_size": "completions of a prompt",
  "members": "members of a sweep",
  "devices": "devices",
}
# Steeper than the work by more is marked.
TOLERANCE = 0.15


class Iteration:
  """The compiled programs of an iteration, and the state that they change."""

  def __init__(self, config, size: workload.Size, mesh, *, num_members: int = 0, per_batch=1):
    """Compiles both; `num_members` > 0 makes it a sweep, `per_batch` of them at a time."""
    setup = setup_of(config, size, mesh)
    make = programs.make_programs
    if num_members:
      configs = [dataclasses.replace(config, seed=seed) for seed in range(num_members)]
      self.state, shardings = population.init_members(setup, configs)
      lift = functools.partial(parallel.map_members, mesh, members_per_batch=per_batch)
      make = functools.partial(make, lift=lift, guard=population.guarded)
    else:
      self.state = programs.init_run(setup)
      shardings = parallel.state_shardings(mesh, self.state)
    made = make(setup, shardings)
    self._distinct, _ = parallel.distinct(setup.frozen)
    training = setup.task.training
    rows = programs.prompt_rows(setup.algorithm, 0, len(training.tokens), seed=0)
    prompts = training.tokens[rows], training.mask[rows]
    self._given = self._distinct, *parallel.put(prompts, parallel.by_rows(mesh))
    rollout = self.rollout = made["rollout"].lower(self.state, *self._given).compile()
    sampled = rollout(self.state, *self._given)
    shape = sampled.finished.shape
    scores = np.arange(sampled.finished.size, dtype=np.float32).reshape(shape) % 7
    self._scores = parallel.put(scores, parallel.by_rows(mesh, members=scores.ndim > 1))
    update = made["update"].lower(self.state, self._distinct, sampled, self._scores, None)
    self.update = update.compile()

  def run(self) -> tuple[float, float]:
    """Does an iteration, and returns the seconds of the rollout and of the update."""
    began = time.perf_counter()
    sampled = jax.block_until_ready(self.rollout(self.state, *self._given))
    drawn = time.perf_counter()
    found = self.update(self.state, self._distinct, sampled, self._scores, None)
    self.state, _ = jax.block_until_ready(found)
    return drawn - began, time.perf_counter() - drawn


def point(axis: str, value: int, base: workload.Size, repetitions: int) -> dict[str, float]:
  """Returns the seconds, the MiB of temporaries and the GFLOP on a device of an iteration."""
  is_size = axis in {field.name for field in dataclasses.fields(base)}
  size = dataclasses.replace(base, **{axis: value}) if is_size else base
  mesh = parallel.make_mesh(f"data={value}" if axis == "devices" else "data=1")
  config = grpo.Config(
    batch_size=size.num_rows, group_size=size.group_size, num_minibatches=1, kl_every=0
  )
  made = Iteration(config, size, mesh, num_members=value if axis == "members" else 0)
  seconds = [sum(made.run()) for _ in range(repetitions + 1)]
  compiled = made.rollout, made.update
  return {
    "seconds": min(seconds[1:]),
    "MiB": max(each.memory_analysis().temp_size_in_bytes for each in compiled) / MIB,
    "GFLOP": sum(hlo.costs(each.as_text(), dict(mesh.shape)).flops for each in compiled) / 1e9,
  }


def setup_of(config, size: workload.Size, mesh) -> programs.Setup:
  """Returns the setup of a run on a random model and random prompts."""
  decoder = DecoderConfig(
    vocab_size=size.vocab_size,
    width=size.width,
    num_layers=size.num_layers,
    num_heads=size.num_heads,
    num_kv_heads=size.num_heads,
    head_dim=size.width // size.num_heads,
    mlp_dim=size.mlp_dim,
    max_len=1024,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
  )
  policy = policy_model(decoder)
  params = jax.jit(policy.init)(jax.random.key(0))
  words = tokenizers.models.WordLevel(workload.vocabulary(size), unk_token="<2>")
  tokenizer = tokenizers.Tokenizer(words)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer = TokenizerInfo(tokenizer, None, None, 0)
  records = [{"prompt": text} for text in workload.prompts(size, size.num_prompts)]
  prompts = data.encode_prompts(records, tokenizer, max_prompt_len=size.prompt_len)
  critic = (scalar_model(decoder), scalar_params_from(params))
  critic = critic if config.sources().has_value_model else (None, None)
  models = inputs.Models(tokenizer, policy, params, {}, policy, policy, params, *critic, None, None)
  own = rewards.Reward("own", 1.0, len)  # It is not called.
  task = inputs.Task(prompts, prompts, size.completion_len, [own], None, None)
  return programs.set_up(config, mesh, models, task)


def slope(values, figures) -> float:
  """Returns the slope of the logarithms over the larger half of the values."""
  half = len(values) // 2
  x, y = (np.log(np.asarray(z, float)[half - 1 :]) for z in (values, figures))
  return float(np.polyfit(x, y, 1)[0])


def measure(axes: dict, base: workload.Size, repetitions: int) -> dict[str, dict[str, list[float]]]:
  """Returns {axis: {figure: one for each value}}, and prints each point."""
  found = {}
  for axis, values in axes.items():
    points = []
    for value in values:
      points.append(point(axis, value, base, repetitions))
      figures = ", ".join(f"{x:.4g} {unit}" for unit, x in points[-1].items())
      print(f"{value} {LABELS[axis]}: {figures}", flush=True)
    found[axis] = {unit: [each[unit] for each in points] for unit in points[0]}
  return found


def slopes_of(axes: dict, found: dict) -> dict[str, dict[str, float]]:
  """Returns {what grows: {figure: its slope}}."""
  return {
    LABELS[axis]: {unit: round(slope(axes[axis], y), 2) for unit, y in figures.items()}
    for axis, figures in found.items()
  }


def draw(axes: dict, found: dict, path: pathlib.Path) -> None:
  """Writes the picture: what grows, relative to its smallest value, one panel for each size."""
  num_columns = min(3, len(found))
  num_rows = -(-len(found) // num_columns)
  figure, panels = plt.subplots(
    num_rows, num_columns, figsize=(4.2 * num_columns, 3.4 * num_rows), squeeze=False
  )
  for panel, (axis, figures) in zip(panels.flat, found.items(), strict=False):
    values = axes[axis]
    for (unit, y), style in zip(figures.items(), ("o-", "s-", "k--"), strict=True):
      relative = np.asarray(y) / y[0]
      panel.plot(values, relative, style, label=f"{unit}, slope {slope(values, y):.2f}")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(values, [str(value) for value in values])
    panel.minorticks_off()
    panel.set_xlabel(LABELS[axis])
    panel.set_ylabel(f"relative to {values[0]}")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
  for panel in panels.flat[len(found) :]:
    panel.set_visible(False)
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main() -> None:
  """Prints the points and the slopes, and writes the picture."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--axes", default=",".join(AXES), help="some of them, separated by commas")
  parser.add_argument("--points", type=int, default=4, help="values of each, from the least on")
  parser.add_argument("--repetitions", type=int, default=5)
  parser.add_argument("--picture", default=str(PICTURE), help="file to write")
  parser.add_argument("--record", action="store_true", help="write benchmarks/results")
  args = parser.parse_args()
  axes = {axis: AXES[axis][: args.points] for axis in args.axes.split(",")}
  found = measure(axes, BASE, args.repetitions)
  slopes = slopes_of(axes, found)
  for name, row in slopes.items():
    grows = name != LABELS["devices"]
    steep = [x for x in ("seconds", "MiB") if grows and row[x] > row["GFLOP"] + TOLERANCE]
    mark = f"  steeper than its work: {', '.join(steep)}" if steep else ""
    print(f"slope by {name}: {row}{mark}")
  draw(axes, found, pathlib.Path(args.picture))
  if args.record:
    results.record("scaling", slopes)


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
  main()
