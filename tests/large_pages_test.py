"""A program begins once more with large pages, and is the same process with the same arguments."""

import os
import pathlib
import subprocess
import sys

import pytest

from klrl.devices import large_pages

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import os, sys
import experiments
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], flush=True)
"""


class Restarted(Exception):
  """In place of a second start."""


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """A Linux that gives large pages to those who ask, and what a program is begun anew with."""
  setting, begun = tmp_path / "enabled", []
  setting.write_text("always [madvise] never\n")

  def execve(*arguments):
    begun.extend(arguments)
    raise Restarted

  monkeypatch.setattr(large_pages, "_SETTING", setting)
  monkeypatch.setattr(os, "execve", execve)
  monkeypatch.setattr(sys, "platform", "linux")
  monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "experiments.ppo", "--workdir=a b"])
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  return setting, begun


def test_the_second_start_has_the_same_command_and_large_pages(machine):
  with pytest.raises(Restarted):
    large_pages.restart_with()
  path, command, environment = machine[1]
  assert path == sys.executable
  assert command == [sys.executable, "-m", "experiments.ppo", "--workdir=a b"]
  assert environment == os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize("text", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_where_asking_changes_nothing_there_is_one_start(machine, text):
  machine[0].unlink() if text is None else machine[0].write_text(text)
  large_pages.restart_with()


@pytest.mark.parametrize("value", ["", "glibc.malloc.arena_max=1"])
def test_what_the_user_has_set_stays(machine, monkeypatch, value):
  monkeypatch.setenv("GLIBC_TUNABLES", value)
  large_pages.restart_with()


def test_other_systems_and_a_start_that_fails_go_on(machine, monkeypatch):
  def refuse(*_):
    raise PermissionError

  monkeypatch.setattr(os, "execve", refuse)
  large_pages.restart_with()
  monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("no Linux"))
  monkeypatch.setattr(sys, "platform", "darwin")
  large_pages.restart_with()


@pytest.mark.skipif(not large_pages.variables(), reason="nobody has to ask on this machine")
def test_a_program_is_begun_anew_and_an_import_is_not(tmp_path):
  (tmp_path / "experiments").mkdir()
  package = (ROOT / "experiments/__init__.py").read_text()
  (tmp_path / "experiments/__init__.py").write_text(package)
  (tmp_path / "experiments/own.py").write_text(PROGRAM)
  environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  environment |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}

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

  assert start("-m", "experiments.own") == (True, "glibc.malloc.hugetlb=1", "['a b']")
  assert start(str(tmp_path / "experiments/own.py")) == (True, "None", "['a b']")
