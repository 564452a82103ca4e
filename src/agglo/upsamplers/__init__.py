"""Upsamplers: finer maps from a teacher of one size and a larger image."""
