"""Checkpoints of other projects (NVIDIA, transformers, timm) as agglo models, without running their code."""
