"""Linear probes on ``scenes``: agglo-lite's spatial features against EfficientNet-Lite0's own, at the same stride."""

from __future__ import annotations

from typing import Any


def run() -> dict[str, Any]:
    """Segmentation and depth of every model, with one protocol in one process."""
    import agglo
    from agglo.config import build
    from agglo.harness import running

    models = {
        "agglo-lite": agglo.load("agglo-lite"),
        "EfficientNet-Lite0, stride 16": build(
            "teachers", {"kind": "timm", "model": "tf_efficientnet_lite0", "stage": 3}
        ),
        "EfficientNet-Lite2, stride 16": build(
            "teachers", {"kind": "timm", "model": "tf_efficientnet_lite2", "stage": 3}
        ),
        "HOG, stride 16": build("teachers", {"kind": "hog", "cell": 8, "group": 2}),
    }
    return {
        name: running.evaluate(model, [{"kind": "segmentation"}, {"kind": "depth"}]) | {"channels": model.spec.spatial}
        for name, model in models.items()
    }
