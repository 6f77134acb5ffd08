"""Evaluation: the harness, its records and its statistics."""
