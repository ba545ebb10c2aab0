#!/usr/bin/env bash
# Lints, checks the format and checks the types of the heart: a minute, no test.
#
#   bash launch/check.sh          check
#   bash launch/check.sh --fix    format, and mend what ruff can mend
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh

prepare_venv test
bin=$(dirname "$python")
if [ "${1:-}" = --fix ]; then
  "$bin/ruff" check --fix .
  "$bin/ruff" format .
fi
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/pyright"
