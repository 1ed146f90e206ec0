"""Completion and advantage -> loss; knows no network."""
