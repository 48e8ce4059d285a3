"""Flags for XLA with which a test takes two thirds of the time: most of it is compilation."""

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
