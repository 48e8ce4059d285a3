"""Test set-up: four fake CPU devices, fast compilation, and no shapes that broadcast unasked."""

import gc
import os
import sys

from quick_compilation import QUICK

# Before jax is imported. chex's pmap variants are skipped on one device.
os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4 {QUICK}"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Whoever has set it is not given the folder of the user's cache, which tests leave alone.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "true")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from klrl.run import checkpoint

jax.config.update("jax_numpy_rank_promotion", "raise")

# The daily loop, `pytest -m quick`: pure functions, settings, and how the code is laid out.
QUICK_FILES = [
  "advantage_rules",
  "advantages",
  "columns",
  "common",
  "compilation",
  "controllers",
  "epochs",
  "gradients",
  "importance",
  "imports",
  "kl",
  "layering",
  "log_probs",
  "losses",
  "masking",
  "memory",
  "metrics",
  "objective",
  "rewards",
  "schema",
  "sweep_flags",
  "tunables",
  "variants",
]


# The longest files begin, so that no core waits for another at the end.
LONGEST_FILES = [
  "flag_walk",
  "population",
  "processes",
  "experiments",
  "work_shares",
  "kl_audit",
  "faults",
  "dry_run",
  "mode_seeking",
  "tree_task",
  "learner",
  "learner_abilities",
]


def pytest_collection_modifyitems(items):
  order = {f"{name}_test": i for i, name in enumerate(LONGEST_FILES)}
  items.sort(key=lambda item: order.get(item.path.stem, len(order)))
  for item in items:
    if item.path.stem.removesuffix("_test") in QUICK_FILES:
      item.add_marker(pytest.mark.quick)


def pytest_collection_finish():
  """Makes collections of garbage rare: a tenth of the time goes into them otherwise.

  Each would go through all that has been imported, and traces make thousands of objects that live.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(100_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def no_leftovers():
  """What a failed save or reading leaves behind is not told, as in the programs.

  It would be told in whichever test runs by then.
  """
  before, sys.unraisablehook = (
    sys.unraisablehook,
    checkpoint.without_leftovers(sys.unraisablehook),
  )
  yield
  sys.unraisablehook = before


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
  """Whole runs of a module read from the disk what runs of this process have compiled before.

  The key has the whole program and all flags, and the folder goes with the session.
  """
  settings = {
    "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compiled"),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
