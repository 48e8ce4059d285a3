"""Several processes that run one program: `jax.distributed`, and what they must agree on.

All processes run the same lines in the same order. Whatever could differ between them is done by
one process, the writer, which sends the result to the others (`on_writer`), or by each process,
which then tells the others whether it failed (`together`). So no process waits for one that took
another branch. With a single process these functions do nothing.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import pathlib
import pickle
import platform
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from klrl.errors import UserError

# A process that has ended waits this long for the others, before JAX ends them too.
_SECONDS_TO_FOLLOW = 60
# One that has not been heard of for so long is taken for dead, and JAX ends the others.
_SECONDS_UNHEARD = 30
# The others may start later. After the first time a process says what it waits for; after the
# second, which a variable may change, it ends.
_SECONDS_TO_WONDER, _SECONDS_TO_MEET = 20, 50
MEET_SECONDS = "KLRL_MEET_SECONDS"
_SECONDS_TO_COMPARE = 30
# Threads that outlive the program get this long, since a tracker may still have something to send.
_SECONDS_FOR_THREADS = 10
_OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")


def connect(flags: Mapping[str, object] | None = None) -> None:
  """Joins this process to the others, if there are any. Call it before anything is computed.

  `flags` are the values of the command's flags, which all processes must have in common.

  JAX itself finds the processes of Slurm, Open MPI 4, GKE and Cloud TPU. Elsewhere the variables
  JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them. Open MPI 5
  needs the first of these.

  Raises:
    UserError: there are several processes, and something that they need to meet is missing, or
      they run different code or have different flags.
  """
  # JAX's service would take SIGTERM away from `loop`, and outside of the loop ignore it.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
      given = "JAX_NUM_PROCESSES" in os.environ or _OPEN_MPI[0] not in os.environ
      names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if given else _OPEN_MPI
      count, index = _count_and_index(*names)
      _check_address(os.environ["JAX_COORDINATOR_ADDRESS"], listens=index == 0)
      told = {"num_processes": count, "process_id": index}
    else:
      told = {}
    seconds = _seconds_to_meet()
    with _told_while_waiting(seconds):
      jax.distributed.initialize(
        **told,
        heartbeat_timeout_seconds=_SECONDS_UNHEARD,
        shutdown_timeout_seconds=_SECONDS_TO_FOLLOW,
        # JAX's time limit aborts the process, so ours has to end it first.
        initialization_timeout=2 * seconds,
      )
    _check_same(_versions() | {f"--{name}": str(x) for name, x in (flags or {}).items()})
  except KeyError as error:
    raise UserError(f"JAX_COORDINATOR_ADDRESS is set, but not {error}.") from error
  except ValueError as error:
    if "coordinator_address" not in str(error):  # There is no cluster.
      raise
    # Each process would take itself for the only one, and all would write.
    if int(os.environ.get(_OPEN_MPI[0], 1)) > 1:
      raise UserError(
        "Open MPI started several processes, and JAX finds them by itself with its version 4 only. "
        "Say where process 0 runs: mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT ..."
      ) from error
  except RuntimeError as error:
    raise UserError(
      f"The processes cannot meet at {_address()}: {str(error).splitlines()[0]}. Has each its own "
      "index, and do all have the same address and number of processes?"
    ) from error


def _address() -> str:
  return os.environ.get("JAX_COORDINATOR_ADDRESS", "the address that the cluster gives")


def _seconds_to_meet() -> int:
  text = os.environ.get(MEET_SECONDS, str(_SECONDS_TO_MEET))
  if not text.isdecimal() or not int(text):
    raise UserError(f"{MEET_SECONDS}={text}: must be a positive whole number.")
  return int(text)


def _check_same(own: dict[str, str]) -> None:
  """Raises UserError in all processes if one has another value of `own` than process 0.

  Different programs would wait for each other for ever, or share what each computes for itself.
  So nothing is computed to find this out: the processes leave `own` where they met.
  """
  met = distributed.global_state
  own = {"number of processes": str(met.num_processes), **own}
  met.client.key_value_set(f"klrl/common/{met.process_id}", json.dumps(own))
  first = own
  for i in range(met.num_processes):  # By another number of processes there may be no such one.
    other = json.loads(
      met.client.blocking_key_value_get(f"klrl/common/{i}", 1000 * _SECONDS_TO_COMPARE)
    )
    first = first if i else other
    differing = [
      f"{x} {other.get(x)} and not {first.get(x)}"
      for x in first | other
      if other.get(x) != first.get(x)
    ]
    if differing:
      raise UserError(
        f"Process {i} has {', '.join(differing)} as process 0 has. Install the same on every host, "
        "and start all processes with the same flags and the same number."
      )


def _versions() -> dict[str, str]:
  """Returns what all processes of a run must have in common."""
  root, digest = pathlib.Path(__file__).parents[2], hashlib.blake2b(digest_size=4)
  for package in ("klrl", "experiments"):
    for path in sorted((root / package).rglob("*.py")):
      digest.update(path.read_bytes())
  return {
    "Python": platform.python_version(),
    "JAX": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "klrl": digest.hexdigest(),
  }


def _count_and_index(count_name: str, index_name: str) -> tuple[int, int]:
  texts = {name: os.environ[name] for name in (count_name, index_name)}
  if all(text.isdecimal() for text in texts.values()):
    count, index = map(int, texts.values())
    if index < count:
      return count, index
  given = " and ".join(f"{name}={text}" for name, text in texts.items())
  raise UserError(f"{given}: must be a number of processes, and an index from 0 to below it.")


def _check_address(address: str, *, listens: bool) -> None:
  """Raises UserError where nobody can meet at `address`, or this process cannot listen there."""
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise UserError(
      f"JAX_COORDINATOR_ADDRESS={address}: write HOST:PORT of process 0, as in 10.0.0.1:1234."
    )
  try:
    socket.getaddrinfo(host.strip("[]"), int(port))
  except OSError as error:
    raise UserError(
      f"JAX_COORDINATOR_ADDRESS={address}: the host is not known here ({error.strerror})."
    ) from error
  if not listens:
    return
  has_both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if has_both else socket.AF_INET
  try:  # JAX may crash where it cannot listen.
    socket.create_server(("", int(port)), family=family, dualstack_ipv6=has_both).close()
  except OSError as error:
    if error.errno != errno.EADDRINUSE:
      return
    raise UserError(
      f"The port of {address} is taken on this host, by another program or by a run that has not "
      "ended. Choose another port, for all processes."
    ) from error


@contextlib.contextmanager
def _told_while_waiting(seconds: int):
  """Says what this process waits for, and ends it with a message if the others never come.

  JAX waits in silence and then aborts.
  """

  def say(text):
    text = (
      f"This process has waited {text} for the others at {_address()}. Have all been started, each "
      "with its own index, is process 0 there, and is that port reachable and free?"
    )
    print(text, file=sys.stderr, flush=True)

  def give_up():
    say(f"{seconds} s, too long ({MEET_SECONDS} sets another number),")
    os._exit(1)  # The main thread is inside JAX and cannot be interrupted.

  timers = [
    threading.Timer(_SECONDS_TO_WONDER, say, [f"{_SECONDS_TO_WONDER} s"]),
    threading.Timer(seconds, give_up),
  ]
  for timer in timers:
    timer.daemon = True
    timer.start()
  try:
    yield
  finally:
    for timer in timers:
      timer.cancel()


def leave(why: str) -> None:
  """Waits until all processes leave; if the others do not, says `why` this one did.

  JAX ends the processes when one has left and the others have not followed in time. A failure of
  all processes is reported by the writer, and not here.
  """
  alone = threading.Timer(
    _SECONDS_TO_FOLLOW / 2,
    lambda: print(f"Process {jax.process_index()} alone: {why}", file=sys.stderr, flush=True),
  )
  alone.daemon = True
  alone.start()
  jax.distributed.shutdown()
  alone.cancel()


def end_alone(why: str) -> NoReturn:
  """Ends this process at once, says `why`, and waits for no other; they notice that it is gone."""
  print(f"Process {jax.process_index()}: {why}", file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(1)


def leave_threads(status: int) -> None:
  """Ends this process with `status` soon after its program, even if threads of a reward go on.

  Call it last, and only in a single process.
  """

  def end():
    if threading.main_thread().is_alive():  # The program has not ended.
      return
    names = sorted(thread.name for thread in threading.enumerate() if not thread.daemon)
    left = ", ".join(name for name in names if name != threading.main_thread().name)
    print(
      f"The program has ended. Threads that still run, perhaps of a reward, are ended: {left}.",
      file=sys.stderr,
      flush=True,
    )
    sys.stdout.flush()
    os._exit(status)

  # The interpreter waits for all threads that are not daemons.
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
  """Returns when all processes have called it; `what` names the place in the program."""
  multihost_utils.sync_global_devices(what)


def anywhere(flag: bool) -> bool:
  """Returns whether `flag` is true in any process; all processes must call it."""
  return asked_anywhere(flag)()


def asked_anywhere(flag: bool) -> Callable[[], bool]:
  """Returns answer() -> whether `flag` was true in any process when all of them asked.

  All processes must ask. Only the answer waits, until the devices have done what was before it.
  """
  if is_alone():
    return lambda: flag
  split, any_of = _flags()
  own = np.full(jax.local_device_count(), flag)
  found = any_of(jax.make_array_from_process_local_data(split, own, (jax.device_count(),)))
  return lambda: bool(found)


@functools.cache
def _flags():
  """Returns (the sharding of one flag for each device, any(flags), which every device gets)."""
  mesh = Mesh(np.array(jax.devices()), ("all",))
  whole = NamedSharding(mesh, PartitionSpec())
  return NamedSharding(mesh, PartitionSpec("all")), jax.jit(jnp.any, out_shardings=whole)


def together(fn: Callable) -> Callable:
  """Returns `fn` for all processes to call: if it fails in one, it fails in all.

  It is for work that each process does by itself and that may fail, such as reading files or
  running the user's code. `fn` must not wait for other processes.

  Raises, when called:
    UserError: `fn` raised a UserError here, or any error in another process.
  """

  @functools.wraps(fn)
  def call(*arguments, **named):
    if is_alone():
      return fn(*arguments, **named)
    found = failure = None
    try:
      found = fn(*arguments, **named)
    except Exception as error:  # Any error: without a word the others would wait for ever.
      failure = error
    failed = multihost_utils.process_allgather(np.array(failure is not None))
    if failed.any():
      first = int(failed.argmax())
      text = _broadcast(_told(failure), first)
      raise failure or UserError(text)
    return found

  return call


def on_writer(fn: Callable) -> Callable:
  """Returns `fn` for all processes to call: the writer runs it, and all get what it returns.

  It is for writing files, and for decisions that depend on files: processes that read files at
  different times could decide differently. `fn` must not wait for other processes, and its result
  must pickle.

  Raises, when called:
    UserError: `fn` raised a UserError, or, in another process than the writer, any error.
  """

  @functools.wraps(fn)
  def call(*arguments, **named):
    found = together(fn if is_writer() else lambda *_, **__: None)(*arguments, **named)
    return _broadcast(found, 0)

  return call


def in_shares(fn: Callable[[slice], np.ndarray], num_rows: int, *, unit: int = 1) -> np.ndarray:
  """Returns [K, num_rows], where each process computes fn(rows) [K, len(rows)] for its own rows.

  All processes must call it, and all get the same. Their rows are neighbours, as many in each but
  the last ones, which may have none. As with `together`, `fn` must not wait for other processes.

  Args:
    fn: takes a slice of the rows, which may be empty.
    num_rows: of all processes.
    unit: so many neighbouring rows stay with one process.

  Raises:
    UserError: as `together`.
  """
  if is_alone():
    return fn(slice(0, num_rows))
  size = unit * -(-num_rows // (unit * jax.process_count()))
  begin = min(size * jax.process_index(), num_rows)
  own = together(fn)(slice(begin, min(begin + size, num_rows)))
  padded = np.pad(own, ((0, 0), (0, size - own.shape[1])))
  every = multihost_utils.process_allgather(padded)  # [processes, K, size]
  return np.concatenate(list(every), axis=1)[:, :num_rows]


def _told(failure: Exception | None) -> str:
  """Returns the message by which the other processes report a failure of this one."""
  if failure is None or isinstance(failure, UserError):
    return str(failure)
  return f"Process {jax.process_index()}: {type(failure).__name__}: {failure}"


def _broadcast(value, source: int):
  """Returns the `value` that process `source` has.

  Only what another process of the same run has pickled is unpickled, never a model or data.
  """
  if is_alone():
    return value
  is_source = jax.process_index() == source
  data = np.frombuffer(pickle.dumps(value) if is_source else b"", np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data)), is_source))
  # A program is compiled for each size, so sizes are powers of two; pickle ignores the padding.
  padded = np.zeros(1 << size.bit_length(), np.uint8)
  padded[: len(data)] = data
  return pickle.loads(multihost_utils.broadcast_one_to_all(padded, is_source).tobytes())
