"""Image sources, one kind per file."""
