"""ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agglo.extras import require
from agglo.runtimes.base import Runtime


class Onnx(Runtime):
    """An ONNX graph computed by ONNX Runtime on the CPU."""

    def _open(self, folder: Path) -> Any:
        ort = require("onnxruntime", "export")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads  # the library's default ignores the process's CPU affinity
        options.log_severity_level = 3
        return ort.InferenceSession(folder / self.facts["graph"], options, providers=["CPUExecutionProvider"])

    def _run(self, session: Any, images: Tensor) -> Mapping[str, Tensor]:
        found = session.run(self.facts["outputs"], {"images": images.detach().numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(self.facts["outputs"], found, strict=True)}
