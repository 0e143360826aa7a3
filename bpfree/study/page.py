"""The page of a study, as it was written before; :func:`bpfree.study.report.write_report` writes it with its Markdown and numbers."""

from __future__ import annotations

from pathlib import Path

from bpfree.study.report import Report
from bpfree.study.report.page import html_page
from bpfree.tracking.events import write_text

__all__ = ["write_page"]


def write_page(path: Path, report: Report) -> Path:
    """Write the page alone."""
    write_text(path, html_page(report.plan.study.title, report.sections()))
    return path
