"""Checks and benchmarks of the kernels on a machine with an NVIDIA GPU; scripts/gpu_check.sh runs them."""
