"""Students, one kind per file."""
