"""Weights on disk, read lazily and without running code from the file."""
