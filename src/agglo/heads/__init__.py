"""Heads, one kind a file."""
