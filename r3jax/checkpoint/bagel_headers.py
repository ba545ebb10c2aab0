"""Finds the tensors of a BAGEL folder and checks them against a config, without reading them."""

from collections.abc import Iterable, Sequence
import dataclasses
import re

from etils import epath

from r3jax.checkpoint import bagel_names
from r3jax.checkpoint import mismatch
from r3jax.checkpoint import safetensors_files
from r3jax.files import bounded
from r3jax.model import architecture

# The language model and the ViT: the first of these files that exists, ...
MODEL_FILES = ("ema.safetensors", "model.safetensors")
# ... or, without them, the files that this one names.
INDEX_FILE = "model.safetensors.index.json"
AUTOENCODER_FILE = "ae.safetensors"
_FILE_NAME = re.compile(r"\w[\w.-]{0,200}\.safetensors", re.ASCII)


def weight_files(folder: epath.Path) -> list[epath.Path]:
  """Returns the files of a folder that a model is read from, as far as they are there, by name.

  Other files with weights, as `model.safetensors` beside `ema.safetensors`, are not read.
  """
  model_file = _first_file(folder, MODEL_FILES)
  if model_file is not None:
    names = {model_file.name}
  elif (folder / INDEX_FILE).is_file():
    names = set(_read_index(folder / INDEX_FILE).values())
  else:
    names = set()
  names.add(AUTOENCODER_FILE)
  return [folder / name for name in sorted(names) if (folder / name).is_file()]


@dataclasses.dataclass(frozen=True)
class _Headers:
  """The headers of some files.

  Attributes:
    entries: Tensors of the files by name.
    problems: What is wrong with the files, one line each.
  """

  entries: dict[str, safetensors_files.Entry]
  problems: list[str]


def find(
  folder: epath.PathLike, config: architecture.BagelConfig
) -> dict[str, safetensors_files.Entry]:
  """Returns every tensor of a model by its released name; reads only the headers of files.

  The sin-cos tables are left out: they are recomputed.

  Args:
    folder: Folder in BAGEL's format, see `bagel_files.load`.
    config: Sizes that the model must have.

  Raises:
    ValueError: Lists everything that is missing, unexpected, mis-shaped or unreadable.
  """
  folder = epath.Path(folder)
  if not folder.is_dir():
    raise ValueError(f"a BAGEL folder must be a folder; not found: {folder}")
  headers = _read_folder(folder)
  # Where a file is broken, its tensors would be listed as missing too.
  mismatch.refuse(f"the BAGEL folder {folder}", headers.problems)

  tables = (bagel_names.LATENT_TABLE, bagel_names.VISION_TABLE)
  entries = {
    name: entry for name, entry in headers.entries.items() if name not in tables
  }
  expected = bagel_names.expected_shapes(config)
  shapes = {name: entry.shape for name, entry in entries.items()}
  problems = mismatch.differences("tensor", expected, shapes)
  known_dtypes = ", ".join(safetensors_files.DTYPES)
  for name, entry in sorted(entries.items()):
    if name in expected and entry.dtype not in safetensors_files.DTYPES:
      problems.append(
        f"wrong dtype of tensor {name}: expected one of {known_dtypes}, seen {entry.dtype}"
      )
  mismatch.refuse(f"the BAGEL folder {folder}", problems)
  return entries


def _read_folder(folder: epath.Path) -> _Headers:
  """Returns all tensors of a folder, and what is wrong with its files."""
  missing = []
  model_file = _first_file(folder, MODEL_FILES)
  index = folder / INDEX_FILE
  if model_file is not None:
    model = _read_files([model_file])
  elif index.is_file():
    model = _read_indexed(index)
  else:
    model = _read_files([])
    missing.append(f"missing file {' or '.join(MODEL_FILES)} or {INDEX_FILE}")

  autoencoder_file = folder / AUTOENCODER_FILE
  if autoencoder_file.is_file():
    autoencoder = _read_files([autoencoder_file])
  else:
    autoencoder = _read_files([])
    missing.append(f"missing file {AUTOENCODER_FILE}")

  return _Headers(
    entries=model.entries | autoencoder.entries,
    problems=[
      *missing,
      *model.problems,
      *autoencoder.problems,
      *_in_two_files(model.entries, autoencoder.entries),
    ],
  )


def _first_file(folder: epath.Path, names: Sequence[str]) -> epath.Path | None:
  """Returns the first of these files that exists."""
  for name in names:
    if (folder / name).is_file():
      return folder / name
  return None


def _read_files(paths: Iterable[epath.Path]) -> _Headers:
  """Returns the tensors of some files, and what is wrong with the files."""
  entries = {}
  problems = []
  for path in paths:
    try:
      header = safetensors_files.read_header(path)
    except ValueError as error:
      problems.append(str(error))
      continue
    problems += _in_two_files(entries, header)
    entries |= header
  return _Headers(entries, problems)


def _in_two_files(
  first: dict[str, safetensors_files.Entry],
  second: dict[str, safetensors_files.Entry],
) -> list[str]:
  """Returns a line for every tensor that two headers have."""
  problems = []
  for name in sorted(first.keys() & second.keys()):
    first_file = first[name].path.name
    second_file = second[name].path.name
    problems.append(
      f"tensor {name} must be in one file; it is in {first_file} and in {second_file}"
    )
  return problems


def _read_indexed(index: epath.Path) -> _Headers:
  """Returns the tensors of the files that an index names, and everything that contradicts it."""
  try:
    file_of_tensor = _read_index(index)
  except ValueError as error:
    return _Headers({}, [str(error)])

  files = sorted(set(file_of_tensor.values()))
  missing = [name for name in files if not (index.parent / name).is_file()]
  headers = _read_files(
    index.parent / name for name in files if name not in missing
  )
  problems = list(headers.problems)
  for name in missing:
    problems.append(f"missing file {name}: {index.name} names it")
  for name, file in sorted(file_of_tensor.items()):
    if file in missing:
      continue
    entry = headers.entries.get(name)
    if entry is None or entry.path.name != file:
      problems.append(f"tensor {name} must be in {file}, as {index.name} says")
  for name in sorted(headers.entries.keys() - file_of_tensor.keys()):
    problems.append(f"tensor {name} must be in {index.name}")
  return _Headers(headers.entries, problems)


def _read_index(index: epath.Path) -> dict[str, str]:
  """Returns the name of the file of every tensor.

  Raises:
    ValueError: The file is no index.
  """
  bounded.check_link(index)
  try:
    file_of_tensor = bounded.read_json_object(index).get("weight_map")
  except ValueError as error:
    raise ValueError(
      f"unreadable file {index}: it must be JSON with a weight_map: {error}"
    ) from error
  if not isinstance(file_of_tensor, dict):
    raise ValueError(
      f"unreadable file {index}: it must be JSON with a weight_map, an object"
    )
  for tensor, name in file_of_tensor.items():
    # No path: it could lead out of the folder.
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
      raise ValueError(
        f"unreadable file {index}: tensor {tensor:.200} must be in a file NAME.safetensors of the "
        f"folder; got {name!r:.200}"
      )
  return file_of_tensor
