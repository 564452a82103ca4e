"""The teacher-feature cache: features of every fixed crop, stored once and read during training.

``records`` is the format on disk, ``coding`` converts features to bytes and back, ``identity`` detects a changed
teacher or image, ``reading`` and ``disk`` read and write a cache's folder. ``agglo.training.precompute`` fills it.
"""
