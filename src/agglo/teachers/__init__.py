"""Teachers, one kind a file."""
