#!/usr/bin/env bash
# Installs r3jax with its test requirements into .venv and runs the tests that are neither slow nor
# need PyTorch.
#
#   bash launch/test.sh [ARGUMENTS OF pytest ...]      for example: -m torch, or tests/report -k page
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh

prepare_venv test
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$venv/cache/jax}"
exec "$python" -m pytest -n 2 --dist worksteal -m "not slow and not torch" "$@"
