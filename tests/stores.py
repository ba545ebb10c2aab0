"""An object store in memory behind etils.epath, that behaves as badly as a real one."""

import collections
import io

from etils.epath import backend
from etils.epath import gpath
from etils.epath import stat_utils


class MemoryStore(backend.Backend):
  """Objects by their whole name. There are no folders, only names with slashes, and no appending.

  Attributes:
    objects: content by name.
    writes: how often a name was written.
  """

  def __init__(self):
    self.objects: dict[str, bytes] = {}
    self.writes: collections.Counter[str] = collections.Counter()

  def _put(self, path: str, content: bytes):
    self.objects[path] = content
    self.writes[path] += 1

  def _get(self, path: str) -> bytes:
    if path not in self.objects:
      raise FileNotFoundError(path)
    return self.objects[path]

  def open(self, path, mode):
    if "r" in mode:
      content = self._get(path)
      return (
        io.BytesIO(content) if "b" in mode else io.StringIO(content.decode())
      )
    if "w" not in mode:
      raise ValueError(f"an object cannot be opened to {mode!r}")
    return (
      _Writer(self, path)
      if "b" in mode
      else io.TextIOWrapper(_Writer(self, path), encoding="utf-8", newline="")
    )

  def exists(self, path):
    return path in self.objects or self.isdir(path)

  def isdir(self, path):
    return any(name.startswith(path.rstrip("/") + "/") for name in self.objects)

  def listdir(self, path):
    start = path.rstrip("/") + "/"
    return sorted(
      {
        name[len(start) :].split("/")[0]
        for name in self.objects
        if name.startswith(start)
      }
    )

  def remove(self, path):
    self._get(path)
    del self.objects[path]

  def rmtree(self, path):
    for name in [
      name for name in self.objects if name.startswith(path.rstrip("/") + "/")
    ]:
      del self.objects[name]

  def replace(self, path, dst):  # a copy, then a removal, as in real stores
    self._put(dst, self._get(path))
    self.remove(path)

  def makedirs(self, path, *, exist_ok=False, mode=None):
    del path, exist_ok, mode

  def mkdir(self, path, *, exist_ok=False, mode=None):
    del path, exist_ok, mode

  def stat(self, path):
    return stat_utils.StatResult(
      is_directory=self.isdir(path),
      length=len(self.objects.get(path, b"")),
      mtime=0,
    )

  def glob(self, path):
    raise NotImplementedError(path)

  def walk(self, top, *, top_down=True, on_error=None):
    raise NotImplementedError(top)

  def rename(self, path, dst):  # object by object, as in real stores
    start = path.rstrip("/") + "/"
    names = [name for name in self.objects if name.startswith(start)]
    for name in names:
      self.replace(name, dst.rstrip("/") + "/" + name[len(start) :])

  def copy(self, path, dst, overwrite):
    raise NotImplementedError(path)


class _Writer(io.BytesIO):
  """The object is there when the file is closed."""

  def __init__(self, store: MemoryStore, path: str):
    super().__init__()
    self._store, self._path = store, path

  def close(self):
    if not self.closed:
      self._store._put(self._path, self.getvalue())
    super().close()


class FolderStore(type(backend.os_backend)):
  """A folder that is read as if it were a bucket."""

  def __init__(self, bucket: str, folder: str):
    self._bucket, self._folder = bucket, folder

  def _local(self, path) -> str:
    return str(path).replace(self._bucket, self._folder, 1)

  def open(self, path, mode):
    return super().open(self._local(path), mode)

  def exists(self, path):
    return super().exists(self._local(path))

  def isdir(self, path):
    return super().isdir(self._local(path))

  def listdir(self, path):
    return super().listdir(self._local(path))

  def stat(self, path):
    return super().stat(self._local(path))

  def glob(self, path):
    return [
      found.replace(self._folder, self._bucket, 1)
      for found in super().glob(self._local(path))
    ]


def serve(store: backend.Backend, monkeypatch):
  """Puts the store behind every gs:// path."""
  monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", store)
  # else its files are taken
  monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
