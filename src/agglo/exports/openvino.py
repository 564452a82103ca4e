"""OpenVINO's intermediate representation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agglo.exports._graph import GraphExport, to_onnx
from agglo.extras import require


class OpenVino(GraphExport):
    """``model.xml`` and ``model.bin`` with free batch, height and width, float32.

    The graph is the one of the export ``onnx``, converted: OpenVINO's own tracing of PyTorch fixes which side of an
    image is the longer one. ``agglo.load`` runs the folder with OpenVINO on the CPU.
    """

    runtime = "openvino"

    def _write(self, program: Any, names: list[str], folder: Path) -> str:
        ov = require("openvino", "export")
        source = folder / "graph.onnx"
        to_onnx(program, names).save(source, external_data=True)
        # The default of save_model is float16.
        ov.save_model(ov.convert_model(source), folder / "model.xml", compress_to_fp16=False)
        for path in folder.glob("graph.onnx*"):
            path.unlink()
        return "model.xml"
