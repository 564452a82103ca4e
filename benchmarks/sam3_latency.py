"""Seconds from pixels to SAM 3's neck: its own trunk beside C-RADIOv4's shapes, at windows of 8 to 24 and global.

The boundary is the same for all: normalised pixels of one image in, the maps of SAM 3's neck out, that is trunk, head
(of a student) and neck: figure 9 of C-RADIOv4 (arXiv:2601.17237), where only SAM 3 was timed with its neck. SAM 3 gets
1008 pixels, students 1152, so that all have 72 x 72 cells. Weights are random, of real size.

``python benchmarks/run.py sam3_latency`` on the CPU: a whole pass takes up to a minute, so only the pairs with a goal
are timed whole, alternating. The table is the sum of parts (patches, blocks of each kind, windowing, head, neck), which
alternate too, times their number; blocks of one kind differ in weights only. ``python benchmarks/sam3_latency.py
--device cuda --dtype bfloat16`` times every row whole. ``--tiny`` is a trial with toy models, ``--page`` writes table
and figure of the published numbers into ``docs/guides/sam3.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import record
import torch
from inference import THREADS
from inference import compete as alternate
from torch import Tensor

from agglo.integrations.sam3 import install, vision_encoder
from agglo.model.heads import HeadConfig
from agglo.model.model import Model
from agglo.nn.packing import Layout

Call = Callable[[], object]
ROOT = Path(__file__).parents[1]
GUIDE, FIGURE = ROOT / "docs" / "guides" / "sam3.md", ROOT / "docs" / "images" / "sam3-latency.png"
GOAL = 0.9
"""Largest ratio of SO400M's shape, at windows of at most 12, to SAM 3's own trunk."""
HEADS = {"mlp": {"kind": "mlp", "hidden": 2048}, "attention": {"kind": "attention", "hidden": 2048}}
"""The two kinds of head that releases of RADIO have for maps; ``attention`` is that of our C-RADIOv4 recipes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a trunk; ``globals`` is its number of blocks with global attention."""

    width: int
    depth: int
    heads: int
    hidden: int
    globals: int
    patch: int
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class Setting:
    """Shapes, cells of a side and windows; the first of ``students`` is the one with a goal."""

    sam3: Shape
    students: dict[str, Shape]
    grid: int
    stock: int
    windows: tuple[int, ...]


REAL = Setting(
    Shape(1024, 32, 16, 4736, 4, 14),
    {"SO400M": Shape(1152, 27, 16, 4304, 5, 16, 10), "H": Shape(1280, 32, 16, 5120, 4, 16, 10)},
    72,
    24,
    (8, 12, 18, 24),
)
TINY = Setting(
    Shape(32, 8, 2, 64, 4, 14), {"SO400M": Shape(48, 9, 2, 96, 5, 16, 10), "H": Shape(64, 8, 2, 96, 4, 16, 10)}, 8, 4,
    (2, 4),
)  # fmt: skip


# --- models -----------------------------------------------------------------------------------------------------------


def stock(setting: Setting) -> Any:
    """A tracker with SAM 3's own vision encoder: the smallest model that has it, and needs no tokenizer."""
    from transformers import Sam3TrackerConfig, Sam3TrackerModel

    shape, grid = setting.sam3, setting.grid
    trunk = {
        "model_type": "sam3_vit_model", "hidden_size": shape.width, "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.depth, "num_attention_heads": shape.heads, "image_size": grid * shape.patch,
        "patch_size": shape.patch, "pretrain_image_size": grid // 3 * shape.patch, "window_size": setting.stock,
        "global_attn_indexes": [
            index for index in range(shape.depth) if (index + 1) % (shape.depth // shape.globals) == 0
        ],
    }  # fmt: skip
    sizes = [[grid * 4] * 2, [grid * 2] * 2, [grid] * 2]
    vision = {"backbone_config": trunk, "fpn_hidden_size": 256, "backbone_feature_sizes": sizes}
    prompts = {"image_size": grid * shape.patch, "patch_size": shape.patch}
    return Sam3TrackerModel(Sam3TrackerConfig(vision_config=vision, prompt_encoder_config=prompts)).eval()


def student(shape: Shape, width: int, head: str, grid: int) -> Model:
    """A student with a ``sam3`` head of ``width`` channels."""
    options = {
        "kind": "vit", "width": shape.width, "depth": shape.depth, "heads": shape.heads, "mlp_hidden": shape.hidden,
        "patch": shape.patch, "max_grid": max(128, grid), "registers": shape.prefix - 3,
    }  # fmt: skip
    keys = {**HEADS[head], **({"heads": shape.heads} if head == "attention" else {})}
    return Model(options, {"sam3": HeadConfig(None, keys, None, width)}, tokens=["a", "b", "c"]).eval()


def pixels_of(vision: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random pixels in [-1, 1], as the processor makes them."""
    side = int(vision.config.backbone_config.image_size)
    return (torch.rand(1, 3, side, side, device=device) * 2 - 1).to(dtype)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def tflop(shape: Shape, setting: Setting, window: int, head: str | None) -> float:
    """Floating-point operations of the matrix products of one image in 10^12, ``2 m n k`` each; 0 for no window."""
    cells = setting.grid**2
    linear = shape.width * (4 * shape.width + 2 * shape.hidden)
    whole = cells + shape.prefix
    done = 3 * shape.patch**2 * shape.width * cells
    done += shape.globals * (whole * linear + 2 * whole**2 * shape.width)
    windowed = cells if window else whole
    length = window**2 if window else whole
    done += (shape.depth - shape.globals) * (windowed * linear + 2 * windowed * length * shape.width)
    if head is not None:
        hidden = HEADS[head]["hidden"]
        done += cells * int(hidden) * (shape.width + setting.sam3.width)
    if head == "attention":
        done += 2 * (cells * 12 * shape.width**2 + 2 * cells**2 * shape.width)
    return 2 * (done + neck_products(setting.sam3.width, cells)) / 1e12


def neck_products(width: int, cells: int, out: int = 256) -> int:
    """Multiplications of SAM 3's neck: transposed convolutions, then 1x1 and 3x3 convolutions per level."""
    up = cells * width * (width // 2) * 4  # to twice the side
    further = 4 * cells * (width // 2) * (width // 4) * 4
    levels = ((16, width // 4), (4, width // 2), (1, width), (0.25, width))
    last = sum(round(share * cells) * (channels * out + 9 * out * out) for share, channels in levels)
    return 2 * up + further + last


# --- clocks -----------------------------------------------------------------------------------------------------------


def compete(calls: dict[str, Call], rounds: int, base: str, device: torch.device, *, warm: bool) -> dict[str, Any]:
    """Alternating calls: the clocks of ``inference.py`` on a CPU, of ``inference_gpu.py`` on a GPU."""
    if device.type == "cpu":
        return alternate(calls, rounds, base=base, warm=warm)
    from inference_gpu import compete as on_gpu

    with torch.inference_mode():
        return on_gpu(calls, device, rounds, base=base)


def cast(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Weights in ``dtype``; a student's conditioner stays in float32, as after loading."""
    model.to(device, dtype)
    for module in model.modules():
        if isinstance(module, Model):
            module.conditioner.float()
    return model


# --- measurements -----------------------------------------------------------------------------------------------------


def parts_of_sam3(model: Any, setting: Setting, device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
    """Parts of SAM 3's own trunk, and the neck that all share."""
    vision = vision_encoder(model)
    trunk, shape, grid = vision.backbone, setting.sam3, setting.grid
    pixels = pixels_of(vision, device, dtype)
    cells = torch.randn(1, grid, grid, shape.width, device=device, dtype=dtype)
    windowed = next(layer for layer in trunk.layers if layer.window_size)
    whole = next(layer for layer in trunk.layers if not layer.window_size)
    return {
        "SAM 3 patches": lambda: trunk.layer_norm(trunk.embeddings(pixels)),
        f"SAM 3 block {setting.stock}": lambda: windowed(cells),
        "SAM 3 block 0": lambda: whole(cells),
        "neck": lambda: vision.neck(cells.permute(0, 3, 1, 2)),
    }


def parts_of_student(
    name: str, shape: Shape, setting: Setting, device: torch.device, dtype: torch.dtype
) -> dict[str, Call]:
    """Parts of a student: blocks at each window, the split into windows and back, its heads."""
    one = replace(shape, depth=1)
    side, cells = setting.grid * shape.patch, setting.grid**2
    models = {head: cast(student(one, setting.sam3.width, head, setting.grid), device, dtype) for head in HEADS}
    model = models["mlp"]
    block: Any = model.student.blocks[0]  # type: ignore[attr-defined]
    generator: Any = model.student.patch_generator
    images = torch.rand(1, 3, side, side, device=device, dtype=dtype)
    tokens = torch.randn(1, shape.prefix + cells, shape.width, device=device, dtype=dtype)
    found = tokens[:, shape.prefix :].transpose(1, 2).unflatten(2, (setting.grid, setting.grid))
    layout = Layout(shape.prefix, ((setting.grid, setting.grid),), packed=False)
    calls: dict[str, Call] = {
        f"{name} patches": lambda: generator(model.conditioner(images).to(dtype)),
        f"{name} block 0": lambda: block(tokens),
    }
    for head, each in models.items():
        calls[f"{name} head {head}"] = lambda run=each.heads["sam3"].spatial: run(found)
    for window in setting.windows:
        split = layout.split_windows(tokens, window)[1].contiguous()
        calls[f"{name} block {window}"] = lambda split=split: block(split)
        calls[f"{name} windowing {window}"] = lambda window=window: layout.join_windows(
            *layout.split_windows(tokens, window), window
        )
    return calls


def add_up(seconds: dict[str, float], name: str, shape: Shape, window: int, head: str | None) -> float:
    """Seconds of a pass from those of its parts."""
    total = seconds[f"{name} patches"] + shape.globals * seconds[f"{name} block 0"] + seconds["neck"]
    total += (shape.depth - shape.globals) * seconds[f"{name} block {window}"]
    if head is not None:
        total += seconds[f"{name} head {head}"] + (
            shape.globals * seconds[f"{name} windowing {window}"] if window else 0
        )
    return total


def by_parts(setting: Setting, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Median seconds of every part."""
    calls = parts_of_sam3(cast(stock(setting), device, dtype), setting, device, dtype)
    for name, shape in setting.students.items():
        calls |= parts_of_student(name, shape, setting, device, dtype)
    return compete(calls, rounds, f"SAM 3 block {setting.stock}", device, warm=True)


def table_of(setting: Setting, parts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table, as sums of parts."""
    seconds = {name: row["median_s"] for name, row in parts.items() if isinstance(row, dict)}
    base = add_up(seconds, "SAM 3", setting.sam3, setting.stock, None)
    rows = [_row("SAM 3", None, setting.stock, base, base, tflop(setting.sam3, setting, setting.stock, None))]
    for name, shape in setting.students.items():
        for head in HEADS:
            for window in (*setting.windows, 0):
                took = add_up(seconds, name, shape, window, head)
                rows.append(_row(name, head, window, took, base, tflop(shape, setting, window, head)))
    return rows


def _row(name: str, head: str | None, window: int, seconds: float, base: float, work: float) -> dict[str, Any]:
    return {
        "trunk": name, "head": head, "window": window, "seconds": round(seconds, 5),
        "ratio_to_SAM 3": round(seconds / base, 3), "tflop": round(work, 2),
    }  # fmt: skip


def whole_passes(
    setting: Setting, device: torch.device, dtype: torch.dtype, rounds: int, rows: list[tuple[str, str, int]]
) -> dict[str, Any]:
    """Whole passes of SAM 3 and of students ``(name, head, window)``, alternating."""
    own = vision_encoder(cast(stock(setting), device, dtype))
    pixels = pixels_of(own, device, dtype)
    calls: dict[str, Call] = {"SAM 3": lambda: own(pixels)}
    for name, head in dict.fromkeys((name, head) for name, head, _ in rows):
        made = student(setting.students[name], setting.sam3.width, head, setting.grid)
        vision = vision_encoder(cast(install(stock(setting), made).model, device, dtype))
        inputs = pixels_of(vision, device, dtype)
        for window in [w for n, h, w in rows if (n, h) == (name, head)]:

            def call(vision: Any = vision, inputs: Tensor = inputs, window: int = window) -> object:
                vision.backbone.encoder.options["window"] = window
                return vision(inputs)

            calls[f"{name}, {head} head, window {window}"] = call
    return compete(calls, rounds, "SAM 3", device, warm=device.type != "cpu")


def run(
    device: str = "cpu", dtype: str = "float32", *, tiny: bool = False, rounds: int | None = None
) -> dict[str, Any]:
    """All measurements."""
    setting, place, kind = TINY if tiny else REAL, torch.device(device), getattr(torch, dtype)
    before, began = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(THREADS if place.type == "cpu" else before)
    torch.manual_seed(0)
    goal, widest = next(iter(setting.students)), max(w for w in setting.windows if w <= 12)
    rows = [(goal, head, widest) for head in HEADS]
    if place.type != "cpu":
        rows = [(name, head, w) for name in setting.students for head in HEADS for w in (*setting.windows, 0)]
    try:
        with nullcontext() if place.type == "cpu" else place:
            parts = by_parts(setting, place, kind, rounds or 5)
            table = table_of(setting, parts)
            whole = whole_passes(setting, place, kind, rounds or 3, rows)
    finally:
        torch.set_num_threads(before)
    least = {head: min(row["ratio_to_SAM 3"] for row in table if _has_goal(row, goal, head)) for head in HEADS}
    return {
        "device": torch.cuda.get_device_name() if place.type == "cuda" else "cpu",
        "threads": THREADS if place.type == "cpu" else None, "dtype": dtype, "cells": setting.grid, "tiny": tiny,
        "goal": GOAL, "least_ratio_of_SO400M_to_window_12": least, "table": table, "whole_passes": whole,
        "parts": parts, "minutes": round((time.perf_counter() - began) / 60, 1),
    }  # fmt: skip


def _has_goal(row: dict[str, Any], name: str, head: str) -> bool:
    return row["trunk"] == name and row["head"] == head and 0 < row["window"] <= 12


# --- the page ---------------------------------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> str:
    """The table as Markdown: trunks and heads down, windows across."""
    windows = [*sorted({row["window"] for row in result["table"] if row["window"]}), 0]
    lines = [
        f"| trunk | head | {' | '.join(f'window {w}' if w else 'global' for w in windows)} | TFLOP |",
        f"|---|---|{'---:|' * (len(windows) + 1)}",
    ]
    groups: dict[tuple[str, str | None], dict[int, dict[str, Any]]] = {}
    for row in result["table"]:
        groups.setdefault((row["trunk"], row["head"]), {})[row["window"]] = row
    for (name, head), own in groups.items():
        cells = [f"{own[w]['seconds']:.1f} s ({own[w]['ratio_to_SAM 3']:.2f})" if w in own else "" for w in windows]
        work = [each["tflop"] for each in own.values()]
        span = f"{min(work):.1f}" if len(work) == 1 else f"{min(work):.1f} to {max(work):.1f}"
        lines.append(f"| {name} | {head or 'none'} | {' | '.join(cells)} | {span} |")
    passes = result["whole_passes"]
    whole = "; ".join(
        f"{name} {row['median_s']:.1f} s ({row['ratio_to_SAM 3']:.2f})"
        for name, row in passes.items()
        if isinstance(row, dict)
    )
    where = f"{result['threads']} threads of a CPU" if result["device"] == "cpu" else result["device"]
    lines += ["", f"Seconds per image on {where}, {result['dtype']}; in brackets the ratio to SAM 3's own trunk."]
    lines += [f"The table adds up medians of parts; whole passes, alternating: {whole}."]
    if passes.get("contended_rounds") or result["parts"].get("contended_rounds"):
        lines += ["Other programs used the cores during some rounds."]
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds against window, a line per trunk and head; SAM 3's own trunk as a level."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.4), dpi=130)
    own = next(row for row in result["table"] if row["trunk"] == "SAM 3")
    axes.axhline(own["seconds"], color="black", linewidth=1)
    axes.annotate(f"SAM 3, window {own['window']}", (0.02, own["seconds"]), xycoords=("axes fraction", "data"),
                  xytext=(0, 3), textcoords="offset points", fontsize=8)  # fmt: skip
    ticks = [*sorted({row["window"] for row in result["table"] if row["window"]}), 0]
    for name in dict.fromkeys(row["trunk"] for row in result["table"] if row["head"]):
        for head, line in zip(HEADS, ("-", "--"), strict=True):
            rows = {
                row["window"]: row["seconds"] for row in result["table"] if (row["trunk"], row["head"]) == (name, head)
            }
            colour = {"SO400M": "tab:blue"}.get(name, "tab:orange")
            axes.plot(range(len(ticks)), [rows[w] for w in ticks], line, color=colour, marker="o", markersize=3,
                      label=f"{name}, {head} head")  # fmt: skip
    axes.set_xticks(range(len(ticks)), [str(w) if w else "global" for w in ticks])
    axes.set_xlabel("attention window in patches")
    axes.set_ylabel("seconds per image")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def publish(guide: Path = GUIDE, figure: Path = FIGURE) -> None:
    """Write table and figure of the published numbers."""
    result = json.loads((record.RESULTS / "sam3_latency.json").read_text())["result"]
    draw(result, figure)
    record.fill(guide, "sam3_latency.py", page(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, help="rounds of every measurement")
    parser.add_argument("--tiny", action="store_true", help="trial run with toy models; saves nothing")
    parser.add_argument("--page", action="store_true", help="write table and figure of the published numbers")
    given = parser.parse_args()
    if given.page:
        publish()
    else:
        outcome = run(given.device, given.dtype, tiny=given.tiny, rounds=given.rounds)
        if given.tiny:
            print(json.dumps(outcome, indent=2), page(outcome), sep="\n")
        else:
            record.write("sam3_latency" if given.device == "cpu" else "sam3_latency_gpu", outcome)
