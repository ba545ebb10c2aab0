#!/usr/bin/env bash
# Builds the sdist, and the wheel from it, installs the wheel in a fresh environment and runs it
# there: what is published works without this repository.
#
#   bash launch/release_check.sh [FOLDER]
#
# FOLDER gets dist/ and the environment venv/; without one both are temporary. Python is $PYTHON, or
# the first on the PATH that r3jax supports.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh

if [ $# -gt 0 ]; then
  mkdir -p "$1"
  folder=$(cd "$1" && pwd)
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
bin="$folder/venv/bin"
"${PYTHON:-$(find_python)}" -m venv --clear "$folder/venv"
"$bin/python" -m pip install --quiet build
rm -rf "$folder/dist"
"$bin/python" -m build --outdir "$folder/dist" . >"$folder/build.log" 2>&1 ||
  { tail -n 20 "$folder/build.log" >&2; exit 1; }
ls -l "$folder/dist"

"$bin/python" -m pip install --quiet "$folder"/dist/*.whl
"$bin/python" -m pip check
cd "$folder" # away from the repository, which Python would import
version=$("$bin/r3jax" --version)
[ -f "dist/r3jax-$version.tar.gz" ] || { echo "--version is not that of the sdist" >&2; exit 1; }
"$bin/r3jax" --help >/dev/null
"$bin/r3jax" train --help >/dev/null
rm -rf converted
JAX_PLATFORMS=cpu "$bin/r3jax" convert --source=shapes --out=converted --format=bagel
[ -f converted/ema.safetensors ] || { echo "convert wrote no weights" >&2; exit 1; }
if "$bin/python" -c 'import tensorflow' 2>/dev/null; then
  echo "the base install must not have TensorFlow" >&2
  exit 1
fi
echo "r3jax $version: sdist and wheel build, and the wheel works in a fresh environment"
