"""Teachers, one kind per file."""
