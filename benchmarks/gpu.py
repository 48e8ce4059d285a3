"""What klrl reaches on one GPU in bfloat16, in one call.

    python -m benchmarks.gpu --torch=VENV/bin/python

1. An iteration of GRPO and of PPO at 0.1B, 0.6B and 1.2B parameters: 64 completions of 512 tokens
   to prompts of 512. Drawing as a share of the memory's bandwidth, where each token reads the
   weights and the keys and values before it once and prompts cost nothing; the update as a share of
   the peak, where recomputed work does not count; and klrl's seconds divided by those of a loop of
   `transformers` with a static cache and `torch.compile` (`contenders/torch_loop.py`), where the
   Python of an environment with torch is named.
2. Log-probabilities at a vocabulary of 128,256, with gradients: seconds and memory beside those of
   dense logits.
3. An iteration of a sweep of 16 members at 0.1B against that of one run, 16 times.
4. The tests of the operations, on the GPU.

Shares need the figures of the device, `klrl.cost.dry_run.CHIPS`. Without a GPU, `--sizes=toy` shows
that everything runs; torch and the tests are then left out.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "")  # `workload` would choose the CPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch takes its turn.

import jax
import jax.numpy as jnp

from benchmarks import peers
from benchmarks.contenders import workload
from benchmarks.sampling_bench import measure
from benchmarks.scaling import Iteration
from experiments import grpo, ppo
from klrl import ops
from klrl.cost.dry_run import CHIPS
from klrl.devices import parallel

ROOT = pathlib.Path(__file__).parents[1]
SIZES = "0.1B,0.6B,1.2B"
NUM_MEMBERS = 16
# Rows, width and vocabulary of the log-probabilities.
LOG_PROBS, TOY_LOG_PROBS = (8192, 2048, 128256), (16, 8, 64)
OPS = ("advantages", "controllers", "importance", "kl", "log_probs", "losses", "masking")
GIB = 2**30


def is_gpu() -> bool:
  """Returns whether JAX computes on a GPU."""
  return jax.default_backend() == "gpu"


def chip():
  """Returns the figures of the device, or None."""
  return CHIPS.get(jax.devices()[0].device_kind)


def config_of(algorithm: str, size: workload.Size):
  """Returns the settings of an iteration: one step, in parts of at most 8 rows."""
  shared = {
    "batch_size": size.num_rows,
    "num_epochs": 1,
    "num_minibatches": 1,
    "accumulation": max(1, size.num_rows // 8),
    "kl_every": 0,
    "dtype": "bfloat16",
    "param_dtype": "bfloat16",
  }
  if algorithm == "ppo":
    return ppo.Config(**shared)
  return grpo.Config(group_size=size.group_size, **shared)


def bytes_drawn(size: workload.Size) -> float:
  """Returns what drawing the completions of `size` has to read of the memory."""
  weights = size.num_body + size.vocab_size * size.width
  tokens_before = size.prompt_len + size.completion_len / 2
  cache = size.num_rows * tokens_before * 2 * size.num_layers * size.width
  return 2 * size.completion_len * (weights + cache)


def iteration(algorithm: str, name: str, repetitions: int, theirs: dict | None) -> dict:
  """Returns the figures of an iteration of klrl's, beside `theirs`, which `of_torch` found."""
  size, mesh = workload.SIZES[name], parallel.make_mesh("data=1")
  made = Iteration(config_of(algorithm, size), size, mesh)
  made.run()
  times = [made.run() for _ in range(repetitions)]
  draw, update = (statistics.median(each) for each in zip(*times, strict=True))
  memory = [each.memory_analysis() for each in (made.rollout, made.update)]
  held = max(x.argument_size_in_bytes + x.temp_size_in_bytes for x in memory)
  figures = {"seconds": round(draw + update, 4), "generate, s": round(draw, 4)}
  figures["memory, GiB"] = round(held / GIB, 2)
  if chip():
    figures["bandwidth"] = round(bytes_drawn(size) / draw / chip().bandwidth, 3)
    figures["MFU"] = round(workload.flops_of_update(size, algorithm) / update / chip().flops, 3)
  if theirs:
    figures["torch, s"] = round(theirs["seconds"], 4)
    figures["of torch"] = round((draw + update) / theirs["seconds"], 3)
    figures["generate, of torch"] = round(draw / theirs["generate"], 3)
  return figures


def of_torch(algorithm: str, name: str, python: str) -> dict[str, float]:
  """Returns the median seconds of an iteration of the plain loop, and of its drawing."""
  with tempfile.TemporaryDirectory() as folder:
    script = str(peers.HERE / "torch_loop.py")
    flags = [f"--algorithm={algorithm}", f"--size={name}", "--warm=2", f"--folder={folder}"]
    report = peers.run([python, script, *flags], is_ours=False)
  return {part: peers.seconds(report, part) for part in ("seconds", "generate")}


def log_probs(rows: int, width: int, vocab_size: int, repetitions: int) -> dict:
  """Returns seconds and memory of log-probabilities with gradients, by klrl's way and dense."""
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = jax.random.normal(keys[0], (rows, width), jnp.bfloat16)
  table = 0.02 * jax.random.normal(keys[1], (width, vocab_size), jnp.bfloat16)
  tokens = jax.random.randint(keys[2], (rows,), 0, vocab_size)

  def dense(hidden, table, tokens):
    logits = jnp.matmul(hidden, table, preferred_element_type=jnp.float32)
    return ops.token_log_probs(logits, tokens)

  ways = {"dense": dense, "klrl": ops.token_log_probs_from_hidden}
  compiled, figures = {}, {}
  for name, way in ways.items():
    mean = jax.value_and_grad(lambda h, t, k, way=way: way(h, t, k).mean(), (0, 1))
    compiled[name] = jax.jit(mean).lower(hidden, table, tokens).compile()
  calls = {name: lambda fn=fn: fn(hidden, table, tokens) for name, fn in compiled.items()}
  for name, seconds in measure(calls, repetitions).items():
    figures[f"{name}, s"] = round(statistics.median(seconds), 5)
    held = compiled[name].memory_analysis().temp_size_in_bytes
    figures[f"{name}, GiB"] = round(held / GIB, 3)
  return figures


def sweep(name: str, num_members: int, repetitions: int) -> dict:
  """Returns the seconds of an iteration of a run and of a sweep, by ones and all at a time."""
  size, mesh = workload.SIZES[name], parallel.make_mesh("sweep=1")
  config, found = config_of("grpo", size), {}
  ways = {"one run": {}} | {
    f"{num_members} members, {per_batch} at a time": {
      "num_members": num_members,
      "per_batch": per_batch,
    }
    for per_batch in (1, num_members)
  }
  for way, settings in ways.items():
    made = Iteration(config, size, mesh, **settings)
    made.run()
    found[f"{way}, s"] = round(statistics.median(sum(made.run()) for _ in range(repetitions)), 4)
    del made
  first, *others = found.values()
  return found | {"of that many runs": round(min(others) / (num_members * first), 3)}


def ops_on_gpu() -> str:
  """Returns the last line that the tests of the operations print."""
  files = [f"tests/{name}_test.py" for name in OPS]
  command = [sys.executable, "-m", "pytest", "-q", "-n", "0", *files]
  environment = os.environ | {"JAX_PLATFORMS": "cuda,cpu"}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  return done.stdout.strip().splitlines()[-1]


def main() -> None:
  """Prints each figure as soon as it is there."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--sizes", default=SIZES, help="of `workload.SIZES`, separated by commas")
  parser.add_argument("--members", type=int, default=NUM_MEMBERS)
  parser.add_argument("--torch", default="", help="Python of an environment with torch")
  parser.add_argument("--repetitions", type=int, default=3)
  parser.add_argument("--json", default="", help="file for the figures")
  args = parser.parse_args()
  print(f"{jax.devices()[0].device_kind}; torch: {args.torch if is_gpu() else 'needs a GPU'}")
  sizes, figures = args.sizes.split(","), {}
  works = [(algorithm, size) for size in sizes for algorithm in ("grpo", "ppo")]
  # Before this process holds memory of the GPU.
  theirs = {work: of_torch(*work, args.torch) for work in works if args.torch and is_gpu()}

  def add(name, row):
    figures[name] = row
    print(f"{name}: {row}", flush=True)
    if args.json:  # What is measured stays, whatever comes.
      pathlib.Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")

  for work in works:
    add(" ".join(work), iteration(*work, args.repetitions, theirs.get(work)))
  shape = TOY_LOG_PROBS if sizes == ["toy"] else LOG_PROBS
  add(f"log-probs, V {shape[-1]}", log_probs(*shape, args.repetitions))
  add(f"sweep at {sizes[0]}", sweep(sizes[0], args.members, args.repetitions))
  if is_gpu():
    print(f"tests of the operations: {ops_on_gpu()}")


if __name__ == "__main__":
  main()
