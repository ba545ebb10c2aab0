"""Measures an iteration stage by stage, on CPUs, GPUs and TPUs, against what the machine can do."""
