"""The report of a study: tables and figures as one page, as Markdown, and each cell's numbers as CSV."""

from __future__ import annotations

from bpfree.study.report.report import Report, files_of, report_on, write_report

__all__ = ["Report", "files_of", "report_on", "write_report"]
