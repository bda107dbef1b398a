"""Unlearning tasks from public-domain novels."""
