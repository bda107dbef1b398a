"""Rows of users' data: read by one loader, checked row by row, and accounted for."""

from fdiv import lazy

__all__ = ["RowReport", "Source", "check_rows", "named_dataset", "read_file", "source_of"]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "RowReport": "fdiv.rows.report",
        "Source": "fdiv.rows.sources",
        "check_rows": "fdiv.rows.checks",
        "named_dataset": "fdiv.rows.loading",
        "read_file": "fdiv.rows.loading",
        "source_of": "fdiv.rows.sources",
    },
)
