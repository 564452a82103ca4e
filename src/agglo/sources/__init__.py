"""Image sources, one kind a file."""
