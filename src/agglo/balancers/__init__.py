"""Balancers, one kind a file."""
