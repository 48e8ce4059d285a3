"""Flags for XLA with which the suite takes half the time: most of it is compilation."""

import importlib.metadata
import os

# Only with the emitters is a sweep bit for bit the same on other devices; see `population_test`.
BIT_FOR_BIT = "KLRL_TEST_BIT_FOR_BIT"
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# Other versions may not know these flags, and end the process that names one they do not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
  # One module of code in place of 32 side by side: a fifth less work, and every core has its own.
  QUICK += " --xla_cpu_parallel_codegen_split_count=1"
  if not os.environ.get(BIT_FOR_BIT):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
