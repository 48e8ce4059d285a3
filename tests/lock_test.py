"""Tests of the lock of a folder: who is refused, who waits, and what stays of it."""

import pathlib
import subprocess
import sys
import threading
import time

import pytest

from klrl.errors import UserError
from klrl.run import lock

# Holds a folder until it is told to end, in whatever way.
HOLDER = """
import os, pathlib, sys
from klrl.run import lock
with lock.held(pathlib.Path(sys.argv[1]), wait=False):
  if os.fork() == 0:  # As a reward with a pool does; it outlives its parent.
    os.close(1)
    sys.stdin.readline()
    os._exit(0)
  print("held", flush=True)
  sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
  """A process that holds tmp_path / "runs/a"."""
  command = [sys.executable, "-c", HOLDER, str(tmp_path / "runs/a")]
  process = subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=".", env=None
  )
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.communicate()


def test_who_comes_second_is_told_who_holds_the_folder_and_a_killed_one_blocks_nobody(
  tmp_path, holder
):
  day = time.strftime("%Y-%m-%d")
  message = rf"runs/a is in use by process {holder.pid} on .*, since {day} .*--workdir"
  with pytest.raises(UserError, match=message), lock.held(tmp_path / "runs/a", wait=False):
    pass
  with lock.held(tmp_path / "runs/b", wait=False):  # Another folder is free.
    pass
  holder.kill()
  holder.wait()
  assert (tmp_path / "runs/a" / lock.FILE).exists()
  with lock.held(tmp_path / "runs/a", wait=False):
    pass


def test_who_waits_goes_on_when_the_other_has_ended(tmp_path, holder, monkeypatch, capsys):
  monkeypatch.setattr(lock, "_SECONDS", 0.01)
  timer = threading.Timer(0.1, holder.communicate, ["\n"])
  timer.start()
  with lock.held(tmp_path / "runs/a", wait=True):
    assert holder.wait() == 0
  timer.join()  # The fixture communicates too.
  assert f"Waiting for process {holder.pid}" in " ".join(capsys.readouterr().out.split())


def test_a_folder_that_stayed_empty_is_not_left_behind(tmp_path):
  with lock.held(tmp_path / "runs/a", wait=False):
    assert (tmp_path / "runs/a").is_dir()
    with lock.held(tmp_path / "runs/a", wait=False):  # Who holds it passes.
      pass
    assert (tmp_path / "runs/a" / lock.FILE).exists()
  assert not list(tmp_path.iterdir())
  with lock.held(tmp_path / "runs/a", wait=False):
    (tmp_path / "runs/a/metrics.jsonl").touch()
  assert [path.name for path in (tmp_path / "runs/a").iterdir()] == ["metrics.jsonl"]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
  def refuse(*_):
    raise OSError(lock.errno.ENOLCK, "No locks available")

  monkeypatch.setattr(lock.fcntl, "lockf", refuse)
  with lock.held(tmp_path / "a", wait=False):
    pass
  assert "has no locks. Make sure" in " ".join(capsys.readouterr().out.split())


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path):
  (tmp_path / "file").touch()
  for folder in (tmp_path / "file/run", pathlib.Path("/proc/none/run")):
    message = f"The folder {folder} cannot be made: .*Choose another --workdir"
    with pytest.raises(UserError, match=message), lock.held(folder, wait=True):
      pass
