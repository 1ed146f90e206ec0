"""Completions shown step by step."""
