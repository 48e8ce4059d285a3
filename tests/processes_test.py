"""Two real processes give what one with two devices gives."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "experiments.ppo", "--workdir=run"]
COMMAND += ["--num_iterations=2", "--batch_size=8", "--num_minibatches=2", "--num_eval_rows=16"]
COMMAND += ["--sft_iterations=3", "--reward_model_iterations=3"]
NOT_THE_RESULT = ("wall_seconds", "tokens_per_second")


def start(folder, **environment):
  folder.mkdir(exist_ok=True)
  inherited = {name: x for name, x in os.environ.items() if not name.startswith("JAX_")}
  root = str(pathlib.Path(__file__).parents[1])
  return subprocess.Popen(
    COMMAND,
    cwd=folder,
    env=inherited | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root} | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finished(process):
  output, _ = process.communicate(timeout=500)
  assert process.returncode == 0, output
  return output


def summary(folder):
  return json.loads((folder / "run" / "summary.json").read_text())


def test_two_processes_equal_one(tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": ""}
  processes = [start(tmp_path / "two", **several, JAX_PROCESS_ID=str(i)) for i in range(2)]
  printed = [finished(process) for process in processes]
  assert "Report:" in printed[0] and "Report:" not in printed[1]
  one = start(tmp_path / "one", XLA_FLAGS="--xla_force_host_platform_device_count=2")
  finished(one)
  expected, found = summary(tmp_path / "one"), summary(tmp_path / "two")
  assert expected["device"] == found["device"]
  figures = {
    name: x for name, x in expected.items() if isinstance(x, float) and name not in NOT_THE_RESULT
  }
  assert {name: found[name] for name in figures} == pytest.approx(figures, abs=1e-4)
