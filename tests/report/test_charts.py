"""Tests of io/charts.py."""

import math

import pytest

from r3jax.report import charts


def drawn(points, **others):
  return charts.layout(
    charts.Chart("score", [charts.Series("ours", points)], **others)
  )


def plain(values):
  return [(x, y, None, None) for x, y in values]


class TestLayout:
  def test_ends_of_the_ticks_are_the_ends_of_the_plot(self):
    drawing = drawn(plain([(0, 0.0), (10, 1.0)]))
    assert drawing.curves[0].lines == ["46.0,164.0 350.0,10.0"]
    assert drawing.y_ticks == [
      ("164.0", "0.0"),
      ("133.2", "0.2"),
      ("102.4", "0.4"),
      ("71.6", "0.6"),
      ("40.8", "0.8"),
      ("10.0", "1.0"),
    ]
    assert [text for _, text in drawing.x_ticks] == [
      "0",
      "2",
      "4",
      "6",
      "8",
      "10",
    ]

  def test_curve_breaks_at_a_missing_value(self):
    drawing = drawn(plain([(1, 0.0), (2, 1.0), (3, None), (5, 0.5)]))
    assert drawing.curves[0].lines == ["46.0,164.0 122.0,10.0", "350.0,87.0"]

  def test_what_is_not_finite_is_missing(self):
    drawing = drawn(plain([(1, 0.0), (2, math.nan), (3, math.inf), (4, 1.0)]))
    assert drawing.curves[0].lines == ["46.0,164.0", "350.0,10.0"]
    assert drawing.curves[0].points[1] == (2, None, None, None)

  def test_band_goes_out_by_the_high_bounds_and_back_by_the_low_ones(self):
    drawing = drawn(
      [(0, 0.5, 0.0, 1.0), (1, 0.5, 0.0, 1.0), (2, 0.5, None, None)]
    )
    assert drawing.curves[0].bands == [
      "46.0,10.0 198.0,10.0 198.0,164.0 46.0,164.0"
    ]

  def test_ticks_hold_the_bands(self):
    ticks = drawn([(0, 0.5, -0.19, 0.5), (1, 0.5, 0.5, 1.31)]).y_ticks
    assert (float(ticks[0][1]), float(ticks[-1][1])) == (-0.5, 1.5)

  def test_chart_without_values_is_none(self):
    assert drawn([]) is None
    assert drawn(plain([(1, None), (2, None)])) is None

  def test_series_without_values_is_left_out_and_the_rest_keep_their_styles(
    self,
  ):
    empty, full = (
      charts.Series("a", plain([(1, None)])),
      charts.Series("b", plain([(1, 1.0)])),
    )
    curves = charts.layout(charts.Chart("c", [empty, full])).curves
    assert [(curve.label, curve.style) for curve in curves] == [("b", 1)]

  def test_constant_stands_in_the_middle(self):
    drawing = drawn(plain([(1, 2.0), (2, 2.0)]))
    assert drawing.curves[0].lines == ["46.0,87.0 350.0,87.0"]
    assert drawn(plain([(7, 0.0)])).curves[0].dots == [("198.0", "87.0")]

  @pytest.mark.parametrize(
    ("count", "kept"), [(1, 1), (400, 400), (401, 201), (402, 202), (5000, 386)]
  )
  def test_long_curve_is_thinned_and_keeps_its_ends(self, count, kept):
    points = drawn(plain((x, float(x)) for x in range(count))).curves[0].points
    assert len(points) == kept
    assert (points[0][0], points[-1][0]) == (0, count - 1)

  def test_label_says_what_the_curves_say(self):
    drawing = drawn(plain([(1, 0.25), (4, 0.75), (9, 0.5)]), x_label="round")
    assert (
      drawing.description
      == "score over round 1 to 9: between 0.25 and 0.75, last 0.5"
    )

  def test_axis_of_shares_reaches_from_0_to_1_and_further_if_it_must(self):
    points = plain([(1, 0.4), (2, 0.5)])
    ticks = drawn(points, y_range=(0.0, 1.0)).y_ticks
    assert (ticks[0], ticks[-1]) == (("164.0", "0.0"), ("10.0", "1.0"))
    higher = drawn(plain([(1, 0.4), (2, 1.4)]), y_range=(0.0, 1.0)).y_ticks
    assert float(higher[-1][1]) >= 1.4

  def test_logarithmic_axis_has_decades_and_no_place_for_zero(self):
    drawing = drawn(
      plain([(1, 1e-6), (2, 0.0), (3, 1e-4)]), is_log=True, threshold=1e-3
    )
    assert [text for _, text in drawing.y_ticks] == [
      "1e-06",
      "1e-05",
      "0.0001",
      "0.001",
    ]
    assert drawing.threshold == "10.0"
    # missing at 0, so that two single points are left
    assert drawing.curves[0].lines == ["46.0,164.0", "350.0,61.3"]
    many = drawn(plain([(1, 1e-12), (2, 1.0)]), is_log=True)
    assert len(many.y_ticks) <= 7

  def test_faint_curve_is_not_named(self):
    points = plain([(1, 0.0), (2, 1.0)])
    drawing = charts.layout(
      charts.Chart(
        "score",
        [
          charts.Series("raw", points, is_faint=True, style=0),
          charts.Series("smooth", points, style=0),
        ],
      )
    )
    assert [curve.style for curve in drawing.curves] == [0, 0]
    assert [curve.label for curve in drawing.named] == ["smooth"]
    assert "raw" not in drawing.description

  @pytest.mark.parametrize(
    ("values", "texts"),
    [
      ((0, 1e-6), ["0", "2e-07", "4e-07", "6e-07", "8e-07", "1e-06"]),
      ((0, 300_000), ["0", "1e+05", "2e+05", "3e+05"]),
      ((-1, 1), ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
      ((1000, 1002), ["1000.0", "1000.5", "1001.0", "1001.5", "1002.0"]),
    ],
  )
  def test_ticks_can_be_told_apart(self, values, texts):
    assert [
      text for _, text in drawn(plain(enumerate(values))).y_ticks
    ] == texts
