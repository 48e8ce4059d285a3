"""Tests of the loop: what is written, what is saved, how it stops."""

import contextlib
import errno
import gc
import json
import os
import pathlib
import shutil
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl.devices import free_memory, parallel
from klrl.errors import UserError
from klrl.run import checkpoint, loop, metrics


def counting_step(state, iteration):
  """A state that accumulates noise, so that a wrong resume shows in every later figure."""
  key, noise_key = jax.random.split(state["key"])
  x = state["x"] + jax.random.normal(noise_key)
  # No metric of a compiled step is a buffer of its state, which the next step may use up.
  return {"key": key, "x": x}, {"score/mean": (x.copy(), 1.0), "kl/ref_exact": (0.0, 0.0)}


def fresh_state():
  return {"key": jax.random.key(0), "x": jnp.float32(0)}


def run(workdir, *, step=counting_step, num_iterations=6, save_every=2):
  workdir.mkdir(exist_ok=True)
  start, state = loop.restore_or_init(workdir, fresh_state(), keep=2)
  return list(
    loop.iterate(
      step,
      state,
      start=start,
      num_iterations=num_iterations,
      workdir=workdir,
      save_every=save_every,
      keep=2,
    )
  )


def test_each_iteration_has_its_own_time_though_its_figures_are_read_later(tmp_path):
  def step(state, iteration):
    time.sleep(0.02 * (iteration + 1))
    return jax.block_until_ready(counting_step(state, iteration))

  run(tmp_path, step=step, num_iterations=3, save_every=10)
  seconds = [line["seconds"] for line in metrics.read_lines(tmp_path / "timing.jsonl")]
  assert all(found >= 0.02 * (i + 1) for i, found in enumerate(seconds)), seconds


def test_free_memory_goes_back_after_each_save(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(free_memory, "give_back", lambda: calls.append(0))
  run(tmp_path, num_iterations=6, save_every=2)
  assert len(calls) == 3


def interrupting_step(at):
  def step(state, iteration):
    if iteration == at:
      os.kill(os.getpid(), signal.SIGINT)
    return counting_step(state, iteration)

  return step


def test_saves_leave_nothing_behind(tmp_path):
  def num_lists():
    gc.collect()
    return sum(type(x) is list for x in gc.get_objects())

  with contextlib.closing(checkpoint.Checkpoints(tmp_path, keep=1)) as checkpoints:
    checkpoints.save(1, fresh_state())
    checkpoints.save(2, fresh_state())
    before = num_lists()
    for iteration in range(3, 13):
      checkpoints.save(iteration, fresh_state())
  # TensorStore would leave 23 for each save, and each of its specifications leaves a few.
  assert num_lists() < before + 100


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
      raise SystemExit("killed")  # No exception that a step may fail with.
    return counting_step(state, iteration)

  with pytest.raises(SystemExit, match="killed"):
    run(tmp_path / "parts", step=killed)  # Iteration 4 is written, but the checkpoint holds 4 done.
  with (tmp_path / "parts/metrics.jsonl").open("a") as file:
    file.write('{"iteration": 5, "sco')  # A line that was cut off.
  assert [done for done, _, _ in run(tmp_path / "parts")] == [5, 6]
  assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (
    tmp_path / "whole/metrics.jsonl"
  ).read_bytes()


def events_of(workdir, monkeypatch, *, step=counting_step, **settings):
  """Returns what a run of six iterations did, in its order; reading waits for the devices."""
  events, found_by = [], {}

  def starting(state, iteration):
    events.append(f"start {iteration}")
    state, pairs = step(state, iteration)
    found_by[id(pairs)] = iteration, pairs
    return state, pairs

  def reading(pairs):
    events.append(f"read {found_by[id(pairs)][0]}")
    return fetch(pairs)

  def saving(self, done, state):
    events.append(f"save {done}")

  fetch = parallel.fetch
  with monkeypatch.context() as patch:
    patch.setattr(loop.parallel, "fetch", reading)
    patch.setattr(loop.Checkpoints, "save", saving)
    try:
      run(workdir, step=starting, **settings)
    except (UserError, loop.Interrupted) as error:
      events.append(type(error).__name__)
  return events


def test_the_next_iteration_starts_before_figures_are_read_and_none_before_a_save(
  tmp_path, monkeypatch
):
  expected = """
    start 0, start 1, read 0, start 2, read 1, read 2, save 3,
    start 3, start 4, read 3, start 5, read 4, read 5, save 6
  """
  assert events_of(tmp_path, monkeypatch, save_every=3) == [x.strip() for x in expected.split(",")]


def test_nothing_is_saved_before_the_figures_of_a_started_iteration_are_found_finite(
  tmp_path, monkeypatch
):
  def bad(state, iteration):
    state, pairs = counting_step(state, iteration)
    if iteration == 3:
      pairs["score/mean"] = (float("nan"), 1.0)
    return state, pairs

  def failing(state, iteration):
    if iteration == 4:
      raise UserError("The server is gone.")
    return bad(state, iteration)

  before = ["start 0", "start 1", "read 0", "start 2", "read 1", "start 3", "read 2"]
  for name, step in (("bad", bad), ("failing", failing)):
    found = events_of(tmp_path / name, monkeypatch, step=step, save_every=50)
    assert found == [*before, "start 4", "read 3", "UserError"]
  # A signal: what was started is read and saved.
  found = events_of(tmp_path / "told", monkeypatch, step=interrupting_step(3), save_every=50)
  assert found == [*before, "read 3", "save 4", "Interrupted"]


def test_with_several_processes_a_signal_counts_when_the_devices_have_told_the_others(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(loop.processes, "is_alone", lambda: False)
  before = ["start 0", "start 1", "read 0", "start 2", "read 1", "start 3", "read 2"]
  found = events_of(tmp_path / "next", monkeypatch, step=interrupting_step(3), save_every=50)
  assert found == [*before, "start 4", "read 3", "read 4", "save 5", "Interrupted"]
  # Where all wait anyway, it counts at once.
  found = events_of(tmp_path / "now", monkeypatch, step=interrupting_step(3), save_every=4)
  assert found == [*before, "read 3", "save 4", "Interrupted"]


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
  run(tmp_path)
  assert run(tmp_path) == []


def test_a_run_that_is_made_longer_is_what_it_would_have_been(tmp_path):
  run(tmp_path / "whole")
  run(tmp_path / "parts", num_iterations=3)
  assert [done for done, _, _ in run(tmp_path / "parts")] == [4, 5, 6]
  whole, parts = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts"))
  assert whole == parts


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


@pytest.fixture
def sigint():
  """Python's own handler; a run of another test that nobody has closed may have left its own."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield signal.default_int_handler
  signal.signal(signal.SIGINT, before)


def test_second_signal_is_not_swallowed(tmp_path, capfd, sigint):
  def impatient(state, iteration):
    os.kill(os.getpid(), signal.SIGINT)
    while signal.getsignal(signal.SIGINT) is not sigint:  # Signals do not queue.
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
    return counting_step(state, iteration)

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, step=impatient)
  assert capfd.readouterr().err.count("Once more stops at once") == 1


def test_a_step_that_goes_to_another_folder_does_not_move_the_run(tmp_path, monkeypatch):
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.chdir(tmp_path)

  def moving(state, iteration):
    if iteration == 1:
      os.chdir("elsewhere")
    return counting_step(state, iteration)

  run(pathlib.Path("run"), step=moving)
  assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 6
  assert not any((tmp_path / "elsewhere").iterdir())


def test_handlers_are_put_back(tmp_path):
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with pytest.raises(loop.Interrupted):
    run(tmp_path, step=interrupting_step(0))
  assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(
  ("other", "difference"),
  [
    ({"x": jnp.zeros(3)}, r"x is float32\[\] there and float32\[3\] here"),
    ({}, r"x is float32\[\] there and absent here"),
    ({"x": jnp.float32(0), "y": jnp.zeros(2)}, r"y is absent there and float32\[2\] here"),
    ({"x": jnp.bfloat16(0)}, r"x is float32\[\] there and bfloat16\[\] here"),
  ],
)
def test_checkpoint_of_another_model_is_one_clear_error(tmp_path, other, difference):
  run(tmp_path)
  with pytest.raises(UserError, match=f"does not fit this model: {difference}"):
    loop.restore_or_init(tmp_path, {"key": jax.random.key(0), **other}, keep=2)
  assert [done for done, _, _ in run(tmp_path)] == []


DAMAGES = {
  "cut": lambda folder: os.truncate(folder / "default/_METADATA", 100),
  "removed": lambda folder: (folder / "default/manifest.ocdbt").unlink(),
  "garbage": lambda folder: (folder / "default/manifest.ocdbt").write_bytes(b"garbage"),
  "no record": lambda folder: (folder / "_CHECKPOINT_METADATA").write_text("[" * 10**5),
  "emptied": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
  "a copy": lambda folder: [shutil.rmtree(folder), shutil.copytree(folder.parent / "4", folder)],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path, damage, capsys):
  run(tmp_path / "whole")
  run(tmp_path / "run")
  DAMAGES[damage](tmp_path / "run/checkpoints/6")
  assert [done for done, _, _ in run(tmp_path / "run")] == [5, 6]
  said = " ".join(capsys.readouterr().out.split())
  assert "The checkpoint after iteration 6" in said and "damaged" in said
  assert "goes on from the checkpoint before, after iteration 4" in said
  assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {
    *("4", "6", "6.damaged")
  }
  whole, mended = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "run"))
  assert whole == mended


def test_one_changed_bit_of_any_array_is_noticed(tmp_path):
  # TensorStore compresses larger arrays, and notices some changes of theirs itself.
  state = {"key": jax.random.key(3), "x": jnp.float32(1.5), "many": jnp.arange(4096.0)}

  def unchanged(state, iteration):
    return jax.tree.map(lambda x: x, state), {"score/mean": (1.0, 1.0)}

  settings = {"start": 0, "num_iterations": 2, "save_every": 1, "keep": 2}
  for _ in loop.iterate(unchanged, state, workdir=tmp_path / "run", **settings):
    pass
  data = sorted((tmp_path / "run/checkpoints/2").rglob("d/*"), key=lambda x: x.stat().st_size)[-1]
  size = data.stat().st_size
  named = set()
  for at in range(0, size, max(1, size // 12)):
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    path = tmp_path / "copy" / data.relative_to(tmp_path / "run")
    changed = bytearray(path.read_bytes())
    changed[at] ^= 1
    path.write_bytes(changed)
    copied = jax.tree.map(lambda x: x.copy(), state)
    done, restored = loop.restore_or_init(tmp_path / "copy", copied, keep=2)
    named.add(done)
    for name, leaf in restored.items():
      expected, found = (
        jax.random.key_data(x) if name == "key" else x for x in (state[name], leaf)
      )
      np.testing.assert_array_equal(found, expected)
  assert 1 in named  # The other bytes are of what nobody reads.


def test_what_a_failed_save_or_a_ctrl_c_leaves_behind_is_not_told():
  errors = [RuntimeError("Event loop is closed"), KeyboardInterrupt(), RuntimeError("another")]
  told = []
  tell = checkpoint.without_leftovers(told.append)
  for error in errors:
    tell(types.SimpleNamespace(exc_value=error))
  assert [unraisable.exc_value for unraisable in told] == errors[2:]


def test_a_digest_sees_every_bit_and_place_and_no_device():
  x = jax.random.normal(jax.random.key(0), (6, 5))
  state = {
    "x": x,
    "swapped": x[::-1],
    "half": x.astype(jnp.bfloat16),
    "bool": x > 0,
    "key": jax.random.key(0),
    "other_key": jax.random.key(1),
    "int8": jnp.int8(-1),
    "zeros": jnp.zeros(3),
    "more_zeros": jnp.zeros(3).at[1].set(-0.0),
  }
  found = checkpoint.digests(state)
  assert len(set(found.values())) == len(found)
  assert found == checkpoint.digests(jax.tree.map(jnp.copy, state))
  flipped = np.tile(np.asarray(x), (32, 1, 1))
  flipped.view(np.uint32)[:, 2, 3] ^= np.uint32(1) << np.arange(32, dtype=np.uint32)
  one_bit = {str(bit): jnp.asarray(array) for bit, array in enumerate(flipped)}
  assert len({*checkpoint.digests(one_bit).values(), found["x"]}) == 33
  # Larger ones are taken apart.
  large = np.random.default_rng(0).normal(size=(3, 1, 5, 7000)).astype(np.float32)
  whole = checkpoint._sums(large, np.uint32(2**32 - 5), (4, 2, 5, 7001))
  parts = checkpoint._sums_on_host(large, 2**32 - 5, (4, 2, 5, 7001))
  np.testing.assert_array_equal(parts, whole)
  # A part knows its place, and a device computes what the host does.
  parts = [(x[:2], 0), (x[2:], 10)]
  sums = sum(checkpoint._sums(np.asarray(part), np.uint32(at), (6, 5)) for part, at in parts)
  assert "".join(f"{word:08x}" for word in sums) == found["x"]
  for part, at in parts:
    np.testing.assert_array_equal(
      checkpoint._sums_on_device(part, np.uint32(at), (6, 5)),
      checkpoint._sums(np.asarray(part), np.uint32(at), (6, 5)),
    )


def test_a_digest_is_the_same_on_any_devices_and_so_is_what_is_restored(tmp_path):
  mesh = parallel.make_mesh("data=2,fsdp=2")
  state = {
    "x": jax.random.normal(jax.random.key(0), (8, 12)),
    "half": jnp.arange(24.0, dtype=jnp.bfloat16).reshape(4, 6),
    "key": jax.random.split(jax.random.key(1), 4),
  }
  rows = jax.sharding.PartitionSpec("data")
  specs = {"x": jax.sharding.PartitionSpec("fsdp", "data"), "half": rows, "key": rows}
  split = {
    name: jax.device_put(x, jax.sharding.NamedSharding(mesh, specs[name]))
    for name, x in state.items()
  }
  assert checkpoint.digests(split) == checkpoint.digests(state)
  with contextlib.closing(checkpoint.Checkpoints(tmp_path, keep=1)) as checkpoints:
    checkpoints.save(3, split)
  for other in (state, split):
    found = checkpoint.restore(tmp_path, 3, other)
    assert checkpoint.digests(found) == checkpoint.digests(state)
    assert found["x"].sharding == other["x"].sharding


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (MemoryError("Unable to allocate 3. GiB"), "Unable to allocate"),
    (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
  ],
)
def test_what_the_machine_refuses_is_no_damage(tmp_path, monkeypatch, error, message):
  run(tmp_path)

  def refusing(*_, **__):
    raise error

  monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "restore", refusing)
  with pytest.raises(type(error), match=message):
    loop.restore_or_init(tmp_path, fresh_state(), keep=2)
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]


def test_a_checkpoint_without_a_record_is_refused_and_stays(tmp_path):
  run(tmp_path)
  path = tmp_path / "checkpoints/6/_CHECKPOINT_METADATA"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {}}))
  with pytest.raises(UserError, match="was saved by an older klrl"):
    loop.restore_or_init(tmp_path, fresh_state(), keep=2)
  assert path.exists()


def test_where_no_checkpoint_is_whole_all_are_named_and_left(tmp_path):
  run(tmp_path)
  for path in (tmp_path / "checkpoints").iterdir():
    (path / "default/_METADATA").write_bytes(b"{")
  message = r"after iteration 6 .* is damaged.*after iteration 4 .* is damaged.*No other is left"
  with pytest.raises(UserError, match=message):
    run(tmp_path)
  assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", "6"}


def test_what_was_done_before_an_iteration_that_fails_is_saved(tmp_path):
  def failing(state, iteration):
    if iteration == 3:
      raise UserError("The server is gone.")
    return counting_step(state, iteration)

  run(tmp_path / "whole")
  with pytest.raises(
    UserError, match=r"Iteration 4: The server is gone\. The state after iterat.* 3"
  ):
    run(tmp_path / "run", step=failing, save_every=50)
  assert [done for done, _, _ in run(tmp_path / "run")] == [4, 5, 6]
  whole, mended = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "run"))
  assert whole == mended


def test_a_state_that_was_used_up_is_not_saved(tmp_path):
  def failing(state, iteration):
    if iteration == 3:
      state["x"].delete()
      raise UserError("Too late.")
    return counting_step(state, iteration)

  with pytest.raises(UserError, match=r"Too late\. The state after iteration 2 is saved"):
    run(tmp_path, step=failing)


def test_whoever_iterates_may_fail_and_nothing_is_lost(tmp_path):
  iterations = loop.iterate(
    counting_step,
    fresh_state(),
    start=0,
    num_iterations=6,
    workdir=tmp_path,
    save_every=2,
    keep=2,
  )
  with pytest.raises(RuntimeError, match="whoever"):
    for done, _, _ in iterations:
      if done == 3:
        raise RuntimeError("whoever iterates failed")
  loop._close_all()  # As the interpreter does where it ends.
  # Iteration 4 had been started.
  assert loop.restore_or_init(tmp_path, fresh_state(), keep=2)[0] == 4
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_figures_without_a_checkpoint_are_told_and_begun_anew(tmp_path, capsys):
  run(tmp_path)
  before = (tmp_path / "metrics.jsonl").read_bytes()
  shutil.rmtree(tmp_path / "checkpoints")
  assert len(run(tmp_path)) == 6
  assert "no checkpoint: the run starts again" in " ".join(capsys.readouterr().out.split())
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (OSError(28, "No space left on device", "runs/x"), "No space left on device at runs/x. Make"),
    (ValueError("INTERNAL: [OS error 30: Read-only file system]"), "Read-only file system"),
    (
      RuntimeError(f"RESOURCE_EXHAUSTED: Out of memory allocating {2**31} bytes."),
      r"Iteration 1: .*2\.0 GiB at once.*the rest of the state take .* GiB of each device.*--acc",
    ),
    (MemoryError(), "Iteration 1: The memory does not hold this: out of memory"),
  ],
)
def test_what_the_machine_refuses_is_one_message(tmp_path, error, message):
  def failing(state, iteration):
    raise error

  with pytest.raises(UserError, match=message):
    run(tmp_path, step=failing)


def test_a_signal_between_two_iterations_is_saved_before_it_is_obeyed(tmp_path):
  iterations = loop.iterate(
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
  iterations = loop.iterate(
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
