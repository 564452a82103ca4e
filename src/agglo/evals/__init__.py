"""Evals, one kind a file."""
