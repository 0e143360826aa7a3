"""Imports point downwards, without circles. Oracle: the table of layers in docs/design.md, and the import statements of every module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import bpfree

CORE = Path(bpfree.__file__).parent
DESIGN = CORE.parent / "docs" / "design.md"
Graph = dict[str, dict[str, int]]
"""For each module what it imports, with the line."""


def layers(text: str) -> list[set[str]]:
    """The modules and packages of each layer, from the ground up."""
    rows = re.findall(r"^\| \w+ \| (`.*?) \|", text.partition("\n## Layers\n")[2].partition("\n## ")[0], re.M)
    return [set(re.findall(r"`(\w+)`", row)) for row in rows]


def modules(core: Path) -> dict[str, Path]:
    """Files by the names that imports have for them, ``bpfree.`` left out."""
    return {".".join(path.relative_to(core).with_suffix("").parts).removesuffix(".__init__"): path for path in core.rglob("*.py")}


def imports(core: Path) -> Graph:
    known = modules(core)
    return {name: {other: line for other, line in _imported(path, known) if other != name} for name, path in known.items()}


def _imported(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head == "bpfree":
                yield next((known_name for known_name in (rest, rest.rpartition(".")[0]) if known_name in known), "__init__"), node.lineno


def violations(order: list[set[str]], graph: Graph) -> list[str]:
    """One sentence for each import that points up, each circle, and each module that is in no layer or in several."""
    height = {name: number for number, names in enumerate(order) for name in names}
    tops = {module.partition(".")[0] for module in graph}
    found = [f"{top} is in {count} layers" for top in sorted(tops) if (count := sum(top in names for names in order)) != 1]
    found += [f"{name} is in a layer, but there is no such module" for name in sorted(height.keys() - tops)]
    for module, others in sorted(graph.items()):
        for other, line in others.items():
            above = height.get(other.partition(".")[0], 0) > height.get(module.partition(".")[0], len(order))
            found += [f"{module}, line {line}: {other} is in a layer above"] if above else []
    return found + list(_circles(graph))


def _circles(graph: Graph) -> Iterator[str]:
    left = {module: set(others) for module, others in graph.items()}
    while True:
        try:
            TopologicalSorter(left).prepare()
        except CycleError as error:
            circle = error.args[1][::-1]  # each module imports the next one
            yield f"a circle: {' -> '.join(circle)}"
            left[circle[0]].discard(circle[1])
        else:
            return


def test_imports_point_downwards_without_circles() -> None:
    found = violations(layers(DESIGN.read_text(encoding="utf-8")), imports(CORE))
    assert not found, "\n".join(found)


def test_each_kind_of_violation_is_named(tmp_path: Path) -> None:
    """Oracle: three layers, and imports planted at the top, inside a function and for types."""
    order = layers("\n## Layers\n\n| layer | modules |\n| --- | --- |\n| a | `low`, `__init__` |\n| b | `mid`, `gone` |\n| c | `top` |\n")
    for name, text in {
        "__init__": "",
        "low": "def f():\n    from bpfree import top\n",
        "mid/__init__": "",
        "mid/one": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bpfree.mid.two import X\n",
        "mid/two": "import bpfree.low\nfrom bpfree.mid import one\n",
        "top": "from bpfree.low import f\n",
        "new": "",
    }.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    found = violations(order, imports(tmp_path))
    assert found[:3] == ["new is in 0 layers", "gone is in a layer, but there is no such module", "low, line 2: top is in a layer above"]
    assert {frozenset(circle.removeprefix("a circle: ").split(" -> ")) for circle in found[3:]} == {
        frozenset({"low", "top"}),
        frozenset({"mid.one", "mid.two"}),
    }
