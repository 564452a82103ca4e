"""Heads, one kind per file."""
