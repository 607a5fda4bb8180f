"""Plots are SVG that a browser can read."""

import xml.etree.ElementTree as ElementTree

from ropewalk.train.plots import line_plot

SVG = "{http://www.w3.org/2000/svg}"


def test_a_plot_is_well_formed_and_its_curve_has_a_point_per_finite_value():
    text = line_plot("Loss <1>", "step", "nats", [("a & b", [1, 2, 3, 4], [4.0, float("nan"), 2.0, 1.0]), ("c", [1], [2.0])])
    curves = ElementTree.fromstring(text).findall(f"{SVG}polyline")
    assert [len(c.get("points").split()) for c in curves] == [3, 1]


def test_a_falling_curve_goes_down_on_the_page():
    curve = ElementTree.fromstring(line_plot("t", "x", "y", [("a", [0, 1], [2.0, 1.0])])).find(f"{SVG}polyline")
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in curve.get("points").split())
    assert x1 > x0
    assert y1 > y0  # SVG counts from the top


def test_nothing_to_draw_is_an_empty_frame():
    assert "polyline" in line_plot("t", "x", "y", [("a", [], [])])
