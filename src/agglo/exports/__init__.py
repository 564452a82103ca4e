"""Exports: models written in other libraries' layouts, one kind per file."""
