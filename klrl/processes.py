"""Several processes that run one program: `jax.distributed`, and what they must agree on.

All processes run the same lines in the same order. What depends on the process is done by the
writer (`on_writer`), or by each with a word to the others when it fails (`together`); so nobody
waits for a process that has gone another way. With one process all of it is nothing.
"""

import functools
import os
import pickle
import sys
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from klrl.errors import UserError

# A process that has ended waits this long for the others, which then are ended too.
_SECONDS_TO_FOLLOW = 60
# Threads that outlive the program get this long, for what a tracker may have to send.
_SECONDS_FOR_THREADS = 10
_OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")


def join() -> None:
  """Makes this process one of several, where it is; to be called before anything is computed.

  JAX itself finds Slurm, Open MPI 4, GKE and Cloud TPU. Elsewhere
  JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID say it. Open MPI 5 needs
  the first of them.

  Raises:
    UserError: there are several processes, and something that joins them is missing.
  """
  # It would take SIGTERM away from `loop`, and where no loop runs nothing would obey it.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
      given = "JAX_NUM_PROCESSES" in os.environ or _OPEN_MPI[0] not in os.environ
      count, index = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if given else _OPEN_MPI
      jax.distributed.initialize(
        num_processes=int(os.environ[count]),
        process_id=int(os.environ[index]),
        shutdown_timeout_seconds=_SECONDS_TO_FOLLOW,
      )
    else:
      jax.distributed.initialize(shutdown_timeout_seconds=_SECONDS_TO_FOLLOW)
  except KeyError as error:
    raise UserError(f"JAX_COORDINATOR_ADDRESS is set, but not {error}.") from error
  except ValueError as error:
    if "coordinator_address" not in str(error):  # There is no cluster.
      raise
    # They would all be the writer.
    if int(os.environ.get(_OPEN_MPI[0], 1)) > 1:
      raise UserError(
        "Open MPI started several processes, and JAX finds them by itself with its version 4 only. "
        "Say where process 0 runs: mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT ..."
      ) from error


def leave(why: str) -> None:
  """Ends this process's part when all do; where it is alone, says why, and the others are ended.

  What fails everywhere is said by the writer. JAX ends the processes when one has left and others
  have not followed.
  """
  alone = threading.Timer(
    _SECONDS_TO_FOLLOW / 2,
    lambda: print(f"Process {jax.process_index()} alone: {why}", file=sys.stderr, flush=True),
  )
  alone.daemon = True
  alone.start()
  jax.distributed.shutdown()
  alone.cancel()


def leave_threads(status: int) -> None:
  """Ends this process with `status` soon after its program, though threads of a reward's go on.

  To be called last, in a process that is alone.
  """

  def end():
    if threading.main_thread().is_alive():  # The program has not ended.
      return
    names = sorted(thread.name for thread in threading.enumerate() if not thread.daemon)
    left = ", ".join(name for name in names if name != threading.main_thread().name)
    print(
      f"All is saved. What still runs, perhaps of the reward, is left behind: {left}.",
      file=sys.stderr,
      flush=True,
    )
    sys.stdout.flush()
    os._exit(status)

  # The interpreter waits for all threads but such a one.
  timer = threading.Timer(_SECONDS_FOR_THREADS, end)
  timer.daemon = True
  timer.start()


def is_writer() -> bool:
  """Returns whether this process is the one that writes files and prints."""
  return jax.process_index() == 0


def is_alone() -> bool:
  """Returns whether this process is the only one."""
  return jax.process_count() == 1


def wait_for_all(what: str) -> None:
  """Returns when all processes are here; `what` names the place."""
  multihost_utils.sync_global_devices(what)


def anywhere(flag: bool) -> bool:
  """Returns whether `flag` is true in any process; all must ask."""
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def together(fn: Callable) -> Callable:
  """Returns `fn` for all processes to call: where it fails in one, it fails in all.

  For what a process does by itself and may fail at: reading files, or the user's code. `fn` must
  not wait for other processes.

  Raises, when called:
    UserError: `fn` raised it here, or anything in another process.
  """

  @functools.wraps(fn)
  def call(*arguments, **named):
    if is_alone():
      return fn(*arguments, **named)
    found = failure = None
    try:
      found = fn(*arguments, **named)
    except Exception as error:  # Whatever it is: the others would wait for ever.
      failure = error
    failed = multihost_utils.process_allgather(np.array(failure is not None))
    if failed.any():
      first = int(failed.argmax())
      text = _broadcast(_told(failure), first)
      raise failure or UserError(text)
    return found

  return call


def on_writer(fn: Callable) -> Callable:
  """Returns `fn` for all processes to call: the writer does it, and all get what it returns.

  For what is written, and for what files decide: processes that read them at different times would
  decide differently. `fn` must not wait for other processes; what it returns must pickle.

  Raises, when called:
    UserError: `fn` raised it, or in the writer anything.
  """

  @functools.wraps(fn)
  def call(*arguments, **named):
    found = together(fn if is_writer() else lambda *_, **__: None)(*arguments, **named)
    return _broadcast(found, 0)

  return call


def _told(failure: Exception | None) -> str:
  """Returns what the other processes say of a failure here."""
  if failure is None or isinstance(failure, UserError):
    return str(failure)
  return f"Process {jax.process_index()}: {type(failure).__name__}: {failure}"


def _broadcast(value, source: int):
  """Returns the `value` that process `source` has.

  What is unpickled was pickled by the same run in another process: nothing of a model's or of data.
  """
  if is_alone():
    return value
  is_source = jax.process_index() == source
  data = np.frombuffer(pickle.dumps(value) if is_source else b"", np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data)), is_source))
  # A program is compiled for each size, so there are few; pickle knows its end.
  padded = np.zeros(1 << size.bit_length(), np.uint8)
  padded[: len(data)] = data
  return pickle.loads(multihost_utils.broadcast_one_to_all(padded, is_source).tobytes())
