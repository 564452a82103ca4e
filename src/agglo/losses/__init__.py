"""Losses, one kind a file."""
