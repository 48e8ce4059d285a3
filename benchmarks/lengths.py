"""What an update costs whose completions differ in length: each in a row of its own, and packed.

    python -m benchmarks.lengths

Lengths are geometric with a mean of a quarter of the limit, which one completion reaches. The
updates of the same rollout, packed and plain, and of one whose completions are all of the whole
length take turns. A plain update is as wide as its longest completion, so the last two are one
program. Seconds are the median, the least and the most of several turns.
"""

import argparse
import dataclasses
import time

import jax
import numpy as np

from benchmarks import results
from benchmarks.contenders import workload
from benchmarks.scaling import setup_of
from experiments import grpo, ppo
from klrl import programs
from klrl.cost import hlo
from klrl.devices import parallel


def config_of(algorithm: str, size: workload.Size):
  """Returns GRPO with one minibatch, or PPO with two."""
  if algorithm == "grpo":
    groups = {"group_size": size.group_size, "num_minibatches": 1}
    return grpo.Config(batch_size=size.num_rows, kl_every=0, **groups)
  return ppo.Config(batch_size=size.num_rows, kl_every=0, num_minibatches=2, num_epochs=1)


def measure(algorithm: str, size: workload.Size, repetitions: int) -> dict[str, dict]:
  """Returns {rollout: {figure: value}}, of an update on one device."""
  config, mesh = config_of(algorithm, size), parallel.make_mesh("data=1")
  setup = setup_of(config, size, mesh)
  state = programs.init_run(setup)
  made = programs.make_programs(setup, parallel.state_shardings(mesh, state))
  distinct, _ = parallel.distinct(setup.frozen)
  training = setup.task.training
  rows = programs.prompt_rows(setup.algorithm, 0, len(training.tokens), seed=0)
  prompts = parallel.put((training.tokens[rows], training.mask[rows]), parallel.by_rows(mesh))
  full = made["rollout"](state, distinct, *prompts)
  lengths = np.random.default_rng(0).geometric(4 / size.completion_len, size.num_rows)
  lengths[0] = size.completion_len
  mask = np.arange(size.completion_len) < lengths[:, None]
  uneven = full._replace(completion_mask=parallel.put(mask, parallel.by_rows(mesh)))
  fits = jax.device_get(made["fitting"](state, distinct, uneven))
  packing = programs.packings_of(setup)[int(np.argmax(fits))]
  assert fits.any()
  rollouts = {"full": full, "uneven": uneven, "packed": uneven._replace(packing=packing)}
  scores = np.arange(size.num_rows, dtype=np.float32) % 7
  scores = parallel.put(scores, parallel.by_rows(mesh))
  found, compiled, seconds = {}, {}, {name: [] for name in rollouts}
  for name, rollout in rollouts.items():
    compiled[name] = made["update"].lower(state, distinct, rollout, scores, None).compile()
    costs = hlo.costs(compiled[name].as_text(), dict(mesh.shape))
    found[name] = {"GFLOP": round(costs.flops / 1e9, 3)}
  for turn in range(repetitions + 1):
    for name, rollout in rollouts.items():
      own = jax.block_until_ready(jax.tree.map(lambda x: x.copy(), state))  # It is donated.
      began = time.perf_counter()
      jax.block_until_ready(compiled[name](own, distinct, rollout, scores, None))
      if turn:
        seconds[name].append(time.perf_counter() - began)
  for name, each in seconds.items():
    found[name]["seconds"] = [round(float(f(each)), 4) for f in (np.median, min, max)]
  found["packed"]["share of rows"] = packing.share
  return found


def main() -> None:
  """Prints the figures of each algorithm and limit."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", choices=workload.SIZES, default="small")
  parser.add_argument("--limits", default="64,128,256", help="tokens of the longest completion")
  parser.add_argument("--repetitions", type=int, default=5)
  parser.add_argument("--record", action="store_true", help="write benchmarks/results")
  args = parser.parse_args()
  figures = {}
  for algorithm in ("grpo", "ppo"):
    for limit in map(int, args.limits.split(",")):
      size = dataclasses.replace(workload.SIZES[args.size], completion_len=limit)
      found = measure(algorithm, size, args.repetitions)
      for name, row in found.items():
        print(f"{algorithm}, {limit} tokens, {name}: {row}", flush=True)
        figures[f"{algorithm}, {limit} tokens, {name}"] = row
  if args.record:
    results.record("lengths", figures)


if __name__ == "__main__":
  main()
