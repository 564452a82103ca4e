"""Balancers, one kind per file."""
