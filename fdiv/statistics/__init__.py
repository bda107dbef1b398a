"""Estimates with standard errors, calibration, diversity."""
