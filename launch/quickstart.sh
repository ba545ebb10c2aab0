#!/usr/bin/env bash
# Installs r3jax into .venv and trains the shipped model on the embedded world, on whatever device
# JAX finds.
#
#   bash launch/quickstart.sh [WORKDIR] [FLAGS OF launch/tpu.py ...]
#
# WORKDIR is runs/quickstart in this repository unless given. The run resumes when started again. On
# SIGTERM and Ctrl-C it saves and ends with exit code 75.
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
# In the background: bash would hand on a signal only after the run.
"$python" launch/tpu.py --config=configs/r3_geneval.py:shapes --workdir="$workdir" "$@" &
run=$!
trap 'kill -TERM $run' TERM INT
wait $run || true # a signal ends this, too
wait $run         # the run's exit code
