"""Ahead-of-time compilation for TPU topologies: memory, time and communication without a TPU."""
