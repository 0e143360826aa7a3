"""The report of a study: tables and figures as one page, as Markdown, and each cell's numbers as CSV."""

from __future__ import annotations

from bpfree.study.report.files import files_of, write_report
from bpfree.study.report.made import Report, report_on

__all__ = ["Report", "files_of", "report_on", "write_report"]
