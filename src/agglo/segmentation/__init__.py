"""Masks from words, boxes and points: prompts, SAM 3 on a student, files. ``agglo.segment`` is the verb."""
