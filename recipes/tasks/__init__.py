"""Builders of the data and toy worlds that recipes train on."""
