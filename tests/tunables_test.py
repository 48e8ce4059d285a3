"""A program begins once more with tunables, and is the same process with the same arguments."""

import os
import pathlib
import subprocess
import sys

import pytest

from klrl.devices import tunables

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import os, sys
import experiments
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], flush=True)
"""


class Restarted(Exception):
  """In place of a second start."""


@pytest.fixture
def begun(monkeypatch):
  """What a program is begun anew with, on a Linux with three cores."""
  begun = []

  def execve(*arguments):
    begun.extend(arguments)
    raise Restarted

  monkeypatch.setattr(os, "execve", execve)
  monkeypatch.setattr(sys, "platform", "linux")
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 3}, raising=False)
  monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "experiments.ppo", "--workdir=a b"])
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  return begun


def test_the_second_start_has_the_same_command_and_the_tunables(begun):
  with pytest.raises(Restarted):
    tunables.begin_anew()
  path, command, environment = begun
  assert path == sys.executable
  assert command == [sys.executable, "-m", "experiments.ppo", "--workdir=a b"]
  value = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=3"
  assert environment == os.environ | {"GLIBC_TUNABLES": value}


@pytest.mark.parametrize("value", ["", "glibc.malloc.arena_max=1"])
def test_what_the_user_has_set_stays(begun, monkeypatch, value):
  monkeypatch.setenv("GLIBC_TUNABLES", value)
  tunables.begin_anew()


def test_other_systems_and_a_start_that_fails_go_on(begun, monkeypatch):
  def refuse(*_):
    raise PermissionError

  monkeypatch.setattr(os, "execve", refuse)
  tunables.begin_anew()
  monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("no Linux"))
  monkeypatch.setattr(sys, "platform", "darwin")
  tunables.begin_anew()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such library")
def test_a_program_is_begun_anew_and_an_import_is_not(tmp_path):
  (tmp_path / "experiments").mkdir()
  package = (ROOT / "experiments/__init__.py").read_text()
  (tmp_path / "experiments/__init__.py").write_text(package)
  (tmp_path / "experiments/own.py").write_text(PROGRAM)
  environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  environment |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}

  value = f"glibc.malloc.hugetlb=1:glibc.malloc.arena_max={len(os.sched_getaffinity(0))}"

  def start(*command):
    process = subprocess.Popen(
      [sys.executable, *command, "a b"],
      cwd=tmp_path,
      env=environment,
      stdout=subprocess.PIPE,
      text=True,
    )
    printed = process.communicate()[0].split(maxsplit=2)
    assert not process.returncode
    return int(printed[0]) == process.pid, printed[1], printed[2].strip()

  assert start("-m", "experiments.own") == (True, value, "['a b']")
  assert start(str(tmp_path / "experiments/own.py")) == (True, "None", "['a b']")
