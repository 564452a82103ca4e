"""Upsamplers: from a teacher of one size and a larger image to a finer map."""
