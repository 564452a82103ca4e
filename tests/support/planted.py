"""FiftyOne datasets with known vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def plant(dataset: Any, vectors: Sequence[Any], field: str = "radio", **values: Sequence[Any]) -> list[str]:
    """Add a sample per vector, None for none; returns the ids. ``values`` are fields by name."""
    import fiftyone

    start = len(dataset)
    samples = []
    for row, vector in enumerate(vectors):
        own = {name: column[row] for name, column in values.items()}
        held = None if vector is None else np.asarray(vector, np.float32)
        samples.append(fiftyone.Sample(filepath=f"/photographs/{start + row}.jpg", **{field: held}, **own))
    return dataset.add_samples(samples)


def circle(*degrees: float) -> np.ndarray:
    """Unit vectors in the plane at these angles."""
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], 1)


def cosine(degrees: float) -> float:
    """The cosine distance of two vectors at this angle."""
    return float(2 * np.sin(np.deg2rad(degrees) / 2) ** 2)
