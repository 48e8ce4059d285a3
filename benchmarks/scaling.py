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
from klrl.models import DecoderConfig, TokenizerInfo, policy_model
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


def point(axis: str, value: int, base: workload.Size, repetitions: int) -> dict[str, float]:
  """Returns the seconds, the MiB of temporaries and the GFLOP on a device of an iteration."""
  is_size = axis in {field.name for field in dataclasses.fields(base)}
  size = dataclasses.replace(base, **{axis: value}) if is_size else base
  num_members = value if axis == "members" else 1
  mesh = parallel.make_mesh(f"data={value}" if axis == "devices" else "data=1")
  config = grpo.Config(
    batch_size=size.num_rows, group_size=size.group_size, num_minibatches=1, kl_every=0
  )
  setup = setup_of(config, size, mesh)
  make = programs.make_programs
  if axis == "members":
    configs = [dataclasses.replace(config, seed=seed) for seed in range(num_members)]
    state, shardings = population.init_members(setup, configs)
    lift = functools.partial(parallel.map_members, mesh, members_per_batch=1)
    make = functools.partial(make, lift=lift, guard=population.guarded)
  else:
    state = programs.init_run(setup)
    shardings = parallel.state_shardings(mesh, state)
  made = make(setup, shardings)
  distinct, _ = parallel.distinct(setup.frozen)
  training = setup.task.training
  prompts = parallel.put((training.tokens, training.mask), parallel.replicated(mesh))
  rows = programs.prompt_rows(setup.algorithm, 0, len(training.tokens), seed=0)
  rows = parallel.put(rows, parallel.by_rows(mesh))
  rollout = made["rollout"].lower(state, distinct, *prompts, rows).compile()
  sampled = rollout(state, distinct, *prompts, rows)
  scores = np.arange(sampled.finished.size, dtype=np.float32).reshape(sampled.finished.shape) % 7
  scores = parallel.put(scores, parallel.by_rows(mesh, members=scores.ndim > 1))
  update = made["update"].lower(state, distinct, sampled, scores, None).compile()
  seconds = []
  for _ in range(repetitions + 1):
    began = time.perf_counter()
    sampled = rollout(state, distinct, *prompts, rows)
    state, _ = jax.block_until_ready(update(state, distinct, sampled, scores, None))
    seconds.append(time.perf_counter() - began)
  compiled = rollout, update
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
  )
  policy = policy_model(decoder)
  params = jax.jit(policy.init)(jax.random.key(0))
  words = tokenizers.models.WordLevel(workload.vocabulary(size), unk_token="<2>")
  tokenizer = tokenizers.Tokenizer(words)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer = TokenizerInfo(tokenizer, None, None, 0)
  records = [{"prompt": text} for text in workload.prompts(size, size.num_prompts)]
  prompts = data.encode_prompts(records, tokenizer, max_prompt_len=size.prompt_len)
  none = (None,) * 4
  models = inputs.Models(tokenizer, policy, params, {}, policy, policy, params, *none)
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
