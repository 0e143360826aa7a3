"""The report of a study: its content for terminal, page and Markdown, and its files, including each cell's numbers."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpfree.document.content import Bullets, Folded, Part, Section, Table, Text
from bpfree.document.markdown import markdown
from bpfree.document.page import html_page
from bpfree.document.tables import text_table
from bpfree.document.terminal import fitted
from bpfree.document.view import html_view
from bpfree.errors import BpfreeError
from bpfree.files import write_text
from bpfree.redaction import redact_word
from bpfree.study.cells import Plan, word
from bpfree.study.controls import ComparisonTable, control_table
from bpfree.study.floors import Floors
from bpfree.study.report import about, blocks, classes, curves, leaderboard, methods, profiles, quote, table, targets, tuning
from bpfree.study.report import floor as floor_report
from bpfree.study.report.remarks import environments, failures, remarks
from bpfree.study.report.view import View
from bpfree.study.rows import TableRow
from bpfree.study.store import CellRecord

__all__ = ["Report", "files_of", "report_on", "results_csv", "write_report"]

HEADERS = ("row", "column", "seed", "trial", "status", "reason", "cells_at_once", "run", "settings")


@dataclass
class Report:
    """The content of a report.

    Attributes:
        plan: the study with what the command line said.
        rows: the table's, row by row, with the learning curves of their cells.
        command: the words that run it; empty for a study that runs from Python.
        headers, table: the cells of the study's table, as text.
        controls: comparisons with the study's controls, if there are any.
        floors: comparisons with the floors, and the verdicts, if floors were measured.
        remarks: what a reader must know, a sentence each: first, how this differs from the study as written.
        failures: a sentence for each cell that did not finish.
        environment: where the finished cells ran.
    """

    plan: Plan
    rows: list[TableRow]
    command: str
    headers: list[str]
    table: list[list[str]]
    controls: ComparisonTable | None
    floors: list[ComparisonTable]
    remarks: list[str]
    failures: list[str]
    environment: str

    @property
    def name(self) -> str:
        """Base name of the files; a changed study has a name of its own, so that it does not overwrite the full report."""
        changes = "; ".join(self.plan.changes)
        return f"report-{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else "report"

    def plain(self) -> dict[str, Any]:
        """Return the report as plain values: cells with their results, comparisons, remarks."""
        study = self.plan.study
        tables = [
            {"title": found.title, "rows": [dict(zip(found.headers, row, strict=True)) for row in found.table]}
            for found in self._comparisons()
        ]
        cells = [
            {"row": row.written.label, "column": row.column, "seed": cell.key.seed, **_outcome(record), "settings": list(cell.words)}
            for row in self.rows
            for cell, record in zip(row.cells, row.records, strict=True)
        ]
        about = {"study": study.name, "title": study.title, "changes": self.plan.changes, "command": self.command}
        told = {"remarks": self.remarks, "failures": self.failures, "environment": self.environment}
        return {**about, "cells": cells, "comparisons": tables, **told}

    def text(self, width: int | None = None) -> str:
        """Format the report for a terminal of a width: title, table, controls, remarks, failures, environment, command."""
        study = self.plan.study
        numbers = range(self.headers.index("n") - 1, len(self.headers))
        parts = [study.title, *([f"Published: {study.paper}"] if study.paper else []), ""]
        parts += text_table(self.headers, self.table, numbers, width)
        for found in self._comparisons():
            parts += ["", found.title, "", *text_table(found.headers, found.table, found.numeric, width), "", fitted(found.legend, width)]
        told = (
            *self.remarks,
            *self.failures,
            study.notes if width is None else _flowing(study.notes),
            self.environment,
            self.command and f"Again: {self.command}",
        )
        return "\n".join([fitted(parts[0], width), *parts[1:], "", *(fitted(text, width) for text in told if text)])

    def __repr__(self) -> str:
        records = [record for row in self.rows for record in row.records]
        finished = sum(record is not None and record.status == "finished" for record in records)
        first = f"Report({self.plan.study.title}: {finished} of {len(records)} cells finished; .text() has all of it)"
        return "\n".join([first, *text_table(self.headers, self.table, range(self.headers.index("n") - 1, len(self.headers)))])

    def _repr_html_(self) -> str:
        """Show head, leaderboards and learning curves in a notebook."""
        view = View(self.plan, self.rows)
        shown = [Section("", self._head(view)), *leaderboard.leaderboards(view), *curves.learning_curves(view)]
        return html_view(self.plan.study.title, shown)

    def sections(self) -> list[Section]:
        """Make the sections of page and Markdown, in their order, with their figures."""
        view = View(self.plan, self.rows)
        return [
            Section("", self._head(view)),
            *leaderboard.leaderboards(view),
            self._as_written(view),
            *targets.time_to_target(view),
            *curves.learning_curves(view),
            *curves.costs(view),
            *tuning.tuning(view),
            *profiles.across_columns(view),
            *self._against(),
            *classes.by_class(view),
            *blocks.blocks(view),
            *about.failed(view),
            *about.differences(view),
            methods.methods(view),
            *([Section("Notes", [Text(_flowing(self.plan.study.notes), "notes")])] if self.plan.study.notes else []),
            *([about.again(view, self.command)] if self.command else []),
        ]

    def _head(self, view: View) -> list[Part]:
        """Make the head: facts at a glance, a paragraph to quote, the paper, changes of the study, what was compared, findings, remarks."""
        paper = self.plan.study.paper
        parts: list[Part] = [quote.glance(view)]
        parts += [Text(f"Published: {paper}", "lead")] if paper else []
        told = list(self.remarks)
        if self.plan.changes:
            parts.append(Text(told.pop(0), "changed"))
        paragraph, others = quote.quotable(view)
        parts.append(Text(paragraph, "quote"))
        found = list(filter(None, [*others, floor_report.floor_finding(self.floors)]))
        parts += [Bullets(found)] if found else []
        parts.append(Text(" ".join(filter(None, [*told, profiles.why_not(view)])), "note"))
        return parts

    def _as_written(self, view: View) -> Section:
        words = [place for place, header in enumerate(self.headers) if header == "column"]
        text = "Mean and standard deviation over n seeds. Blank: not published, not verified, or not measured."
        if self.plan.study.publishes("test") or self.plan.study.publishes("train"):
            text += " Difference: our mean minus the published number."
        texts = [list(cells) for cells in self.table]
        parts: list[Part] = [Table(self.headers, texts, words, "The study's table"), Text(text, "note")]
        if not self.plan.study.publishes("test"):
            parts = [Folded("All rows in the order of the study", parts)]
        return Section("Results in the order of the study", parts)

    def _comparisons(self) -> list[ComparisonTable]:
        return [*self.floors, *([self.controls] if self.controls else [])]

    def _against(self) -> list[Section]:
        """Make a section each of floors, verdicts and controls."""
        return [Section(found.title, [_as_table(found), Text(found.legend, "note")]) for found in self._comparisons()]


def _outcome(record: CellRecord | None) -> dict[str, Any]:
    if record is None:
        return {"status": "not run", "reason": "", "run": "", "result": {}}
    return {"status": record.status, "reason": record.reason, "run": record.run, "result": record.result}


def report_on(plan: Plan, rows: Sequence[TableRow], words: Sequence[str], *, hidden: int = 0, floors: Floors | None = None) -> Report:
    """Make the report on the cells that are finished so far.

    Args:
        plan: the study, resolved.
        rows: its rows in their columns, with the records of their cells.
        words: those of the command line after ``bpfree``; empty for a study that runs from Python.
        hidden: finished cells of other settings, which are not shown.
        floors: those that were measured; ``None``: the study asks for none.
    """
    shown = list(rows)
    view = View(plan, shown)
    return Report(
        plan,
        shown,
        shlex.join(["bpfree", *map(redact_word, words)]) if words else "",
        table.headers(view),
        [table.texts(view, row) for row in shown],
        control_table(plan, shown),
        [] if floors is None else floor_report.floor_tables(view, floors),
        [*remarks(plan, shown, hidden=hidden), *(() if floors is None else floor_report.floor_remarks(view, floors))],
        [_failure(*each) for each in failures(shown)],
        "; ".join(environments(shown)),
    )


def _as_table(found: ComparisonTable) -> Table:
    words = [place for place in range(len(found.headers)) if place not in found.numeric]
    return Table(found.headers, found.table, words, found.title)


def _failure(row: TableRow, record: CellRecord) -> str:
    return f"{row.label} seed {record.key.seed}: {record.status}" + (f": {record.reason}" if record.reason else "")


def _flowing(notes: str) -> str:
    """Join the lines of a paragraph; keep breaks at blank lines and before lines that begin with a mark or space."""
    return re.sub(r"(?<=\S)\n(?=[\w\"'(])", " ", notes)


# --- files --------------------------------------------------------------------------------------------------------------


def write_report(report: Report, folder: Path, name: str = "report") -> Path:
    """Write ``NAME.html``, ``NAME.md`` and ``NAME-results.csv`` (``results.csv`` for the name ``report``), each atomically.

    Returns:
        The page.

    Raises:
        BpfreeError: the folder cannot be written.
    """
    title, sections = report.plan.study.title, report.sections()
    page, text, table = files_of(folder / f"{name}.html")
    try:
        write_text(page, html_page(title, sections))
        write_text(text, markdown(title, sections))
        write_text(table, results_csv(report.rows))
    except OSError as error:
        raise BpfreeError(f"cannot write the report: {error.strerror}", where=str(folder), fix="choose another with --to FOLDER") from error
    return page


def files_of(page: Path) -> list[Path]:
    """List all files of a report, given its page."""
    name = page.stem
    return [page, page.with_suffix(".md"), page.with_name("results.csv" if name == "report" else f"{name}-results.csv")]


def results_csv(rows: Sequence[TableRow]) -> str:
    """Write each cell's numbers as CSV, also of failed cells: a column for each result, shares and losses as measured.

    Scores on validation (``val/accuracy``) are those after the last epoch. After its cells a row's trials follow, each with its mean score
    over the tuning seeds.
    """
    trials = {id(row): list(_trials(row)) for row in rows}
    found = [_measured(record) for row in rows for record in row.records] + [each for row in rows for _, each in trials[id(row)]]
    keys = sorted({key for each in found for key in each})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*HEADERS, *keys])
    for row in rows:
        for cell, record in zip(row.cells, row.records, strict=True):
            words = shlex.join(word for word in cell.words if not word.startswith(("output=", "seed=")))
            place = [row.written.label, row.column, f"{cell.key.seed}", ""]
            writer.writerow([*place, *_status(record), words, *_numbers(_measured(record), keys)])
        for first, numbers in trials[id(row)]:
            writer.writerow([row.written.label, row.column, "", *first, *_numbers(numbers, keys)])
    return buffer.getvalue()


def _measured(record: CellRecord | None) -> dict[str, float]:
    if record is None:
        return {}
    last = record.history[-1] if record.history else {}
    return {key: value for key, value in last.items() if key.startswith("val/")} | record.result


def _trials(row: TableRow) -> Iterator[tuple[list[str], dict[str, float]]]:
    """Iterate over the trials of a row: what stands before the numbers, and the numbers."""
    tuned = row.tuned
    for number, trial in enumerate(() if tuned is None or not tuned.keys else tuned.trials):
        assert tuned is not None
        measure = tuned.measure
        numbers = {} if trial.score is None else {measure.key: trial.score / measure.metric.factor}
        numbers |= {"train/seconds": trial.seconds} if trial.seconds else {}
        settings = shlex.join(word(key, value) for key, value in trial.settings.items())
        yield [f"{number}", trial.status, "", "", "", settings], numbers


def _status(record: CellRecord | None) -> list[str]:
    if record is None:
        return ["not run", "", "", ""]
    return [record.status, " ".join(record.reason.split()), f"{record.parallel}", record.run]


def _numbers(known: Mapping[str, float], keys: Sequence[str]) -> list[str]:
    return [repr(float(known[key])) if key in known else "" for key in keys]
