"""Training objectives, one kind per file."""
