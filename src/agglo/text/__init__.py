"""Text towers, one kind per file."""
