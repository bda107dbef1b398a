"""Benchmarks: speed and memory only, run from the root of the checkout as `python -m benchmarks.NAME`."""
