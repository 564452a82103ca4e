"""mIoU of masks from words: plain similarity and training-free refinements, beside chance and a supervised probe.

Every variant is the `open_vocabulary` eval on the same images at the same input size; the probe is the `segmentation`
eval, which learns from the masks of the training split. On `scenes`, pixels outside objects compete as "background",
"floor" and "wall"; on CamVid (`AGGLO_SHARED`) they are not measured.
"""

from __future__ import annotations

from typing import Any

import record

MODEL, SIZE = "agglo-lite", 448
VARIANTS: dict[str, dict[str, Any]] = {
    "affinity": {"centre": 0.0},
    "affinity, centre 0.5 (default)": {},
    "affinity, centre 0.9": {"centre": 0.9},
    "default in windows of 224 px": {"slide": 224},
    "default without outlying tokens": {"outliers": 5.0},
}


def run() -> dict[str, Any]:
    """mIoU by data set and variant."""
    import agglo

    model = agglo.load(MODEL)
    return {"model": MODEL, "size": SIZE} | {name: _measure(model, *each) for name, each in _sets().items()}


def _sets() -> dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Options of `open_vocabulary`, of the test source, and of the probe, by data set."""
    sets: dict[str, Any] = {"scenes test": ({}, {"kind": "scenes", "split": "test"}, {})}
    path = record.SHARED / "data" / "camvid"
    if path.is_dir():
        camvid = {"kind": "camvid", "path": str(path)}
        train, val = ({**camvid, "split": split} for split in ("train", "val"))
        sets["camvid val"] = {"background": []}, val, {"train": train, "val": train}  # the penalty by training images
    return sets


def _measure(model: Any, keys: dict[str, Any], source: dict[str, Any], probe: dict[str, Any]) -> dict[str, float]:
    from agglo.config import build
    from agglo.evals.base import EvalContext

    context, table = EvalContext(), {}
    for name, options in VARIANTS.items():
        made = build("evals", {"kind": "open_vocabulary", "size": SIZE, "source": source, **keys, **options})
        found = made.run(model, context)
        print(name, {key: round(value, 3) for key, value in found.items()}, flush=True)
        table |= {"chance": found["miou_chance"], "plain": found["miou_plain"], name: found["miou"]}
    # The probe's input has the aspect of its size; whole images are compared at about as many pixels.
    supervised = build("evals", {"kind": "segmentation", "size": [336, 448], "test": source, **probe})
    table["linear probe, supervised"] = supervised.run(model, context)["miou"]
    return {name: round(value, 4) for name, value in table.items()}
