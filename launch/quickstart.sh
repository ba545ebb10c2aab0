#!/usr/bin/env bash
# Installs r3jax into .venv and trains the shipped model on the embedded world, on whatever device
# JAX finds.
#
#   bash launch/quickstart.sh [WORKDIR] [FLAGS OF launch/tpu.py ...]
#
# WORKDIR is runs/quickstart in this repository unless given. The run resumes when started again.
set -euo pipefail
workdir=runs/quickstart
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
  workdir=$1
  [[ $workdir == /* || $workdir == *://* ]] || workdir="$PWD/$workdir"
  shift
fi
cd "$(dirname "$0")/.."
source launch/venv.sh

prepare_venv
"$python" launch/tpu.py --config=configs/r3_geneval.py:shapes --workdir="$workdir" "$@"
"$python" -m r3jax report "$workdir"
