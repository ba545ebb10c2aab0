"""Reads texts that people have written with any editor, as UTF-8."""

import codecs
import unicodedata

from etils import epath

from r3jax.files import bounded
from r3jax.files import paths

MAX_MESSAGE = 2000  # characters of a message to a person: about a screen
_OTHER_MARKS = {
  codecs.BOM_UTF32_LE: "UTF-32",  # it begins with the mark of UTF-16
  codecs.BOM_UTF32_BE: "UTF-32",
  codecs.BOM_UTF16_LE: "UTF-16",
  codecs.BOM_UTF16_BE: "UTF-16",
}


def read(path: epath.PathLike) -> str:
  """Returns the text of a file without its byte order mark.

  Raises:
    ValueError: It is no regular file, too long, or not UTF-8; the message has the path.
    OSError: It cannot be read.
  """
  content = bounded.read_bytes(paths.of_user(path))
  try:
    return _without_mark(content).decode()
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def lines(content: bytes) -> list[bytes]:
  r"""Returns the lines of UTF-8 text without its byte order mark.

  Lines end in \n, \r\n or \r, as editors count them; other separators of Unicode, such as
  U+2028, are part of a line. The lines are not decoded, so that one that is no UTF-8 can be named.

  Raises:
    ValueError: The text is UTF-16 or UTF-32.
  """
  return _without_mark(content).splitlines()


def shorten(text: str, most: int = MAX_MESSAGE) -> str:
  """Returns a text of at most `most` characters: the middle of a longer one is left out.

  Args:
    text: Any text, for example what a service sent.
    most: At least 60 characters.
  """
  if len(text) <= most:
    return text
  gap = f" [... of {len(text)} characters ...] "
  remaining = most - len(gap)
  head = remaining - remaining // 3
  return text[:head] + gap + text[len(text) - remaining // 3 :]


def printable(text: str) -> str:
  """Returns a text for a terminal: a space stands for a control character that ends no line.

  Such characters move the cursor, rename the window or delete what was printed before.

  Args:
    text: Any text, for example a prompt or what a service sent.
  """
  return "".join(
    " " if unicodedata.category(c) == "Cc" and c != "\n" else c for c in text
  )


def canonical(text: str) -> str:
  """Returns a text in the one form of all that look like it, without case.

  That is Unicode's toNFKC_Casefold but for the characters that it removes: here those of the
  category Cf (zero-width spaces and joiners, soft hyphens, marks of direction) and the variation
  selectors.
  """
  visible = "".join(
    character
    for character in text
    if unicodedata.category(character) != "Cf"
    and not "\ufe00" <= character <= "\ufe0f"
  )
  # Case folding can leave the normal form, as for U+0345.
  folded = unicodedata.normalize("NFKC", visible).casefold()
  return unicodedata.normalize("NFKC", folded)


def _without_mark(content: bytes) -> bytes:
  """Removes a byte order mark of UTF-8.

  Raises:
    ValueError: The text is UTF-16 or UTF-32.
  """
  for mark, encoding in _OTHER_MARKS.items():
    if content.startswith(mark):
      raise ValueError(
        f"the text must be UTF-8; it has the byte order mark of {encoding}: save it as UTF-8"
      )
  # Without a mark their first characters have zero bytes, if they are of ASCII.
  if b"\0" in content[:4]:
    raise ValueError(
      "the text must be UTF-8; it begins with zero bytes, as UTF-16 and UTF-32 do: save it as UTF-8"
    )
  return content.removeprefix(codecs.BOM_UTF8)
