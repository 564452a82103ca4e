"""Shared by the exports of graphs: tracing, the folder and its facts, the comparison with the model."""

from __future__ import annotations

import hashlib
import re
import time
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglo.config import build, nearest
from agglo.exports.base import Export
from agglo.extras import require
from agglo.files import read_json, replacing_folder, versions, write_json
from agglo.model.artefact import EXPORT_FORMAT, EXPORTED
from agglo.model.model import Model
from agglo.nn.windows import check_window_value
from agglo.preprocess import Conditioner
from agglo.types import AggloError, ConfigError, Output, StorageError

OPSET = 20
REPORT = "verification.json"
COSINE, ERROR = 0.99999, 1e-2
"""Limits of the comparison in float32: mean cosine, and largest error in standard deviations of the output."""


class GraphExport(Export):
    """A graph from images to features of any batch size, height and width, in a folder that ``agglo.load`` reads.

    Args:
        heads: names of the heads; None or ``["all"]`` for all of the model, ``[]`` for none.
        window: side of the attention windows in patches, a constant of the graph; None for the model's own setting.
    """

    runtime: str

    def __init__(self, *, heads: Sequence[str] | None = None, window: int | None = None) -> None:
        check_window_value(window)
        self.heads = None if heads is None or list(heads) == ["all"] else list(heads)
        self.window = window

    @abstractmethod
    def _write(self, program: Any, names: list[str], folder: Path) -> str:
        """Write the graph of an exported program; return the file's name."""

    def write(self, model: Model, folder: str | Path) -> Path:
        """See :meth:`Export.write`. The graph is compared with the model before the folder is put in place.

        Raises:
            ConfigError: an operation that cannot be exported, with its module; features that differ from the model's;
                ``folder`` holds something else than an earlier export.
            StorageError: the folder cannot be written; an earlier export is unchanged.
        """
        if not isinstance(model.conditioner, Conditioner):
            raise ConfigError("this model's conditioner was taken: restore model.conditioner, or load it again")
        folder = Path(folder).expanduser()
        training = model.training
        model.eval()
        try:
            graph = _Graph(model, self.heads, self.window)
            with _replacing(folder) as partial:
                program, names = traced(graph)
                name = self._write(program, names, partial)
                files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
                write_json(partial / EXPORTED, facts(graph, names, self.runtime, name, files))
                report = compare(model, graph, partial)
                write_json(partial / REPORT, report)
                check(report)
        finally:
            model.train(training)
        return folder


class _Graph(nn.Module):
    """A model as a function of one tensor that returns a tuple of tensors."""

    def __init__(self, model: Model, heads: Sequence[str] | None, window: int | None) -> None:
        super().__init__()
        self.model = model
        self.chosen = list(model.heads) if heads is None else list(heads)
        for name in self.chosen:
            if name not in model.heads:
                has = ", ".join(model.heads) or "none; load it with heads=[...]"
                raise KeyError(f"no head {name!r}{nearest(name, model.heads)}; this model has: {has}")
        if window and not model.student.windows:
            raise ConfigError(f"window: a {model.student_config['kind']} student has no windowed attention")
        self.multiple = model.step(window)
        self.window = (getattr(model.student, "window", 0) or 0) if window is None else window
        self.options: dict[str, Any] = {"window": self.window} if model.student.windows else {}

    def output(self, images: Tensor) -> Output:
        return self.model.decode(self.model.encode(images, **self.options), self.chosen)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(self.output(images)).values())


def flat(output: Output) -> dict[str, Tensor]:
    """The tensors of an output by the names of a graph's outputs: ``summary``, ``heads.NAME.spatial``, ..."""
    named = {"": output, **{f"heads.{name}.": features for name, features in output.heads.items()}}
    found = {f"{prefix}{part}": getattr(f, part) for prefix, f in named.items() for part in ("summary", "spatial")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def traced(graph: _Graph) -> tuple[Any, list[str]]:
    """The program of a graph, whose batch, height and width are free, and the names of its outputs.

    Raises:
        ConfigError: the model cannot be exported; names the operation.
    """
    from torch.export import Dim, export

    multiple = graph.multiple
    # Not the grid of a position table, not square, batch above one: other examples make a size a constant.
    images = torch.rand(2, 3, 3 * multiple, 5 * multiple)
    dynamic = ({0: Dim("batch"), 2: multiple * Dim("rows"), 3: multiple * Dim("columns")},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = list(flat(graph.output(images)))
        try:
            return export(graph, (images,), dynamic_shapes=dynamic, strict=False), names
        except AggloError:
            raise
        except Exception as error:  # each kind of failure has its own class
            raise ConfigError(
                f"torch.export cannot take this {graph.model.student_config['kind']} student: {_first_line(error)}"
            ) from error


def to_onnx(program: Any, names: list[str]) -> Any:
    """The ONNX program of an exported program.

    Raises:
        ConfigError: an operation has no translation; names it and its module.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    require("onnx", "export")
    require("onnxscript", "export")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=["images"], output_names=names, verbose=False
            )
        except Exception as error:
            raise ConfigError(f"ONNX cannot express {_culprit(program, error)}") from error


def _culprit(program: Any, error: BaseException) -> str:
    """The operation and the module of the node that a translation failed at."""
    chain: BaseException | None = error
    while chain is not None:
        if found := re.search(r"translating node %(\w+) .*?target=(?:torch\.ops\.)?([\w.]+)", str(chain), re.DOTALL):
            # The exporter translates a decomposed program, whose nodes are named by parts of the names in this one.
            part = re.sub(r"_\d+$", "", found[1])
            node = next((node for node in program.graph.nodes if part in node.name), None)
            stack = [] if node is None else list((node.meta.get("nn_module_stack") or {}).values())
            where = stack[-1][0].removeprefix("model.") if stack else ""
            return f"{found[2]} in {where or 'the model'}: {_first_line(chain.__cause__ or chain)}"
        chain = chain.__cause__
    return f"this model: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def facts(graph: _Graph, names: list[str], runtime: str, file: str, files: dict[str, str]) -> dict[str, Any]:
    """The content of ``export.json``."""
    model = graph.model
    conditioner: Any = model.conditioner
    config = model.config()
    return {
        "format": EXPORT_FORMAT,
        "runtime": runtime,
        "graph": file,
        "files": files,
        "precision": "fp32",
        "input": {
            "name": "images",
            "layout": "(batch, 3, height, width), float32 RGB in [0, 1]; normalised inside the graph",
            "multiple": graph.multiple,
            "maximum": None,
        },
        "outputs": names,
        "heads": graph.chosen,
        "window": graph.window,
        "mean": conditioner.mean.flatten().tolist(),
        "std": conditioner.std.flatten().tolist(),
        "spec": asdict(model.spec),
        "license": model.provenance.get("license", "see provenance"),
        "config": config,
        "versions": versions(),
    }


# --- comparison -------------------------------------------------------------------------------------------------------


def sizes(preferred: int, multiple: int) -> list[tuple[int, int, int]]:
    """``(batch, height, width)`` of the comparison; none is the example's size."""
    n = max(2, round(preferred / multiple))
    grids = [(2, n, n), (1, n + 1, n), (3, max(1, n // 2), n), (1, n, n + 2), (2, n // 2 + 1, n // 2 + 1), (1, 1, n)]
    return [(batch, rows * multiple, columns * multiple) for batch, rows, columns in grids]


@torch.no_grad()
def compare(model: Model, graph: _Graph, folder: Path) -> dict[str, Any]:
    """Compare an exported folder with its model on sizes that it has not seen.

    Returns:
        ``limits``, and in ``sizes`` for each size the seconds of both and, per output, ``cosine`` (mean over vectors)
        and ``error`` (the largest, in standard deviations of the output).
    """
    known = read_json(folder / EXPORTED)
    exported = build("runtimes", {"kind": known["runtime"]}, folder, known)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for batch, height, width in sizes(model.preferred_size, graph.multiple):
        images = torch.rand(batch, 3, height, width, generator=generator)
        start = time.perf_counter()
        expected = flat(graph.output(images))
        seconds = time.perf_counter() - start
        found = flat(exported(images, resize=False))
        rows.append({
            "batch": batch, "height": height, "width": width,
            "seconds": {"torch": seconds, known["runtime"]: exported.latency(images, repeats=1)},
            "outputs": {name: _difference(found[name], tensor) for name, tensor in expected.items()},
        })  # fmt: skip
    return {"limits": {"cosine": COSINE, "error": ERROR}, "sizes": rows}


def _difference(found: Tensor, expected: Tensor) -> dict[str, float]:
    if found.shape != expected.shape:
        raise ConfigError(f"the exported graph returns the shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    found, expected = found.double(), expected.double()
    cosine = F.cosine_similarity(found, expected, dim=1).mean()
    scale = expected.std(correction=0).clamp_min(1e-12)
    return {"cosine": float(cosine), "error": float((found - expected).abs().max() / scale)}


def check(report: dict[str, Any]) -> None:
    """Raise a ConfigError if a comparison exceeds its limits; names the output and the size."""
    limits = report["limits"]
    for row in report["sizes"]:
        for name, found in row["outputs"].items():
            if not (found["cosine"] >= limits["cosine"] and found["error"] <= limits["error"]):
                raise ConfigError(
                    f"{name} of the exported graph differs from the model's at {row['height']}x{row['width']} pixels: "
                    f"cosine {found['cosine']:.6f} (at least {limits['cosine']}), largest error {found['error']:.2g} "
                    f"standard deviations (at most {limits['error']}); nothing was written"
                )


# --- folder -----------------------------------------------------------------------------------------------------------


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``folder`` on success and is removed on failure.

    Raises:
        ConfigError: ``folder`` exists, is not empty and is not an earlier export of this kind.
        StorageError: it cannot be written.
    """
    if folder.exists() and not (folder / EXPORTED).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} holds something else than an export: name another folder")
    try:
        with replacing_folder(folder) as partial:
            yield partial
    except AggloError:
        raise
    except OSError as error:
        raise StorageError(f"{folder} cannot be written ({error}): free some space or name another folder") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
