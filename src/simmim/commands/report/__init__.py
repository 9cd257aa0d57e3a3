"""One HTML file that says what came out: no account, no server, nothing beside it."""

from simmim.commands.report.page import Curve, Curves, Flow, Page, Picture, Table, Text, write_page
from simmim.commands.report.run_report import REPORT, read_metrics, report_run

__all__ = [
    "REPORT",
    "Curve",
    "Curves",
    "Flow",
    "Page",
    "Picture",
    "Table",
    "Text",
    "read_metrics",
    "report_run",
    "write_page",
]
