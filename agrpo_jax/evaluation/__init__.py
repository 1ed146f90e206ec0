"""Held-out accuracy: one evaluation, records, statistics, tables."""
