"""Evidence for people: charts and reports, without a framework and without anything loaded from the network."""

from kpt.report.drawn import draw, draw_bars, drawable
from kpt.report.html import Figure, Report, Table, render, writable, write
from kpt.report.svg import Bar, Line, bar_chart, line_chart, save

__all__ = [
    "Bar", "Figure", "Line", "Report", "Table", "bar_chart", "draw", "draw_bars", "drawable", "line_chart", "render", "save", "writable",
    "write",
]  # fmt: skip
