"""Normalizers, one kind a file."""
