"""Checkpoints of other projects (NVIDIA, transformers, timm) as models of ours, without running their code."""
