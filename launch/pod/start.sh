#!/usr/bin/env bash
# Starts the main job on this host with the environment of env.sh: `start.sh FLAGS OF launch/tpu.py ...`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/pod/env.sh
exec "${PYTHON:-python}" launch/tpu.py "$@"
