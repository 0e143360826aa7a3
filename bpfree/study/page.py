"""The page of a study: one self-contained HTML file that opens offline."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from bpfree import comparison
from bpfree.comparison_page import STYLE, curves
from bpfree.study.controls import Section
from bpfree.study.line import Line
from bpfree.study.report import Report
from bpfree.tracking.events import write_text
from bpfree.training.run import Run

__all__ = ["write_page"]

MORE_STYLE = """
.changed{border-left:4px solid #D55E00;padding:.4rem .8rem;background:#fdf3ec;color:#1c1e21;font-weight:600}
.words{text-align:left} .words:last-child{padding-left:1.5rem} .notes{white-space:pre-line} li{overflow-wrap:anywhere} h2{font-size:1.15rem}
"""


def write_page(path: Path, report: Report) -> Path:
    """Write the table, what a reader must know of it, the learning curves, and how to run it again."""
    study = report.plan.study
    first, *others = report.remarks or [""]
    changed = bool(report.plan.changes)
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(study.title)}</title><style>{STYLE}{MORE_STYLE}</style></head><body>
<h1>{html.escape(study.title)}</h1>
{_paragraph(study.paper and f"Published: {study.paper}")}{_paragraph(first, "changed" if changed else "")}
{_table(report.headers, report.table, words=["column"])}
<p>Ours: mean and standard deviation over n seeds; the test split is evaluated once per run. Difference: our mean minus the
published number. What is blank was not published, not verified, or not measured. Seconds: training only. Trained: parameters that are.</p>
{"".join(map(_paragraph, others))}{_list(report.failures)}{_paragraph(study.notes, "notes")}
{_controls(report.controls)}{"".join(_curves(report))}
<h2>Again</h2><p><code>{html.escape(report.command)}</code></p>{_paragraph(report.environment)}
<details><summary>Each cell as a run of its own</summary>{_list(map(_one_run, report.lines), "code")}</details></body></html>
"""
    write_text(path, text)
    return path


def _paragraph(text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{html.escape(text)}</p>\n" if text else ""


def _list(texts: Iterable[str], tag: str = "span") -> str:
    items = "".join(f"<li><{tag}>{html.escape(text)}</{tag}></li>" for text in texts)
    return f"<ul>{items}</ul>\n" if items else ""


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[str]) -> str:
    """With the columns of words to the left, as the first is, and numbers to the right."""
    kinds = [' class="words"' if name in words else "" for name in headers]
    body = "".join(_row(cells, "td", kinds) for cells in rows)
    return f'<div class="scroll"><table><thead>{_row(headers, "th", kinds)}</thead><tbody>{body}</tbody></table></div>\n'


def _row(cells: Sequence[str], tag: str, kinds: Sequence[str]) -> str:
    texts = (html.escape(cell.replace("+-", "±")) for cell in cells)
    return "<tr>" + "".join(f"<{tag}{kind}>{text}</{tag}>" for text, kind in zip(texts, kinds, strict=True)) + "</tr>"


def _controls(section: Section | None) -> str:
    if section is None:
        return ""
    words = [name for place, name in enumerate(section.headers) if place not in section.numeric]
    return f"<h2>Against the controls</h2>\n{_table(section.headers, section.table, words)}{_paragraph(section.legend)}"


def _one_run(line: Line) -> str:
    import shlex

    return f"{line.label}: {shlex.join(['bpfree', 'train', *line.cells[0].words])}"


def _curves(report: Report) -> Iterable[str]:
    """A figure per column, where there is a validation split to draw."""
    for column in report.plan.study.columns:
        rows = [
            comparison.Row(line.row.label, [], runs=[_run(report.plan.output / outcome.run) for outcome in line.finished])
            for line in report.lines
            if line.column == column.label
        ]
        figure = curves(rows)
        if figure:
            yield f"<h2>{html.escape(column.label or 'Learning curves')}</h2>{figure}"


def _run(folder: Path) -> Run:
    """A finished run with its history, as far as its folder is still there."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        history = [{key: float(value) for key, value in json.loads(line).items()} for line in lines]
    except (OSError, ValueError, TypeError, AttributeError):
        history = []
    return Run(folder.name, folder.name, status="finished", history=history)
