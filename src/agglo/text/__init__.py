"""Text towers, one kind a file."""
