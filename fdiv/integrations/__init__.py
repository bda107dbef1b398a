"""The losses inside other projects' trainers: verl and ms-swift. Neither is a dependency; each module imports its own.

TRL needs no adapter: every loss runs in a stock TRL trainer, see `examples/` and docs/integrations.md.
"""
