"""OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agglo.extras import require
from agglo.runtimes.base import Runtime


class OpenVino(Runtime):
    """An OpenVINO graph computed on the CPU in float32."""

    def _open(self, folder: Path) -> Any:
        ov = require("openvino", "export")
        # By default the library computes in bfloat16 on processors that have it.
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": self.threads}
        return ov.Core().compile_model(folder / self.facts["graph"], "CPU", options)

    def _run(self, session: Any, images: Tensor) -> Mapping[str, Tensor]:
        # Copied: the arrays belong to the request, which the next call overwrites.
        found = session(images.detach().numpy())
        return {name: torch.from_numpy(found[name].copy()) for name in self.facts["outputs"]}
