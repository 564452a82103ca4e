"""ONNX, for ONNX Runtime and every program that reads the format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agglo.exports._graph import GraphExport, to_onnx


class Onnx(GraphExport):
    """``model.onnx`` (opset 20) with free batch, height and width: backbone, chosen heads, and normalisation of pixels.

    The graph takes ``images (B, 3, H, W)``, float32 RGB in [0, 1], and returns ``summary``, ``spatial``,
    ``heads.NAME.summary`` and ``heads.NAME.spatial``. It is compared with the model on six sizes
    (``verification.json``). ``agglo.load`` runs the folder with ONNX Runtime.
    """

    runtime = "onnx"

    def _write(self, program: Any, names: list[str], folder: Path) -> str:
        file = "model.onnx"
        graph = to_onnx(program, names)
        # One file cannot exceed 2 GB, the limit of protobuf.
        size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
        graph.save(folder / file, external_data=size > 1.9e9)
        return file
