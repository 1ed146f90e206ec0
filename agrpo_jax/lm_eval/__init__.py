"""A model for lm-eval."""
