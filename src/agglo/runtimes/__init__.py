"""Runtimes: exported models, computed by another library than PyTorch, one library per file."""
