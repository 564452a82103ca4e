"""Students, one kind a file."""
