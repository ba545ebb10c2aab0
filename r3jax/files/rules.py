"""Rules of config values and flags: the type, the range, or the allowed values.

A table maps dotted keys to rules, one line a key. `check` compares a whole config with its table
and lists every problem in a line of its own, before anything is compiled or written.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import difflib
import re
from typing import Any, Protocol
import unicodedata
import urllib.parse

import ml_collections

from r3jax import plugins

# Long values are cut off here in messages.
_MAX_SHOWN = 60


class Rule(Protocol):
  """What a value must be."""

  def describe(self) -> str:
    """Returns what stands behind "must be" in a message."""
    ...

  def allows(self, value: Any) -> bool:
    """Returns whether a value of any type keeps the rule."""
    ...


@dataclasses.dataclass(frozen=True)
class Whole:
  """A whole number.

  Attributes:
    least: the smallest.
    most: the largest.
    also: allowed beside the range, for example -1 for "all".
  """

  least: int
  most: int
  also: tuple[int, ...] = ()

  def describe(self) -> str:
    """See `Rule`."""
    beside = "".join(f"{value} or " for value in self.also)
    return f"{beside}a whole number in {self.least}..{self.most}"

  def allows(self, value: Any) -> bool:
    """See `Rule`; True and False are no numbers."""
    if type(value) is not int:
      return False
    return value in self.also or self.least <= value <= self.most


@dataclasses.dataclass(frozen=True)
class Real:
  """A finite number.

  Attributes:
    least: the smallest.
    most: the largest.
    also: allowed beside the range, for example 0 for "greedy".
  """

  least: float
  most: float
  also: tuple[float, ...] = ()

  def describe(self) -> str:
    """See `Rule`."""
    beside = "".join(f"{value:g} or " for value in self.also)
    return f"{beside}a number in {self.least:g}..{self.most:g}"

  def allows(self, value: Any) -> bool:
    """See `Rule`; NaN, infinities, True and False are no numbers."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN; math.isnan fails at a whole number that no float holds.
    if not is_number or value != value:
      return False
    return value in self.also or self.least <= value <= self.most


@dataclasses.dataclass(frozen=True)
class Flag:
  """True or False."""

  def describe(self) -> str:
    """See `Rule`."""
    return "True or False"

  def allows(self, value: Any) -> bool:
    """See `Rule`."""
    return isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class OneOf:
  """One of some texts.

  Attributes:
    options: the texts.
  """

  options: tuple[str, ...]

  def describe(self) -> str:
    """See `Rule`."""
    return f"one of {', '.join(map(repr, self.options))}"

  def allows(self, value: Any) -> bool:
    """See `Rule`."""
    return isinstance(value, str) and value in self.options


@dataclasses.dataclass(frozen=True)
class Named(OneOf):
  """One of some texts, or `package.module:attribute` of the user's own."""

  def describe(self) -> str:
    """See `Rule`."""
    return f"{super().describe()} or 'package.module:attribute'"

  def allows(self, value: Any) -> bool:
    """See `Rule`; nothing is imported."""
    if super().allows(value):
      return True
    return is_line(value) and plugins.is_path(value)


@dataclasses.dataclass(frozen=True)
class Text:
  """A line of text.

  Attributes:
    meaning: what it names, for the message.
    pattern: a regular expression that all of it matches.
    may_be_empty: whether "" is allowed.
    is_secret: whether messages must not show the value, which may hold a password by mistake.
  """

  meaning: str = "a line of text"
  pattern: str = r"(?=\S).*(?<=\S)"
  may_be_empty: bool = True
  is_secret: bool = False

  def describe(self) -> str:
    """See `Rule`."""
    return f"{self.meaning}, or ''" if self.may_be_empty else self.meaning

  def allows(self, value: Any) -> bool:
    """See `Rule`."""
    if not is_line(value):
      return False
    if not value:
      return self.may_be_empty
    return bool(re.fullmatch(self.pattern, value))


# A token that is given in its place must not be shown.
ENVIRONMENT_VARIABLE = Text(
  "the name of an environment variable", r"[A-Za-z_]\w*", is_secret=True
)


@dataclasses.dataclass(frozen=True)
class Url:
  """The base URL of a service."""

  is_secret: bool = True  # it may hold a password by mistake

  def describe(self) -> str:
    """See `Rule`."""
    return "http://HOST[:PORT] or https://HOST[:PORT]"

  def allows(self, value: Any) -> bool:
    """See `Rule`."""
    if not is_line(value) or re.search(r"\s", value):
      return False
    try:
      parts = urllib.parse.urlsplit(value)
      has_port = parts.port is None or parts.port > 0
    except ValueError:  # of brackets or a port that cannot be
      return False
    return (
      parts.scheme in ("http", "https") and bool(parts.hostname) and has_port
    )


@dataclasses.dataclass(frozen=True)
class Several:
  """A tuple of values of the same rule.

  Attributes:
    rule: of every value.
  """

  rule: Rule

  @property
  def is_secret(self) -> bool:
    """Whether messages must not show the values."""
    return getattr(self.rule, "is_secret", False)

  def describe(self) -> str:
    """See `Rule`."""
    return f"a tuple in which every item is {self.rule.describe()}"

  def allows(self, value: Any) -> bool:
    """See `Rule`; a list is a tuple that was read from JSON."""
    if not isinstance(value, tuple | list):
      return False
    return all(self.rule.allows(item) for item in value)


@dataclasses.dataclass(frozen=True)
class Interval:
  """A pair (low, high) of numbers.

  Attributes:
    least: the smallest low.
    most: the largest high.
    may_be_empty: whether () is allowed.
  """

  least: float
  most: float
  may_be_empty: bool = False

  def describe(self) -> str:
    """See `Rule`."""
    empty = "() or " if self.may_be_empty else ""
    return (
      f"{empty}(low, high) with {self.least:g} <= low <= high <= {self.most:g}"
    )

  def allows(self, value: Any) -> bool:
    """See `Rule`."""
    if not Several(Real(self.least, self.most)).allows(value):
      return False
    if not value:
      return self.may_be_empty
    return len(value) == 2 and value[0] <= value[1]


@dataclasses.dataclass(frozen=True)
class Table:
  """A section whose keys are free within limits.

  Attributes:
    keys: the keys that it may have; it need not have all.
    rule: of every value.
  """

  keys: tuple[str, ...]
  rule: Rule

  def describe(self) -> str:
    """See `Rule`."""
    return (
      f"a section with keys among {', '.join(self.keys)}, in which every value "
      f"is {self.rule.describe()}"
    )

  def allows(self, value: Any) -> bool:
    """See `Rule`."""
    if not isinstance(value, ml_collections.ConfigDict):
      return False
    if not set(value) <= set(self.keys):
      return False
    return all(self.rule.allows(item) for item in value.values())


@dataclasses.dataclass(frozen=True)
class Sections:
  """A section of sections, whose names are free.

  Attributes:
    contents: what each of them has, for the message.
  """

  contents: str

  def describe(self) -> str:
    """See `Rule`."""
    return f"a section of sections, each with {self.contents}"

  def allows(self, value: Any) -> bool:
    """See `Rule`."""
    if not isinstance(value, ml_collections.ConfigDict):
      return False
    sections = value.values()
    return all(isinstance(x, ml_collections.ConfigDict) for x in sections)


def is_line(value: Any) -> bool:
  """Returns whether a value is a text without control characters that UTF-8 can store."""
  if not isinstance(value, str):
    return False
  return not any(unicodedata.category(char) in ("Cc", "Cs") for char in value)


def problem(name: str, rule: Rule, value: Any) -> str:
  """Returns the line about a value that breaks a rule, "" where the value keeps it.

  Args:
    name: of the key or the flag.
    rule: what the value must be.
    value: of any type.
  """
  if rule.allows(value):
    return ""
  line = f"{name} must be {rule.describe()}"
  if getattr(rule, "is_secret", False):
    return line
  shown = repr(value)
  if isinstance(value, ml_collections.ConfigDict):
    shown = repr(value.to_dict())
  if len(shown) > _MAX_SHOWN:
    shown = f"{shown[:_MAX_SHOWN]}..."
  options = getattr(rule, "options", ())
  return f"{line}; got {shown}{did_you_mean(value, options)}"


def did_you_mean(name: Any, options: Iterable[str]) -> str:
  """Returns "; did you mean NAME?" with the nearest of some names, "" where none is near."""
  nearest = difflib.get_close_matches(str(name), options, n=1)
  return f"; did you mean {nearest[0]}?" if nearest else ""


def unknown_key(key: str, known: Iterable[str]) -> str:
  """Returns the line about a dotted key that a config does not have.

  Args:
    key: the unknown one.
    known: all dotted keys of the config.
  """
  return f"the config has no key {key}{did_you_mean(key, known)}"


def leaves(
  config: ml_collections.ConfigDict, stops: Iterable[str], prefix: str = ""
) -> dict[str, Any]:
  """Returns dotted key -> value of a config.

  Args:
    config: a config or a section of one.
    stops: keys of sections that are returned whole.
    prefix: of the keys.
  """
  values = {}
  for key, value in config.items():
    name = f"{prefix}{key}"
    if isinstance(value, ml_collections.ConfigDict) and name not in stops:
      values |= leaves(value, stops, f"{name}.")
    else:
      values[name] = value
  return values


def problems(
  config: ml_collections.ConfigDict, rules: Mapping[str, Rule]
) -> list[str]:
  """Returns a line for every key that breaks its rule, is unknown, or is missing.

  Args:
    config: of a command.
    rules: dotted key -> rule, of all keys.
  """
  values = leaves(config, rules)
  missing = sorted(rules.keys() - values.keys())
  if missing:
    # Mostly it is the config of another command.
    shown = ", ".join(missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return [
      f"the config must have all keys of its command; it lacks {shown}{more}"
    ]
  lines = []
  for key, value in values.items():
    if key in rules:
      lines.append(problem(key, rules[key], value))
    else:
      lines.append(unknown_key(key, rules))
  return list(filter(None, lines))
