"""Write docs/metrics.md from the glossary of metrics; run by `make metrics`."""

from __future__ import annotations

from pathlib import Path

from fdiv.report.metrics import documentation

if __name__ == "__main__":
    page = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
    page.write_text(documentation(), encoding="utf-8")
