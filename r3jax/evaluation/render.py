"""Tables and charts of evaluations: for people in Markdown and on the page, for programs in CSV."""

import csv
import io
import re

from r3jax.report import charts as charts_lib
from r3jax.report import page

_INTERVAL = re.compile(r"([+-]?[\d.]+) \[([+-]?[\d.]+), ([+-]?[\d.]+)\]")


def of_summary(summary: dict) -> dict[str, page.Table]:
  """Returns the tables of an evaluation, by name."""
  made = {
    "rounds": _rounds(summary),
    "tags": _tags(summary),
    "lengths": _lengths(summary),
    "stops": _stops(summary),
    "stop_policies": _policies(summary),
  }
  return made | (
    {"understanding": _understanding(summary)}
    if summary["understanding"]
    else {}
  )


def _rounds(summary: dict) -> page.Table:
  parts = list(summary["rounds"][0]["parts"])
  columns = [
    "round",
    "score",
    *parts,
    "gain",
    "improved",
    "worse",
    "unchanged",
    "finished",
    "format",
  ]
  rows = []
  for one in summary["rounds"]:
    scores = [
      page.with_interval(one["score"]),
      *(page.share(value and value[0]) for value in one["parts"].values()),
    ]
    shares = [
      page.share(one.get(name)) for name in ("improved", "worse", "unchanged")
    ]
    rows.append(
      (
        one["round"],
        [
          *scores,
          page.change("score", one.get("gain")),
          *shares,
          page.share(one["finished"]),
          page.share(one["format"]),
        ],
      )
    )
  images = f"{summary['images']} images of {summary['prompts']} prompts"
  return page.Table(
    f"Rounds: {images}; mean of the tags' means with 95 % interval; gain over the round before",
    columns,
    rows,
  )


def _tags(summary: dict) -> page.Table:
  columns = ["tag", "images", *(one["round"] for one in summary["rounds"])]
  rows = [
    (
      tag,
      [str(summary["images_by_tag"][tag]), *map(page.with_interval, values)],
    )
    for tag, values in summary["tags"].items()
  ]
  return page.Table("Score by tag, with 95 % interval", columns, rows)


def _lengths(summary: dict) -> page.Table:
  columns = [
    "round",
    "tokens",
    "of them instruction",
    "seconds an image",
    "TFLOP an image",
    "gain per second",
    "gain per TFLOP",
  ]
  number = lambda value: page.NOTHING if value is None else f"{value:.4g}"
  rows = []
  for one in summary["rounds"]:
    gain = one["gain"] and one["gain"][0] if "gain" in one else None
    worth = [
      number(None if gain is None or not one[cost] else gain / one[cost])
      for cost in ("seconds", "tflops")
    ]
    rows.append(
      (
        one["round"],
        [
          *(
            number(one[name])
            for name in ("tokens", "instruction_tokens", "seconds", "tflops")
          ),
          *worth,
        ],
      )
    )
  return page.Table(
    "Lengths and cost: texts of samples that were not finished; seconds in batches, scoring included",
    columns,
    rows,
  )


def _stops(summary: dict) -> page.Table:
  columns = [
    "round",
    "right before",
    "wrong before",
    "stops when right",
    "stops when wrong",
    "right when it stops",
  ]
  shares = ("stop_when_right", "stop_when_wrong", "stop_precision")
  rows = [
    (
      one["round"],
      [
        str(one["right"]),
        str(one["wrong"]),
        *(page.share(one[name]) for name in shares),
      ],
    )
    for one in summary["stops"]["rounds"]
  ]
  return page.Table(
    "Stop calibration: samples that were not finished before the round",
    columns,
    rows,
  )


def _policies(summary: dict) -> page.Table:
  rows = [
    (name, [page.with_interval(value)])
    for name, value in summary["stops"]["score"].items()
  ]
  return page.Table(
    "What stopping is worth: the score of the last image",
    ["stops", "score"],
    rows,
  )


def _understanding(summary: dict) -> page.Table:
  columns = [
    "kind",
    "questions",
    "accuracy",
    "most frequent word",
    "precision of yes",
    "recall of yes",
    "says yes",
    "yes is right",
    "unread",
  ]
  names = {"match": "match (ITA-style)"}
  rows = []
  for kind, one in summary["understanding"].items():
    baseline = f"{one['most_frequent']:.3f} ({one['most_frequent_word']})"
    yes = [
      page.share(one.get(name))
      for name in ("precision", "recall", "says_yes", "always_yes")
    ]
    cells = [
      str(one["questions"]),
      page.with_interval(one["accuracy"]),
      baseline,
      *yes,
      page.share(one["unread"]),
    ]
    rows.append((names.get(kind, f"{kind} (VQA-style)"), cells))
  return page.Table("Understanding: questions about the drafts", columns, rows)


def charts(summary: dict) -> list[charts_lib.Chart]:
  """Returns the score by round: of all images, and of every tag."""
  points = lambda values: [
    (turn + 1, *(value or (None,) * 3)) for turn, value in enumerate(values)
  ]
  overall = charts_lib.Series(
    "all tags", points([one["score"] for one in summary["rounds"]])
  )
  by_tag = [
    charts_lib.Series(
      tag, points([value and (value[0], None, None) for value in values])
    )
    for tag, values in summary["tags"].items()
  ]
  return [
    charts_lib.Chart("score by round", [overall], "round"),
    *(
      [charts_lib.Chart("score by round and tag", by_tag, "round")]
      if len(by_tag) > 1
      else []
    ),
  ]


def _text(cell) -> str:
  return cell if isinstance(cell, str) else cell[0]


def markdown(table: page.Table) -> str:
  """Returns a table in Markdown, its caption above it."""
  escape = lambda text: text.replace("|", "\\|")
  lines = [
    "| " + " | ".join(map(escape, table.columns)) + " |",
    "| --- " * len(table.columns) + "|",
  ]
  lines += [
    "| "
    + " | ".join([escape(name), *(escape(_text(cell)) for cell in cells)])
    + " |"
    for name, cells in table.rows
  ]
  return "\n".join([f"{table.caption}:", "", *lines])


def csv_text(table: page.Table) -> str:
  """Returns a table as CSV with a line of names; an interval's bounds have columns of their own."""
  parts = [
    [_INTERVAL.fullmatch(_text(cell)) for cell in column]
    for column in zip(*(cells for _, cells in table.rows))
  ]
  wide = [any(matches) for matches in parts]
  header = [
    name
    for name, bounds in zip(table.columns[1:], wide)
    for name in _widened(name, f"{name}, low", f"{name}, high", bounds)
  ]
  file = io.StringIO()
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow([table.columns[0], *header])
  for name, cells in table.rows:
    writer.writerow(
      [
        name,
        *(
          value
          for cell, bounds in zip(cells, wide)
          for value in _values(_text(cell), bounds)
        ),
      ]
    )
  return file.getvalue()


def _widened(name: str, low: str, high: str, bounds: bool) -> tuple[str, ...]:
  return (name, low, high) if bounds else (name,)


def _values(text: str, bounds: bool) -> tuple[str, ...]:
  text = "" if text == page.NOTHING else text
  match = _INTERVAL.fullmatch(text)
  return _widened(*(match.groups() if match else (text, "", "")), bounds)
