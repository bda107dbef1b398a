"""Rejected answers for D²O from public preference data."""
