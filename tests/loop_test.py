"""Tests of the loop: what is written, what is saved, how it stops."""

import json
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import pytest

from klrl import loop
from klrl.errors import UserError


def counting_step(state, iteration):
  """A state that accumulates noise, so that a wrong resume shows in every later figure."""
  key, noise_key = jax.random.split(state["key"])
  x = state["x"] + jax.random.normal(noise_key)
  return {"key": key, "x": x}, {"score/mean": (x, 1.0), "kl/ref_exact": (0.0, 0.0)}


def fresh_state():
  return {"key": jax.random.key(0), "x": jnp.float32(0)}


def run(workdir, *, step=counting_step, num_iterations=6, save_every=2):
  workdir.mkdir(exist_ok=True)
  start, state = loop.restore_or_init(workdir, fresh_state(), keep=2)
  return list(
    loop.run(
      step,
      state,
      start=start,
      num_iterations=num_iterations,
      workdir=workdir,
      save_every=save_every,
      keep=2,
    )
  )


def interrupting_step(at):
  def step(state, iteration):
    if iteration == at:
      os.kill(os.getpid(), signal.SIGINT)
    return counting_step(state, iteration)

  return step


def test_resumed_run_writes_the_same_metrics_as_an_uninterrupted_one(tmp_path):
  run(tmp_path / "whole")
  with pytest.raises(loop.Interrupted, match="Stopped after iteration 4 of 6"):
    run(tmp_path / "parts", step=interrupting_step(3))
  assert [done for done, _, _ in run(tmp_path / "parts")] == [5, 6]
  whole, parts = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts"))
  assert whole == parts
  assert len(whole.splitlines()) == 6


def test_metrics_after_the_last_checkpoint_are_dropped_on_resume(tmp_path):
  run(tmp_path / "whole")

  def killed(state, iteration):
    if iteration == 5:
      raise RuntimeError("killed")
    return counting_step(state, iteration)

  with pytest.raises(RuntimeError, match="killed"):
    run(tmp_path / "parts", step=killed)  # Iteration 4 is written, but the checkpoint holds 4 done.
  with (tmp_path / "parts/metrics.jsonl").open("a") as file:
    file.write('{"iteration": 5, "sco')  # A line that was cut off.
  assert [done for done, _, _ in run(tmp_path / "parts")] == [5, 6]
  assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (
    tmp_path / "whole/metrics.jsonl"
  ).read_bytes()


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
  run(tmp_path)
  assert run(tmp_path) == []


def test_what_was_not_measured_is_null(tmp_path):
  run(tmp_path, num_iterations=1)
  record = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert record["kl/ref_exact"] is None


def test_nan_stops_the_run_and_names_the_first_bad_figure(tmp_path):
  def bad(state, iteration):
    state, pairs = counting_step(state, iteration)
    if iteration == 4:
      nan = (float("nan"), 1.0)
      pairs |= {"gradient/norm": nan, "policy/loss": nan, "score/mean": nan}
    return state, pairs

  with pytest.raises(UserError, match=r"Iteration 5: score/mean is nan.*after iteration 4 is kept"):
    run(tmp_path, step=bad)
  assert [done for done, _, _ in run(tmp_path)] == [5, 6]


def test_second_signal_is_not_swallowed(tmp_path):
  before = signal.getsignal(signal.SIGINT)

  def impatient(state, iteration):
    os.kill(os.getpid(), signal.SIGINT)
    while signal.getsignal(signal.SIGINT) is not before:  # Signals do not queue.
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
    return counting_step(state, iteration)

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, step=impatient)


def test_handlers_are_put_back(tmp_path):
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with pytest.raises(loop.Interrupted):
    run(tmp_path, step=interrupting_step(0))
  assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(
  ("other", "difference"),
  [
    ({"x": jnp.zeros(3)}, r"x is \(\) there and \(3,\) here"),
    ({}, r"x is \(\) there and absent here"),
    ({"x": jnp.float32(0), "y": jnp.zeros(2)}, r"y is absent there and \(2,\) here"),
  ],
)
def test_checkpoint_of_another_model_is_one_clear_error(tmp_path, other, difference):
  run(tmp_path)
  with pytest.raises(UserError, match=f"does not fit this model: {difference}"):
    loop.restore_or_init(tmp_path, {"key": jax.random.key(0), **other}, keep=2)
  assert [done for done, _, _ in run(tmp_path)] == []


def test_damaged_checkpoint_names_the_folder_to_delete_and_the_one_before_it_is_kept(tmp_path):
  run(tmp_path)
  metadata = tmp_path / "checkpoints/6/default/_METADATA"
  metadata.write_bytes(metadata.read_bytes()[:100])
  with pytest.raises(UserError, match=r"is damaged.*Delete its folder 6"):
    loop.restore_or_init(tmp_path, fresh_state(), keep=2)
  shutil.rmtree(tmp_path / "checkpoints/6")
  assert [done for done, _, _ in run(tmp_path)] == [5, 6]


def test_a_signal_between_two_iterations_is_saved_before_it_is_obeyed(tmp_path):
  iterations = loop.run(
    counting_step,
    fresh_state(),
    start=0,
    num_iterations=6,
    workdir=tmp_path,
    save_every=50,
    keep=2,
  )
  with pytest.raises(loop.Interrupted, match="Stopped after iteration 4 of 6"):
    for done, _, _ in iterations:
      if done == 3:  # While the consumer prints.
        os.kill(os.getpid(), signal.SIGINT)
  assert loop.restore_or_init(tmp_path, fresh_state(), keep=2)[0] == 4


def test_a_signal_in_the_last_iteration_is_not_swallowed(tmp_path):
  with pytest.raises(loop.Interrupted, match="iteration 6 of 6"):
    run(tmp_path, step=interrupting_step(5))


def test_profile_of_a_single_iteration_is_no_error(tmp_path):
  iterations = loop.run(
    counting_step,
    fresh_state(),
    start=0,
    num_iterations=1,
    workdir=tmp_path,
    save_every=1,
    keep=1,
    profile=True,
  )
  assert len(list(iterations)) == 1
