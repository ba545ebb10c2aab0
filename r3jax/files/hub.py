"""Files and folders of the Hugging Face Hub, by `hf://` in place of a path.

  hf://OWNER/NAME[@REVISION]                        a model's folder
  hf://OWNER/NAME[@REVISION]/FILE                   a file of a model
  hf://datasets/OWNER/NAME[@REVISION][/FILE]        of a data set

They are downloaded once into Hugging Face's own cache (HF_HOME), where every commit has a folder.
Without a revision it is the newest commit of the main branch, looked up once a process; offline
(HF_HUB_OFFLINE=1) the one that the cache has. Needs the extra `r3jax[hf]`.
"""

import dataclasses
import functools
import pathlib
import re

PREFIX = "hf://"
_FORM = re.compile(
  r"hf://(?P<kind>datasets/)?(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>.+?))?/?",
  re.ASCII,
)
# What a folder of a model or an adapter is read from; releases hold much else.
_PATTERNS = ("*.json", "*.safetensors", "*.txt")
_SNAPSHOTS = (
  "snapshots"  # the folder of the cache whose entries are named by commits
)
_LETTERS = 500  # of the library's error that are repeated

# The commit of every address that this process has read.
_commits: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Address:
  """What an `hf://` address names.

  Attributes:
    name: OWNER/NAME of the repository.
    is_dataset: whether it is a data set's, else a model's.
    revision: a commit, tag or branch; None for the main branch.
    file: path in the repository; None for all of it.
  """

  name: str
  is_dataset: bool
  revision: str | None
  file: str | None


def parse(text: str) -> Address:
  """Returns what an address names.

  Raises:
    ValueError: it has another form, or leads out of the repository.
  """
  match = _FORM.fullmatch(text)
  file = match and match["file"]
  if not match or (file and ".." in file.split("/")):
    raise ValueError(
      "an address of the Hub must have the form hf://OWNER/NAME[@REVISION][/FILE] or "
      f"hf://datasets/OWNER/NAME[@REVISION][/FILE]; got {text:.200}"
    )
  return Address(match["name"], bool(match["kind"]), match["revision"], file)


@functools.cache
def local_path(text: str) -> pathlib.Path:
  """Returns where an address's file or folder is on this machine, after it has been downloaded.

  The same address leads to the same commit for as long as the process runs.

  Raises:
    ValueError: the address has another form, the extra is not installed, or there is no such
      repository, revision or file, or no way to it.
  """
  address = parse(text)
  try:
    import huggingface_hub  # an optional extra
  except ImportError as error:
    raise ValueError(
      f"{text} needs `pip install r3jax[hf]`: {error}"
    ) from error
  where = {
    "repo_id": address.name,
    "repo_type": "dataset" if address.is_dataset else "model",
    "revision": address.revision,
  }
  try:
    if address.file:
      download = huggingface_hub.hf_hub_download(filename=address.file, **where)
    else:
      download = huggingface_hub.snapshot_download(
        allow_patterns=list(_PATTERNS), **where
      )
  # The library's errors have no base in common: network, names, rights, a cache that lacks files.
  except Exception as error:
    reason = " ".join(str(error).split())[:_LETTERS]
    raise ValueError(
      f"{text} must be readable at the Hugging Face Hub (gated repositories need HF_TOKEN): "
      f"{type(error).__name__}: {reason}"
    ) from error
  path = pathlib.Path(download)
  parts = path.parts
  if _SNAPSHOTS in parts[:-1]:
    _commits[text] = parts[parts.index(_SNAPSHOTS) + 1]
  return path


def commits() -> dict[str, str]:
  """Returns the commit of every address that this process has read."""
  return dict(sorted(_commits.items()))
