"""Weights on disk: read lazily, whatever wrote them, without running code."""
