"""What every metric means, its range and which way is better: one glossary for tables, reports, plots and docs."""

from fdiv.report.metrics.glossary import GLOSSARY, Metric
from fdiv.report.metrics.lookup import better, describe, documentation, hover, marked, meanings, plain_name

__all__ = ["GLOSSARY", "Metric", "better", "describe", "documentation", "hover", "marked", "meanings", "plain_name"]
