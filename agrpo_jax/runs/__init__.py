"""A work directory that survives kills."""
