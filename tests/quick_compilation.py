"""Flags for XLA with which the suite takes half the time: most of it is compilation."""

import importlib.metadata
import os

# What is bit for bit the same on other devices is so with the emitters alone; see `sweep_test`.
BIT_FOR_BIT = "KLRL_TEST_BIT_FOR_BIT"
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# Later versions do not know the flag, and end the process that names it.
if not os.environ.get(BIT_FOR_BIT) and importlib.metadata.version("jaxlib").startswith("0.10."):
  QUICK += " --xla_cpu_use_fusion_emitters=false"
