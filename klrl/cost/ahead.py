"""Optimises a program for TPUs that are not there, as far as its costs can be read.

libtpu takes seconds to optimise a program, lay out its memory and write both down, and then many
minutes for its machine code, of which nothing is read here. So a process compiles the program until
its text is there, and is ended. Machine code takes memory too, which is then not known.
"""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
from jax._src import compiler
from jax._src.interpreters import mlir
from jax._src.lib import xla_client
from jax._src.lib.mlir import ir

from klrl.devices import parallel

_ROOT = pathlib.Path(__file__).parents[2]


def optimised(lowered: jax.stages.Lowered, topology: str) -> tuple[str, dict[str, int]]:
  """Returns (the text of the optimised program, bytes of a device's memory by what they hold).

  Args:
    lowered: a program for devices that `parallel.topology_devices(topology)` returned.
    topology: the name of the TPU slice.

  Raises:
    JaxRuntimeError: what the compiler says of a program that it cannot compile.
  """
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    _write_for_compiler(lowered, folder)
    with _compiling(folder, topology) as process:
      text = None
      while text is None and process.poll() is None:
        time.sleep(0.1)
        text = dumped(folder / "text")
    if text is None:
      error = folder / "error"
      said = (error if error.exists() else folder / "log").read_text()
      raise jax.errors.JaxRuntimeError(said[-3000:] or "The compiler ended without a word.")
    (assigned,) = folder.glob("text/module_0000.*buffer-assignment.txt")
    return text, memory_of(assigned.read_text())


def dumped(folder: pathlib.Path) -> str | None:
  """Returns the text that libtpu writes where `xla_dump_to` is `folder`, None until all is there.

  It is that of the optimised program, written before its machine code is made. Other modules in the
  folder are parts of the first.
  """
  for path in folder.glob("module_0000.*.after_optimizations_after_buffer_assignment.txt"):
    text = path.read_text()
    # The computation that runs is the last one.
    if re.search(r"^ENTRY.*^}\s*\Z", text, re.DOTALL | re.MULTILINE):
      return text
  return None


def memory_of(assigned: str) -> dict[str, int]:
  """Returns the bytes of main memory that a program takes, from libtpu's list of its buffers.

  What is donated is an argument. Buffers of other memories have a colour, and what is local to a
  thread is a view of another buffer.
  """
  found = {"arguments": 0, "temporaries": 0, "outputs": 0}
  of_main = r"^allocation \d+: size (\d+), page \d+, (?!thread-local)(.*)$"
  for size, what in re.findall(of_main, assigned, re.MULTILINE):
    is_output = "maybe-live-out" in what
    holds = "arguments" if "parameter" in what else "outputs" if is_output else "temporaries"
    found[holds] += int(size)
  return found


class _Taken(Exception):
  """What JAX was about to give to a compiler: (module, ids of the devices, options)."""


def _write_for_compiler(lowered: jax.stages.Lowered, folder: pathlib.Path) -> None:
  """Writes the module, the devices and the options with which JAX would compile a program."""

  def take(backend, module, devices, options, *others):
    raise _Taken(module, [device.id for device in devices.flat], options)

  # JAX offers no way to be asked for them.
  compile_in_process, compiler.compile_or_get_cached = compiler.compile_or_get_cached, take
  try:
    lowered.compile(compiler_options={"xla_dump_to": str(folder / "text")})
  except _Taken as taken:
    module, devices, options = taken.args
  finally:
    compiler.compile_or_get_cached = compile_in_process
  with open(folder / "module", "wb") as file:
    module.operation.write_bytecode(file)
  (folder / "devices").write_text(json.dumps(devices))
  (folder / "options").write_bytes(options.SerializeAsString())


@contextlib.contextmanager
def _compiling(folder: pathlib.Path, topology: str) -> Iterator[subprocess.Popen]:
  """Yields the process that compiles what is in `folder`, and ends it."""
  command = [sys.executable, "-m", __name__, str(folder), topology]
  paths = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
  with open(folder / "log", "w") as log:
    environment = os.environ | {"PYTHONPATH": paths}
    process = subprocess.Popen(
      command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
    )
  try:
    yield process
  finally:
    process.kill()
    process.wait()


def _compile(folder: pathlib.Path, topology: str) -> None:
  """Compiles what `_write_for_compiler` has written."""
  found = {device.id: device for device in parallel.topology_devices(topology)}
  devices = tuple(found[i] for i in json.loads((folder / "devices").read_text()))
  options = xla_client.CompileOptions.ParseFromString((folder / "options").read_bytes())
  with mlir.make_ir_context():
    module = ir.Module.parse((folder / "module").read_bytes())
    try:
      compiler.backend_compile_and_load(
        devices[0].client, module, xla_client.DeviceList(devices), options, []
      )
    except jax.errors.JaxRuntimeError as error:
      (folder / "error").write_text(str(error))


if __name__ == "__main__":
  _compile(pathlib.Path(sys.argv[1]), sys.argv[2])
