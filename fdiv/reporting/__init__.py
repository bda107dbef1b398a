"""Reports: one HTML page and PNG plots from the directories that runs and sweeps leave."""

from fdiv.reporting.page import write_frontier, write_report

__all__ = ["write_frontier", "write_report"]
