"""Test set-up: four fake CPU devices, fast compilation, and no shapes that broadcast unasked."""

import os

from quick_compilation import QUICK

# Before jax is imported. chex's pmap variants are skipped on one device.
os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4 {QUICK}"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
