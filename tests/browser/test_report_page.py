"""Reports and certificates in a browser. Oracles: what Chromium lays out; contrast by the formula of WCAG 2.1; the csv module."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_certificates
import numpy as np
import pytest
from browser.kit import cut, dead_links, opened
from made_studies import lines_of, outcome, planned, tuned

from bpfree.certify.page import write_page
from bpfree.study.report import report_on, write_report
from bpfree.training.predictions import Predictions, write_predictions

pytestmark = pytest.mark.browser

LABELS = ["BP", "DFA with a label that is long enough to need a second line", "frozen", *(f"further row {number}" for number in range(9))]
LEAST_CONTRAST = 4.5

OVERFLOWING = """() => [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)
  .map(e => [e.getAttribute('aria-label') || '', !e.previousElementSibling.hidden && e.previousElementSibling.className === 'hint'])"""

CONTRAST = """() => {
  function parsed(text) {
    const numbers = (text.match(/-?[\\d.]+(e-?\\d+)?/g) || []).map(Number), scale = text.startsWith('color(') ? 255 : 1;
    return {rgb: numbers.slice(0, 3).map(one => one * scale), alpha: numbers.length > 3 ? numbers[3] : 1};
  }
  function over(top, below) { return top.rgb.map((one, place) => top.alpha * one + (1 - top.alpha) * below[place]); }
  function ground(element) {
    const layers = [];
    for (let up = element; up; up = up.parentElement) {
      const one = parsed(getComputedStyle(up).backgroundColor);
      if (getComputedStyle(up).backgroundColor !== 'transparent' && one.alpha > 0) layers.push(one);
      if (one.alpha === 1 && layers.length) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  }
  function light(rgb) {
    const [r, g, b] = rgb.map(one => one / 255).map(one => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getClientRects().length || ['SCRIPT', 'STYLE', 'title'].includes(element.tagName)) continue;
    const style = getComputedStyle(element), below = ground(element);
    const ink = over(parsed(element.closest('svg') ? style.fill : style.color), below);
    const [low, high] = [light(ink), light(below)].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), element.tagName + ': ' + element.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows with everything that a report may show, of one column."""
    folder = tmp_path_factory.mktemp("report")
    published = {"BP": 98.0, "DFA with a label that is long enough to need a second line": 97.5}
    made = planned(folder, rows=LABELS, seeds=3, controls=["frozen"], targets={"": 90.0}, metric="test/accuracy", published=published)
    lines = lines_of(made, {})
    target = np.arange(200) % 17  # as many classes as have room
    for number, line in enumerate(lines):
        line.records = [outcome(cell, number, blocks=3 if number == 1 else 0) for cell in line.cells]
        line.tuned = tuned(number)
        for record in line.finished:
            record.seen().tags |= {"examples": "1295 train, 143 validation, 200 test", "downstream_weights": "all"}
            predicted = np.where(np.arange(200) % (number + 9) == record.key.seed, (target + 3) % 17, target).astype(np.uint8)
            (made.output / record.run).mkdir(parents=True)
            kept = Predictions(predicted, (predicted == target).astype(np.uint8), target=target.astype(np.uint8))
            write_predictions(made.output / record.run / "predictions.npz", kept)
    failed = lines[4].records[0]
    assert failed is not None
    lines[4].records = [dataclasses.replace(failed, status="failed", reason="a reason of some words, as they come from a rule", about=None)]
    lines[4].cells = lines[4].cells[:1]
    return write_report(report_on(made, lines, ["study", "run", "made.yaml"]), folder)


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on three columns with five seeds, which has profiles and probabilities."""
    folder = tmp_path_factory.mktemp("columns")
    made = planned(folder, columns=["first", "second", "third"], seeds=5, controls=["frozen"])
    return write_report(report_on(made, lines_of(made), ["study", "run", "made.yaml"]), folder)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(__file__).parents[2] / "registry" / "certificates" / "noprop-dt.json"
    folder = tmp_path_factory.mktemp("certificate")
    known = made_certificates.certificate("noprop-dt")
    content = json.loads(path.read_text()) if path.is_file() else {}
    return write_page(folder / "certificate.html", dataclasses.replace(known, properties=content.get("properties", known.properties)))


@pytest.fixture(params=["report", "columns", "certificate"])
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def unfold(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    page.wait_for_function("() => [...document.querySelectorAll('details')].every(one => one.open)")
    page.evaluate("window.dispatchEvent(new Event('resize'))")


def test_nothing_is_cut_nothing_is_fetched_and_links_hold(chromium: Any, page: Path) -> None:
    """At 1280 pixels no table scrolls, at 390 each one that does says so."""
    for width in (1280, 390):
        with opened(chromium, page, width=width) as shown:
            unfold(shown.page)
            assert cut(shown.page) == []
            assert shown.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            overflowing = shown.page.evaluate(OVERFLOWING)
            assert overflowing == [] if width == 1280 else all(hinted for _, hinted in overflowing)
            hints = shown.page.evaluate("[...document.querySelectorAll('.hint')].filter(one => !one.hidden).length")
            assert hints == len(overflowing)
            assert dead_links(shown.page) == []
            assert shown.outside == []
            assert shown.errors == []


def test_the_wide_tables_of_a_report_scroll_on_a_phone(chromium: Any, report: Path) -> None:
    with opened(chromium, report, width=390) as shown:
        names = {name for name, _ in shown.page.evaluate(OVERFLOWING)}
        assert {"Leaderboard", "Costs", "Rules and networks"} <= names
        box = shown.page.locator(".scroll").first
        head = box.locator("td").first.bounding_box()
        box.evaluate("one => { one.scrollLeft = 200; }")
        assert box.locator("td").first.bounding_box() == head  # a row's label stays in view


def test_dark_and_light_pages_have_contrast(chromium: Any, page: Path) -> None:
    for dark in (False, True):
        with opened(chromium, page, dark=dark) as shown:
            unfold(shown.page)
            found = shown.page.evaluate(CONTRAST)
            assert len(found) > 20
            assert [(round(ratio, 2), text) for ratio, text in found if ratio < LEAST_CONTRAST] == []
            ground = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert ground == ("rgb(21, 23, 26)" if dark else "rgb(255, 255, 255)")


@pytest.fixture
def shown(chromium: Any, report: Path) -> Iterator[Any]:
    with opened(chromium, report) as found:
        yield found.page


def hidden(figure: Any) -> set[str]:
    rows = figure.evaluate("one => [...one.querySelectorAll('.panel .gone')].map(each => each.dataset.row)")
    return set(rows)


def test_a_legend_hides_and_shows_its_rows_in_its_figure_alone(shown: Any) -> None:
    figures = shown.locator("figure.many")
    first, second = figures.nth(0), figures.nth(1)
    item = first.locator(".legend li").nth(2)
    item.click()
    row = item.get_attribute("data-row")
    assert hidden(first) == {row}
    assert first.locator(f".panel [data-row='{row}']").count() > 1  # in each panel
    assert item.get_attribute("aria-pressed") == "false"
    assert hidden(second) == set()
    item.press("Enter")
    assert hidden(first) == set()
    first.get_by_role("button", name="hide all").click()
    assert len(hidden(first)) == first.locator(".legend li").count()
    first.get_by_role("button", name="show all").click()
    assert hidden(first) == set()


def test_pointing_at_a_row_brings_it_out(shown: Any) -> None:
    """A row in the background becomes as strong as any, and the others fade."""
    figure = shown.locator("figure.many").first
    item = figure.locator(".legend li.faint").first
    opacity = "one => Number(getComputedStyle(one).opacity)"
    mine = figure.locator(f".panel [data-row='{item.get_attribute('data-row')}']").first
    other = figure.locator(f".panel [data-row='{figure.locator('.legend li').first.get_attribute('data-row')}']").first
    before = mine.evaluate(opacity), other.evaluate(opacity)
    item.hover()
    assert before[0] < 0.5 < before[1] == mine.evaluate(opacity)
    assert other.evaluate(opacity) < before[0]
    shown.locator("h1").hover()
    assert (mine.evaluate(opacity), other.evaluate(opacity)) == before


def test_a_figures_data_are_saved_as_csv(shown: Any) -> None:
    figure = shown.locator("figure").first
    figure.locator(".data summary").click()
    with shown.expect_download() as download:
        figure.get_by_role("button", name="Save as CSV").click()
    assert download.value.suggested_filename == "figure-1.csv"
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
    drawn = figure.locator(".legend li").all_inner_texts()
    assert {row["name"] for row in rows} == {text.strip() for text in drawn}
    assert all(float(row["y_low"]) <= float(row["y"]) <= float(row["y_high"]) for row in rows if row["y_low"])
    assert {row["chart"] for row in rows} == {
        f"validation accuracy, %, over {what}" for what in ("epochs", "examples drawn", "seconds of training")
    }


def test_paper_has_no_buttons_and_no_data_of_figures(chromium: Any, report: Path) -> None:
    with opened(chromium, report) as found:
        found.page.emulate_media(media="print")
        for what in ("nav", ".data", ".do", ".hint"):
            assert not any(one.is_visible() for one in found.page.locator(what).all())
        assert found.page.locator("details table").first.evaluate("one => one.getClientRects().length > 0")
