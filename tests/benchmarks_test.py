"""Every benchmark runs, at toy size, and `peers` makes its table of what contenders report."""

import contextlib
import dataclasses
import json
import pathlib
import runpy
import subprocess
import sys

import jax
import pytest

from benchmarks import (
  faults,
  fits,
  gpu,
  kl_bench,
  lengths,
  loading_bench,
  oracle_bench,
  peers,
  sampling_bench,
  scaling,
  soak,
  sweep_bench,
)
from benchmarks.contenders import workload
from klrl import programs
from klrl.cost.dry_run import CHIPS
from klrl.devices import parallel
from klrl.models import load_config, policy_model
from klrl.run import loop

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


def run(monkeypatch, main, *flags):
  monkeypatch.setattr(sys, "argv", ["benchmark", *flags])
  main()


def test_the_exact_kl_is_measured(monkeypatch, capsys):
  small = ("--rows=8", "--vocab_size=16", "--width=4", "--ref_width=4", "--wide=4")
  monkeypatch.setattr(kl_bench, "QUESTIONS", dict(list(kl_bench.QUESTIONS.items())[:1]))
  run(monkeypatch, kl_bench.main, *small, "--repetitions=1")
  printed = capsys.readouterr().out
  assert "custom VJP" in printed and "in one pass" in printed


def test_trees_are_enumerated(monkeypatch, capsys):
  monkeypatch.setattr(oracle_bench, "TREES", ((2, 2, None),))
  run(monkeypatch, oracle_bench.main)
  assert "4 completions" in capsys.readouterr().out


def test_a_point_is_compiled_and_timed():
  found = scaling.point("num_prompts", 2, workload.SIZES["toy"], 1)
  assert set(found) == {"seconds", "MiB", "GFLOP"} and min(found.values()) > 0


def test_slopes_are_told_and_drawn(monkeypatch, capsys, tmp_path):
  def point(axis, value, *_):
    return {"seconds": value**2.0, "MiB": 3.0 * value, "GFLOP": 2.0 * value}

  monkeypatch.setattr(scaling, "point", point)
  run(monkeypatch, scaling.main, f"--picture={tmp_path / 'slopes.png'}")
  printed = capsys.readouterr().out.splitlines()
  line = next(line for line in printed if line.startswith("slope by tokens of a completion"))
  assert "'seconds': 2.0, 'MiB': 1.0, 'GFLOP': 1.0" in line
  assert line.endswith("steeper than its work: seconds")
  assert not printed[-1].endswith("seconds")  # of devices, which share a CPU
  assert (tmp_path / "slopes.png").stat().st_size > 1000


def test_an_update_of_uneven_lengths_is_timed_packed_and_plain():
  size = dataclasses.replace(workload.SIZES["toy"], completion_len=64)
  found = lengths.measure("grpo", size, 1)
  assert found["full"]["GFLOP"] == found["uneven"]["GFLOP"] >= found["packed"]["GFLOP"]
  assert found["packed"]["share of rows"] < 1
  assert all(min(row["seconds"]) > 0 for row in found.values())


def test_a_slope_is_that_of_the_larger_half():
  assert scaling.slope((1, 2, 4, 8), (9, 4, 16, 64)) == pytest.approx(2)


def report(seconds, *, others=0.0):
  row = {"seconds": seconds, "generate": seconds / 4, "others": others}
  rows = [row, row | {"seconds": 3 * seconds, "others": 1.0}]
  return {"first": row | {"seconds": 9.0}, "timed": rows, "peak_mib": 100, "extra_mib": 10}


def test_the_ratio_is_to_the_peer_that_was_fastest_in_the_same_round():
  found = {
    "klrl": [report(1.0), report(1.0), report(2.0)],
    "TRL": [report(2.0), report(8.0), report(8.0)],
    "Tunix": [report(4.0), report(4.0), report(16.0)],
  }
  figures = peers.figures_of("grpo", "toy", found)
  assert figures["klrl"]["of the fastest"] == [0.25, 0.25, 0.5]
  assert figures["TRL"]["seconds"] == [8.0, 2.0, 8.0]  # Disturbed iterations do not count.
  assert figures["klrl"]["quiet iterations"] == 0.5
  assert "of the fastest" not in figures["TRL"]
  assert all(None not in row.values() for row in figures.values())


def test_only_peers_whose_python_is_named_take_part():
  ours = peers.commands("ppo", {"": "python"})
  assert list(ours) == ["klrl"]
  everyone = {"": "a", "torch": "b", "trl": "c", "trl_ppo": "d", "tunix": "e"}
  assert list(peers.commands("grpo", everyone)) == ["klrl", "torch loop", "TRL", "Tunix"]
  assert peers.commands("ppo", everyone)["TRL"][0] == "d"
  for work, _ in peers.WORKS:
    assert all(pathlib.Path(x[1]).exists() for x in peers.commands(work, everyone).values())


def contend(monkeypatch, capsys, script, algorithm, folder):
  """Returns what a contender reports that runs in this process."""
  flags = ["--size=toy", f"--algorithm={algorithm}", "--warm=1", "--timed=1", f"--folder={folder}"]
  monkeypatch.setattr(sys, "argv", [script, *flags])
  monkeypatch.syspath_prepend(str(FOLDER / "contenders"))
  # Its clocks go when the test ends.
  monkeypatch.setattr(programs, "make_programs", programs.make_programs)
  monkeypatch.setattr(loop, "iterate", loop.iterate)
  monkeypatch.setattr("klrl.devices.compilation.keep", lambda where: None)
  runpy.run_path(str(FOLDER / "contenders" / script))
  return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_klrl_contends_by_its_own_program(monkeypatch, capsys, tmp_path):
  found = contend(monkeypatch, capsys, "klrl_run.py", "grpo", tmp_path)
  (row,) = found["timed"]
  assert 0 < row["generate"] + row["update"] < row["seconds"] < found["first"]["seconds"]
  assert found["peak_mib"] > 0 and set(found["versions"]) == {"klrl", "jax"}


def test_klrl_contends_with_log_probs(monkeypatch, capsys, tmp_path):
  found = contend(monkeypatch, capsys, "jax_log_probs.py", "log_probs_gradient", tmp_path)
  assert len(found["timed"]) == 1 and "klrl" in found["versions"]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_the_plain_loop_contends(monkeypatch, capsys, tmp_path, algorithm):
  pytest.importorskip("torch")
  found = contend(monkeypatch, capsys, "torch_loop.py", algorithm, tmp_path)
  assert found["timed"][0]["update"] > 0


def test_what_a_gpu_would_be_asked_runs_at_toy_size(monkeypatch, capsys):
  chip, made = CHIPS["NVIDIA H200"], []
  monkeypatch.setattr(gpu, "chip", lambda: chip)

  def one_for_all(config, size, mesh, **settings):
    # Most of the time is compilation. PPO's has the models of the others too.
    if not made:
      made.append(scaling.Iteration(gpu.config_of("ppo", size), size, mesh))
    return made[0]

  monkeypatch.setattr(gpu, "Iteration", one_for_all)
  run(monkeypatch, gpu.main, "--sizes=toy", "--members=2", "--repetitions=1", "--torch=python")
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].endswith("torch: needs a GPU")
  rows = [line.partition(":")[0] for line in lines[1:]]
  assert rows == ["grpo toy", "ppo toy", "log-probs, V 64", "sweep at toy"]
  assert "'bandwidth'" in lines[1] and "'MFU'" in lines[1]


def test_drawing_reads_the_weights_for_each_token_and_the_cache():
  size = workload.SIZES["1.2B"]
  assert size.num_parameters == pytest.approx(1.22e9, rel=0.01)
  cache = 2 * 24 * 2048 * 2 * 64 * 768  # keys and values of all layers and rows, half way
  assert gpu.bytes_drawn(size) == pytest.approx(512 * (2 * 1.22e9 + cache), rel=0.01)


@pytest.fixture
def toy_shape(monkeypatch):
  for name, value in (("NUM_ROWS", 16), ("PROMPT_LEN", 4), ("COMPLETION_LEN", 4)):
    monkeypatch.setattr(fits, name, value)
  shape = fits.SHAPES["Llama 3.2 1B"] | {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
  shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
  return shape | {"num_hidden_layers": 1}


def reports_on_this_machine(algorithm, shape, folder):
  fits.write_inputs(folder, shape)
  return fits.dry_run_of(algorithm, folder, "", "fsdp=2")


def test_an_iteration_is_costed_without_the_judge(toy_shape, tmp_path):
  rollout, update = reports_on_this_machine("GRPO with LoRA", toy_shape, tmp_path)
  assert (rollout["program"], update["program"]) == ("rollout", "update")
  for report in (rollout, update):
    assert report["memory"]["arguments"] > 2 * fits.num_parameters(toy_shape) / 2
    assert report["flops"] > 0 and {sent["axes"] for sent in report["collectives"]} == {"fsdp"}


def test_the_reference_of_dpo_is_held_beside_a_step(toy_shape, tmp_path):
  (step,) = reports_on_this_machine("DPO", toy_shape, tmp_path)
  expected = 2 * fits.num_parameters(toy_shape) / 2
  assert step["memory"]["beside"] == pytest.approx(expected, rel=0.05)


def report_of(memory, seconds, sent):
  bounds = dict(zip(fits.BOUNDS, (*seconds, max(seconds)), strict=True))
  collectives = [{"kind": "all-reduce", "axes": "fsdp", "bytes": x} for x in sent]
  return {"memory": {"total": memory}, "flops": 1.0, "seconds": bounds, "collectives": collectives}


def test_a_row_has_the_largest_memory_and_the_time_of_all_programs():
  rollout = report_of(2 * 2**30, (1.0, 2.0, 0.5), [1e9])
  update = report_of(8 * 2**30, (10.0, 0.0, 1.0), [0.5e9, 1.5e9])
  found = fits.figures_of([rollout, update], "v5e:4x4")
  assert found["memory, GiB"] == 8 and found["share"] == 0.5 and found["fits"]
  assert found["at_least, s"] == 12 and found["compute, s"] == 11 and found["over fsdp, GB"] == 3
  full = report_of(15.5 * 2**30, (1.0, 1.0, 1.0), [])  # The machine code has to fit too.
  assert not fits.figures_of([full], "v5e:4x4")["fits"]


def test_a_program_that_the_compiler_refuses_has_the_memory_that_it_asks_for():
  message = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (20.00G) exceeds available HBM (15.75G). HLO module: jit_step"
  )
  assert fits.refused("some other failure") is None
  found = fits.figures_of([{"memory": {"total": fits.refused(message)}}], "v5e:16x16")
  assert found == {"fits": 0, "memory, GiB": 20, "share": 1.25}
  row = {"DPO, Qwen 3 32B, v5e:16x16": found}
  assert "| DPO | Qwen 3 32B | v5e:16x16 | no | more than 125% |  |  |  |  |" in fits.table(row)


def test_what_models_take_of_a_chip_needs_no_compiler(tmp_path):
  for name, number in (("Llama 3.1 8B", 8.03e9), ("Qwen 3 32B", 32.8e9), ("Llama 3.2 1B", 1.236e9)):
    assert fits.num_parameters(fits.SHAPES[name]) == pytest.approx(number, rel=0.002)
    fits.write_inputs(tmp_path, fits.SHAPES[name] | {"vocab_size": 64})
    model = policy_model(load_config(tmp_path))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    smaller = fits.SHAPES[name] | {"vocab_size": 64}
    assert fits.num_parameters(smaller) == sum(x.size for x in jax.tree.leaves(shapes))
  # Two trained models of 16 bytes and two frozen ones of 2, on 64 chips.
  found = fits.held("PPO", fits.SHAPES["Llama 3.1 8B"], "v5p:4x4x4")
  assert found == pytest.approx(36 * 8.03e9 / 64, rel=0.002)
  assert "| PPO | Llama 3.1 8B | **105%** | 7% | 4% | 13% |" in fits.table_of_held()
  document = (FOLDER.parent / "docs/pods.md").read_text()
  compiled = fits.table(json.loads(fits.FILE.read_text())["figures"])
  assert fits.table_of_held() in document and compiled in document


def test_the_table_of_what_fits_names_the_smallest_slice_of_a_chip():
  seconds = {"compute, s": 1.0, "memory, s": 2.0, "interconnect, s": 1.5, "at_least, s": 2.25}
  row = {"fits": 1, "share": 0.5, **seconds, "over fsdp, GB": 3.0}
  rows = {
    "SFT, Qwen 3 8B, v5e:4x4": row | {"fits": 0, "share": 1.5},
    "SFT, Qwen 3 8B, v5e:16x16": row,
    "SFT, Qwen 3 8B, v5e:8x8": row,
  }
  lines = fits.table(rows).splitlines()
  (no,) = (line for line in lines if line.startswith("| SFT | Qwen 3 8B | v5e:4x4 |"))
  (yes,) = (line for line in lines if line.startswith("| SFT | Qwen 3 8B | v5e:16x16 |"))
  assert no.endswith("| no | 150% | 2.25 s | memory | 3 GB over fsdp |  |")
  # On v5e:2x4 the models alone take 95%, and of v5e:4x8 nothing is known.
  assert yes.endswith("| yes | 50% | 2.25 s | memory | 3 GB over fsdp | at most v5e:8x8 |")
  assert "| PPO | Llama 3.1 8B | v5e:4x4 | no | 105% by the models alone |  |" in fits.table(rows)
  assert "| SFT | Qwen 3 8B | v6e:8x8 | not compiled |" in fits.table(rows)


def test_the_work_is_what_a_pass_over_each_row_takes():
  size = workload.SIZES["small"]
  assert size.num_parameters == 5_248_256
  assert workload.SIZES["large"].num_parameters == 36_847_104
  # Of a linear map 2 for each weight and token: drawn, scored, and trained three times.
  linear = 2 * (size.num_body * (95 + 4 * 96) + size.vocab_size * size.width * 5 * 64) * 64
  assert workload.flops(size, "grpo") == pytest.approx(linear, rel=0.05)
  assert workload.flops(size, "ppo") - workload.flops(size, "grpo") == pytest.approx(
    4 * 2 * size.num_body * 96 * 64, rel=0.05
  )


def test_a_model_is_loaded_and_saved(tmp_path):
  config = dataclasses.replace(
    loading_bench.shape(1, 40), width=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=32
  )
  loading_bench.write_model(tmp_path, config)
  found = loading_bench.measure(tmp_path, "float32")
  assert found["peak_gb"] > 0 and (tmp_path / "policy/saved/model.safetensors").exists()


def test_drawing_is_measured(monkeypatch, capsys):
  config = dataclasses.replace(sampling_bench.CONFIG, num_layers=1)
  monkeypatch.setattr(sampling_bench, "CONFIG", config)
  monkeypatch.setattr(sampling_bench, "ROOMS", (sampling_bench.NUM_TOKENS,))
  # Most of its time is compilation of rooms that are alike.
  monkeypatch.setattr(sampling_bench, "measure", lambda calls, _: {name: [1.0] for name in calls})
  run(monkeypatch, sampling_bench.main, "--batch_size=2")
  printed = capsys.readouterr().out
  assert f"longest completion {sampling_bench.NUM_TOKENS}" in printed and "3. drawing" in printed


def test_a_sweep_is_compared_with_a_run(monkeypatch, capsys):
  """What it starts are the experiments' own programs, which are tested as such."""
  monkeypatch.setattr(sweep_bench, "run", lambda *arguments: 1.0)
  monkeypatch.setattr(parallel, "use_every_core", lambda: None)  # Tests have their devices.
  cache = jax.config.jax_enable_compilation_cache
  try:
    run(monkeypatch, sweep_bench.main, "--parts=2", "--repetitions=1")
  finally:
    jax.config.update("jax_enable_compilation_cache", cache)
  assert "ratio, in pairs: 1.000" in capsys.readouterr().out


class Sleeping:
  """A process as `multiprocessing` has it."""

  def __init__(self):
    self.process = subprocess.Popen(["sleep", "60"])
    self.pid = self.process.pid

  def is_alive(self):
    return self.process.poll() is None

  def join(self, seconds):
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.process.wait(seconds)

  def terminate(self):
    self.process.terminate()


@pytest.mark.parametrize("lost", [False, True])
def test_a_run_that_loses_something_is_told(monkeypatch, capsys, lost):
  """What it starts is klrl's own command, as `faults_test` does."""
  starts = []

  def started(experiment, flags, folder, *, operations=None, while_it_runs=None, **settings):
    workdir = folder / "run"
    is_first = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    if operations:
      operations.write_text("open run/a\nos.rename run/checkpoints/1\n")
    (workdir / "summary.json").write_text('{"num_iterations": 1}')
    end = "" if is_first or not lost else " "
    (workdir / "metrics.jsonl").write_text(f'{{"iteration": 0}}{end}\n')
    if while_it_runs:
      (workdir / "timing.jsonl").write_text(
        f'{{"iteration": {len(starts)}, "seconds": 1.0}}\n' * 20
      )
      sleeping = Sleeping()
      while_it_runs(sleeping)
      assert sleeping.process.wait() == -15
    fault, kill_after = settings.get("fault"), settings.get("kill_after")
    starts.append((experiment, fault))
    killed = fault and fault.does in (faults.KILL, faults.TORN)
    status = {None: 0, faults.FULL: 1, faults.READ_ONLY: 1}.get(fault and fault.does, 130)
    if while_it_runs:
      status = 130
    return faults.Ended(-9 if killed or kill_after is not None else status, "", 1.0)

  monkeypatch.setattr(faults, "run", started)
  with pytest.raises(SystemExit) as ended:
    run(monkeypatch, soak.main, "--moments=2", "--minutes=0.01")
  printed = capsys.readouterr().out
  assert ended.value.code == lost
  assert "operations {'tried': 2, 'disturbed': 2" in printed and "'iterations': 20" in printed
  assert ("metrics.jsonl" in printed) == lost
