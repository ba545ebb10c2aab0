"""Paths as Orbax takes them."""

from etils import epath


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns an absolute path; one in a store, as gs://BUCKET/FOLDER, is one already.

  `epath.Path.absolute` does not know that, and makes it a folder "gs:" of the working directory.
  """
  path = epath.Path(path)
  return path if path.is_absolute() else path.absolute()
