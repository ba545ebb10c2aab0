"""Absolute paths on disks and in buckets, as Orbax requires them."""

from etils import epath


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns an absolute path; gs://BUCKET/FOLDER is one already.

  `epath.Path.absolute` turns such a path into a folder "gs:" of the working
  directory.
  """
  path = epath.Path(path)
  if path.is_absolute():
    return path
  return path.absolute()
