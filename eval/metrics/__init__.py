"""Metrics: functions of per-item values."""
