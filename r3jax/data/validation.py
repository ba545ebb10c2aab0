"""Finds what keeps a JSON object from being a prompt record; never raises, whatever the object.

A record has one of four forms, which differ in the field that says what the image must show:
  its text alone, or with a text that is written in the image: {"prompt", "tag"?, "inscription"?}
  GenEval, GenEval++: {"tag", "prompt", "include", "exclude"?}
  TIIF: {"type", "short_description", "long_description"?, "yn_question_list", "yn_answer_list"}
  TIIF as r3jax writes it: {"tag", "prompt", "questions": [[text, "yes" or "no"], ...]}
"""

from collections.abc import Collection, Sequence
import reprlib

from r3jax.sequence import tokenization

# The optional words about an item's objects; GenEval++ adds the last two.
ATTRIBUTES = ("color", "region", "size")
ANSWERS = ("yes", "no")
# Far beyond what an image can show, and small enough for every integer type.
MAX_COUNT = 1000
# Characters of an inscription: more than an image can show, and few enough to be compared.
MAX_INSCRIPTION = 400
# The field that decides the form -> the names of its tag and prompt.
_FORMS = {
  "prompt": ("tag", "prompt"),  # alone: where none of the others is there
  "include": ("tag", "prompt"),
  "questions": ("tag", "prompt"),
  "yn_question_list": ("type", "short_description"),
}


def find_problems(
  obj: object, tags: Collection[str] | None = None
) -> list[str]:
  """Lists what keeps an object from being a prompt record.

  Args:
    obj: a JSON value.
    tags: the tags that records with `include` or questions may have; any, and also none, if it is
      None. A prompt alone may always have any tag or none.
  """
  if not isinstance(obj, dict):
    return [f"a record must be a JSON object, got {type(obj).__name__}"]
  alone, *richer = _FORMS
  forms = [field for field in richer if field in obj] or [alone]
  if len(forms) > 1:
    present = " and ".join(forms)
    return [f"a record must have one of {', '.join(richer)}, got {present}"]
  (form,) = forms
  if form == alone and alone not in obj:
    return [f"a record must have one of {', '.join(_FORMS)}, got none of them"]
  tag_field, prompt_field = _FORMS[form]
  if form == alone:
    tags = None
  problems = _tag_problems(tag_field, obj, tags)
  problems += _text_problems(prompt_field, obj.get(prompt_field))
  if form == alone:
    return problems + _alone_problems(obj)
  if "inscription" in obj:
    problems.append(f"inscription must stand without {form}")
  if form == "include":
    return problems + _item_list_problems(obj)
  if form == "questions":
    return problems + _question_problems(obj)
  return problems + _tiif_problems(obj)


def _tag_problems(
  field: str, obj: dict, tags: Collection[str] | None
) -> list[str]:
  """Lists what is wrong with the tag."""
  if tags is None and field not in obj:
    return []
  problems = _text_problems(field, obj.get(field))
  if tags is not None and not problems and obj[field] not in tags:
    problems.append(
      f"{field} must be one of {sorted(tags)}, got {show(obj[field])}"
    )
  return problems


def _alone_problems(obj: dict) -> list[str]:
  """Lists what is wrong with an inscription, and fields that mean nothing without another one."""
  problems = []
  if "exclude" in obj:
    problems.append("exclude must stand beside include, which is missing")
  if "inscription" not in obj:
    return problems
  inscription = obj["inscription"]
  problems += _text_problems("inscription", inscription)
  if isinstance(inscription, str) and len(inscription) > MAX_INSCRIPTION:
    problems.append(
      f"inscription must have at most {MAX_INSCRIPTION} characters, "
      f"got {len(inscription)}"
    )
  return problems


def show(value: object) -> str:
  """Returns a value as Python writes it, cut short: a line may hold megabytes or deep nesting."""
  return _SHORT.repr(value)


def _item_list_problems(obj: dict) -> list[str]:
  """Lists what is wrong with include and exclude."""
  include = obj["include"]
  exclude = obj.get("exclude") or []
  if not isinstance(include, list) or not include:
    return [f"include must be a non-empty list, got {show(include)}"]
  if not isinstance(exclude, list):
    return [f"exclude must be a list, got {show(exclude)}"]
  problems = []
  for index, item in enumerate(include):
    for problem in _item_problems(item, index, include):
      problems.append(f"include[{index}]: {problem}")
  for index, item in enumerate(exclude):
    for problem in _item_problems(item, index, ()):
      problems.append(f"exclude[{index}]: {problem}")
  return problems


def _item_problems(item: object, index: int, others: Sequence) -> list[str]:
  """Lists what is wrong with an item; a position must point at another one of `others`."""
  if not isinstance(item, dict):
    return [f"an item must be a JSON object, got {show(item)}"]
  problems = _text_problems("class", item.get("class"))
  count = item.get("count")
  if not _is_integer(count) or not 1 <= count <= MAX_COUNT:
    problems.append(
      f"count must be an integer of at least 1 and at most {MAX_COUNT}, "
      f"got {show(count)}"
    )
  for name in ATTRIBUTES:
    if name in item:
      problems += _text_problems(name, item[name])
  if "position" in item and not _is_position(item["position"], index, others):
    problems.append(
      "position must be [relation, index of another include item (0 to "
      f"{len(others) - 1})], got {show(item['position'])}"
    )
  return problems


def _question_problems(obj: dict) -> list[str]:
  """Lists what is wrong with questions."""
  questions = obj["questions"]
  if not isinstance(questions, list) or not questions:
    return [f"questions must be a non-empty list, got {show(questions)}"]
  problems = []
  for index, pair in enumerate(questions):
    if not isinstance(pair, list) or len(pair) != 2:
      problems.append(
        f"questions[{index}] must be [text, answer], got {show(pair)}"
      )
    else:
      problems += _text_problems(f"questions[{index}][0]", pair[0])
      problems += _answer_problems(f"questions[{index}][1]", pair[1])
  return problems


def _tiif_problems(obj: dict) -> list[str]:
  """Lists what is wrong with the questions, the answers and the long description."""
  questions = obj["yn_question_list"]
  answers = obj.get("yn_answer_list")
  if not isinstance(questions, list) or not questions:
    return [f"yn_question_list must be a non-empty list, got {show(questions)}"]
  if not isinstance(answers, list) or len(answers) != len(questions):
    actual = len(answers) if isinstance(answers, list) else show(answers)
    return [
      f"yn_answer_list must hold an answer to each of the {len(questions)} questions, "
      f"got {actual}"
    ]
  problems = []
  for index, question in enumerate(questions):
    problems += _text_problems(f"yn_question_list[{index}]", question)
    problems += _answer_problems(f"yn_answer_list[{index}]", answers[index])
  if not isinstance(obj.get("long_description", ""), str):
    problems.append(
      f"long_description must be a string, got {show(obj['long_description'])}"
    )
  return problems


def _answer_problems(name: str, value: object) -> list[str]:
  if isinstance(value, str) and value.strip().lower() in ANSWERS:
    return []
  return [f"{name} must be yes or no, got {show(value)}"]


def _text_problems(name: str, value: object) -> list[str]:
  if not isinstance(value, str) or not value.strip():
    return [f"{name} must be a non-empty string, got {show(value)}"]
  if any("\ud800" <= character <= "\udfff" for character in value):
    return [
      f"{name} must be Unicode text without lone surrogates, got {show(value)}"
    ]
  marker = tokenization.marker_in(value)
  if marker:
    return [
      f"{name} must not hold the marker {marker}, which models take for the end or the begin of a "
      f"text, got {show(value)}"
    ]
  return []


def _is_position(position: object, index: int, others: Sequence) -> bool:
  """Returns whether a value is [relation, index of another item]."""
  if not isinstance(position, list) or len(position) != 2:
    return False
  relation, other = position
  if _text_problems("relation", relation) or not _is_integer(other):
    return False
  return 0 <= other < len(others) and other != index


def _is_integer(value: object) -> bool:
  """Returns whether a value is an integer; booleans are none."""
  return isinstance(value, int) and not isinstance(value, bool)


def _short_repr() -> reprlib.Repr:
  short = reprlib.Repr()
  short.maxstring = 120
  return short


_SHORT = _short_repr()
