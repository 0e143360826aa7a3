"""The kit of browser tests. Oracle: pages with one known fault each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser.kit import cut, dead_links, opened

pytestmark = pytest.mark.browser
WIDE = "<p style='white-space: nowrap; width: 3000px'>beyond the window<span style='float: right'>end</span></p>"


def written(folder: Path, body: str) -> Path:
    path = folder / "page.html"
    path.write_text(f"<!doctype html><html><head><link rel='icon' href='data:,'></head><body>{body}</body></html>", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("<p>fits</p>", 0),
        (WIDE, 1),
        (f"<div style='overflow-x: auto'>{WIDE}</div>", 0),
        (f"<div style='overflow-x: hidden; width: 200px'>{WIDE}</div>", 1),
    ],
)
def test_what_is_cut_is_found(chromium: Any, tmp_path: Path, body: str, found: int) -> None:
    with opened(chromium, written(tmp_path, body)) as shown:
        assert bool(cut(shown.page)) == bool(found)


def test_requests_beyond_the_machine_are_refused_and_listed(chromium: Any, tmp_path: Path) -> None:
    with opened(chromium, written(tmp_path, "<img src='http://example.invalid/a.png'><img src='data:,'>")) as shown:
        assert shown.outside == ["http://example.invalid/a.png"]


def test_links_to_nowhere_and_errors_of_scripts_are_found(chromium: Any, tmp_path: Path) -> None:
    body = "<a href='#here'>a</a><a href='#gone'>b</a><h2 id='here'>c</h2><script>throw new Error('broken')</script>"
    with opened(chromium, written(tmp_path, body)) as shown:
        assert dead_links(shown.page) == ["gone"]
        assert shown.errors == ["broken"]


def test_dark_colours_are_asked_for(chromium: Any, tmp_path: Path) -> None:
    asked = "matchMedia('(prefers-color-scheme: dark)').matches"
    for dark in (False, True):
        with opened(chromium, written(tmp_path, ""), dark=dark) as shown:
            assert shown.page.evaluate(asked) is dark
