"""From sources to batches of views."""
