"""Fixtures that several test files use: models, data sets, checkpoints, runs, commands."""
