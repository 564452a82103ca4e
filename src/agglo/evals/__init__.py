"""Evals, one kind per file."""
