"""Writing a report: page, Markdown, and each cell's numbers."""

from __future__ import annotations

from pathlib import Path

from bpfree.errors import BpfreeError
from bpfree.files import write_text
from bpfree.study.report.made import Report
from bpfree.study.report.markdown import markdown
from bpfree.study.report.page import html_page
from bpfree.study.report.results import results_csv

__all__ = ["files_of", "write_report"]


def write_report(report: Report, folder: Path, name: str = "report") -> Path:
    """Write ``NAME.html``, ``NAME.md`` and ``NAME-results.csv`` (``results.csv`` for the name ``report``), each at once.

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
        write_text(table, results_csv(report.lines))
    except OSError as error:
        raise BpfreeError(f"cannot write the report: {error.strerror}", where=str(folder), fix="choose another with --to FOLDER") from error
    return page


def files_of(page: Path) -> list[Path]:
    """All files of a report, given its page."""
    name = page.stem
    return [page, page.with_suffix(".md"), page.with_name("results.csv" if name == "report" else f"{name}-results.csv")]
