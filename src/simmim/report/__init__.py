"""One HTML file that says what came out: no account, no server, nothing beside it."""

from simmim.report.of_run import REPORT, read_metrics, report_run
from simmim.report.page import Curve, Curves, Flow, Page, Picture, Table, Text, write_page

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
