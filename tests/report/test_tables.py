"""Tests of report/tables.py."""

import csv
import io

import numpy as np
import pytest

from r3jax.evaluation import bootstrap
from r3jax.report import tables

Estimate = bootstrap.Estimate
TABLE = tables.Table(
  "What",
  ["of", "a|b"],
  [("x|y", [1]), ("z", [tables.Difference(Estimate(0.2, 0.1, 0.3), "better")])],
)


class TestTable:
  def test_row_of_another_length_is_refused(self):
    with pytest.raises(
      ValueError, match="'scores' has 3 columns, but 1 cells beside 'draft'"
    ):
      tables.Table("scores", ("name", "before", "after"), [("draft", (0.5,))])


class TestFormatCell:
  @pytest.mark.parametrize(
    "cell, text",
    [
      (None, "-"),
      (3, "3"),
      ("no", "no"),
      (0.12345, "0.123"),
      (np.float64(0.12345), "0.123"),
      (Estimate(0.5, 0.25, 0.75), "0.500 [0.250, 0.750]"),
      (
        tables.Difference(Estimate(0.5, -0.25, 0.75), ""),
        "+0.500 [-0.250, +0.750]",
      ),
    ],
  )
  def test_texts(self, cell, text):
    assert str(tables.format_cell(cell, ".3f")) == text

  def test_format_is_that_of_the_table(self):
    assert str(tables.format_cell(12345.678, ".4g")) == "1.235e+04"
    assert str(tables.format_cell(12345, ".4g")) == "12345"


class TestMarkdown:
  def test_escapes_its_own_signs(self):
    assert tables.markdown(TABLE) == (
      "What:\n\n| of | a\\|b |\n| --- | --- |\n| x\\|y | 1 |\n"
      "| z | +0.200 [+0.100, +0.300] |"
    )

  def test_a_name_stays_in_its_row_and_leaves_the_terminal_alone(self):
    table = tables.Table("What", ["of", "a"], [("x\n\x1b[2Jy", [1])])
    assert tables.markdown(table).splitlines()[-1] == "| x  [2Jy | 1 |"


class TestCsvText:
  def test_without_estimates_columns_are_those_of_the_table(self):
    table = tables.Table("What", ["of", "a|b"], [("x|y", [1]), ("z", ["2"])])
    assert tables.csv_text(table) == "of,a|b\nx|y,1\nz,2\n"

  def test_bounds_are_in_columns(self):
    difference = tables.Difference(Estimate(0.2, -0.1, 0.3), "")
    table = tables.Table(
      "What",
      ["of", "a", "b"],
      [("x", [Estimate(0.5, 0.1, 0.9), None]), ("y", [None, difference])],
    )
    assert tables.csv_text(table) == (
      'of,a,"a, low","a, high",b,"b, low","b, high"\n'
      "x,0.5,0.1,0.9,,,\ny,,,,0.2,-0.1,0.3\n"
    )

  def test_numbers_have_all_their_digits(self):
    values = np.random.default_rng(0).normal(size=4)
    table = tables.Table(
      "What", ["of", "a", "b"], [("x", [Estimate(*values[:3]), values[3]])]
    )
    _, line = tables.csv_text(table).splitlines()
    assert [float(field) for field in line.split(",")[1:]] == values.tolist()

  @pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r=", "  ="])
  def test_text_that_a_spreadsheet_would_run_is_quoted(self, start):
    text = f"{start}1+1|cmd"
    table = tables.Table("What", [text, text], [(text, [text]), ("x", [-1.5])])
    file = io.StringIO(tables.csv_text(table), newline="")
    shown = "'" + text.replace("\r", " ")
    assert list(csv.reader(file)) == [[shown] * 2] * 2 + [["x", "-1.5"]]

  def test_line_end_inside_of_a_text_begins_no_row(self):
    table = tables.Table("What", ["of", "a"], [("x\r=1", ["y\n=1"])])
    assert tables.csv_text(table) == 'of,a\nx =1,"y\n=1"\n'


class TestDifference:
  @pytest.mark.parametrize(
    "values, verdict",
    [
      ([0.1, 0.05, 0.2], "better"),
      ([-0.1, -0.2, -0.01], "worse"),
      ([0.1, -0.1, 0.2], ""),
    ],
  )
  def test_is_clear_where_its_interval_leaves_out_zero(self, values, verdict):
    estimate = Estimate(*values)
    assert tables.difference("score", estimate) == tables.Difference(
      estimate, verdict
    )

  def test_of_nothing_is_nothing(self):
    assert tables.difference("score", None) is None

  def test_less_clutter_is_better(self):
    falls = tables.difference("draft, clutter", Estimate(-0.1, -0.2, -0.01))
    assert falls.verdict == "better"
    rises = tables.difference("draft, clutter", Estimate(0.1, 0.05, 0.2))
    assert rises.verdict == "worse"


class TestWithoutInterval:
  def test_mean_stands_alone(self):
    assert str(tables.format_cell(Estimate(0.5), ".3f")) == "0.500"
    difference = tables.difference("draft", Estimate(0.042))
    assert str(tables.format_cell(difference, ".3f")) == "+0.042"

  def test_bounds_are_empty_in_csv(self):
    rows = [("x", [Estimate(0.5)]), ("y", [Estimate(0.5, 0.25, 0.75)])]
    text = tables.csv_text(tables.Table("What", ["of", "a"], rows))
    assert text.splitlines()[1:] == ["x,0.5,,", "y,0.5,0.25,0.75"]

  @pytest.mark.parametrize(
    "estimate", [Estimate(0.042), Estimate(0.3, 0.3, 0.1 + 0.2)]
  )
  def test_there_is_no_verdict(self, estimate):
    assert tables.difference("draft", estimate).verdict == ""
