"""Tests of report/page.py and run_page.py; test_browser.py looks at such pages in a browser."""

import base64
import hashlib
import html.parser
import io
import json
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from r3jax.evaluation import bootstrap
from r3jax.evaluation import sample_log
from r3jax.report import charts
from r3jax.report import page as page_lib
from r3jax.report import run_page
from r3jax.report import tables

SUMMARY = {
  "title": "R3 on shapes",
  "scores": {
    "overall": {
      "before": [0.5, 0.4, 0.6],
      "after": [0.75, 0.7, 0.8],
      "difference": [0.25, 0.15, 0.35],
    },
    "counting": {
      "before": [0.5, 0.4, 0.6],
      "after": [0.4, 0.3, 0.5],
      "difference": [-0.1, -0.3, 0.1],
    },
  },
  "seconds": {"reason": 1.25},
  "versions": {"jax": "0.10.2"},
}
METRICS = [
  {"step": 1, "reward": 0.0},
  {"step": 2, "reward": 1.0},
  {"step": 3, "reward": None},
  {"step": 5, "reward": 0.5, "loss": 2.0},
]
ATTACK = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"&\u2028<!--"


def image(seed=0):
  return np.random.default_rng(seed).integers(0, 256, (48, 48, 3), np.uint8)


def turn(name, score, **others):
  return {
    "image": name,
    "score": score,
    "parts": {"strict": score},
    "text": "<think>a ring</think>",
    "instruction": "",
    "stop": False,
    **others,
  }


def sample(step=1, number=0, **changes):
  key = f"{step:05d}_{number:02d}"
  turns = [
    turn(f"images/{key}_0.png", 0.5),
    turn(f"images/{key}_1.png", 1.0, instruction="make it red"),
  ]
  return {
    "step": step,
    "key": key,
    "prompt": "a red ring",
    "tag": "colors",
    "turns": turns,
  } | changes


def images_of(*samples):
  names = dict.fromkeys(
    turn["image"] for sample in samples for turn in sample["turns"]
  )
  return {name: image(seed) for seed, name in enumerate(names)}


class Html(html.parser.HTMLParser):
  """Collects the tags of a page, with their attributes, its text, and what its scripts hold."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text, self.inside = [], "", []
    self.feed(text)
    self.data = json.loads(self.inside[1])

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag in ("style", "script"):
      self.inside.append("")

  def handle_data(self, data):
    if self.cdata_elem:
      self.inside[-1] += data
    else:
      self.text += data

  def all(self, tag):
    return [attributes for name, attributes in self.tags if name == tag]


def append(folder, samples, images):
  sample_log.append(
    folder, [sample_log.Sample.from_json(line) for line in samples], images
  )


def read(folder):
  return [line.to_json() for line in sample_log.read(folder)]


def page_of(folder, samples):
  typed = [sample_log.Sample.from_json(line) for line in samples]
  return Html(
    page_lib.write_page(folder, page_lib.Page("t", samples=typed)).read_text()
  )


def render(folder, samples=(), summary=SUMMARY, metrics=METRICS, **kwargs):
  return Html(
    run_page.write_report(
      folder,
      run_page.RunSummary.from_json(summary),
      metrics,
      [sample_log.Sample.from_json(line) for line in samples],
      **kwargs,
    ).read_text()
  )


class TestSampleLog:
  def test_samples_survive_a_restart(self, tmp_path):
    for number in (1, 2):
      append(tmp_path, [sample(number)], images_of(sample(number)))
    assert read(tmp_path) == [sample(1), sample(2)]

  def test_images_are_exact(self, tmp_path):
    images = images_of(sample(1), sample(2))
    append(tmp_path, [sample(1), sample(2)], images)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
      "00001_00_0.png",
      "00001_00_1.png",
      "00002_00_0.png",
      "00002_00_1.png",
    ]
    for name, expected in images.items():
      np.testing.assert_array_equal(
        np.asarray(PIL.Image.open(tmp_path / name)), expected
      )

  def test_repeated_steps_are_dropped_and_written_anew(self, tmp_path):
    samples = [sample(1), sample(2), sample(2, 1), sample(3)]
    append(tmp_path, samples, images_of(*samples))
    sample_log.drop_after(tmp_path, 2)
    assert [line["key"] for line in read(tmp_path)] == [
      "00001_00",
      "00002_00",
      "00002_01",
    ]
    append(
      tmp_path, [sample(3)], {name: image(9) for name in images_of(sample(3))}
    )
    np.testing.assert_array_equal(
      np.asarray(PIL.Image.open(tmp_path / "images/00003_00_1.png")), image(9)
    )
    sample_log.drop_after(tmp_path, None)
    assert read(tmp_path) == []

  @pytest.mark.parametrize(
    "bad", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8)]
  )
  def test_other_image_is_refused_and_leaves_no_line(self, tmp_path, bad):
    images = images_of(sample()) | {"images/00001_00_1.png": bad}
    with pytest.raises(
      ValueError, match=r"an image must be uint8 \[H, W, 3\], got"
    ):
      append(tmp_path, [sample()], images)
    assert read(tmp_path) == []

  def test_missing_image_is_refused(self, tmp_path):
    with pytest.raises(
      ValueError,
      match="images that are not given: .'images/00001_00_0.png', 'images/00001_00_1",
    ):
      append(tmp_path, [sample()], {})

  @pytest.mark.parametrize(
    "name",
    [
      "../x.png",
      "/x.png",
      "a/../x.png",
      "https://host/x.png",
      "a b.png",
      "x#.png",
      "x.svg",
      "é.png",
    ],
  )
  def test_path_that_leaves_the_folder_or_needs_quoting_is_refused(
    self, tmp_path, name
  ):
    with pytest.raises(ValueError, match="an image's path must match"):
      append(tmp_path, [], {name: image()})

  def test_store_holds_every_image_once(self, store):
    append(
      "gs://bucket/report",
      [sample(1), sample(2)],
      images_of(sample(1), sample(2)),
    )
    written = [name for name in store.writes if name.endswith(".png")]
    assert len(written) == 4 and all(
      store.writes[name] == 1 for name in written
    )
    pixels = PIL.Image.open(
      io.BytesIO(store.objects["gs://bucket/report/images/00001_00_0.png"])
    )
    np.testing.assert_array_equal(np.asarray(pixels), image(0))
    assert read("gs://bucket/report") == [sample(1), sample(2)]
    sample_log.drop_after("gs://bucket/report", 1)
    assert read("gs://bucket/report") == [sample(1)]


class TestWritePage:
  def test_notes_tables_and_charts_need_no_script(self, tmp_path):
    score = bootstrap.Estimate(0.5, 0.4, 0.6)
    change = tables.Difference(bootstrap.Estimate(0.1, 0.05, 0.2), "better")
    table = tables.Table(
      "Rounds", ("round", "score", "change"), [("2", (score, change))]
    )
    points = [(0, 0.1, 0, 0.2), (1, 0.2, 0.1, 0.3)]
    chart = charts.Chart(
      "Score", [charts.Series("a", points), charts.Series("b", points)], "round"
    )
    page = page_lib.Page("An evaluation", ["Mind the gap."], [table], [chart])
    found = Html(page_lib.write_page(tmp_path, page).read_text())
    text = re.sub(r"\s+", " ", found.text)
    assert "Note Mind the gap." in text
    assert (
      "Rounds roundscorechange 2 0.500 [0.400, 0.600] "
      "▲ +0.100 [+0.050, +0.200] better"
    ) in text
    # the legend's
    assert (
      len(found.all("polygon")) == 2 and len(found.all("polyline")) == 2 + 2
    )
    assert {attributes.get("scope") for attributes in found.all("th")} == {
      "col",
      "row",
    }
    assert len(found.all("caption")) == len(found.all("table"))

  def test_data_are_the_samples(self, tmp_path):
    answer = {
      "kind": "count",
      "question": "?",
      "expected": "1",
      "answer": ATTACK,
      "text": ATTACK,
    }
    samples = [sample(prompt=ATTACK), sample(2, answers=[answer])]
    assert page_of(tmp_path, samples).data["samples"] == samples

  def test_halves_of_surrogate_pairs_are_held(self, tmp_path):
    samples = [sample(prompt="\ud800")]
    assert page_of(tmp_path, samples).data["samples"] == samples

  def test_nan_is_refused(self, tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
      page_of(tmp_path, [sample(turns=[turn("x.png", float("nan"))])])

  def test_policy_allows_its_own_style_and_script_alone(self, tmp_path):
    page = render(tmp_path, [sample()])
    policy = next(
      attributes["content"]
      for attributes in page.all("meta")
      if "http-equiv" in attributes
    )
    assert "unsafe" not in policy and policy.startswith(
      "default-src 'none'; img-src 'self' file: data:; "
    )
    style, _, script = page.inside
    for kind, text in (("style", style), ("script", script)):
      digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
      assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not any(
      name == "style" or name.startswith("on")
      for _, attributes in page.tags
      for name in attributes
    )

  def test_page_loads_nothing(self, tmp_path):
    page = render(tmp_path, [sample()])
    sources = [
      value
      for _, attributes in page.tags
      for name, value in attributes.items()
      if name in ("src", "href")
    ]
    assert "#gallery" in sources
    assert [
      source for source in sources if not source.startswith(("#", "data:"))
    ] == []
    assert "http" not in page.inside[0] + re.sub(
      r"http://www\.w3\.org/2000/svg", "", page.inside[2]
    )


class TestWriteReport:
  def test_text_is_escaped_everywhere(self, tmp_path):
    turns = [turn("x.png", 1.0, text=ATTACK, instruction=ATTACK, label=ATTACK)]
    attacked = sample(prompt=ATTACK, tag=ATTACK, turns=turns)
    summary = SUMMARY | {
      "title": ATTACK,
      "versions": {ATTACK: ATTACK},
      "seconds": {ATTACK: 1.0},
      "start": {"command": ATTACK},
    }
    details = run_page.RunDetails(config={"model.folder": ATTACK})
    page = render(
      tmp_path, [attacked], summary, [{"step": 1, ATTACK: 1.0}], details=details
    )
    harmless = sample(turns=[turn("x.png", 1.0)])
    plain = render(
      tmp_path,
      [harmless],
      SUMMARY | {"seconds": {"a": 1.0}, "start": {"command": "b"}},
      [{"step": 1, "b": 1.0}],
      details=run_page.RunDetails(config={"model.folder": "c"}),
    )
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert len(page.all("script")) == 2
    assert not any("onerror" in attributes for _, attributes in page.tags)
    # title 2, versions 2, seconds 1, command 1, config 1; tag and turn in the filters.
    assert page.text.count(ATTACK) == 9

  def test_scores_and_seconds_are_shown(self, tmp_path):
    text = re.sub(r"\s+", " ", render(tmp_path).text)
    assert (
      "overall ▲ +0.250 [+0.150, +0.350] better 0.500 [0.400, 0.600] 0.750 [0.700, 0.800] -"
      in text
    )
    assert (
      "counting -0.100 [-0.300, +0.100] 0.500 [0.400, 0.600] 0.400 [0.300, 0.500] - Seconds"
      in text
    )
    assert "reason 1.25" in text

  def test_rest_of_a_summary_is_shown(self, tmp_path):
    summary = {
      "last round minus draft": {"before": None, "after": [0.1, 0.05, 0.15]},
      "behaviour": {"before": {"edit_rate": 0.5}, "after": {"edit_rate": 0.25}},
      "images without a score": {"before": 0, "after": 0.02},
      "leaked": {"tags": {"colors": 3, "counting": 0}, "complete": True},
      "iterations": 7,
      "seed": 3,
      "peak_memory_gib": 1.5,
    }
    text = re.sub(r"\s+", " ", render(tmp_path, summary=summary).text)
    assert "trained on 3 of these prompts (colors 3)" in text
    assert "no score and count in no mean: 0.0% before, 2.0% after." in text
    assert "after ▲ +0.100 [+0.050, +0.150] better" in text
    assert "edit rate 0.500 0.250" in text
    assert "iterations 7 seed 3 peak memory 1.50 GiB" in text

  def test_run_without_faults_has_no_note(self, tmp_path):
    summary = SUMMARY | {
      "images without a score": {"before": 0, "after": 0},
      "leaked": {"tags": {"colors": 0}, "complete": True},
    }
    assert "Note" not in render(tmp_path, summary=summary).text

  def test_curves_are_grouped_by_what_they_answer(self, tmp_path):
    metrics = [
      {
        "step": step,
        "reason/score": 0.5,
        "edit/score": 0.6,
        "mismatch/reason_text": 10.0**-step,
        "mismatch/edit_text": 0.0,
        "edit/edit_rate": None,
      }
      for step in range(1, 11)
    ]
    page = render(
      tmp_path,
      metrics=metrics,
      details=run_page.RunDetails(mismatch_limit=1e-3),
    )
    text = re.sub(r"\s+", " ", page.text)
    # the main chart, before and after an edit, mismatch
    assert len(page.all("figure")) == 3
    assert "Are the updates sound? mismatch" in text
    assert "Does it judge its own images?" not in text
    assert "largest |ratio - 1| of a token and of an image" in text
    limits = [line for line in page.all("line") if line.get("class") == "limit"]
    assert len(limits) == 1
    faint = [
      group for group in page.all("g") if "faint" in group.get("class", "")
    ]
    assert len(faint) == 2
    lead, _, mismatch = page.data["charts"]
    assert [series["label"] for series in lead["series"]] == [
      "training, drafts",
      "training, edits",
    ]
    assert [series["label"] for series in mismatch["series"]] == [
      "mismatch/reason_text"
    ]

  def test_filters_offer_what_there_is(self, tmp_path):
    three = [turn(f"{i}.png", 1.0) for i in range(3)]
    page = render(
      tmp_path, [sample(1), sample(20, tag="counting", turns=three), sample(3)]
    )
    values = [option["value"] for option in page.all("option")]
    assert values[:10] == [
      "",
      "colors",
      "counting",
      "",
      "20",
      "3",
      "1",
      "",
      "1",
      "2",
    ]

  def test_one_iteration_cannot_be_chosen(self, tmp_path):
    assert "step" not in [
      select["name"] for select in render(tmp_path, [sample()]).all("select")
    ]

  def test_boxes_can_be_switched_where_there_are_some(self, tmp_path):
    boxed = sample(
      turns=[
        turn(
          "x.png", 1.0, boxes=[{"label": "red ring", "box": [0, 0, 0.5, 0.5]}]
        )
      ]
    )

    def buttons(page):
      return [button.get("id") for button in page.all("button")]

    assert "boxes" in buttons(render(tmp_path, [boxed]))
    assert "boxes" not in buttons(render(tmp_path, [sample()]))

  def test_empty_run_has_a_page(self, tmp_path):
    assert (
      "No samples were logged." in render(tmp_path, summary={}, metrics=[]).text
    )


class TestSummaryLines:
  def test_verdict_follows_the_interval(self):
    assert run_page.summary_lines(run_page.RunSummary.from_json(SUMMARY)) == [
      "overall: 0.500 -> 0.750  (+0.250, 95 % interval +0.150 to +0.350: better)",
      "counting: 0.500 -> 0.400  (-0.100, 95 % interval -0.300 to +0.100: no clear change)",
    ]

  def test_without_an_interval_there_is_no_verdict(self):
    numbers = {
      "before": [0.056, None, None],
      "after": [0.0, None, None],
      "difference": [-0.056, None, None],
      "prompts": 3,
    }
    summary = run_page.RunSummary.from_json({"scores": {"draft": numbers}})
    (line,) = run_page.summary_lines(summary)
    assert line == (
      "draft: 0.056 -> 0.000  (-0.056, 3 prompts, too few for an interval)"
    )

  def test_notes_come_first_and_less_clutter_is_better(self):
    scores = {
      "draft, clutter": {
        "before": [0.3, 0.2, 0.4],
        "after": [0.1, 0.0, 0.2],
        "difference": [-0.2, -0.3, -0.1],
      }
    }
    first, second = run_page.summary_lines(
      run_page.RunSummary.from_json(
        {"scores": scores, "leaked": {"tags": {"colors": 1}, "complete": True}}
      )
    )
    assert first.startswith("CONTAMINATED") and second.endswith(
      "-0.100: better)"
    )


class TestClosingLines:
  def test_headline_report_and_what_to_do_next(self, tmp_path):
    scores = {
      "draft": SUMMARY["scores"]["overall"] | {"prompts": 120},
      "last round": {
        "before": [0.5, None, None],
        "after": [0.25, None, None],
        "difference": [-0.25, None, None],
        "prompts": 4,
      },
      "draft, counting": SUMMARY["scores"]["counting"],
    }
    summary = run_page.RunSummary.from_json(
      {"scores": scores, "prompt": "it's a ring"}
    )
    workdir = tmp_path / "a run"
    lines = run_page.closing_lines(summary, workdir)
    assert lines[:3] == [
      "            before  after  difference, 95 % interval       prompts",
      "draft       0.500   0.750  +0.250 [+0.150, +0.350] better  120",
      "last round  0.500   0.250  -0.250                          4",
    ]
    assert lines[4] == f"report: {workdir}/report/index.html"
    commands = [line.split("  # ")[0].strip() for line in lines[7:]]
    words = [shlex.split(command) for command in commands]
    assert words == [
      [
        "r3jax",
        "generate",
        f"--model={workdir}",
        "--prompt=it's a ring",
        "--out=drawn",
      ],
      ["r3jax", "compare", str(workdir), "--workdir=compared"],
      ["r3jax", "report", str(workdir)],
    ]

  def test_run_without_scores_names_its_report(self, tmp_path):
    lines = run_page.closing_lines(run_page.RunSummary(), tmp_path)
    assert lines[1] == f"report: {tmp_path}/report/index.html"


class TestMain:
  def test_prints_where_the_report_is_and_what_improved(self, tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    output = subprocess.run(
      [sys.executable, "-m", "r3jax", "report", str(tmp_path)],
      check=True,
      cwd=pathlib.Path(__file__).parents[2],
      capture_output=True,
      text=True,
    )
    lines = output.stdout.splitlines()
    assert lines[0] == f"report: {tmp_path}/report/index.html"
    assert len(lines) == 3


class TestLabelledImages:
  PAIR = {
    "before": [0.5, 0.4, 0.6],
    "after": [0.75, 0.7, 0.8],
    "difference": [0.25, 0.15, 0.35],
    "prompts": 90,
  }
  SUMMARY = run_page.RunSummary.from_json(
    {
      "labelled images": {
        "judgement": PAIR,
        "judgement, precision of stop": PAIR,
        "judgement, position": PAIR,
      }
    }
  )

  def test_stand_in_the_last_lines_without_tags(self):
    lines = run_page.summary_lines(self.SUMMARY)
    assert lines == [
      "labelled images, judgement: 0.500 -> 0.750  (+0.250, 90 prompts, "
      "95 % interval +0.150 to +0.350: better)",
      "labelled images, judgement, precision of stop: 0.500 -> 0.750  (+0.250, "
      "90 prompts, 95 % interval +0.150 to +0.350: better)",
    ]

  def test_accuracies_stand_in_the_headline(self, tmp_path):
    lines = run_page.closing_lines(self.SUMMARY, tmp_path)
    assert lines[1].startswith(
      "labelled images, judgement  0.500   0.750  +0.250"
    )
    assert lines[2] == ""
    path = run_page.write_report(tmp_path, self.SUMMARY, [], [])
    assert "judgement of labelled images" in path.read_text()

  def test_stand_on_the_page_by_tag(self, tmp_path):
    path = run_page.write_report(tmp_path, self.SUMMARY, [], [])
    page = path.read_text()
    assert "Understanding: questions about labelled images" in page
    assert "judgement, position" in page


class TestCost:
  SUMMARY = run_page.RunSummary(versions={"devices": "4"})
  METRICS = (
    {"step": 1, "seconds/iteration": 3600.0},
    {"step": 2, "seconds/iteration": None},
    {"step": 3, "seconds/iteration": 1800.0},
  )

  def test_is_the_time_of_all_iterations_on_all_devices(self, tmp_path):
    assert run_page.device_hours(self.SUMMARY, self.METRICS) == 6
    path = run_page.write_report(tmp_path, self.SUMMARY, self.METRICS, [])
    assert "6.00 hours of a device (4 devices)" in path.read_text()

  def test_is_left_out_where_it_is_not_known(self):
    assert run_page.device_hours(self.SUMMARY, []) is None
    nameless = run_page.RunSummary()
    assert run_page.device_hours(nameless, self.METRICS) is None
