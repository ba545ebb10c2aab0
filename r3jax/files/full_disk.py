"""Errors of a disk without room, which are no fault of the code."""

import errno

# The disk is full, or what this user may write to it, or into one file.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error: OSError) -> bool:
  """Returns whether an error says that there is no room for what was written."""
  return error.errno in _NO_ROOM


def message(error: OSError) -> str:
  """Returns what a person reads of such an error."""
  return (
    f"there must be room for what is written: {error}. Free some; the same "
    "command then continues"
  )
