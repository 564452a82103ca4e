"""Checkpoints that others wrote: read without running their code and without reading more than is asked for."""
