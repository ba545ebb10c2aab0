#!/usr/bin/env bash
# Installs r3jax with its test requirements into .venv and runs the tests that are not slow and need no PyTorch.
#
#   bash launch/test.sh [ARGUMENTS OF pytest ...]      for example: -m torch, or tests/io -k report
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh

prepare_venv test
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$venv/cache/jax}"
exec "$python" -m pytest -n 2 --dist worksteal -m "not slow and not torch" "$@"
