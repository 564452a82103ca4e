"""The comparison of ``inference.py`` on one GPU: half precision, eager and compiled, as a share of the matmul peak.

``python benchmarks/inference_gpu.py`` writes ``$OUT/inference_gpu.json``, or ``results/inference_gpu.json`` without
``$OUT``; ``--smoke`` runs toy models anywhere. transformers and timm take part if installed. Results are written
after every measurement, so that an interrupted run keeps them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from inference import TINY, VIT_B, Geometry, ours, photos, timm_naflex, transformers_radio
from torch import Tensor, nn

from agglo.model.model import Model

MODELS = {
    "ViT-H": Geometry(1280, 32, 16, 5120, None, class_tokens=3, registers=7),
    "SO400M": Geometry(1152, 27, 16, 4304, None, class_tokens=3, registers=7),
    "ViT-L": Geometry(1024, 24, 16, 4096, 0.5),
    "ViT-B": VIT_B,
}
"""C-RADIOv4-H and -SO400M, C-RADIOv3-L and -B; the one with a goal comes first."""

GOAL = 0.999
"""Minimum cosine between half precision and float32."""


def flops(geometry: Geometry, side: int) -> float:
    """Floating-point operations of the matrix products of one image, ``2 m n k`` each."""
    g = geometry
    patches = (side // g.patch) ** 2
    tokens = patches + g.class_tokens + g.registers
    block = 2 * tokens * g.width * (4 * g.width + 2 * g.hidden) + 4 * tokens**2 * g.width
    return g.depth * block + 2 * patches * 3 * g.patch**2 * g.width


# --- clocks -----------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds per call, averaged over several in a row, by GPU events if available."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000 / calls


def compete(
    calls: dict[str, Callable[[], object]], device: torch.device, rounds: int, base: str = "agglo"
) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum seconds of alternating calls, and the median ratio to ``base``."""
    once = {}
    for name, call in calls.items():
        seconds(call, device, 2)  # compiles, tunes and warms up
        once[name] = seconds(call, device, 1)
    took: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(calls)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            # At least 0.1 s: shorter spans are mostly launches.
            took[name].append(seconds(calls[name], device, max(1, min(50, round(0.1 / once[name])))))
    ratios = {name: [mine / theirs for mine, theirs in zip(took[name], took[base], strict=True)] for name in calls}
    return {
        name: {
            "median_s": round(statistics.median(took[name]), 6),
            "min_s": round(min(took[name]), 6),
            "max_s": round(max(took[name]), 6),
            f"ratio_to_{base}": round(statistics.median(ratios[name]), 3),
        }
        for name in calls
    }


def peak(device: torch.device, dtype: torch.dtype, sides: tuple[int, ...]) -> dict[str, Any]:
    """The best rate of square matrix products of random values (zeros are faster: they draw less power)."""
    rates = {}
    for side in sides:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        call = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)  # noqa: E731
        seconds(call, device, 5)
        best = min(seconds(call, device, 10) for _ in range(7))
        rates[side] = 2 * side**3 / best
    return {"flop_per_s": max(rates.values()), "by_side": {str(side): rate for side, rate in rates.items()}}


# --- measurements -----------------------------------------------------------------------------------------------------


def halved(model: Model, dtype: torch.dtype) -> Model:
    """Weights in half precision, the conditioner in float32, as after loading."""
    model.to(dtype)
    model.conditioner.float()
    return model


def contestants(geometry: Geometry, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Any], list[str]]:
    """Implementations with one set of weights, and the names of those not installed."""
    model = ours(geometry)
    # Inputs are in [0, 1]; every implementation normalises them.
    found: dict[str, Any] = {"agglo": model}
    absent = []
    for name, make in (("transformers", transformers_radio), ("timm", timm_naflex)):
        try:
            found[name] = make(model, geometry)
        except ImportError:
            absent.append(name)
    for name, module in found.items():
        found[name] = halved(module.to(device), dtype) if isinstance(module, Model) else module.to(device, dtype).eval()
    if "timm" in found:
        # Our conditioner is part of timm's entry and was converted with it; create it again.
        found["timm"][0].float()
    return found, absent


def run_one(name: str, module: Any, dtype: torch.dtype) -> Callable[[Tensor], object]:
    """One implementation as a function of images ``(B, 3, H, W)`` in float32."""
    if name == "agglo":
        return lambda images: module(images).tokens()
    if name == "transformers":
        return lambda images: module(images.to(dtype)).features
    return lambda images: module[1](module[0](images).to(dtype))


def compile_parts(name: str, module: Any) -> None:
    """``torch.compile``: ours per block, as in ``load(compile=True)``, the others as a whole."""
    for part in module.student.blocks if name == "agglo" else [module[1] if name == "timm" else module]:
        part.compile()


def speed(
    geometry: Geometry, device: torch.device, dtype: torch.dtype, side: int, batch: int, rounds: int, rate: float
) -> dict[str, Any]:
    """Images per second of every implementation, eager and compiled, and share of the peak."""
    images = torch.rand(batch, 3, side, side, device=device)
    work = flops(geometry, side) * batch
    result: dict[str, Any] = {"side": side, "batch": batch, "gflop_per_image": round(work / batch / 1e9, 2)}
    for how in ("eager", "compiled"):
        found, result["not_installed"] = contestants(geometry, device, dtype)
        calls: dict[str, Callable[[], object]] = {}
        for name, module in found.items():
            if how == "compiled":
                compile_parts(name, module)
            forward = run_one(name, module, dtype)
            calls[name] = lambda forward=forward: forward(images)
        table = compete(calls, device, rounds)
        for row in table.values():
            row["images_per_s"] = round(batch / row["median_s"], 2)
            row["share_of_peak"] = round(work / row["median_s"] / rate, 4)
        result[how] = table
        print(
            f"  {how}: " + ", ".join(f"{k} {v['images_per_s']}/s, {v['share_of_peak']:.1%}" for k, v in table.items())
        )
        del found, calls
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return result


def exactness(geometry: Geometry, device: torch.device, dtypes: tuple[torch.dtype, ...], side: int) -> dict[str, Any]:
    """Minimum and mean cosine of patch tokens, and of summaries, to float32 (without TF32)."""
    torch.manual_seed(1)
    model, images = ours(geometry).to(device), torch.rand(4, 3, side, side, device=device)
    reference = model(images)
    expected = (reference.tokens().double(), reference.summary.double())
    result: dict[str, Any] = {}
    for dtype in dtypes:
        torch.manual_seed(1)
        out = halved(ours(geometry).to(device), dtype)(images)
        tokens, summary = (
            nn.functional.cosine_similarity(a.double(), b, dim=-1)
            for a, b in zip((out.tokens(), out.summary), expected, strict=True)
        )
        result[str(dtype).removeprefix("torch.")] = {
            "tokens_min": float(tokens.min()),
            "tokens_mean": float(tokens.mean()),
            "summary_min": float(summary.min()),
            "reached": bool(min(tokens.min(), summary.min()) >= GOAL),
        }
    return result


def windows(geometry: Geometry, device: torch.device, dtype: torch.dtype, side: int, sides: tuple[int, ...]) -> Any:
    """ViTDet's windows against global attention."""
    model, images = halved(ours(geometry).to(device), dtype), torch.rand(8, 3, side, side, device=device)
    calls: dict[str, Callable[[], object]] = {"global": lambda: model(images)}
    for window in sides:
        calls[f"window {window}"] = lambda window=window: model(images, window=window)
    return compete(calls, device, 5, base="global")


def packing(geometry: Geometry, device: torch.device, dtype: torch.dtype, pictures: list[Tensor]) -> dict[str, Any]:
    """Photographs of different shapes, on the device: packed, one by one, padded to the largest."""
    model, pictures = halved(ours(geometry).to(device), dtype), [picture.to(device) for picture in pictures]
    height, width = (max(p.shape[axis] for p in pictures) for axis in (1, 2))
    padded = torch.stack([nn.functional.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pictures])
    calls: dict[str, Callable[[], object]] = {
        "packed": lambda: model(pictures),
        "one by one": lambda: [model(picture) for picture in pictures],
        "padded to the largest": lambda: model(padded),
    }
    table = compete(calls, device, 5, base="packed")
    for row in table.values():
        row["images_per_s"] = round(len(pictures) / row["median_s"], 2)
    return table


def run(path: Path, smoke: bool = False) -> dict[str, Any]:
    """All measurements, the one with a goal first; the file is written after each."""
    from agglo.files import versions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not smoke:
        raise SystemExit("no GPU found; use --smoke for toy models on the CPU, or inference.py for CPU timings")
    dtype = torch.bfloat16
    models = {"toy": TINY} if smoke else MODELS
    side, batch, rounds = (64, 2, 2) if smoke else (512, 64, 7)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    result: dict[str, Any] = {"benchmark": "inference_gpu", "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    result["dtype"] = "bfloat16"

    def keep(question: str, answer: Any) -> Any:
        result[question] = answer
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        return answer

    with torch.no_grad():
        rate = keep("peak", peak(device, dtype, (128,) if smoke else (4096, 8192, 16384)))["flop_per_s"]
        print(f"peak {rate / 1e12:.4g} TFLOP/s", flush=True)
        table: dict[str, Any] = {}
        for name, geometry in models.items():
            print(f"{name}, {side} px, batch {batch}", flush=True)
            table[name] = speed(geometry, device, dtype, side, batch, rounds, rate)
            keep("forward", table)
        small = TINY if smoke else VIT_B
        for name, geometry in models.items():
            dtypes = (torch.bfloat16, torch.float16)
            keep(f"exactness {name}", exactness(geometry, device, dtypes, side))
        keep("windows", windows(small, device, dtype, 128 if smoke else 1024, (2, 4) if smoke else (8, 16)))
        pictures = photos(4, 16, 48, 96) if smoke else photos(64, 16, 256, 384)
        keep("packing", packing(small, device, dtype, pictures))
    return result


if __name__ == "__main__":
    record.on_gpu("inference_gpu", __doc__, run)
