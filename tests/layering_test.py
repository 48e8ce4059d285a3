"""Imports point one way, and frameworks stay in their place."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# A module may import its own level and those below. A level belongs to a module or to its room;
# what is not named is in the middle.
LEVELS = {
  "ops": 0,
  "errors": 0,
  "figures": 0,
  "schema": 0,
  "run.progress": 0,
  "models": 1,
  "devices": 1,
  "exact": 1,
  "algorithm.objective": 1,
  "algorithm.kl_terms": 1,
  "run.loop": 3,
  "rlhf": 4,
  "supervised": 4,
  "population": 4,
  "cost.dry_run": 4,
}
MIDDLE = 2


def _files(package):
  return sorted((ROOT / package).rglob("*.py"))


def _imports(path):
  """Yields the full dotted name of everything that a file imports, wherever it does."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: write imports in full, not relative."
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _within(name, *packages):
  return any(name == package or name.startswith(package + ".") for package in packages)


def _level(module):
  """Returns the level of a dotted name within klrl: its own, or that of the room it is in."""
  parts = module.split(".")
  names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
  return next((LEVELS[name] for name in names if name in LEVELS), MIDDLE)


def _offences(path):
  """Yields what is wrong with the imports of one file of the library."""
  parts = path.relative_to(ROOT / "klrl").with_suffix("").parts
  room, module = parts[0], ".".join(parts)
  for name in _imports(path):
    if _within(name, "experiments"):
      yield f"{name}: the library knows no experiment"
    if _within(name, "absl.flags"):
      yield f"{name}: flags are read in experiments only"
    if _within(name, "flax") and room != "models":
      yield f"{name}: Flax stays in klrl/models"
    if room == "ops" and not (
      _within(name, "jax", "chex", "klrl.ops") or name.split(".")[0] in sys.stdlib_module_names
    ):
      yield f"{name}: ops import jax, chex and each other only"
    if _within(name, "klrl") and module != "__init__":
      imported = name.partition(".")[2]
      if not imported or _level(imported) > _level(module):
        yield f"{name}: above klrl.{module}"


@pytest.mark.parametrize("path", _files("klrl"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
  assert not list(_offences(path))


@pytest.mark.parametrize(
  ("module", "line"),
  [
    ("ops/kl", "import optax"),
    ("ops/kl", "from klrl import errors"),
    ("algorithm/learner", "from klrl.run.loop import iterate"),
    ("models/decoder", "from klrl import sampling"),
    ("exact/oracle", "from klrl.algorithm.learner import make_update_fn"),
    ("run/loop", "from absl import flags"),
    ("run/loop", "def lazily():\n  import flax.nnx"),
    ("devices/parallel", "from experiments import ppo"),
  ],
)
def test_an_import_that_points_up_is_seen(module, line, tmp_path, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
  path = tmp_path / "klrl" / f"{module}.py"
  path.parent.mkdir(parents=True)
  path.write_text(line)
  assert list(_offences(path))


def test_no_two_modules_have_one_name():
  names = [path.stem for package in ("klrl", "experiments") for path in _files(package)]
  assert {name for name in names if names.count(name) > 1} <= {"__init__"}
