"""Gold queries whose rows depend on the day."""

from __future__ import annotations

import re


def asks_for_the_day(query: str) -> bool:
    """Whether the rows of a gold query depend on the clock, as those of 37 tasks of sql_defog do."""
    return re.search(r"'now'|current_(date|time)", query, re.IGNORECASE) is not None
