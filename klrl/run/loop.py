"""The loop that every experiment runs: step, check, record, save.

It knows nothing of flags, of mathematics or of how progress is shown: it is a generator, and its
caller decides what to print.
"""

import collections
import contextlib
import functools
import math
import os
import pathlib
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax

from klrl.devices import free_memory, parallel, processes
from klrl.errors import UserError, memory_message, troubles_told
from klrl.run import checkpoint, metrics, progress, trace, trackers
from klrl.run.checkpoint import Checkpoints
from klrl.run.evaluations import Evaluations, OfMembers

_PROFILED_ITERATIONS = 3


class Interrupted(Exception):
  """The run was asked to stop; everything so far is saved."""


def restore_or_init(workdir: pathlib.Path, state, *, keep: int):
  """Returns (iterations done, state) of the newest whole checkpoint in `workdir`, or (0, `state`).

  A damaged checkpoint is named and set aside, and the one before is taken. Where there is any, the
  arrays of `state` are freed before one is read, so that no device holds two states.

  Raises:
    UserError: all checkpoints are damaged, or one is of another model. `keep` is in the message.
  """
  directory = workdir / "checkpoints"
  damages = {}
  saved = processes.on_writer(checkpoint.saved_iterations)(directory)
  like = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
  )
  if saved:
    jax.tree.map(lambda leaf: leaf.delete(), state)
  for done in saved:
    try:
      restored = checkpoint.restore(directory, done, like)
    except checkpoint.Damaged as damage:
      damages[done] = f"The checkpoint after iteration {done} in {directory} is damaged: {damage}."
    else:
      for number, text in damages.items():
        progress.warn(f"{text} It is now {checkpoint.set_aside(directory, number).name}.")
      if damages:
        progress.warn(f"The run goes on from the checkpoint before, after iteration {done}.")
      return done, restored
  if damages:
    raise UserError(
      f"{' '.join(damages.values())} No other is left (--keep={keep}). Put one back from a copy, "
      f"or move {directory} away to start again."
    )
  return 0, state


_running: weakref.WeakSet[Iterator] = weakref.WeakSet()


def _close_all() -> None:
  for iterations in list(_running):
    if not iterations.gi_running:
      iterations.close()


# Saving in the background needs thread pools, which the interpreter ends before it calls the
# functions of `atexit`. A program that leaves a run half way through would lose the last save.
threading._register_atexit(_close_all)


def _closed_at_exit(generator_fn):
  """Returns `generator_fn`, whose generators are closed before the program ends."""

  @functools.wraps(generator_fn)
  def begin(*arguments, **named):
    iterations = generator_fn(*arguments, **named)
    _running.add(iterations)
    return iterations

  return begin


class _Record:
  """The figures of the iterations of a run: read, checked, and written to its files."""

  def __init__(self, workdir: pathlib.Path, log: trackers.Log, checkpoints: Checkpoints, read):
    past = processes.on_writer(metrics.read_lines)(workdir / "timing.jsonl")
    self._elapsed = past[-1].get("elapsed_seconds", 0.0) if past else 0.0
    self._workdir, self._log, self._checkpoints, self._read = workdir, log, checkpoints, read
    self._since = time.monotonic()
    self.evaluation_seconds = 0.0  # of the evaluation before the next iteration

  def begin(self) -> None:
    """Starts the clock of an iteration that follows none which still runs."""
    self._since = time.monotonic()

  def add(self, iteration: int, found, ended: float | None) -> dict[str, float | None]:
    """Waits for what the step of `iteration` found, and returns its figures.

    The time of an iteration ends when its figures are there, and then that of the next begins.
    `ended` is the time at which they were there, if that is known already.
    """
    figures = metrics.finalise(self._read(iteration, parallel.fetch(found)))
    if ended is None or ended <= self._since:  # That of the iteration before was not known.
      ended = time.monotonic()
    seconds, self._since = ended - self._since, ended
    self._elapsed += seconds
    num_tokens = figures.get("rollout/tokens")
    _check_finite(figures, iteration, self._checkpoints.latest(), self._workdir)
    metrics.append_line(self._workdir / "metrics.jsonl", {"iteration": iteration, **figures})
    evaluation, self.evaluation_seconds = self.evaluation_seconds, 0.0
    metrics.append_line(
      self._workdir / "timing.jsonl",
      {
        "iteration": iteration,
        "seconds": round(seconds, 6),
        "tokens_per_second": num_tokens and round(num_tokens / seconds, 1),
        "elapsed_seconds": round(self._elapsed, 6),
        **({"evaluation_seconds": round(evaluation, 6)} if evaluation else {}),
      },
    )
    self._log.write(iteration, figures)
    return figures


def _end_of(found) -> float | None:
  """Returns the time if what a step found is there, as where the step waited for the devices."""
  is_there = all(x.is_ready() for x in jax.tree.leaves(found) if isinstance(x, jax.Array))
  return time.monotonic() if is_there else None


@_closed_at_exit
def iterate(
  step: Callable[[Any, int], tuple[Any, Any]],
  state,
  *,
  start: int,
  num_iterations: int,
  workdir: pathlib.Path,
  save_every: int,
  keep: int,
  profile: bool = False,
  tensorboard: bool = False,
  wandb_project: str = "",
  evaluations: Evaluations | OfMembers | None = None,
  read: Callable[[int, Any], dict] = lambda iteration, found: found,
) -> Iterator[tuple[int, Any, dict[str, float | None]]]:
  """Yields (iterations done, newest state, figures) for each iteration.

  The figures of an iteration are read when the next one has been started, so that the devices never
  wait for the host. The state that is yielded is then that of the next one already, and with the
  last figures it is the last. Where the state itself is needed, for a checkpoint or an evaluation,
  the figures are read before the next iteration starts.

  It writes `metrics.jsonl` (figures, the same for the same seed), `timing.jsonl` and
  `checkpoints/`. A state is saved only after its figures were read and found finite. The time of
  evaluations is not in that of the iterations: it stands as `evaluation_seconds` in the line of the
  iteration that follows.

  Args:
    step: (state, iteration) -> (state, what it found); may donate the state.
    state: a pytree of arrays, as `restore_or_init` returned it.
    start: iterations that are done already.
    num_iterations: iterations to have done at the end.
    workdir: the run's folder.
    save_every: iterations between checkpoints; the last state is always saved.
    keep: how many checkpoints are kept.
    profile: whether to write a trace of a few iterations to `workdir/profile`.
    tensorboard: whether to write event files to `workdir/tensorboard`.
    wandb_project: the project of Weights & Biases to which figures go; "" for none.
    evaluations: what judges the policy while it trains.
    read: (iteration, what its step found, on the host) -> metrics as (sum, count) pairs; without it
      the step finds such pairs.

  Raises:
    Interrupted: after SIGINT or SIGTERM, between two iterations, with the state saved.
    UserError: a figure, which is named, is NaN or infinite, and the last checkpoint stays; or a
      step or an evaluation failed, and the state before it is saved; or the disk or the memory is
      full.
  """
  workdir = workdir.absolute()  # A reward may go to another folder.
  last_profiled = min(start + _PROFILED_ITERATIONS, num_iterations - 1)

  def must_wait(done):
    """Returns whether the state after `done` iterations, or an end of the profile, is needed."""
    is_end = profile and done in (start + 1, last_profiled + 1)
    is_evaluated = evaluations is not None and evaluations.is_due(done)
    return done == num_iterations or done % save_every == 0 or is_end or is_evaluated

  with contextlib.ExitStack() as stack:
    stack.enter_context(troubles_told())
    if not start and processes.on_writer(metrics.read_lines)(workdir / "metrics.jsonl"):
      progress.warn(
        f"{workdir} has figures of iterations, but no checkpoint: the run starts again."
      )
    for name in ("metrics.jsonl", "timing.jsonl"):
      metrics.truncate(workdir / name, start)
    checkpoints = stack.enter_context(
      contextlib.closing(Checkpoints(workdir / "checkpoints", keep=keep))
    )
    log = stack.enter_context(
      trackers.opened(workdir, start, {"tensorboard": tensorboard, "wandb_project": wandb_project})
    )
    record = _Record(workdir, log, checkpoints, read)
    asked_to_stop = stack.enter_context(_deferred_signals())
    unread = None  # (iteration, what its step found, when), not read yet
    asked = collections.deque([lambda: False], maxlen=2)  # whether any process was asked to stop

    def read_rest():
      """Reads what is unread, so that the state may be saved; returns its figures, if any."""
      nonlocal unread
      rest, unread = unread, None
      return record.add(*rest) if rest else None

    def evaluate(done, state):
      """Returns whether there was an evaluation after `done` iterations."""
      began = time.monotonic()
      with _saved_if_it_fails(f"The evaluation after iteration {done}", done, state, checkpoints):
        figures = evaluations.after(done, state) if evaluations else None
      log.evaluated(figures or {})
      record.evaluation_seconds = 0.0 if figures is None else time.monotonic() - began
      return figures is not None

    def shown(done, newest, state, figures):
      """Yields what `iterate` yields; `newest` is how many iterations `state` has done."""
      try:
        yield done, state, figures
      except GeneratorExit:  # The caller failed, or stopped.
        if processes.is_alone():
          read_rest()
          _save_if_whole(newest, state, checkpoints)
        raise

    if evaluations:
      evaluations.resume(start)
    evaluate(start, state)
    for iteration in range(start, num_iterations):
      done = iteration + 1
      # The first iteration compiles, so the trace starts with the second.
      if profile and iteration == start + 1:
        jax.profiler.start_trace(str(workdir / "profile"))
      if unread is None:
        record.begin()
      with _saved_if_it_fails(f"Iteration {done}", iteration, state, checkpoints, read_rest):
        state, found = step(state, iteration)
      before, unread = unread, (iteration, found, _end_of(found))
      if before:
        yield from shown(iteration, done, state, record.add(*before))
      # It is read once, so that message and save agree. One process may get a signal alone. The
      # devices of the others tell of it behind this iteration; where nothing waits for that, it
      # counts after the next one.
      asked.append(processes.asked_anywhere(bool(asked_to_stop)))
      stop = asked[-1 if must_wait(done) or processes.is_alone() else 0]()
      if not (stop or must_wait(done)):
        continue
      figures = read_rest()
      if profile and start < iteration == last_profiled:
        jax.profiler.stop_trace()
        trace.show(workdir / "profile", num_iterations=last_profiled - start)
      if stop or done == num_iterations or done % save_every == 0:
        checkpoints.save(done, state)
        free_memory.give_back()
      yield from shown(done, done, state, figures)
      # The state is saved first where it is time, so that no kill in here takes it.
      if not stop and evaluate(done, state) and processes.anywhere(bool(asked_to_stop)):
        stop = True
        checkpoints.save(done, state)
      if stop:
        raise Interrupted(
          f"Stopped after iteration {done} of {num_iterations}, saved in {workdir}. "
          "Run the same command again to go on."
        )
    log.write(num_iterations, {})  # The evaluation at the end has no iteration after it.
    if processes.anywhere(bool(asked_to_stop)):  # The signal came late; everything is saved.
      raise Interrupted(f"Stopped after the last iteration, saved in {workdir}.")


@contextlib.contextmanager
def _saved_if_it_fails(
  what: str, done: int, state, checkpoints: Checkpoints, read_rest: Callable = lambda: None
):
  """Saves the state after `done` iterations where the body, which is called `what`, fails.

  `read_rest()` reads the figures of that state first: one that is not finite is the error.
  """
  try:
    yield
  except Exception as error:
    # If only one process fails, it must not wait for the others in order to save.
    is_common = isinstance(error, UserError) or processes.is_alone()
    saved = ""
    if is_common:
      read_rest()
      saved = _save_if_whole(done, state, checkpoints)
    if isinstance(error, UserError):
      raise UserError(f"{what}: {error}{saved}") from error
    if message := memory_message(error, _held(state)):
      raise UserError(f"{what}: {message}{saved}") from error
    raise


def _held(state) -> str:
  """Returns a sentence on what the state takes of a device, and on what the device has."""
  leaves = [leaf for leaf in jax.tree.leaves(state) if hasattr(leaf, "sharding")]
  shards = [(math.prod(x.sharding.shard_shape(x.shape)), x.dtype.itemsize) for x in leaves]
  size = sum(num * itemsize for num, itemsize in shards) / 2**30
  limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
  has = f", which has {limit / 2**30:.1f} GiB" if limit else ""
  return (
    f" Trained parameters, their moments and the rest of the state take {size:.2g} GiB of each "
    f"device{has}; the rest is for frozen models, the cache of sampling and activations."
  )


def _save_if_whole(iteration: int, state, checkpoints: Checkpoints) -> str:
  """Saves the state after `iteration` unless it was donated; returns a message of what is saved."""
  deleted = any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  if iteration and not processes.anywhere(deleted):
    checkpoints.save(iteration, state)
  saved = checkpoints.latest()
  return f" The state after iteration {saved} is saved; the same command goes on." if saved else ""


def _check_finite(figures, iteration: int, saved: int | None, workdir: pathlib.Path) -> None:
  bad = metrics.first_not_finite(figures)
  if bad is not None:
    kept = f"The checkpoint after iteration {saved} is kept" if saved else "Nothing was saved yet"
    raise UserError(
      f"Iteration {iteration + 1}: {bad} is {figures[bad]}. {kept} in {workdir}. "
      "Try a lower --learning_rate or --max_grad_norm; for score/mean look at the reward."
    )


@contextlib.contextmanager
def _deferred_signals():
  """Yields a list that is empty until SIGINT or SIGTERM arrives.

  A state that was donated to a running iteration cannot be saved, so the first signal waits until
  the iteration ends; a second signal ends the program as usual.
  """
  received: list[int] = []
  previous = {}

  def note(number, frame):
    del frame
    received.append(number)
    signal.signal(number, previous[number])
    # The console may be at work when the signal arrives, so it is not used.
    os.write(2, b"\nStopping after this iteration, which is saved. Once more stops at once.\n")

  try:
    for number in (signal.SIGINT, signal.SIGTERM):
      previous[number] = signal.signal(number, note)
  except ValueError:  # This is not the main thread, which alone can handle signals.
    previous.clear()
  try:
    yield received
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
