"""1000-way zero-shot by text on the half of the ImageNet samples held out by agglo-lite."""

from __future__ import annotations

from typing import Any

from record import SHARED

HELD_OUT = (0.5, 1.0)
"""Share of the samples, by hash of their names, held out by agglo-lite's recipe."""


def run() -> dict[str, Any]:
    """Top-1 and top-5 of the student and of its teachers, at 224 px, with the same images and text."""
    import torch

    import agglo
    from agglo.config import build
    from agglo.evals.zero_shot import ZeroShot

    folder = SHARED / "data" / "imagenet_samples"
    if not folder.is_dir():
        return {"left_out": f"no images at {folder}: set AGGLO_SHARED"}
    source = {"kind": "folder", "path": str(folder), "share": list(HELD_OUT)}
    models = {"agglo-lite": agglo.load("agglo-lite")}
    for size in (0, 2):
        options = {"kind": "conse", "model": f"tf_efficientnet_lite{size}"}
        models[f"ConSE on EfficientNet-Lite{size} (teacher's kind)"] = build("teachers", options)
    result: dict[str, Any] = {"images": len(build("sources", source)), "classes": 1000}
    for templates in (("{}",), ("a photo of a {}",)):
        protocol = ZeroShot(templates=templates, classes="imagenet", size=224, source=source)
        with torch.inference_mode():
            result[templates[0]] = {name: protocol.run(model) for name, model in models.items()}
    return result
