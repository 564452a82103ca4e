"""Batches of views from image sources."""
