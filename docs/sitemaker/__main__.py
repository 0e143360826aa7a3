"""Build the site of the documentation: ``PYTHONPATH=docs python -m sitemaker [--output build/site]``, from the root of a checkout.

The pages of the repository are copied to a folder of sources, in the places where they are, so that their relative links go on
leading where they led; ``README.md`` is ``index`` there. Pages that are made of what is installed (API, rules, keys) and of the
registry, and notebooks, are added. Then Sphinx builds it, with every warning an error. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from sitemaker.blocks import FENCE, LINK, outside_code, page_paths

__all__ = ["assemble", "build", "contents", "main"]

ROOT = Path(__file__).parents[2]
FURTHER = "More"
"""Caption of the pages that the table in docs/README.md does not name."""
OF_RULES = ("registry/index", "docs/certificates", "docs/what-is-here")
"""Pages in whose tables the names of rules are links."""
INDEX = re.compile(r"(\]\((?:[^)\s:]*/)?)README\.md")


def pages_of(root: Path) -> list[Path]:
    """Return the pages of the site that are files of the repository."""
    return [*page_paths(root), root / "CHANGELOG.md", root / "benchmarks" / "README.md"]


def contents(root: Path) -> dict[str, list[Path]]:
    """Return the pages by the headings of docs/README.md, in the order in which its tables name them; others come last."""
    index = root / "docs" / "README.md"
    parts = re.split(r"^## (.+)$", FENCE.sub("", index.read_text(encoding="utf-8")), flags=re.MULTILINE)
    known = {page.resolve() for page in pages_of(root)} - {index.resolve(), (root / "README.md").resolve()}
    found: dict[str, list[Path]] = {}
    for title, text in zip(parts[1::2], parts[2::2], strict=True):
        linked = dict.fromkeys((index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(text))
        found[title.strip()] = [page for page in linked if page in known]
        known -= set(linked)
    return {**found, **({FURTHER: sorted(known)} if known else {})}


def site_name(page: Path, root: Path) -> str:
    """Return a page's name in the site, without suffix."""
    name = page.resolve().relative_to(root.resolve()).with_suffix("").as_posix()
    return re.sub(r"(^|/)README$", r"\1index", name)


def assemble(root: Path, sources: Path) -> None:
    """Write the sources of the site: the repository's pages, the files that they link to, generated pages, and notebooks."""
    from bpfree.plugins import installed_plugins
    from sitemaker.generated import write_generated
    from sitemaker.notebooks import write_notebook

    known, rules = {page.resolve() for page in pages_of(root)}, installed_plugins().names("rules")
    for page in pages_of(root):
        target = sources / f"{site_name(page, root)}.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        text = page.read_text(encoding="utf-8")
        for link in LINK.findall(FENCE.sub("", text)):
            linked = (page.parent / link.partition("#")[0]).resolve()
            if linked.is_file() and linked not in known:
                copy(linked, sources / linked.relative_to(root.resolve()))
        if (made := write_notebook(page, sources / "notebooks")) is not None:
            up = "../" * site_name(page, root).count("/")
            text = re.sub(r"\A(# .+\n)", rf"\1\n[This page as a notebook]({up}notebooks/{made.name})\n", text)
        text = outside_code(text, lambda prose: INDEX.sub(r"\1index.md", prose))
        target.write_text(linked_rules(text, rules) if site_name(page, root) in OF_RULES else text, encoding="utf-8")
    made_pages = write_generated(sources, root / "registry")
    named = {title: [site_name(page, root) for page in pages] for title, pages in contents(root).items()}
    index = sources / "index.md"
    trees = "".join(toctree(title, names) for title, names in {"": ["docs/index"], **named, **made_pages}.items())
    index.write_text(index.read_text(encoding="utf-8") + trees, encoding="utf-8")


def linked_rules(text: str, rules: Collection[str]) -> str:
    """Make a link of each rule's name in the tables of a page, to the rule's own page; names of plugins, in a first column, are left."""
    name = re.compile(rf"(?<!\[)`({'|'.join(map(re.escape, rules))})`")

    def linked(table: re.Match[str]) -> str:
        first = 2 if table[0].startswith("| plugin |") else 1  # cell whose names may be those of rules
        rows = (line.split("|", first) for line in table[0].split("\n"))
        return "\n".join("|".join([*row[:-1], name.sub(r"[`\1`](../rules/\1.md)", row[-1])]) for row in rows)

    return re.sub(r"^\|.*(?:\n\|.*)*", linked, text, flags=re.MULTILINE)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def toctree(caption: str, names: Sequence[str]) -> str:
    """Return a hidden table of contents, which the theme shows beside every page."""
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["", "```{toctree}", *options, "", *names, "```", ""])


def build(output: Path, root: Path = ROOT) -> int:
    """Build the site; returns Sphinx's exit code, which is not 0 if there was any warning."""
    from sphinx.cmd.build import build_main

    sources = output.with_name(f"{output.name}-sources")
    for folder in (sources, output):
        shutil.rmtree(folder, ignore_errors=True)
    assemble(root, sources)
    words = [
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "-c",
        str(root / "docs" / "sitemaker"),
        "-d",
        str(output / ".doctrees"),
        str(sources),
        str(output),
    ]
    code = build_main(words)
    shutil.rmtree(output / ".doctrees", ignore_errors=True)
    return code


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Builds the site of the documentation.")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "site", help="folder of the site (build/site)")
    output = parser.parse_args(words).output
    code = build(output)
    print(f"the site: {output / 'index.html'}" if code == 0 else "the site has faults; see above")
    return code


if __name__ == "__main__":
    sys.exit(main())
