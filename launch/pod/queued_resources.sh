#!/usr/bin/env bash
# Runs the main job on a Cloud TPU slice that a queued resource provides.
#
#   bash launch/pod/queued_resources.sh create        asks for the slice
#   bash launch/pod/queued_resources.sh status        says how far the request is
#   bash launch/pod/queued_resources.sh install       copies this repository to every host and installs it
#   bash launch/pod/queued_resources.sh run [FLAGS OF launch/tpu.py ...]
#                                                     starts the job on every host, detached
#   bash launch/pod/queued_resources.sh logs          follows the log of the first host
#   bash launch/pod/queued_resources.sh stop          ends the job, which saves first, and waits until it
#                                                     is gone on every host; keeps the slice
#   bash launch/pod/queued_resources.sh delete        gives the slice back
#
# It reads the variables below. The job resumes when `run` is called again. Not run on Google Cloud yet.
set -euo pipefail

PROJECT="${PROJECT:-}"                          # Google Cloud project
ZONE="${ZONE:-us-east5-a}"
NAME="${NAME:-r3jax}"                           # of the request and of the slice
ACCELERATOR_TYPE="${ACCELERATOR_TYPE:-v5p-128}" # v5p counts cores (128 are 64 chips), v5e and v6e count chips
RUNTIME_VERSION="${RUNTIME_VERSION:-v2-alpha-tpuv5}"
TIER="${TIER:-}"                                # --spot, or --reserved; empty is on demand
WORKDIR="${WORKDIR:-}"                          # gs://BUCKET/FOLDER that all hosts see
CONFIG="${CONFIG:-configs/r3_geneval.py}"
REMOTE="${REMOTE:-r3jax}"                       # folder on the hosts, under the home
STOP_SECONDS="${STOP_SECONDS:-120}"             # how long stop waits: longer than preemption.grace_s

usage() {
  sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
  exit 2
}

need() {
  local name
  for name in "$@"; do
    [ -n "${!name}" ] || { echo "set the variable $name, see the top of $0" >&2; exit 2; }
  done
}

queued() {
  gcloud compute tpus queued-resources "$@" --project="$PROJECT" --zone="$ZONE"
}

# on WORKERS COMMAND: runs a command on "all" hosts of the slice, or on the host of that number.
on() {
  gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker="$1" --command="$2"
}

install_everywhere() {
  local repo archive
  repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  archive=$(mktemp --suffix=.tar.gz)
  git -C "$repo" archive --format=tar.gz --output="$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$NAME:$REMOTE.tar.gz" --project="$PROJECT" --zone="$ZONE" --worker=all
  rm "$archive"
  # Huge pages: JAX warns that the TPU's runtime starts slowly without them. uv brings a Python where
  # the system's is too old.
  on all "set -e
    sudo sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled'
    mkdir -p $REMOTE && tar -xzf $REMOTE.tar.gz -C $REMOTE && cd $REMOTE
    python3 -m pip install --quiet --user uv && export PATH=\$HOME/.local/bin:\$PATH
    source launch/venv.sh && prepare_venv tpu,gcs"
}

run_everywhere() {
  local flags
  flags=$(printf ' %q' --config="$CONFIG" --workdir="$WORKDIR" "$@")
  on all "cd $REMOTE && export JAX_COMPILATION_CACHE_DIR=${WORKDIR%/}-compiled && source launch/pod/env.sh
    nohup .venv/bin/python launch/tpu.py$flags >> run.log 2>&1 < /dev/null & echo \$! > run.pid"
}

# Asking one host would end the job on all, but only a host can say whether its process is gone.
stop_everywhere() {
  on all "pid=\$(cat $REMOTE/run.pid)
    kill \$pid || exit 0
    for _ in \$(seq $STOP_SECONDS); do kill -0 \$pid 2> /dev/null || exit 0; sleep 1; done
    echo \"process \$pid on \$(hostname) runs on after $STOP_SECONDS s\" >&2
    exit 1"
}

command="${1:-}"
shift || usage
case "$command" in
  create)
    need PROJECT
    tier=()
    [ -z "$TIER" ] || tier=("$TIER")
    queued create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR_TYPE" \
      --runtime-version="$RUNTIME_VERSION" "${tier[@]}"
    ;;
  status) need PROJECT; queued describe "$NAME" --format="value(state.state)" ;;
  install) need PROJECT; install_everywhere ;;
  run) need PROJECT WORKDIR; run_everywhere "$@" ;;
  logs) need PROJECT; on 0 "tail -n 100 -f $REMOTE/run.log" ;;
  stop) need PROJECT; stop_everywhere ;;
  delete) need PROJECT; queued delete "$NAME" --force --quiet ;;
  *) usage ;;
esac
