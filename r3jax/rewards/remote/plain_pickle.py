"""Reads pickles of numbers, texts, lists, tuples and dicts, and nothing else, within limits.

Python's own unpickler is no reader for a stranger's bytes, even if every opcode has been checked
before: a tuple of tuples as key of a dict is hashed for ever while the interpreter is locked, lists
that are nested deep enough overflow the C stack, and a memo index takes as much memory as it says.
A child process with limits would have to be started, watched and killed for every reply. The few
opcodes of plain values are read here by a loop: it imports and calls nothing, hashes only texts,
and takes time and memory in proportion to the length of the body.
"""

from collections.abc import Callable
import pickletools
import struct

from r3jax.files import bounded
from r3jax.rewards.remote import http_client

LIMITS = bounded.Limits(max_bytes=2**24, max_levels=50, max_values=200_000)
_MAX_OPCODES = 200_000
_MAX_DIGITS = 4000  # of a number in decimal digits
# Opcode -> the format of the number that follows it.
_NUMBERS = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}


class _Refused(ValueError):
  """The body is no pickle of plain values; the text says why."""


def read(body: bytes) -> object:
  """Returns the value of a pickle of protocol 0 to 5.

  Args:
    body: Made of None, booleans, numbers, texts, lists, tuples, and dicts with texts as keys.

  Raises:
    http_client.BadReply: It is damaged, holds anything else, or exceeds the limits.
  """
  if len(body) > LIMITS.max_bytes:
    raise http_client.BadReply(
      f"it must be a pickle of at most {LIMITS.max_bytes} bytes; got {len(body)}"
    )
  try:
    value = _Reader(body).read()
    bounded.check_levels(value, LIMITS)
  except _Refused as error:
    raise http_client.BadReply(
      f"it must be a pickle of plain values; {error}"
    ) from error
  except (ValueError, IndexError, KeyError, struct.error) as error:
    raise http_client.BadReply(
      f"it must be a pickle of plain values: {type(error).__name__}: {error}"
    ) from error
  return value


class _Reader:
  """The state of reading one pickle: a stack of values, marks in it, and a memo."""

  def __init__(self, body: bytes):
    self._body = body
    self._position = 0
    self._stack: list = []
    self._marks: list[int] = []  # sizes of the stack
    self._memo: dict[int, object] = {}

  def read(self) -> object:
    """Executes opcodes until the last one; returns the value that is left."""
    for _ in range(_MAX_OPCODES):
      opcode = self._take(1)
      if opcode == b".":
        return self._stack.pop()
      if opcode in _CONSTANTS:
        self._stack.append(_CONSTANTS[opcode])
      elif opcode in _NUMBERS:
        self._stack.append(self._number(_NUMBERS[opcode]))
      elif opcode in _ACTIONS:
        _ACTIONS[opcode](self)
      else:
        raise _Refused(f"it has the opcode {_name(opcode)}")
    raise _Refused(f"it has more than {_MAX_OPCODES} opcodes")

  def _take(self, size: int) -> bytes:
    """Returns the next bytes."""
    content = self._body[self._position : self._position + size]
    if len(content) < size:
      raise _Refused("it ends too early")
    self._position += size
    return content

  def _line(self) -> bytes:
    """Returns the bytes up to the next line end, which is skipped."""
    end = self._body.find(b"\n", self._position)
    if end < 0:
      raise _Refused("it ends too early")
    content = self._body[self._position : end]
    self._position = end + 1
    return content

  def _number(self, form: str):
    (number,) = struct.unpack(form, self._take(struct.calcsize(form)))
    return number

  def _digits(self) -> str:
    """Returns the text of a number, which is short enough to be read in linear time."""
    line = self._line()
    if len(line) > _MAX_DIGITS:
      raise _Refused(f"a number has {len(line)} digits")
    return line.decode("ascii")

  def _from_mark(self) -> list:
    """Returns the values since the last mark, and removes them and the mark."""
    start = self._marks.pop()
    values = self._stack[start:]
    del self._stack[start:]
    return values

  # --- what opcodes do

  def _frame(self) -> None:
    self._take(8)  # its length, which a reader of a whole body does not need

  def _protocol(self) -> None:
    self._take(1)

  def _mark(self) -> None:
    self._marks.append(len(self._stack))

  def _integer_line(self) -> None:
    digits = self._digits()
    flags = {"00": False, "01": True}
    self._stack.append(flags[digits] if digits in flags else int(digits))

  def _long_line(self) -> None:
    self._stack.append(int(self._digits().removesuffix("L")))

  def _float_line(self) -> None:
    self._stack.append(float(self._digits()))

  def _long(self) -> None:
    content = self._take(self._number("<B"))
    self._stack.append(int.from_bytes(content, "little", signed=True))

  def _text_line(self) -> None:
    self._stack.append(self._line().decode("raw-unicode-escape"))

  def _short_text(self) -> None:
    self._stack.append(self._take(self._number("<B")).decode())

  def _text(self) -> None:
    self._stack.append(self._take(self._number("<I")).decode())

  def _new_list(self) -> None:
    self._stack.append([])

  def _new_dict(self) -> None:
    self._stack.append({})

  def _new_tuple(self) -> None:
    self._stack.append(())

  def _list_from_mark(self) -> None:
    self._stack.append(self._from_mark())

  def _tuple_from_mark(self) -> None:
    self._stack.append(tuple(self._from_mark()))

  def _dict_from_mark(self) -> None:
    items = self._from_mark()
    obj: dict = {}
    _set_items(obj, items)
    self._stack.append(obj)

  def _tuple_of_1(self) -> None:
    self._short_tuple(1)

  def _tuple_of_2(self) -> None:
    self._short_tuple(2)

  def _tuple_of_3(self) -> None:
    self._short_tuple(3)

  def _short_tuple(self, size: int) -> None:
    items = [self._stack.pop() for _ in range(size)]
    self._stack.append(tuple(reversed(items)))

  def _append(self) -> None:
    item = self._stack.pop()
    self._extend([item])

  def _appends(self) -> None:
    self._extend(self._from_mark())

  def _extend(self, items: list) -> None:
    values = self._stack[-1]
    if not isinstance(values, list):
      raise _Refused("it appends to what is no list")
    values += items

  def _set_item(self) -> None:
    value = self._stack.pop()
    key = self._stack.pop()
    _set_items(self._stack[-1], [key, value])

  def _set_items(self) -> None:
    items = self._from_mark()
    _set_items(self._stack[-1], items)

  def _memoize(self) -> None:
    self._memo[len(self._memo)] = self._stack[-1]

  def _put_line(self) -> None:
    self._memo[int(self._digits())] = self._stack[-1]

  def _put(self) -> None:
    self._memo[self._number("<B")] = self._stack[-1]

  def _long_put(self) -> None:
    self._memo[self._number("<I")] = self._stack[-1]

  def _get_line(self) -> None:
    self._stack.append(self._memo[int(self._digits())])

  def _get(self) -> None:
    self._stack.append(self._memo[self._number("<B")])

  def _long_get(self) -> None:
    self._stack.append(self._memo[self._number("<I")])


def _set_items(obj: object, items: list) -> None:
  """Sets key, value, key, value, ... in a dict; the hash of another key than a text may not end."""
  if not isinstance(obj, dict) or len(items) % 2:
    raise _Refused("it sets items of what is no dict")
  for key, value in zip(items[::2], items[1::2], strict=True):
    if not isinstance(key, str):
      raise _Refused(f"a key must be a text; got a {type(key).__name__}")
    obj[key] = value


def _name(opcode: bytes) -> str:
  """Returns the name of an opcode, for messages."""
  info = pickletools.code2op.get(opcode.decode("latin-1"))
  return info.name if info else repr(opcode)


# Opcode -> what it does. LONG4, BINUNICODE8, bytes, sets and all that imports or calls are missing.
_ACTIONS: dict[bytes, Callable[[_Reader], None]] = {
  b"\x80": _Reader._protocol,
  b"\x95": _Reader._frame,
  b"(": _Reader._mark,
  b"I": _Reader._integer_line,
  b"L": _Reader._long_line,
  b"F": _Reader._float_line,
  b"\x8a": _Reader._long,
  b"V": _Reader._text_line,
  b"\x8c": _Reader._short_text,
  b"X": _Reader._text,
  b"]": _Reader._new_list,
  b"}": _Reader._new_dict,
  b")": _Reader._new_tuple,
  b"l": _Reader._list_from_mark,
  b"t": _Reader._tuple_from_mark,
  b"d": _Reader._dict_from_mark,
  b"\x85": _Reader._tuple_of_1,
  b"\x86": _Reader._tuple_of_2,
  b"\x87": _Reader._tuple_of_3,
  b"a": _Reader._append,
  b"e": _Reader._appends,
  b"s": _Reader._set_item,
  b"u": _Reader._set_items,
  b"\x94": _Reader._memoize,
  b"p": _Reader._put_line,
  b"q": _Reader._put,
  b"r": _Reader._long_put,
  b"g": _Reader._get_line,
  b"h": _Reader._get,
  b"j": _Reader._long_get,
}
