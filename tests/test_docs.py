"""The documentation: its Python examples run, its commands are commands, its links lead somewhere.

Oracles: the interpreter; the command line's own parsers and ``resolve``; the files and headings that are there.
"""

from __future__ import annotations

import re
import shlex
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image
from sitemaker.__main__ import FURTHER, contents
from sitemaker.blocks import FENCE, LINK, blocks, page_paths

from bpfree.cli.main import cli
from bpfree.config import allowing, parse_words, read_yaml, resolve
from bpfree.plugins import installed_plugins
from bpfree.study import cells
from bpfree.study.comparing import comparison, leaves_in

ROOT = Path(__file__).parents[1]
PAGES = page_paths(ROOT)
OWN = re.compile(r"\bmy-(rule|dfa)\b")
"""Names of rules that are the reader's: not installed here, and taken for one that is."""
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pages
def test_python_examples_run(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page share a namespace, and run in an empty folder without tracking."""
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # its thread would outlive the test
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    module = types.ModuleType("bpfree_docs_example")
    module.__file__ = str(page)
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    for block in blocks(page):
        if block.language != "python":
            continue
        if block.remark.startswith("written to "):
            Path(block.remark.removeprefix("written to ")).write_text(block.text)
            continue
        if block.remark:
            assert re.fullmatch(r"no-run\W+\w.*", block.remark), f"{page.name}:{block.line}: a block that does not run says no-run and why"
            continue
        padded = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's own lines
        exec(compile(padded, str(page), "exec"), module.__dict__)
    if "mlflow" in module.__dict__:
        module.mlflow.set_tracking_uri(None)  # as it was


# --- commands -------------------------------------------------------------------------------------------------------


def commands(page: Path, program: str) -> Iterator[tuple[str, list[str]]]:
    """``(place, words after the program's name)`` for each line of a shell block that calls it."""
    for block in blocks(page):
        for number, line in enumerate(block.text.splitlines() if block.language in ("bash", "console") else []):
            line = line.removeprefix("$ ")
            if line.partition(" ")[0] == program:
                yield f"{page.name}:{block.line + number}: {line}", shlex.split(line, comments=True)[1:]


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and its parameters, by the parsers of the command line."""
    with cli.make_context("bpfree", words[:1], resilient_parsing=True) as context:
        command: click.Command = cli
        name, rest = "", list(words)
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            following = command.get_command(context, rest[0])
            assert following is not None, f"no such command: {rest[0]}"
            command, name, rest = following, rest[0], rest[1:]
        help_asked = "--help" in rest or "-h" in rest
        return name, command.make_context(name, rest, parent=context, resilient_parsing=help_asked).params


TAKES_RULES = ("compare", "train", "rules")


def check(name: str, given: dict[str, Any]) -> None:
    if name == "compare" and "words" in given:  # and not that of runs
        rules = [word for word in given["words"] if "=" not in word.split(",")[0]]
        common = parse_words(word for word in given["words"] if word not in rules)
        registry = allowing([*common, *(leaf for word in rules for leaf in leaves_in(word))])
        cells.plan(comparison(rules, common, registry=registry), registry=registry)
    elif name in ("train", "evaluate"):
        files = [path for path in given.get("configs", ()) if "RUN" not in path.parts]
        words = parse_words(given["settings"])
        resolve([leaf for path in files for leaf in read_yaml(path)] + words, allowing(words, given["allow_code"]))
    elif name in ("rules", "networks", "tasks") and given["name"] is not None:
        installed_plugins().get(name, given["name"])


@pages
def test_commands_are_commands(page: Path, workplace: Path) -> None:
    """Nothing is trained: the words pass the command's parser, and its settings resolve to a configuration."""
    x = np.zeros((20, 3), dtype=np.float32)
    np.savez("mine.npz", x=x, y=np.arange(20) % 2)
    Path("tumours.csv").write_text("mean radius,diagnosis\n" + "1.5,benign\n2.5,malignant\n" * 10)
    Path("mine.csv").write_text("weight,colour,bought\n" + "".join(f"{place},red,{'yes' if place % 2 else 'no'}\n" for place in range(20)))
    for folder in (Path("pictures", "dark"), Path("pictures", "light"), *(Path("written-digits", name) for name in "01")):
        folder.mkdir(parents=True)
        Image.new("RGB", (12, 12)).save(folder / "0.png")
    Path("mine.yaml").write_text(next((block.text for block in blocks(page) if block.language == "yaml"), "rule: dfa\n"))
    code = (block.text for block in blocks(page) if block.text.startswith("# mine.py\n") or block.remark == "written to mine.py")
    Path("mine.py").write_text(next(code, ""))
    for place, words in commands(page, "bpfree"):
        for file in (Path(word) for word in words if OWN.match(word) and "/" in word):
            file.parent.mkdir(exist_ok=True)
            file.touch()
        try:
            name, given = parse(words)
            check(name, given if name not in TAKES_RULES else parse([OWN.sub("dfa", word) for word in words])[1])
        except Exception as error:
            pytest.fail(f"{place}\n{type(error).__name__}: {error}")


@pages
def test_commands_in_the_text_exist(page: Path) -> None:
    with cli.make_context("bpfree", [], resilient_parsing=True) as context:
        known = set(cli.list_commands(context))
    text = FENCE.sub("", page.read_text())
    for name in re.findall(r"`bpfree ([a-z]\w*)", text):
        assert name in known, name


@pages
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    inline = [span.split() for span in re.findall(r"`make ([^`]*)`", FENCE.sub("", page.read_text()))]
    for words in [*(words for _, words in commands(page, "make")), *inline]:
        for word in words:
            assert "=" in word or word in targets, word


@pytest.mark.parametrize("kind", ["rules", "networks", "tasks", "studies", "protocols"])
def test_what_ships_is_listed(kind: str) -> None:
    """Oracle: the registry."""
    row = re.search(rf"^\| {kind} \|(.*)$", (ROOT / "docs" / "what-is-here.md").read_text(), re.MULTILINE)
    assert row is not None
    cells = [set(re.findall(r"`([^`]+)`", cell)) for cell in row[1].strip("|").split("|")]
    owners = ("core", "noprop", "forward-gradient", "hebbian", "predictive-coding", "feedback", "local-losses", "gradient-free", "sampled")
    for owner, named in zip(owners, cells, strict=True):
        assert named == {name for name, _, plugin in installed_plugins().items(kind) if plugin.name == owner}, owner


# --- links ----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    seen: Counter[str] = Counter()
    found = set()
    for title in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pages
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_the_checks_notice_what_is_wrong(tmp_path: Path) -> None:
    """Each check fails on a page that is wrong in its way, and says nothing of a page of another language."""
    page = tmp_path / "page.md"
    page.write_text("# A page\n```bash\nbpfree train rule=dffa\n```\n```text\nbpfree nonsense\n```\n")
    ((_, words),) = commands(page, "bpfree")
    with pytest.raises(Exception, match="did you mean 'dfa'"):
        check(*parse(words))
    with pytest.raises(AssertionError, match="no such command"):
        parse(["nonsense"])
    with pytest.raises(click.UsageError, match="No such option"):
        parse(["compare", "dfa", "--sedes", "3"])
    assert anchors(page) == {"a-page"}
    assert [block.line for block in blocks(page)] == [3, 6]


def test_every_page_is_named_in_the_table_of_contents() -> None:
    """The site lists pages that are not under a heading of its own, so that none is lost; here is where to name them."""
    assert FURTHER not in contents(ROOT), "name these in docs/README.md"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_files_of_a_change_are_there() -> None:
    """The page says where changes go; a file that was moved takes its name there along."""
    text = (ROOT / "docs" / "where-changes-go.md").read_text()
    named = [name for name in re.findall(r"`((?:bpfree|tests|plugins|benchmarks)/[^`]*)`", text) if "NAME" not in name]
    assert len(named) > 50
    assert [name for name in named if not (ROOT / name).exists()] == []
    hooks = set(re.findall(r"`(bpfree_[a-z]+)`", text))
    assert hooks <= {name for name in dir(__import__("bpfree.hooks", fromlist=["hooks"])) if name.startswith("bpfree_")}
