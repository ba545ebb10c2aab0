"""Says what keeps a JSON object from being a prompt record; never raises, whatever the object.

Three forms of a record are known, told apart by the field that says what the image must show:
  GenEval, GenEval++: {"tag", "prompt", "include", "exclude"?}
  TIIF: {"type", "short_description", "long_description"?, "yn_question_list", "yn_answer_list"}
  r3jax's own of TIIF: {"tag", "prompt", "questions": [[text, "yes" or "no"], ...]}
"""

from collections.abc import Collection, Sequence
import reprlib

# What an item may say of its objects beside class and count; GenEval++ adds the last two.
ATTRIBUTES = ("color", "region", "size")
ANSWERS = ("yes", "no")
# Far beyond what an image can show; keeps counts in every integer type.
MAX_COUNT = 1000
# The field that makes a form: the names of its tag and prompt.
_FORMS = {
  "include": ("tag", "prompt"),
  "questions": ("tag", "prompt"),
  "yn_question_list": ("type", "short_description"),
}


def find_problems(
  obj: object, tags: Collection[str] | None = None
) -> list[str]:
  """Lists what keeps an object from being a prompt record with one of `tags` (any if None)."""
  if not isinstance(obj, dict):
    return [f"a record must be a JSON object, got {type(obj).__name__}"]
  forms = [field for field in _FORMS if field in obj]
  if len(forms) != 1:
    seen = " and ".join(forms) or "none of them"
    return [f"a record must have one of {', '.join(_FORMS)}, got {seen}"]
  tag, prompt = _FORMS[forms[0]]
  problems = _text_problems(tag, obj.get(tag)) + _text_problems(
    prompt, obj.get(prompt)
  )
  if (
    tags is not None
    and not _text_problems(tag, obj.get(tag))
    and obj[tag] not in tags
  ):
    problems.append(
      f"{tag} must be one of {sorted(tags)}, got {show(obj[tag])}"
    )
  find = {
    "include": _item_list_problems,
    "questions": _question_problems,
    "yn_question_list": _tiif_problems,
  }
  return problems + find[forms[0]](obj)


def show(value: object) -> str:
  """Returns a value as Python writes it, cut short: a line may hold megabytes or deep nesting."""
  return _SHORT.repr(value)


def _item_list_problems(obj: dict) -> list[str]:
  """Lists what is wrong with include and exclude."""
  include, exclude = obj["include"], obj.get("exclude") or []
  if not isinstance(include, list) or not include:
    return [f"include must be a non-empty list, got {show(include)}"]
  if not isinstance(exclude, list):
    return [f"exclude must be a list, got {show(exclude)}"]
  return [
    f"include[{index}]: {problem}"
    for index, item in enumerate(include)
    for problem in _item_problems(item, index, include)
  ] + [
    f"exclude[{index}]: {problem}"
    for index, item in enumerate(exclude)
    for problem in _item_problems(item, index, ())
  ]


def _item_problems(item: object, index: int, others: Sequence) -> list[str]:
  """Lists what is wrong with an item; a position must point at another one of `others`."""
  if not isinstance(item, dict):
    return [f"an item must be a JSON object, got {show(item)}"]
  problems = _text_problems("class", item.get("class"))
  if not _is_index(item.get("count")) or not 1 <= item["count"] <= MAX_COUNT:
    problems.append(
      f"count must be an integer of at least 1 and at most {MAX_COUNT}, "
      f"got {show(item.get('count'))}"
    )
  for name in ATTRIBUTES:
    problems += _text_problems(name, item[name]) if name in item else []
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
  questions, answers = obj["yn_question_list"], obj.get("yn_answer_list")
  if not isinstance(questions, list) or not questions:
    return [f"yn_question_list must be a non-empty list, got {show(questions)}"]
  if not isinstance(answers, list) or len(answers) != len(questions):
    seen = len(answers) if isinstance(answers, list) else show(answers)
    return [
      f"yn_answer_list must hold an answer to each of the {len(questions)} questions, "
      f"got {seen}"
    ]
  problems = []
  for index, (question, answer) in enumerate(zip(questions, answers)):
    problems += _text_problems(f"yn_question_list[{index}]", question)
    problems += _answer_problems(f"yn_answer_list[{index}]", answer)
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
  return []


def _is_position(position: object, index: int, others: Sequence) -> bool:
  return (
    isinstance(position, list)
    and len(position) == 2
    and not _text_problems("relation", position[0])
    and _is_index(position[1])
    and position[1] in range(len(others))
    and position[1] != index
  )


def _is_index(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _short_repr() -> reprlib.Repr:
  short = reprlib.Repr()
  short.maxstring = 120
  return short


_SHORT = _short_repr()
