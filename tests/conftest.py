"""Test set-up: four fake CPU devices, fast compilation, and no shapes that broadcast unasked."""

import os

from quick_compilation import QUICK

# Before jax is imported. chex's pmap variants are skipped on one device.
os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4 {QUICK}"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# The daily loop, `pytest -m quick`: pure functions, settings, and how the code is laid out.
QUICK_FILES = [
  "advantage_rules",
  "advantages",
  "common",
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
  "published_cases",
  "rewards",
  "schema",
  "sweep_flags",
  "uniform",
  "variants",
]


def pytest_collection_modifyitems(items):
  for item in items:
    if item.path.stem.removesuffix("_test") in QUICK_FILES:
      item.add_marker(pytest.mark.quick)
