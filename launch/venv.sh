# Sourced by the other scripts: `prepare_venv [EXTRA]` leaves $python, an interpreter of the
# project's own environment .venv with the package, its requirements and the extra installed.
# It installs only when setup.py, requirements.txt, constraints.txt or the interpreter have changed.
# With the extra `test` the versions are those of constraints.txt, with which the tests have passed.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$repo/.venv"
python="$venv/bin/python"

# Prints the first Python of 3.11 to 3.13 on the PATH: for these every requirement has wheels.
find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
        2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
}

make_venv() {
  local base
  base=$(find_python)
  if command -v uv >/dev/null; then
    uv venv --quiet --clear --python "${base:-3.12}" "$venv"
  elif [ -n "$base" ]; then
    "$base" -m venv --clear "$venv"
  else
    echo "r3jax needs Python 3.11, 3.12 or 3.13 (or uv, which fetches one)" >&2
    return 1
  fi
}

prepare_venv() {
  local extra="${1:-}" stamp key
  local versions=""
  [ "$extra" != test ] || versions="$repo/constraints.txt"
  "$python" -c '' 2>/dev/null || make_venv || return
  stamp="$venv/.installed${extra:+-$extra}"
  key=$(cd "$repo" && "$python" -c 'import hashlib, sys
print(hashlib.sha256(b"".join(open(name, "rb").read() for name in sys.argv[1:])).hexdigest())' \
    setup.py requirements.txt constraints.txt) || return
  [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && return
  echo "installing r3jax${extra:+[$extra]} into $venv"
  if command -v uv >/dev/null; then
    uv pip install --quiet --python "$python" ${versions:+--constraint "$versions"} \
      -e "$repo${extra:+[$extra]}" || return
  else
    "$python" -m pip install --quiet --disable-pip-version-check ${versions:+--constraint "$versions"} \
      -e "$repo${extra:+[$extra]}" || return
  fi
  echo "$key" > "$stamp"
}
