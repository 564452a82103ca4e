"""The teacher-feature cache: what the teachers say of every image's canvas, written once and read while training.

``records`` is the format on disk, ``coding`` turns features into bytes and back, ``identity`` says whose features they
are and what changed, ``writing`` runs the teachers, ``crops`` loads batches of fixed crops together with their records,
and ``lessons`` hands both, cached and live, to the objective.
"""
