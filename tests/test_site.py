"""What the site is made of; built, it is opened in browser/. Oracles: result files, the package's public names, formats' own validation."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from sitemaker.__main__ import FURTHER, contents, linked_rules, site_name
from sitemaker.blocks import blocks, outside_code

import bpfree

ROOT = Path(__file__).parents[1]


@pytest.fixture
def results_page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("results_page")


def test_tables_are_those_of_the_result_files(results_page: ModuleType) -> None:
    for page in results_page.PAGES:
        text = page.read_text(encoding="utf-8")
        assert results_page.filled(text) == text, f"{page.name}: make results"
        assert "<!-- results:" in text


def test_a_table_is_replaced_between_its_marks(results_page: ModuleType) -> None:
    page = "before\n<!-- results:mnist -->\nold\n<!-- /results:mnist -->\nafter\n"
    made = results_page.filled(page)
    assert "old" not in made
    assert made.startswith("before\n<!-- results:mnist -->\n| method | own prediction |")
    assert made.endswith("\n<!-- /results:mnist -->\nafter\n")
    assert "| frozen | 59.67 ± 1.33 | 77.03 | 94.50 | -34.83 | 1,290 | 0.7 |" in made  # as it stood in the README of version 0.1


def test_a_page_that_nobody_named_is_not_lost(tmp_path: Path) -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "registry/README.md", "benchmarks/README.md", "docs/a.md", "docs/b.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# A page\n")
    (tmp_path / "docs/README.md").write_text("# All\n## Use\n[B](b.md#part) [B again](b.md)\n## Inside\n[How](../CONTRIBUTING.md)\n")
    found = {title: [site_name(page, tmp_path) for page in pages] for title, pages in contents(tmp_path).items()}
    assert found["Use"] == ["docs/b"]
    assert found["Inside"] == ["CONTRIBUTING"]
    assert set(found[FURTHER]) == {"docs/a", "CHANGELOG", "registry/index", "benchmarks/index"}


def test_code_is_left_as_it_is() -> None:
    text = "a `a` a\n```text\na\n```\na"
    assert outside_code(text, str.upper) == "A `a` A\n```text\na\n```\nA"


def test_rules_in_tables_are_links() -> None:
    text = "`dfa`\n| `dfa` | [`dfa`](a.md), `dfa-like` |\n"
    assert linked_rules(text, ["dfa", "oja"]) == "`dfa`\n| [`dfa`](../rules/dfa.md) | [`dfa`](a.md), `dfa-like` |\n"
    text = "| plugin | rules |\n| --- | --- |\n| `dfa` | `dfa` |"
    assert linked_rules(text, ["dfa"]) == text.removesuffix("`dfa` |") + "[`dfa`](../rules/dfa.md) |"


def test_every_public_name_is_in_one_group() -> None:
    from sitemaker.generated import GROUPS, api_groups

    listed = [name for names in api_groups().values() for name in names]
    assert sorted(listed) == sorted(set(bpfree.__all__) - {"__version__"})
    assert {name for names in GROUPS.values() for name in names} <= set(bpfree.__all__)


def test_notebooks_run_what_the_page_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (extra docs)")
    from sitemaker.notebooks import write_notebook

    page = tmp_path / "page.md"
    page.write_text(
        "# A page\nSee [this](other.md#part) and `[that](other.md)`.\n```python\na = 1\n```\nThen:\n```bash\nbpfree rules\n```\n"
        "```python no-run: for show\nb\n```\n```python\nc = a + 1\n```\n"
    )
    path = write_notebook(page, tmp_path / "made")
    assert path is not None
    made = nbformat.read(path, as_version=4)
    nbformat.validate(made)
    assert [cell.source for cell in made.cells if cell.cell_type == "code"] == [block.text.strip() for block in blocks(page) if block.runs]
    prose = "\n".join(cell.source for cell in made.cells if cell.cell_type == "markdown")
    assert "See this and `[that](other.md)`." in prose
    assert "```bash\nbpfree rules\n```" in prose
    page.write_text("# Nothing runs\n```python\na = 1\n```\n")
    assert write_notebook(page, tmp_path) is None


def test_formulas_need_no_script(tmp_path: Path) -> None:
    pytest.importorskip("myst_parser", reason="myst_parser is not installed (extra docs)")
    from sphinx.cmd.build import build_main

    (tmp_path / "conf.py").write_text(
        "extensions = ['myst_parser', 'sitemaker.mathml']\nmyst_enable_extensions = ['dollarmath']\nhtml_math_renderer = 'mathml'"
    )
    (tmp_path / "index.md").write_text("# A page\n\nThe square $x^2$.\n\n$$\\sum_i x_i$$\n")
    assert build_main(["-q", "-W", "-b", "html", str(tmp_path), str(tmp_path / "made")]) == 0
    page = (tmp_path / "made/index.html").read_text()
    assert page.count("<math") == 2
    assert "MathJax" not in page
