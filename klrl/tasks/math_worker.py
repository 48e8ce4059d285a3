"""Asks math-verify whether two answers are equal, in a process that can be ended.

What math-verify is given may take it for ever, and nothing inside of a process stops it for sure.
`Worker` starts this file as a program, which answers lines of JSON, and kills it when the time is
over. The file imports nothing of klrl.

math-verify's extraction of plain expressions is never used, for it hands them to Python's eval. The
LaTeX parser that is used lets nothing but literals of numbers get there.
"""

import atexit
import json
import logging
import pathlib
import selectors
import subprocess
import sys

_PROGRAM = pathlib.Path(__file__).resolve()
_SECONDS_TO_START = 120.0


class Worker:
  """A process that answers `verified`; it is started when it is asked, first and after a kill."""

  def __init__(self):
    self._process: subprocess.Popen | None = None
    atexit.register(self.stop)

  def verified(self, reference: str, answer: str, *, timeout: float) -> bool:
    """Returns whether the answers are equal; False where it takes longer than `timeout` seconds."""
    if self._process is None or self._process.poll() is not None:
      self._process = subprocess.Popen(
        [sys.executable, "-P", str(_PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the run, which ends this process itself.
      )
      if self._line(_SECONDS_TO_START) != b"ready\n":
        raise RuntimeError("The process of math-verify did not start.")
    self._process.stdin.write(json.dumps([reference, answer]).encode() + b"\n")
    self._process.stdin.flush()
    return self._line(timeout) == b"true\n"

  def _line(self, timeout: float) -> bytes:
    """Returns the next line of the process; nothing, and no process, where it takes too long."""
    with selectors.DefaultSelector() as selector:
      selector.register(self._process.stdout, selectors.EVENT_READ)
      if selector.select(timeout):
        return self._process.stdout.readline()
    self.stop()
    return b""

  def stop(self) -> None:
    """Ends the process, if there is one."""
    if self._process is not None:
      self._process.kill()
      self._process.communicate()
      self._process = None


def verified(reference: str, answer: str) -> bool:
  """Returns whether math-verify says that the LaTeX of two answers is equal."""
  import math_verify

  def parse(text):
    return math_verify.parse(
      rf"\boxed{{{text}}}",
      [math_verify.LatexExtractionConfig()],
      fallback_mode="no_fallback",
      parsing_timeout=None,
    )

  return math_verify.verify(parse(reference), parse(answer), timeout_seconds=None)


def main() -> None:
  """Answers lines of [reference, answer] until the other side closes."""
  logging.disable(logging.ERROR)  # It warns that its own time limit is off; `Worker` has one.
  verified("1", "1")  # imports
  print("ready", flush=True)
  for line in sys.stdin:
    try:
      found = verified(*json.loads(line))
    except Exception:  # What cannot be compared is not equal.
      found = False
    print(json.dumps(bool(found)), flush=True)


if __name__ == "__main__":
  main()
