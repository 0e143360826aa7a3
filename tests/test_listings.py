"""Listings that are kept from one call to the next. Oracle: the same listing where no cache can be written."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpfree import plugins
from bpfree.cli.main import main

RULE = """
import bpfree
from bpfree.baselines import DFA

bpfree_api = 2


class Mine(DFA):
    card = bpfree.Card("a first try")


@bpfree.hookimpl
def bpfree_rules():
    return {"mine": Mine}
"""
CALLS = (["rules"], ["plugins", "list", "--json"])
ALL = (*CALLS, ["networks"], ["tasks"], ["study", "list"], ["plugins", "list"])


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution `bpfree-mine` on the path, and an empty cache; gives the plugin's source file."""
    info = tmp_path / "site" / "bpfree_mine-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bpfree-mine\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[bpfree]\nmine = mine_of_listings\n")
    (tmp_path / "site" / "mine_of_listings.py").write_text(RULE)
    (tmp_path / "nowhere").write_text("a file, in which no folder can be made")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "site" / "mine_of_listings.py"
    fresh()


def fresh() -> None:
    """As in a new process, as far as plugins go."""
    plugins.installed_plugins.cache_clear()
    sys.modules.pop("mine_of_listings", None)
    importlib.invalidate_caches()


def said(capsys: pytest.CaptureFixture[str], *calls: list[str]) -> list[tuple[str, str]]:
    found = []
    for words in calls:
        fresh()
        with pytest.raises(SystemExit) as end:
            main(words)
        assert not end.value.code
        found.append(tuple(capsys.readouterr()))
    return found


def same(capsys: pytest.CaptureFixture[str], site: Path, *calls: list[str]) -> str:
    """List twice with a cache, and once without; returns what was said."""
    once, again = said(capsys, *calls), said(capsys, *calls)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(site.parent.parent / "nowhere"))
        expected = said(capsys, *calls)
    assert once == expected
    assert again == expected
    return "\n".join(text for pair in expected for text in pair)


def test_a_listing_is_that_of_the_plugins_as_they_are_now(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "a first try" in same(capsys, site, *ALL)
    site.write_text(RULE.replace("first", "second").replace('"mine"', '"ours"'))
    edited = same(capsys, site, *CALLS)
    assert "a second try" in edited
    assert "\nmine " not in edited
    site.write_text("import a_library_that_comes_later\n")
    assert "a_library_that_comes_later" in same(capsys, site, *CALLS)
    (site.parent / "a_library_that_comes_later.py").touch()
    assert "states no bpfree_api" in same(capsys, site, *CALLS)
    site.write_text(RULE.replace("Mine}", "5}"))
    assert "registers the rule 'mine', which must be a subclass of bpfree.Rule with a card" in same(capsys, site, *CALLS)
    site.write_text(RULE)
    assert "a first try" in same(capsys, site, *CALLS)
    monkeypatch.setenv("BPFREE_DISABLE_PLUGINS", "mine")
    assert "disabled by name" in same(capsys, site, *CALLS)
    monkeypatch.delenv("BPFREE_DISABLE_PLUGINS")
    assert "a first try" in same(capsys, site, *CALLS)
    shutil.rmtree(site.parent / "bpfree_mine-0.3.dist-info")
    assert "bpfree-mine" not in same(capsys, site, *CALLS)


def test_a_library_that_is_edited_in_place_counts_too(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = site.parent / "words_of_listings.py"
    library.write_text("SUMMARY = 'from a library'\n")
    code = RULE.replace("import bpfree\n", "import bpfree, words_of_listings\n")
    site.write_text(code.replace('"a first try"', "words_of_listings.SUMMARY"))
    assert "from a library" in same(capsys, site, ["rules"])
    library.write_text("SUMMARY = 'from an edited library'\n")
    del sys.modules["words_of_listings"]
    assert "from an edited library" in same(capsys, site, ["rules"])


def test_plugins_that_were_loaded_before_an_edit_are_not_kept(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fresh()
    plugins.installed_plugins()
    site.write_text(RULE.replace("first", "second"))
    with pytest.raises(SystemExit):
        main(["rules"])
    assert "a first try" in capsys.readouterr().out
    assert "a second try" in same(capsys, site, ["rules"])


def test_a_damaged_cache_is_done_without(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = said(capsys, ["rules"])
    (file,) = (site.parent.parent / "cache").rglob("*.json")
    for content in ("", "[]", '{"state": 1}', file.read_text()[:-9], "\0\xff"):
        file.write_text(content, encoding="latin-1")
        assert said(capsys, ["rules"]) == expected


def test_what_is_kept_is_read_without_loading_plugins(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins.installed_plugins.cache_clear()
    plugins.installed_plugins()  # as training does
    first = said(capsys, *ALL)
    monkeypatch.delattr(plugins, "Plugins")
    assert said(capsys, *ALL) == first


def test_a_shell_completes_names(site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the names that are registered."""
    registered = plugins.installed_plugins()
    for words, wanted in (
        ("bpfree rules n", [name for name in registered.names("rules") if name.startswith("n")]),
        ("bpfree train task=", [f"task={name}" for name in registered.names("tasks")]),
        ("bpfree study run qui", ["quickstart"]),
    ):
        monkeypatch.setenv("_BPFREE_COMPLETE", "fish_complete")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", words.split()[-1])
        with pytest.raises(SystemExit):
            main([])
        found = capsys.readouterr().out.splitlines()
        assert [line.split(",")[1].split("\t")[0] for line in found if line.startswith("plain")] == wanted
