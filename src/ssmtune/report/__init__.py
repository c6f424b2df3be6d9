"""Reports: one HTML page, or generated Markdown tables, as a pure function of records."""

from ssmtune.report.markdown import study_markdown, update_generated
from ssmtune.report.page import write_report

__all__ = ["study_markdown", "update_generated", "write_report"]
