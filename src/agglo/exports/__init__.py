"""Kinds of folders that a model can be written to, so that others' programs load it."""
