"""Tests of io/report.py."""

import dataclasses
import html.parser
import math
import re
import subprocess
import sys
import json
import pathlib

import numpy as np
import pytest

from r3jax.io import report

SUMMARY = {"title": "R3 on shapes",
           "scores": {"overall": {"before": [0.5, 0.4, 0.6], "after": [0.75, 0.7, 0.8],
                                  "difference": [0.25, 0.15, 0.35]},
                      "counting": {"before": [0.5, 0.4, 0.6], "after": [0.4, 0.3, 0.5],
                                   "difference": [-0.1, -0.3, 0.1]}},
           "seconds": {"reason": 1.25}, "versions": {"jax": "0.10.2"}}
METRICS = [{"step": 1, "reward": 0.0}, {"step": 2, "reward": 1.0}, {"step": 3, "reward": None},
           {"step": 5, "reward": 0.5, "loss": 2.0}]
ATTACK = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"&"


def image(seed=0):
  return np.random.default_rng(seed).integers(0, 256, (48, 48, 3), np.uint8)


def sample(step=1, **changes):
  whole = report.RolloutSample(step, "a red ring", "colors", "<think>a ring</think>", image(0), 0.5,
                               "<think>blue</think>", "make it red", image(1), 1.0)
  return dataclasses.replace(whole, **changes)


class Page(html.parser.HTMLParser):
  """Collects the tags of a page, with their attributes, and its text."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text = [], ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data):
    self.text += data

  def all(self, tag):
    return [attributes for name, attributes in self.tags if name == tag]


def render(folder, samples=(), summary=SUMMARY, metrics=METRICS, **kwargs):
  return Page(report.write_report(folder, summary, metrics, samples, **kwargs).read_text())


def assert_same(actual, expected):
  for field in dataclasses.fields(expected):
    np.testing.assert_array_equal(getattr(actual, field.name), getattr(expected, field.name))


class TestAppendSamples:

  def test_samples_survive_a_restart(self, tmp_path):
    first = sample(1)
    second = sample(2, refined=None, refined_score=math.nan, reflection="", instruction="")
    report.append_samples(tmp_path, [first])
    report.append_samples(tmp_path, [second])
    read = report.read_samples(tmp_path)
    assert len(read) == 2
    assert_same(read[0], first)
    assert read[1].refined is None and math.isnan(read[1].refined_score)

  def test_repeated_steps_are_dropped(self, tmp_path):
    report.append_samples(tmp_path, [sample(1), sample(2), sample(2), sample(3)])
    report.drop_samples_after(tmp_path, 2)
    assert [read.step for read in report.read_samples(tmp_path)] == [1, 2, 2]

  @pytest.mark.parametrize("bad", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8)])
  def test_other_image_is_refused(self, tmp_path, bad):
    with pytest.raises(ValueError, match=r"an image must be uint8 \[H, W, 3\], got"):
      report.append_samples(tmp_path, [sample(draft=bad)])


class TestWriteReport:

  def test_images_are_in_the_page(self, tmp_path):
    images = render(tmp_path, [sample()]).all("img")
    assert [attributes["alt"] for attributes in images] == [
        "draft of: a red ring", "refined image of: a red ring"]
    prefix = "data:image/png;base64,"
    for seed, attributes in enumerate(images):
      assert attributes["src"].startswith(prefix)
      decoded = report._from_png_base64(attributes["src"].removeprefix(prefix))
      np.testing.assert_array_equal(decoded, image(seed))

  def test_page_loads_nothing(self, tmp_path):
    page = render(tmp_path, [sample()])
    sources = [value for _, attributes in page.tags for name, value in attributes.items()
               if name in ("src", "href")]
    assert all(value.startswith("data:") for value in sources)
    assert not page.all("link")

  def test_model_text_is_escaped_everywhere(self, tmp_path):
    texts = {name: ATTACK for name in ("prompt", "tag", "thought", "reflection", "instruction")}
    summary = SUMMARY | {"title": ATTACK, "versions": {ATTACK: ATTACK}, "seconds": {ATTACK: 1.0}}
    page = render(tmp_path, [sample(**texts)], summary, [{"step": 1, ATTACK: 1.0}])
    plain = render(tmp_path, [sample()], SUMMARY | {"seconds": {"a": 1.0}}, [{"step": 1, "b": 1.0}])
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert len(page.all("script")) == 1
    assert not any("onerror" in attributes for _, attributes in page.tags)
    # title 2, versions 2, seconds 1, curve 1; prompt 1, tag 2, thought, reflection, instruction.
    assert page.text.count(ATTACK) == 12

  def test_scores_and_seconds_are_shown(self, tmp_path):
    text = re.sub(r"\s+", " ", render(tmp_path).text)
    assert "overall 0.500 [0.400, 0.600] 0.750 [0.700, 0.800] +0.250 [+0.150, +0.350]" in text
    assert "reason 1.25" in text.replace("reason1", "reason 1")

  def test_curve_breaks_at_a_missing_value(self, tmp_path):
    lines = render(tmp_path, charts=["reward"]).all("polyline")
    assert [line["points"] for line in lines] == ["0.0,120.0 80.0,0.0", "320.0,60.0"]

  def test_all_metrics_are_drawn_unless_some_are_chosen(self, tmp_path):
    assert len(render(tmp_path).all("svg")) == 2
    assert len(render(tmp_path, charts=["loss", "absent"]).all("svg")) == 1

  def test_long_curve_is_thinned(self, tmp_path):
    metrics = [{"step": step, "reward": float(step)} for step in range(5000)]
    points = render(tmp_path, metrics=metrics).all("polyline")[0]["points"].split()
    assert 300 <= len(points) <= 400

  def test_latest_iteration_comes_first(self, tmp_path):
    page = render(tmp_path, [sample(1), sample(20), sample(3)])
    headings = [attributes["id"] for attributes in page.all("h3")]
    assert headings == ["iteration-20", "iteration-3", "iteration-1"]

  def test_tags_can_be_chosen(self, tmp_path):
    page = render(tmp_path, [sample(), sample(tag="counting"), sample()])
    assert [option["value"] for option in page.all("option")] == ["", "colors", "counting"]

  def test_every_field_has_a_label(self, tmp_path):
    page = render(tmp_path, [sample()])
    fields = {attributes["id"] for attributes in page.all("input") + page.all("select")}
    assert {attributes["for"] for attributes in page.all("label")} == fields

  def test_missing_score_is_named(self, tmp_path):
    assert "score missing" in render(tmp_path, [sample(draft_score=math.nan)]).text

  def test_empty_run_has_a_page(self, tmp_path):
    assert "No rollouts were logged." in render(tmp_path, summary={}, metrics=[]).text


class TestSummaryLines:

  def test_verdict_follows_the_interval(self):
    assert report.summary_lines(SUMMARY) == [
        "overall: 0.500 -> 0.750  (+0.250, 95 % interval +0.150 to +0.350: better)",
        "counting: 0.500 -> 0.400  (-0.100, 95 % interval -0.300 to +0.100: no clear change)"]


class TestMain:

  def test_prints_where_the_report_is_and_what_improved(self, tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    output = subprocess.run([sys.executable, "-m", "r3jax.io.report", str(tmp_path)], check=True,
                            cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True)
    lines = output.stdout.splitlines()
    assert lines[0] == f"report: {tmp_path}/report/index.html"
    assert len(lines) == 3
