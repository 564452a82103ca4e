"""Normalizers, one kind per file."""
