"""Test set-up: four fake CPU devices, and shapes that may only broadcast when asked to."""

import os

# Before jax is imported: chex's pmap variants are skipped on one device.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
