"""A benchmark under attack: `run` measures every attacked model, `values` makes numbers of what a log holds of it."""
