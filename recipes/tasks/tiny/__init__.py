"""Tiny worlds that the package builds itself."""
