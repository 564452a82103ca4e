"""Evals of the small student, an untrained one and two teachers, on real data and ``scenes``; and the speed of kNN.

Writes ``docs/evals.md``. Results are kept in ``runs/benchmark-evals``, from which an interrupted run resumes.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

from record import SHARED

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "benchmark-evals"
PAGE = ROOT / "docs" / "evals.md"
HELD_OUT = [0.5, 1.0]
"""Share of the ImageNet samples, by hash of their names, held out by agglo-lite's recipe."""

NEIGHBOURS = {"width": 2560, "bank": 2**16, "queries": 2048, "k": 20}
FULL = {"width": 2560, "bank": 1_281_167, "queries": 50_000}


def real(folder: Path) -> list[dict[str, Any]]:
    """The evals on available real data."""
    found: list[dict[str, Any]] = []
    cifar, imagenet, camvid = folder / "cifar10_small.npz", folder / "imagenet_samples", folder / "camvid"
    if cifar.is_file():
        splits = {split: {"kind": "cifar", "path": str(cifar), "split": split} for split in ("train", "test")}
        found.append({"kind": "knn", "name": "cifar10-knn", "size": 128, **splits})
    if imagenet.is_dir():
        source = {"kind": "folder", "path": str(imagenet), "share": HELD_OUT}
        words = {"templates": ["{}"], "classes": "imagenet", "size": 224, "source": source}
        found.append({"kind": "zero_shot", "name": "imagenet-zero-shot", **words})
    if camvid.is_dir():
        train, val = ({"kind": "camvid", "path": str(camvid), "split": split} for split in ("train", "val"))
        # A single penalty, because a third split to select it on does not exist.
        probe = {"size": [240, 320], "decay": [0.01], "train": train, "val": train, "test": val}
        found.append({"kind": "segmentation", "name": "camvid", **probe})
    return found


def on_scenes() -> list[dict[str, Any]]:
    """All evals on ``scenes`` except timings and those that need external files or weights.

    ``agreement`` and ``mode_switch`` compare with :func:`teachers`.
    """
    kinds = (
        "knn", "zero_shot", "linear", "segmentation", "depth", "normals", "correspondence", "robustness", "rank",
        "fixed_pattern", "mode_switch", "agreement",
    )  # fmt: skip
    captions = {"kind": "retrieval", "name": "retrieval", "source": {"kind": "scenes", "split": "test"}}
    return [*({"kind": kind, "name": kind} for kind in kinds), captions]


def teachers() -> dict[str, Any]:
    """The teachers of agglo-lite's recipe."""
    from agglo import recipe
    from agglo.config import build

    return {name: build("teachers", entry.teacher) for name, entry in recipe.load("agglo_lite").teachers.items()}


def models() -> dict[str, Any]:
    """The student, the untrained student, a classification teacher and a shape teacher."""
    import torch

    import agglo
    from agglo.config import build

    untrained = agglo.load("agglo-lite", heads="all")
    torch.manual_seed(0)
    for module in untrained.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return {
        "agglo-lite": agglo.load("agglo-lite", heads="all"),
        "untrained student": untrained,
        "EfficientNet-Lite0 (ConSE)": build("teachers", {"kind": "conse", "model": "tf_efficientnet_lite0"}),
        "EfficientNet-Lite0, stride 16": build(
            "teachers", {"kind": "timm", "model": "tf_efficientnet_lite0", "stage": 3}
        ),
        "HOG, stride 16": build("teachers", {"kind": "hog", "cell": 8, "group": 2}),
    }


def run() -> dict[str, Any]:
    """Every eval on every model with one protocol; then the speed of kNN."""
    import agglo
    from agglo.harness.measuring import measure
    from agglo.results.records import read

    entries = [*real(SHARED / "data"), *on_scenes()]
    seconds = {}
    taught = teachers()
    for name, model in models().items():
        # The packaged agglo-lite has no HOG head.
        asked = {each: taught[each] for each in model.heads} if isinstance(model, agglo.Model) else None
        found = measure(model, name, entries, FOLDER, teachers=asked, progress=None)
        seconds[name] = round(found.seconds, 1)
        for each, why in found.failed.items():
            print(f"{name}, {each}: {why}", flush=True)
        print(name, {each: dict(result.metrics) for each, result in found.results.items()}, flush=True)
    wanted = {entry["name"] for entry in entries}
    results = [result for result in read(FOLDER) if result.name in wanted]
    # In a separate process, to measure peak memory.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        speed = pool.apply(neighbours)
    write(results, speed)
    table: dict[str, dict[str, Any]] = {}
    for result in results:
        table.setdefault(str(result.model["name"]), {})[result.name] = dict(result.metrics)
    protocols = {result.name: f"{result.protocol}/{result.data_hash}" for result in results}
    return {"models": table, "protocols": protocols, "seconds": seconds, "quick": quick(), "neighbours": speed}


def quick() -> dict[str, Any]:
    """Seconds of the quick suite on agglo-lite, and of one more eval on cached features."""
    import tempfile

    import agglo
    from agglo.harness.measuring import measure
    from agglo.harness.protocols import plan

    model = agglo.load("agglo-lite", heads="text")
    with tempfile.TemporaryDirectory() as folder:
        first = measure(model, "agglo-lite", plan("quick"), Path(folder))
        more = measure(model, "agglo-lite", plan("linear"), Path(folder))
    return {"seconds": first.seconds, "each": {n: r.seconds for n, r in first.results.items()}, "linear": more.seconds}


def neighbours() -> dict[str, Any]:
    """Seconds of kNN and of its matrix product alone, interleaved."""
    import torch

    from agglo.evals.knn import neighbours as search

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = FULL | {"k": 20} if device.type == "cuda" else NEIGHBOURS
    draw = torch.Generator().manual_seed(0)
    bank, queries = (torch.empty(shape[which], shape["width"], dtype=torch.float16) for which in ("bank", "queries"))
    for rows in (bank, queries):
        for part in rows.split(1024):  # so that the inputs are the peak before timing starts
            part.copy_(torch.randn(part.shape, generator=draw))
    half = device.type == "cuda"
    whole, product = [], []
    for _ in range(3):
        whole.append(_timed(lambda: search(bank, queries, shape["k"], device), device))
        product.append(_timed(lambda: _product(bank, queries, device, half), device))
    seconds, matrix = statistics.median(whole), statistics.median(product)
    work = shape["bank"] * shape["queries"] * shape["width"]
    scale = FULL["bank"] * FULL["queries"] * FULL["width"] / work
    inputs = (FULL["bank"] + FULL["queries"]) * FULL["width"] * 2
    return {
        "device": torch.cuda.get_device_name() if half else f"cpu, {torch.get_num_threads()} threads",
        "shape": shape,
        "seconds": seconds,
        "product_seconds": matrix,
        "share_of_product": matrix / seconds,
        "gflops": 2e-9 * work / seconds,
        "extrapolated_full_hours": seconds * scale / 3600,
        "full_inputs_gib": inputs / 2**30,
    }


def _product(bank: Any, queries: Any, device: Any, half: bool) -> None:
    """The same matrix products in blocks of the same size, without casts."""
    import torch

    dtype = torch.float16 if half else torch.float32
    part = bank[:32768].to(device, dtype)
    rows = [queries[i : i + 2048].to(device, dtype) for i in range(0, len(queries), 2048)]
    for _ in range(0, len(bank), 32768):
        for row in rows:
            row @ part.T


def _timed(call: Any, device: Any) -> float:
    import torch

    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def write(results: list[Any], speed: dict[str, Any]) -> None:
    """``docs/evals.md``."""
    from agglo.results.tables import markdown

    wanted = {"cifar10-knn", "imagenet-zero-shot", "camvid"}
    on_real, rest = ([r for r in results if (r.name in wanted) is own] for own in (True, False))
    PAGE.write_text(
        "# Evals of the small models\n\n"
        "Written by `python benchmarks/run.py evals`. How to read and make such tables: "
        "[guides/evaluation.md](guides/evaluation.md).\n\n"
        "## Real data\n\n"
        "kNN on 5000 and 2000 images of CIFAR-10 at 128 px; 1000-way zero-shot on the ImageNet samples that were not "
        "trained on, at 224 px; a linear probe on CamVid at 240 x 320 px.\n\n"
        f"{markdown(on_real)}\n"
        "## `scenes`\n\n"
        f"{markdown(rest)}\n"
        "Not every column ranks models: `robustness kept` (and its cosines) is relative to the clean result, and an "
        "untrained model has little to lose; the effective ranks of `rank` and the stability of `mode_switch` "
        "describe features without rating them. In the other columns above the trained student is ahead of the "
        "untrained one.\n\n"
        "## How fast kNN is\n\n"
        f"{speed['shape']['queries']} queries against {speed['shape']['bank']} x {speed['shape']['width']} float16 on "
        f"{speed['device']}: {speed['seconds']:.1f} s, the matrix product alone takes "
        f"{speed['product_seconds']:.1f} s ({100 * speed['share_of_product']:.0f} %; medians of three, interleaved, "
        "on a machine with other work). By that rate 50 000 queries against the 1.28 M images of ImageNet "
        f"take {speed['extrapolated_full_hours']:.1f} hours (extrapolated, not run); the inputs are "
        f"{speed['full_inputs_gib']:.1f} GiB; the search needs more memory than that, "
        "independent of the size of the bank "
        "([guides/evaluation.md](guides/evaluation.md)).\n",
        encoding="utf-8",
    )
