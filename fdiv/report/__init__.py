"""Reports and plots of finished runs: tables, training curves, before against after, the frontier of a sweep."""

from fdiv import lazy

__all__ = ["write_frontier", "write_report"]

__getattr__, __dir__ = lazy.attach(
    __name__, {"write_frontier": "fdiv.report.page", "write_report": "fdiv.report.page"}
)
