"""Write the tables of docs/results.md, of the tutorial, and the five lines in README.md, from the result files.

python benchmarks/results_page.py
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bpfree.document.tables import markdown_table

__all__ = ["TABLES", "filled", "main"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "docs" / "results.md", ROOT / "docs" / "tutorial.md", ROOT / "README.md")
IN_README = ("noprop-dt", "backprop", "dfa", "frozen", "linear")
"""Rows of the digits that the README shows."""
FOLDERS = ("cases", "cost", "variants", "speed")
"""Keys of result files that name no case."""
BESIDE = {
    "denormals": "denormals as they are",
    "feedback_step": "the case's step",
    "forward_gradient_step": "a forward pass; directions: one by one",
    "gradient_free_functions": "SNES of EvoTorch",
    "hebbian_step": "a forward and a weight-gradient convolution",
    "local_losses_step": "the case's step",
    "noprop_inference": "one pass through the stems, or what the case names",
    "noprop_step": "raw passes of the blocks",
    "noprop_step_noprop": "raw passes of the blocks",
    "predictive_coding_step": "the case's step",
    "streamed": "a hand-written loop",
    "trainer_overhead": "a bare PyTorch loop",
}
"""What a benchmark's times are divided by."""


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}-cpu.json").read_text(encoding="utf-8"))
    return found


def lines_of(table: str) -> list[list[str]]:
    """Return the cells of a table in Markdown, the head first, without the rule below it."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def accuracies(name: str, *, seconds: bool, rows: Sequence[str] = (), columns: int = 6) -> str:
    """Return the table that ``accuracy.py`` has made.

    Args:
        name: of the benchmark.
        seconds: show what training took, which says nothing where the machine was busy.
        rows: those to show; all if there are none.
        columns: how many of the first columns to show, beside the seconds.
    """
    head, *lines = lines_of(read(name)["results"]["markdown"])
    kept = [*range(columns), *([6] if seconds else [])]
    shown = [[line[place] for place in kept] for line in lines if not rows or line[0] in rows]
    return markdown_table([head[place] for place in kept], shown, range(1, len(kept)))


def claims() -> str:
    """Return the table of the study ``claims``, the best rule first."""
    content = read("claims")
    floors = {row["row"]: statistics.fmean(row["floor"]) for row in content["floors"]["rows"]}
    headers = [
        *("rule", "network", "test accuracy", "floor", "own less floor", "parameters", "seconds to 95 %", "operations to 95 %, 10^9"),
        *("memory, MiB", "lines", "tuning: default, best"),
    ]
    rows = sorted(content["rows"].items(), key=lambda item: -item[1]["test_accuracy"]["mean"])
    return markdown_table(headers, [list(_claim(label, row, 100 * floors[label])) for label, row in rows], range(2, len(headers)))


def _claim(label: str, row: Mapping[str, Any], floor: float) -> Iterator[str]:
    accuracy, target, tuning = row["test_accuracy"], row["to_95_percent"], row["tuning"]
    missed = math.isinf(float(target["seconds"]))
    some = "" if missed or target["reached"] == f"{row['n']} of {row['n']}" else f" ({target['reached']})"
    yield label
    yield row["network"]
    yield f"{accuracy['mean']:.2f} ± {accuracy['sd']:.2f} %"
    yield f"{floor:.2f}"
    yield f"{accuracy['mean'] - floor:+.2f}"
    yield f"{row['parameters']:,}"
    yield "inf" if missed else f"{target['seconds']:.1f}{some}"
    yield "inf" if missed else f"{target['operations'] / 1e9:,.0f}"
    yield f"{row['whole_run']['peak_memory_mib']:.1f}"
    yield str(row["lines_of_code"])
    yield f"{tuning['default_score']:.2f}, {tuning['best_score']:.2f}"


def ratios() -> str:
    """Return every measured ratio of times, with its target."""
    rows = []
    for path in sorted(RESULTS.glob("*-cpu.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for case, found in _ratios(content.get("results", {})):
            target = found.get("target_ratio")
            told = "" if target is None else f"at most {target:g}"
            rows.append(
                [
                    content["benchmark"],
                    case,
                    BESIDE[content["benchmark"]],
                    f"{found['median_ratio']:.2f}",
                    f"{found['median_processor_ratio']:.2f}",
                    told,
                ]
            )
    return markdown_table(["benchmark", "case", "compared with", "time", "processor time", "target"], rows, range(3, 5))


def _ratios(found: Any, case: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(found, dict) and "median_ratio" in found:
        yield case, found
    elif isinstance(found, dict):
        for key, value in found.items():
            yield from _ratios(value, case if key in FOLDERS else f"{case}, {key}".strip(", "))


def files() -> str:
    """Return a table of all result files."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        cpu = content.get("hardware", {})
        place = f"{cpu.get('cpu', '')}, torch {content.get('versions', {}).get('torch', '?').partition('+')[0]}"
        command = content.get("command")
        rows.append(
            [f"[{path.name}](../benchmarks/results/{path.name})", f"`{command}`" if command else "", content.get("date", ""), place]
        )
    return markdown_table(["file", "command", "date", "on"], rows)


def tutorial() -> str:
    """Return what the steps of the tutorial took, and what the whole took up to the reader's own comparison."""
    content = read("tutorial")["results"]
    steps: dict[str, list[dict[str, Any]]] = {}
    for command in content["commands"]:
        steps.setdefault(command["step"], []).append(command)
    rows = [[step, str(len(commands)), *_seconds(commands)] for step, commands in steps.items()]
    rows.append(["all", str(len(content["commands"])), *_seconds(content["commands"])])
    first = content["to_first_comparison"]
    worked = f"{first['seconds']:.0f} s, of which processors worked {first['processor_seconds']:.0f} s."
    told = f"To the first comparison on data of one's own (step 2): {worked}"
    return f"{markdown_table(['step', 'commands', 'seconds', 'processor seconds'], rows, range(1, 4))}\n\n{told} {_place(read('tutorial'))}"


def _seconds(commands: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for key in ("seconds", "processor_seconds"):
        yield f"{sum(command[key] for command in commands):.0f}"


def _place(content: Mapping[str, Any]) -> str:
    load, hardware = content["load_average"], content["hardware"]
    machine = f"{hardware['cpu']}, {hardware['cores']} cores, one thread, torch {content['versions']['torch'].partition('+')[0]}"
    return f"Measured on {content['date']}, {machine}, beside other work (load {load['before']:g} to {load['after']:g})."


TABLES: dict[str, Callable[[], str]] = {
    "readme": lambda: accuracies("accuracy_digits", seconds=False, rows=IN_README, columns=5),
    "digits": lambda: accuracies("accuracy_digits", seconds=False),
    "mnist": lambda: accuracies("accuracy_mnist", seconds=True),
    "claims": claims,
    "ratios": ratios,
    "tutorial": tutorial,
    "files": files,
}
"""What stands between ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``."""


def filled(text: str) -> str:
    """Return a page's text with its tables as the result files have them."""
    for name, table in TABLES.items():
        begin, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n{table()}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
