"""Objectives and estimators on equal terms."""
