"""Choosing strength, layers and options of a fit by what they do to a task on validation data."""
