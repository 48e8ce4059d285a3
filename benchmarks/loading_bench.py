"""Memory of a process that loads and saves a large model, against what its devices hold.

    python -m benchmarks.loading_bench
    python -m benchmarks.loading_bench --num_layers=4 --vocab_size=32000 --rows="PPO, fsdp=8"

The model is a random Llama of 1.2 billion parameters in bfloat16, which is written without ever
being held. Each row is a process of its own that reads the model onto its devices and saves it
again. `loading` and `saving` are the largest memory of the process (RSS) until then, less that of a
process which has only started JAX, relative to the bytes on the devices; `peak_gb` is the largest
memory itself. The devices of a CPU are in the memory of the process, so that 1 would be ideal.

The row of PPO has the four models of a run and its moments: a policy and a reward model are read,
from which the reference and the value model start. `judging` has the judgement of 16 rows too, with
its programs, and `largest_device` is what the fullest device holds, over an equal share.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks import results
from experiments import ppo
from klrl import inputs, programs, rlhf
from klrl.devices import parallel, unread
from klrl.devices.unread import Block, Unread
from klrl.models import DecoderConfig, hf, load_policy, policy_model, save_policy, scalar_model
from klrl.tasks import arithmetic

# Name -> (dtype on the devices, mesh, whether the whole model is loaded into the host first).
ROWS = {
  "bfloat16": ("file", "data=1", False),
  "float32": ("float32", "data=1", False),
  "bfloat16, fsdp=4": ("file", "fsdp=4", False),
  "float32, whole on the host first": ("float32", "data=1", True),
}
FOUR_MODELS = "PPO, fsdp=8"
NUM_DEVICES = 8


def shape(num_layers: int, vocab_size: int) -> DecoderConfig:
  """Returns the shape of Llama 3.2 1B, with as many layers and tokens."""
  return DecoderConfig(
    vocab_size=vocab_size,
    width=2048,
    num_layers=num_layers,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    mlp_dim=8192,
    max_len=4096,
  )


def write_model(directory: pathlib.Path, config: DecoderConfig) -> None:
  """Writes a random model, one tensor after the other."""
  rng = np.random.default_rng(0)
  noise = (0.02 * rng.standard_normal(2**20)).astype(np.float32)

  def random(leaf):
    def blocks(index):
      size = [axis.stop - axis.start for axis in index]
      yield Block("random", ..., np.resize(np.roll(noise, int(rng.integers(2**20))), size))

    return Unread(leaf.shape, np.dtype("float32"), blocks)

  prompts = [json.dumps({"prompt": f"{number}+1="}) for number in range(32)]
  (directory / "prompts.jsonl").write_text("\n".join(prompts))
  models = (hf.save_policy, "policy", policy_model), (hf.save_scalar, "reward", scalar_model)
  for save, name, model in models:
    params = jax.tree.map(random, jax.eval_shape(model(config).init, jax.random.key(0)))
    save(directory / name, config, params, arithmetic.make_tokenizer(), dtype="bfloat16")


def measure(directory: pathlib.Path, name: str) -> dict[str, float]:
  """Loads and saves the model in this process, and returns the row's figures."""
  dtype, mesh_spec, is_whole = ROWS[name]
  mesh = parallel.make_mesh(mesh_spec)
  jax.block_until_ready(jax.device_put(np.zeros(8), parallel.replicated(mesh)))
  at_start = peak()
  began = time.monotonic()
  directory /= "policy"
  config, params = load_policy(directory) if is_whole else hf.open_policy(directory)
  placed = parallel.put_own(mesh, unread.stored_as(params, dtype))
  jax.block_until_ready(placed)
  loaded, seconds = peak(), time.monotonic() - began
  on_devices = sum(leaf.nbytes for leaf in jax.tree.leaves(placed))
  began = time.monotonic()
  save_policy(directory / "saved", config, placed, arithmetic.make_tokenizer())
  saved, saving_seconds = peak(), time.monotonic() - began
  return {
    "devices_gb": round(on_devices / 1e9, 2),
    "loading": round((loaded - at_start) / on_devices, 2),
    "saving": round((saved - at_start) / on_devices, 2),
    "peak_gb": round(saved / 1e9, 2),
    "started_gb": round(at_start / 1e9, 2),
    "loading_seconds": round(seconds, 1),
    "saving_seconds": round(saving_seconds, 1),
  }


def measure_four_models(directory: pathlib.Path) -> dict[str, float]:
  """Sets up and judges a run of PPO in this process, and returns the row's figures."""
  models = {"policy": str(directory / "policy"), "reward_model": str(directory / "reward")}
  rows = {"prompts": str(directory / "prompts.jsonl"), "batch_size": 16, "num_eval_rows": 16}
  config = ppo.Config(**models, **rows, mesh=FOUR_MODELS.split()[-1])
  mesh = parallel.make_mesh(config.mesh)
  jax.block_until_ready(jax.device_put(np.zeros(8), parallel.replicated(mesh)))
  at_start = peak()
  loaded = inputs.load_models(config.sources(), **models)
  setup = programs.set_up(config, mesh, loaded, inputs.load_task(config.sources(), loaded))
  state = jax.block_until_ready(programs.init_run(setup))
  after_loading = peak()
  held = dict.fromkeys(jax.devices(), 0)
  for leaf in {id(leaf): leaf for leaf in jax.tree.leaves((state, setup.frozen))}.values():
    if isinstance(leaf, jax.Array):
      for shard in leaf.addressable_shards:
        held[shard.device] += shard.data.nbytes
  on_devices = sum(held.values())
  saved = directory / "saved"
  save_policy(saved, loaded.policy.config, state.params["policy"], loaded.tokenizer)
  after_saving = peak()
  rlhf.make_judge(setup).judge(state.params, when="before")
  return {
    "devices_gb": round(on_devices / 1e9, 2),
    "largest_device": round(max(held.values()) * NUM_DEVICES / on_devices, 2),
    "loading": round((after_loading - at_start) / on_devices, 2),
    "saving": round((after_saving - at_start) / on_devices, 2),
    "judging": round((peak() - at_start) / on_devices, 2),
    "peak_gb": round(peak() / 1e9, 2),
    "started_gb": round(at_start / 1e9, 2),
  }


def peak() -> int:
  """Returns the largest memory of this process so far, in bytes."""
  # The figure of `getrusage` would begin with that of the process which started this one.
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def main() -> None:
  """Prints the figures of each row."""
  parser = argparse.ArgumentParser(description="Memory for loading and saving a large model.")
  parser.add_argument("--num_layers", type=int, default=16)
  parser.add_argument("--vocab_size", type=int, default=128_256)
  parser.add_argument("--rows", default="", help="some of the rows, separated by |")
  parser.add_argument("--record", action="store_true", help="write benchmarks/results")
  parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    directory, name = pathlib.Path(args.measure[0]), args.measure[1]
    found = measure_four_models(directory) if name == FOUR_MODELS else measure(directory, name)
    print(json.dumps(found))
    return
  figures = {}
  with tempfile.TemporaryDirectory() as folder:
    write_model(pathlib.Path(folder), shape(args.num_layers, args.vocab_size))
    for name in args.rows.split("|") if args.rows else (*ROWS, FOUR_MODELS):
      command = [sys.executable, "-m", "benchmarks.loading_bench", "--measure", folder, name]
      environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={NUM_DEVICES}"
      }
      found = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
      figures[name] = json.loads(found.stdout.splitlines()[-1])
      print(name, figures[name], flush=True)
  if args.record:
    results.record("loading_bench", figures)


if __name__ == "__main__":
  main()
