"""Charts on pages and in files. Oracles: ticks and places by hand; an XML parser; colours and dashes counted."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from bpfree.document.axes import fitting, linear, logarithmic, short
from bpfree.document.charts import Mark, Series, in_order, look, marker, natural, panel, thinned
from bpfree.document.content import Figure, Key, Section
from bpfree.document.data import figure_csv
from bpfree.document.page import html_page
from bpfree.document.strips import Strip, near_the_best, shared_axis, strip, strip_axis
from bpfree.document.style import CHART_STYLE, PAGE_STYLE
from bpfree.document.svg import svg_file
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
    assert len({(look(Key(index, "")), re.sub(r"[\d.,-]+", "", marker(index, 0, 0))) for index in range(32)}) == 32
    first, ninth = marker(0, 0, 0), marker(8, 0, 0)
    assert (look(Key(0, "")), look(Key(8, ""))) == ('class="c0 d0"', 'class="c0 d1"')
    assert first != ninth


def test_a_panel_is_well_formed_and_says_what_it_shows() -> None:
    label = '<script>"&'
    points = [Mark(1, 50, label, (0.9, 1.2), (40, 60)), Mark(math.nan, 3, "nowhere"), Mark(-1, 3, "not on this axis")]
    one = Series(Key(0, label), [(1, 10), (2, 20), (3, math.inf)], [(1, 8, 12), (2, 15, 25)], points)
    lonely = Series(Key(1, "lonely"), [(2, 5)])
    made = panel("", logarithmic([1, 3], "seconds"), linear([0, 60], label), [one, lonely], rules=[(30, "target")])
    text = svg_file("", Figure([made]))
    root = ElementTree.fromstring(re.sub(' xmlns="[^"]+"', "", text)).find("svg")
    assert root is not None
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == f"{label} against seconds: {label}, lonely"
    titles = [node.text for node in root.iter("title")]
    assert titles == [label, label, "lonely"]  # of the line, of the point that has a place, and of the line of one point
    assert "nan" not in made.body
    assert "inf" not in made.body
    assert ">lonely</span>" in html_page("t", [Section("", [Figure([made], keys=[one.key, lonely.key])])])


def test_a_figures_data_are_what_it_draws() -> None:
    """Lines with their bands, and markers with their error bars; columns that are empty everywhere are left out. By hand."""
    one = Series(Key(0, "a"), [(1, 2), (2, 4.5)], [(1, 1, 3), (2, 4, 5)])
    other = Series(Key(1, "b, c"), points=[Mark(3, 7, "hint", x_range=(2.5, 4))])
    axes = linear([0, 5], "x"), linear([0, 10], "y")
    assert figure_csv(Figure([panel("t", *axes, [one, other])])).splitlines() == [
        "chart,name,x,x_low,x_high,y,y_low,y_high",
        "t,a,1,,,2,1,3",
        "t,a,2,,,4.5,4,5",
        't,"b, c",3,2.5,4,7,,',
    ]
    assert figure_csv(Figure([panel("", *axes, [Series(Key(0, "a"), [(1, 2)])])])) == "chart,name,x,y\ny,a,1,2\n"
    assert figure_csv(Figure([])) == ""


def test_a_chosen_marker_has_a_ring_and_a_faint_row_its_class() -> None:
    points = [Mark(1, 1, "tried"), Mark(2, 2, "chosen", ringed=True)]
    made = panel("t", linear([0, 5], "x"), linear([0, 10], "y"), [Series(Key(0, "a", faint=True), points=points)])
    root = ElementTree.fromstring(f"<svg>{made.body}</svg>")
    rings = [node for node in root.iter("circle") if node.attrib.get("class") == "ring"]
    (row,) = [node for node in root.iter("g") if "data-row" in node.attrib]
    assert len(rings) == 1
    assert row.attrib["class"].split() == ["c0", "d0", "faint"]


def test_places_in_a_panel() -> None:
    """50 to 386 across, 236 to 30 down, in a box of 400 by 280."""
    axis = linear([0, 10], "x", pad=0)
    made = panel("t", axis, linear([0, 1], "y", pad=0), [Series(Key(0, "row"), [(0, 0), (5, 0.5), (10, 1)])])
    root = ElementTree.fromstring(f"<svg>{made.body}</svg>")
    assert (made.width, made.height) == (400, 280)
    line = next(node for node in root.iter("path") if node.attrib["class"] == "line")
    assert line.attrib["d"] == "M50 236L218 133L386 30"


def test_far_rows_do_not_take_the_room_of_the_others() -> None:
    """The best mean is 98, three quarters of them reach down to 96: what lies within twice as far, 4, is kept."""
    means = [98.0, 97.0, 96.0, 10.0]
    assert near_the_best([98.5, 94.0, 93.9, 10.0], means, greater=True) == [98.5, 94.0]
    assert near_the_best([1.0, 4.0, 4.1, 90.0], [2.0, 2.5, 3.0, 90.0], greater=False) == [1.0, 4.0]
    assert near_the_best([50.0, 10.0], means[1:], greater=True) == [50.0, 10.0]
    assert near_the_best([5.0, 1.0], [5.0, 5.0, 5.0, 1.0], greater=True) == [5.0, 1.0]
    rows = [Strip(Key(place, ""), [mean], None, None, f"row {place}") for place, mean in enumerate(means)]
    axis = shared_axis(rows, greater=True)
    assert axis.low > 90
    assert "beyond" in strip(rows[3], axis)
    assert "beyond" not in strip(rows[0], axis)


def test_a_strip_draws_runs_interval_mean_and_the_published_number() -> None:
    row = Strip(Key(3, ""), [96.0, 97.0, math.nan], Interval(95.0, 98.0), 97.5, 'mean "96.5"')
    axis = shared_axis([row], greater=True)
    root = ElementTree.fromstring(strip(row, axis))
    kinds = [node.attrib.get("class") for node in root.iter()]
    assert kinds.count("run") == 2
    assert {"range", "mean", "published"} <= set(kinds)
    assert root.attrib["aria-label"] == 'mean "96.5"'
    ElementTree.fromstring(strip_axis(axis))


# --- looks and files ------------------------------------------------------------------------------------------------------


def test_whole_numbers_and_wide_ranges() -> None:
    """Epochs have no halves; positive values over 50 times apart go on a logarithmic axis."""
    assert [text for _, text in linear([1, 3], "epoch", whole=True).ticks] == ["1", "2", "3"]
    assert [text for _, text in linear([7], "epoch", whole=True).ticks] == ["7"]
    assert [fitting(values, "").log for values in ([1, 51], [1, 49], [0, 51], [-1, 99], [])] == [True, False, False, False, False]


def test_an_order_shows_in_colours() -> None:
    """Thirds of the way by hand, from orange over green to blue; names without a number stand apart, but where all are without."""
    keys = in_order(["b1", "b2", "b3", "readout"])
    assert [key.colour for key in keys] == ["#e69f00", "#009e73", "#0072b2", ""]
    assert look(keys[3]) == 'class="c1 d1"'
    assert [key.colour for key in in_order(["stem", "head"])] == ["#e69f00", "#0072b2"]
    assert [key.colour for key in in_order(["b1", "readout"])] == ["#e69f00", ""]
    assert [look(key) for key in in_order(["readout"])] == ['class="c1 d1"']
    assert in_order([]) == []
    assert sorted(["b10", "b2", "a", "b1"], key=natural) == ["a", "b1", "b2", "b10"]


def test_a_file_holds_panels_side_by_side_below_title_and_legend() -> None:
    """Nothing overlaps, and all of it lies within the view box."""
    axes = linear([0, 1], "x"), linear([0, 1], "y")
    keys = [Key(number, f"a row with a long name, {number}") for number in range(9)]
    made = panel("t", *axes, [Series(key, [(0, 0), (1, 1)]) for key in keys])
    root = ElementTree.fromstring(re.sub(' xmlns="[^"]+"', "", svg_file("<title>", Figure([made, made], "said", keys))))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert (root.findtext("desc"), root.attrib["aria-label"]) == ("said", "<title>")
    boxes = [tuple(float(one.attrib[name]) for name in ("x", "y", "width", "height")) for one in root.findall("svg")]
    assert boxes[0][0] + boxes[0][2] < boxes[1][0]
    assert boxes[1][0] + boxes[1][2] < width
    assert boxes[0][1] + boxes[0][3] < height
    names = {node.text: (float(node.attrib["x"]), float(node.attrib["y"])) for node in root.findall("text")}
    rows = sorted({y for _, y in names.values()})
    assert len(rows) > 2
    assert min(b - a for a, b in pairwise(rows)) >= 14
    assert rows[-1] < boxes[0][1]
    for row in rows[1:]:
        places = sorted(x for x, y in names.values() if y == row)
        assert all(b - a > 6 * len(keys[0].label) for a, b in pairwise(places))


def test_each_class_that_is_drawn_has_a_style() -> None:
    """Also where there is no page: colours are there for light and dark, as names that every program for drawings knows."""
    classes = {f"c{number}" for number in range(8)} | {"d1", "d2", "d3", "line", "dot", "band", "bar", "grid", "axis", "tick", "head"}
    light, dark = CHART_STYLE.split("@media")
    for name in classes:
        assert re.search(rf"\.{name}\b", light)
        assert re.search(rf"\.{name}\b", PAGE_STYLE)
    assert set(re.findall(r"\.c\d", dark)) == set(re.findall(r"\.c\d", light))
    assert "var(" not in CHART_STYLE
