"""Errors of a disk without room, of one that fails and of missing rights: no fault of the code."""

import errno

# The disk is full, or what this user may write to it, or into one file.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A file or a folder belongs to another user, or the disk can only be read.
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
# A disk that fails, became read-only or is gone, a limit of the process.
_FAILS = (
  errno.EIO,
  errno.EROFS,
  errno.ESTALE,
  errno.ENODEV,
  errno.ENXIO,
  errno.ENOTCONN,
  errno.EHOSTDOWN,
  errno.ETIMEDOUT,
  errno.EMFILE,
  errno.ENFILE,
)


def message(error: OSError) -> str:
  """Returns what a person reads of such an error; "" of one that may be a fault of the code."""
  if error.errno in _NO_ROOM:
    return (
      f"there must be room for what is written: {error}. Free some; the same "
      "command then continues"
    )
  # Without the name of a file it is about something else, for example a port.
  if error.errno in _NO_RIGHT and error.filename is not None:
    return (
      "this user must have the right to read what a command is given, and to "
      f"write where it shall write: {error}"
    )
  # A write that fails names no file.
  if error.errno in _FAILS:
    return (
      f"files must stay readable and writable: {error}. See to the machine; the same command then "
      "continues"
    )
  return ""
