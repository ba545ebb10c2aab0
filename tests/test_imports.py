"""Dependencies point one way: a package imports only from floors below its own.

`docs/architecture.md` shows the floors. A new package needs a place in FLOORS.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# From the ground up. The heart ends with `rl`: it reads no file, no config and no socket.
FLOORS = (
  "types",
  "parallel",
  "sequence",
  "model",
  "sampling",
  "agent",
  "rl",
  "plugins",
  "files",
  "data",
  "worlds",
  "rewards",
  "checkpoint",
  "costs",
  "evaluation",
  "report",
  "run",
  "sft",
  "inference",
  "generation",
  "parity",
  "aot",
  "benchmark",
  "study",
  "cli",
  "__main__",
)
HEART = FLOORS[: FLOORS.index("rl") + 1]
# What the heart must not import: files, configs, sockets. `etils` is a path to files.
OUTSIDE = (
  "etils",
  "http",
  "httpx",
  "ml_collections",
  "pathlib",
  "socket",
  "urllib",
)


def imported_modules(source: str) -> set[str]:
  """Returns the full names of all modules and members that a source imports."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      names.update(f"{node.module}.{alias.name}" for alias in node.names)
  return names


def climbing_imports(package: str, source: str) -> list[str]:
  """Returns the imports of r3jax that lie on a higher floor than `package`."""
  climbing = []
  for name in sorted(imported_modules(source)):
    parts = name.split(".")
    if parts[0] != "r3jax" or len(parts) < 2 or parts[1].startswith("__"):
      continue
    if FLOORS.index(parts[1]) > FLOORS.index(package):
      climbing.append(name)
  return climbing


def sources() -> list[tuple[str, pathlib.Path]]:
  """Returns (package, path) of every module of r3jax but the front door `__init__`."""
  package_root = ROOT / "r3jax"
  modules = []
  for path in sorted(package_root.rglob("*.py")):
    relative = path.relative_to(package_root)
    if relative.as_posix() != "__init__.py":
      modules.append((relative.parts[0].removesuffix(".py"), path))
  return modules


def test_no_module_imports_from_a_higher_floor():
  climbing = {
    path.relative_to(ROOT).as_posix(): climbing_imports(
      package, path.read_text()
    )
    for package, path in sources()
  }
  assert {path: names for path, names in climbing.items() if names} == {}


@pytest.mark.parametrize(
  "line",
  [
    "from r3jax.rl import iteration",
    "import r3jax.run.loop",
    "from r3jax import cli",
  ],
)
def test_a_planted_upward_import_is_reported(line):
  assert climbing_imports("sequence", f"def late():\n  {line}\n")
  assert not climbing_imports("cli", line)


def test_the_heart_reads_no_file_no_config_and_no_socket():
  readers = set()
  for package, path in sources():
    roots = {name.split(".")[0] for name in imported_modules(path.read_text())}
    if package in HEART and roots & set(OUTSIDE):
      readers.add(path.relative_to(ROOT / "r3jax").as_posix())
  assert not readers
