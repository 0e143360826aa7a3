"""Figures of reports. Oracles: ticks and places by hand; an XML parser; colours and dashes counted."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from bpfree.study.report.axes import linear, logarithmic, short
from bpfree.study.report.strip import Strip, near_the_best, shared_axis, strip, strip_axis
from bpfree.study.report.svg import Mark, Series, legend, marker, panel, style_of, thinned
from bpfree.study.statistics import Interval


@pytest.mark.parametrize(
    ("values", "bounds", "ticks"),
    [
        ([0, 100], (0, 100), ["0", "20", "40", "60", "80", "100"]),
        ([97.2, 98.4], (0, 100), ["97.5", "98.0"]),
        ([-0.2, 1.0], (-math.inf, math.inf), ["0.0", "0.5", "1.0"]),
        ([0, 60_000], (0, math.inf), ["0", "20k", "40k", "60k"]),
        ([1e-9, 4e-9], (-math.inf, math.inf), ["1e-9", "2e-9", "3e-9", "4e-9"]),
        ([1e-14, 4e-14], (-math.inf, math.inf), ["1e-14", "2e-14", "3e-14", "4e-14"]),
    ],
)
def test_linear_ticks(values: list[float], bounds: tuple[float, float], ticks: list[str]) -> None:
    axis = linear(values, "x", bounds=bounds)
    assert [text for _, text in axis.ticks] == ticks
    assert all(axis.low <= value <= axis.high for value, _ in axis.ticks)
    assert axis.low <= min(values) < max(values) <= axis.high
    assert axis.low >= min(bounds[0], min(values))


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0001, 0.1], ["1e-4", "0.001", "0.01", "0.1"]),
        ([1, 8], ["1", "2", "5"]),
        ([20, 24], ["20", "22", "24"]),
        ([1e-3, 1e9], ["0.001", "1", "1k", "1M", "1G"]),
    ],
)
def test_logarithmic_ticks(values: list[float], ticks: list[str]) -> None:
    axis = logarithmic(values, "x")
    assert [text for _, text in axis.ticks][: len(ticks)] == ticks
    assert axis.share(math.sqrt(axis.low * axis.high)) == pytest.approx(0.5)


def test_axes_of_little() -> None:
    """Nothing, one value, and what has no place on the axis."""
    for axis in (
        linear([], "x"),
        linear([5.0], "x"),
        linear([0.0, math.nan], "x"),
        logarithmic([], "x"),
        logarithmic([3.0, -1.0, 0.0], "x"),
    ):
        assert axis.low < axis.high
        assert axis.ticks
    assert linear([5.0], "x").share(5.0) == pytest.approx(0.5)
    assert linear([0.0, 10.0], "x", pad=0).share(20.0) == 1.0


def test_short_numbers() -> None:
    numbers = [0, 0.00001, 0.001, 0.25, 12, 1500, 20_000, 5e6]
    assert [short(value) for value in numbers] == ["0", "1e-5", "0.001", "0.25", "12", "1.5k", "20k", "5M"]


def test_curves_are_thinned_to_their_ends() -> None:
    points = [(float(i), float(i)) for i in range(1000)]
    chosen = thinned(points)
    assert len(chosen) == 120
    assert (chosen[0], chosen[-1]) == (points[0], points[-1])
    assert thinned(points[:120]) == points[:120]


def test_32_rows_can_be_told_apart() -> None:
    assert len({(style_of(index), re.sub(r"[\d.,-]+", "", marker(index, 0, 0))) for index in range(32)}) == 32
    first, ninth = marker(0, 0, 0), marker(8, 0, 0)
    assert style_of(0).split()[1] == style_of(8).split()[1]  # the colour
    assert first != ninth


def test_a_panel_is_well_formed_and_says_what_it_shows() -> None:
    label = '<script>"&'
    points = [Mark(1, 50, label, (0.9, 1.2), (40, 60)), Mark(math.nan, 3, "nowhere"), Mark(-1, 3, "not on this axis")]
    one = Series(0, label, [(1, 10), (2, 20), (3, math.inf)], [(1, 8, 12), (2, 15, 25)], points)
    text = panel("", logarithmic([1, 3], "seconds"), linear([0, 60], label), [one, Series(1, "lonely", [(2, 5)])], rules=[(30, "target")])
    root = ElementTree.fromstring(text)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == f"{label} against seconds: {label}, lonely"
    titles = [node.text for node in root.iter("title")]
    assert titles == [label, label, "lonely"]  # of the line, of the point that has a place, and of the line of one point
    assert "nan" not in text
    assert "inf" not in text
    ElementTree.fromstring(legend([(0, label), (9, "other")]))


def test_places_in_a_panel() -> None:
    """50 to 386 across, 236 to 30 down, in a box of 400 by 280."""
    axis = linear([0, 10], "x", pad=0)
    root = ElementTree.fromstring(panel("t", axis, linear([0, 1], "y", pad=0), [Series(0, "row", [(0, 0), (5, 0.5), (10, 1)])]))
    line = next(node for node in root.iter("path") if node.attrib["class"] == "line")
    assert line.attrib["d"] == "M50 236L218 133L386 30"


def test_far_rows_do_not_take_the_room_of_the_others() -> None:
    """The best mean is 98, three quarters of them reach down to 96: what lies within twice as far, 4, is kept."""
    means = [98.0, 97.0, 96.0, 10.0]
    assert near_the_best([98.5, 94.0, 93.9, 10.0], means, greater=True) == [98.5, 94.0]
    assert near_the_best([1.0, 4.0, 4.1, 90.0], [2.0, 2.5, 3.0, 90.0], greater=False) == [1.0, 4.0]
    assert near_the_best([50.0, 10.0], means[1:], greater=True) == [50.0, 10.0]
    assert near_the_best([5.0, 1.0], [5.0, 5.0, 5.0, 1.0], greater=True) == [5.0, 1.0]
    rows = [Strip(place, [mean], None, None, f"row {place}") for place, mean in enumerate(means)]
    axis = shared_axis(rows, greater=True)
    assert axis.low > 90
    assert "beyond" in strip(rows[3], axis)
    assert "beyond" not in strip(rows[0], axis)


def test_a_strip_draws_runs_interval_mean_and_the_published_number() -> None:
    row = Strip(3, [96.0, 97.0, math.nan], Interval(95.0, 98.0), 97.5, 'mean "96.5"')
    axis = shared_axis([row], greater=True)
    root = ElementTree.fromstring(strip(row, axis))
    kinds = [node.attrib.get("class") for node in root.iter()]
    assert kinds.count("run") == 2
    assert {"range", "mean", "published"} <= set(kinds)
    assert root.attrib["aria-label"] == 'mean "96.5"'
    ElementTree.fromstring(strip_axis(axis))
