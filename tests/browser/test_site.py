"""The site of the documentation, built and opened. Oracles: the browser; the files that are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from browser.kit import cut, dead_links, opened

pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("site"),  # which is built once
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning"),  # of Sphinx's extensions
    pytest.mark.timeout(1200),  # the build takes 20 s, and several times that beside other work
]

SHOWN = (
    "index",
    "docs/tutorial",
    "docs/results",
    "docs/beside-others",
    "docs/certificates",
    "rules/softhebb",
    "reference/api/rules",
    "plugins/noprop/index",
)
DRAWERS = "document.querySelectorAll('.toc-drawer, .sidebar-drawer').forEach(drawer => { drawer.dataset.scrolls = '' })"
"""What the theme keeps beside the window until it is asked for."""
ANCHOR = re.compile(r'\bid="([^"]+)"')
LINK = re.compile(r'<a\b[^>]*\bhref="([^"]+)"')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site; Sphinx is strict, so that building it is a test by itself."""
    for package in ("furo", "myst_parser", "nbformat", "sphinx_copybutton"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra docs)")
    from sitemaker.__main__ import build

    folder = tmp_path_factory.mktemp("documentation") / "site"
    assert build(folder) == 0
    return folder


def pages(site: Path) -> Iterator[tuple[Path, str]]:
    for page in sorted(site.rglob("*.html")):
        yield page, page.read_text(encoding="utf-8")


def test_links_lead_to_files_and_headings(site: Path) -> None:
    """Every link between pages, also those that the theme makes."""
    anchors = {page: {*ANCHOR.findall(text), ""} for page, text in pages(site)}
    dead = []
    for page, text in pages(site):
        for link in map(urlparse, LINK.findall(text)):
            if link.scheme or link.netloc:
                continue
            target = (page.parent / unquote(link.path)).resolve() if link.path else page
            if not target.is_file() or (target in anchors and unquote(link.fragment) not in anchors[target]):
                dead.append(f"{page.relative_to(site)}: {link.geturl()}")
    assert dead == []


def test_nothing_outside_is_named_but_in_links(site: Path) -> None:
    """No script, style sheet, font or picture comes from elsewhere."""
    fetched = re.compile(r'<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]+"')
    assert [found for _, text in pages(site) for found in fetched.findall(text)] == []
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert [found for text in styles for found in re.findall(r"url\(['\"]?(?:https?:)?//[^)]*|@import[^;]*//[^;]*", text)] == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_or_fetched(chromium: Any, site: Path, width: int, dark: bool) -> None:
    for name in SHOWN:
        with opened(chromium, site / f"{name}.html", width=width, dark=dark) as shown:
            shown.page.evaluate(DRAWERS)
            assert cut(shown.page) == [], name
            assert shown.outside == [], name
            assert shown.errors == [], name
            assert dead_links(shown.page) == [], name


@pytest.mark.parametrize(
    ("words", "found"), [("softhebb", "rules/softhebb.html"), ("BudgetConfig", "reference/api/"), ("patience", "docs/")]
)
def test_the_search_finds(chromium: Any, site: Path, words: str, found: str) -> None:
    with opened(chromium, site / "search.html") as shown:
        shown.page.goto(f"{(site / 'search.html').resolve().as_uri()}?q={words}")
        shown.page.wait_for_selector("#search-results li a", timeout=60_000)
        targets = [link.get_attribute("href") for link in shown.page.query_selector_all("#search-results li a")]
        assert any(target.startswith(found) for target in targets), targets
        assert shown.outside == []


def test_the_reader_can_choose_colours(chromium: Any, site: Path) -> None:
    """By the theme's button, whatever the system asks for."""
    seen = set()
    with opened(chromium, site / "index.html") as shown:
        for _ in range(3):  # automatic, light, dark
            shown.page.click(".content-icon-container .theme-toggle")
            seen.add(shown.page.evaluate("[document.body.dataset.theme, getComputedStyle(document.body).backgroundColor].join()"))
    assert {each.partition(",")[0] for each in seen} == {"auto", "light", "dark"}
    assert len({each.partition(",")[2] for each in seen}) == 2


def test_pages_can_be_had_as_notebooks(site: Path) -> None:
    """Oracle: the format's own validation, and Python's parser."""
    import nbformat

    notebooks = {path.stem: nbformat.read(path, as_version=4) for path in site.rglob("*.ipynb")}
    assert {"tutorial", "writing-a-rule", "studies", "tasks"} <= set(notebooks)
    for name, notebook in notebooks.items():
        nbformat.validate(notebook)
        code = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code" and cell.source[0] not in "!%")
        compile(code, name, "exec")
    commands = [cell.source for cell in notebooks["tutorial"].cells if cell.source.startswith("!")]
    assert commands[0].splitlines()[0] == "!bpfree plugins list"
    written = [cell.source.splitlines()[0] for cell in notebooks["tutorial"].cells if cell.source.startswith("%%")]
    assert written == ["%%writefile mine.py", "%%writefile mine.yaml"]
