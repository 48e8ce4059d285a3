"""Tests of what importing and listing costs, and of what is installed."""

import json
import pathlib
import subprocess
import sys
import tomllib

import pytest

import klrl
from klrl.__main__ import main

ROOT = pathlib.Path(__file__).parents[1]


def test_the_ops_import_jax_and_chex_alone():
  code = (
    "import sys, json, jax, chex; before = set(sys.modules); import klrl.ops;"
    "print(json.dumps(sorted(set(sys.modules) - before)))"
  )
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
  names = json.loads(done.stdout)
  foreign = {name.split(".")[0] for name in names} - {"klrl"} - sys.stdlib_module_names
  assert not foreign
  assert {name for name in names if name.startswith("klrl.")} == {
    "klrl.ops",
    *(f"klrl.ops.{path.stem}" for path in (ROOT / "klrl/ops").glob("[!_]*.py")),
  }


def test_the_wheel_holds_the_library_alone_with_its_types():
  setuptools = pytest.importorskip("setuptools")
  settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
  found = setuptools.find_packages(ROOT, include=settings["packages"]["find"]["include"])
  assert {name.split(".")[0] for name in found} == {"klrl"}
  folders = {path.parent for path in (ROOT / "klrl").rglob("*.py")}
  assert {str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders} == set(found)
  assert settings["package-data"]["klrl"] == ["py.typed"]
  assert (ROOT / "klrl/py.typed").exists()
  assert klrl.__version__[0].isdigit()


def test_every_experiment_and_preset_is_listed_with_a_line(monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  assert main() == 0
  printed = capsys.readouterr().out
  assert "  ppo " in printed and "RLHF with PPO" in printed
  for path in (ROOT / "experiments").glob("*.py"):
    is_program = "__main__" in path.read_text()
    assert (f"\n  {path.stem} " in printed) == is_program, path.stem
  for path in (ROOT / "experiments/presets").glob("*.flags"):
    assert f"experiments/presets/{path.name} " in printed
    first = path.read_text().splitlines()[0]
    assert first.startswith("# experiments."), f"{path}: its first line names its experiment."
    assert first.removeprefix("# ") in printed
  assert max(map(len, printed.splitlines())) <= 150


def test_outside_of_a_checkout_the_list_says_where_the_experiments_are(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  assert main() == 1
  assert "in a checkout of the project" in capsys.readouterr().out
