"""Seconds per forward pass on two threads in float32, against transformers' `RadioModel` and timm's NaFlexViT.

All three have the same random weights in the shape of C-RADIOv3-B (ViT-B/16, layer scale, 4 class tokens, 4 registers,
128x128 position embeddings) and are checked to give the same tokens. Implementations alternate; a ratio is the median
of the per-round ratios. Rounds in which other processes used the cores are repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import torch
from torch import Tensor, nn

from agglo.model.heads import HeadConfig
from agglo.model.model import Model
from agglo.preprocess import nearest_size, to_tensor
from agglo.sources.photos import Photos

THREADS = 2
CONTENDED = 0.8
"""Minimum share of its threads' CPU time for a round to count."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape of a ViT; ``layer_scale`` None disables layer scale."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    layer_scale: float | None = 0.5
    class_tokens: int = 4
    registers: int = 4
    max_grid: int = 128
    patch: int = 16


VIT_B = Geometry()
TINY = Geometry(width=64, depth=3, heads=2, hidden=256, max_grid=16)


# --- the three implementations ----------------------------------------------------------------------------------------


def ours(geometry: Geometry) -> Model:
    """The student and its conditioner, with random layer scales so that a missing one is detected."""
    g = geometry
    options = {
        "kind": "vit", "width": g.width, "depth": g.depth, "heads": g.heads, "mlp_ratio": g.hidden / g.width,
        "patch": g.patch, "max_grid": g.max_grid, "registers": g.registers, "layer_scale": g.layer_scale,
    }  # fmt: skip
    heads: dict[str, HeadConfig] = {}
    model = Model(options, heads, tokens=[f"t{index}" for index in range(g.class_tokens)], summary_slots=[0])
    for name, parameter in model.named_parameters():
        if "ls" in name or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def transformers_radio(model: Model, geometry: Geometry) -> nn.Module:
    """transformers' native RadioModel (SDPA attention, its default) with our weights."""
    from transformers import RadioConfig, RadioModel

    g = geometry
    config = RadioConfig(
        hidden_size=g.width, num_hidden_layers=g.depth, num_attention_heads=g.heads, mlp_ratio=g.hidden / g.width,
        patch_size=g.patch, max_img_size=g.max_grid * g.patch, num_cls_tokens=g.class_tokens,
        num_registers=g.registers, summary_idxs=[0], norm_mean=model.student.mean, norm_std=model.student.std,
    )  # fmt: skip
    theirs = RadioModel(config)
    state = {
        "embeddings.patch_projection.weight": model.student.patch_generator.embedder.weight,
        "embeddings.position_embedding": model.student.patch_generator.pos_embed,
        "embeddings.cls_register_token": model.student.patch_generator.token,
    }
    for index, block in enumerate(model.student.blocks):
        to = f"encoder.layer.{index}."
        for name, tensor in block.state_dict().items():
            if name.startswith("attn.qkv."):
                for which, part in zip("qkv", tensor.chunk(3), strict=True):
                    state[f"{to}attention.{which}_proj.{name.rpartition('.')[2]}"] = part
                continue
            name = name.replace("attn.proj", "attention.o_proj")
            state[
                to + name.replace("ls1.gamma", "layer_scale1.lambda1").replace("ls2.gamma", "layer_scale2.lambda1")
            ] = tensor
    _load(theirs, state, ("input_conditioner.norm_mean", "input_conditioner.norm_std", "summary_idxs"))
    return theirs.eval()


def timm_naflex(model: Model, geometry: Geometry) -> nn.Module:
    """timm's NaFlexViT port with our weights and our conditioner (it has none)."""
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    g = geometry
    theirs = NaFlexVit(
        NaFlexVitCfg(
            patch_size=g.patch, embed_dim=g.width, depth=g.depth, num_heads=g.heads, mlp_ratio=g.hidden / g.width,
            init_values=g.layer_scale, class_token=True, reg_tokens=g.class_tokens + g.registers - 1,
            global_pool="token", final_norm=False, pos_embed_grid_size=(g.max_grid, g.max_grid),
            pos_embed_interp_mode="bilinear", pos_embed_ar_preserving=True, pos_embed_antialias=False,
            pos_embed_align_corners=False,
        ),
        num_classes=0,
    )  # fmt: skip
    generator = model.student.patch_generator
    state = {f"blocks.{k}": v for k, v in model.student.blocks.state_dict().items()}
    embedder = generator.embedder.weight.unflatten(1, (3, g.patch, g.patch))
    state["embeds.proj.weight"] = embedder.permute(0, 2, 3, 1).flatten(1)  # its patches are flattened channels-last
    state["embeds.proj.bias"] = embedder.new_zeros(g.width)
    state["embeds.pos_embed"] = generator.pos_embed.view(1, g.max_grid, g.max_grid, g.width)
    state["embeds.cls_token"], state["embeds.reg_token"] = generator.token[None, :1], generator.token[None, 1:]
    shapes = {k: v.shape for k, v in theirs.state_dict().items()}
    _load(theirs, {k: v.reshape(shapes.get(k, v.shape)) for k, v in state.items()}, ())
    return nn.Sequential(model.conditioner, _Tokens(theirs)).eval()


class _Tokens(nn.Module):
    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk.forward_features(images)


def _load(module: nn.Module, state: dict[str, Tensor], absent: tuple[str, ...]) -> None:
    missing, left_over = module.load_state_dict({k: v.detach() for k, v in state.items()}, strict=False)
    if left_over or set(missing) - set(absent):
        raise RuntimeError(f"{type(module).__name__}: missing {missing}, unused {left_over}")


def check(runners: dict[str, Callable[[Tensor], Tensor]], images: Tensor) -> dict[str, float]:
    """``max |a - ours| / std(ours)`` of the patch tokens ``(B, L, C)`` of every other implementation."""
    with torch.inference_mode():
        found = {name: run(images) for name, run in runners.items()}
    mine = found.pop("agglo")
    errors = {name: float((other - mine).abs().max() / mine.std()) for name, other in found.items()}
    if not all(error < 1e-3 for error in errors.values()):
        raise RuntimeError(f"outputs differ: {errors}")
    return {name: float(f"{error:.1e}") for name, error in errors.items()}


def runners_for(model: Model, geometry: Geometry) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each implementation as images ``(B, 3, H, W)`` in [0, 1] to patch tokens ``(B, L, C)``."""
    hf, naflex = transformers_radio(model, geometry), timm_naflex(model, geometry)
    prefix = geometry.class_tokens + geometry.registers
    return {
        "agglo": lambda images: model(images).tokens(),
        "transformers": lambda images: hf(images).features,
        "timm": lambda images: naflex(images)[:, prefix:],
    }


# --- interleaving -----------------------------------------------------------------------------------------------------


def compete(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    *,
    base: str = "agglo",
    warm: bool = True,
    threads: int = THREADS,
) -> dict[str, Any]:
    """Alternate the calls round by round, and compare each with ``base``.

    Returns:
        For each name its median, minimum and maximum seconds, and ``ratio``: the median over rounds of its seconds
        divided by those of ``base``. ``contended_rounds`` were repeated, at most ``rounds`` times.
    """
    names = list(calls)
    with torch.inference_mode():
        for call in calls.values() if warm else ():
            call()
        kept, contended = [], []
        for number in _at_most(2 * rounds):
            order = names[number % len(names) :] + names[: number % len(names)]
            took, share = {}, 1.0
            for name in order:
                wall, cpu = time.perf_counter(), time.process_time()
                calls[name]()
                took[name] = time.perf_counter() - wall
                share = min(share, (time.process_time() - cpu) / took[name] / threads)
            (kept if share >= CONTENDED else contended).append(took)
            if len(kept) == rounds:
                break
    counted = (kept + contended)[:rounds]
    table: dict[str, Any] = {}
    for name in names:
        seconds = [took[name] for took in counted]
        ratios = [took[name] / took[base] for took in counted]
        table[name] = {
            "median_s": round(statistics.median(seconds), 4),
            "min_s": round(min(seconds), 4),
            "max_s": round(max(seconds), 4),
            f"ratio_to_{base}": round(statistics.median(ratios), 3),
        }
    table["rounds"], table["contended_rounds"] = len(counted), len(contended)
    return table


def _at_most(count: int) -> Iterator[int]:
    yield from range(count)


# --- measurements ----------------------------------------------------------------------------------------------------


def sizes(model: Model, geometry: Geometry, cells: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Side by side at ``(side, batch, rounds)``."""
    runners = runners_for(model, geometry)
    table: dict[str, Any] = {"max_difference": check(runners, torch.rand(2, 3, 5 * geometry.patch, 7 * geometry.patch))}
    for side, batch, rounds in cells:
        images = torch.rand(batch, 3, side, side)
        calls = {name: (lambda run=run, images=images: run(images)) for name, run in runners.items()}
        # All is warm after the first cells; a large one has first-touch memory costs in one round only.
        table[f"{side}px batch {batch}"] = found = compete(calls, rounds, warm=rounds > 3)
        print(f"{side} px, batch {batch}: {_line(found)}", flush=True)
    return table


def windows(model: Model, side: int, windows: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """ViTDet windows in most blocks."""
    images = torch.rand(1, 3, side, side)
    calls: dict[str, Callable[[], object]] = {"global": lambda: model(images)}
    for window in windows:
        calls[f"window {window}"] = lambda window=window: model(images, window=window)
    found = compete(calls, rounds, base="global")
    print(f"{side} px: {_line(found)}", flush=True)
    return found


def photos(count: int, patch: int, lowest: int, highest: int) -> list[Tensor]:
    """The bundled photographs in their aspect ratio, with ``lowest^2`` to ``highest^2`` pixels, sides whole patches.

    Each is used at several scales, because there are fewer than ``count``.
    """
    source = Photos(split="all")
    found = []
    for number in range(count):
        picture = source.read(number % len(source))
        # Golden-ratio steps spread any number of scales evenly.
        area = (lowest + (highest - lowest) * (number * 0.6180339887 % 1)) ** 2
        scale = (area / (picture.width * picture.height)) ** 0.5
        height, width = nearest_size((round(picture.height * scale), round(picture.width * scale)), patch)
        found.append(to_tensor(picture.resize((width, height))))
    return found


def packing(
    model: Model, hf: nn.Module, patch: int, pictures: list[Tensor], rounds: int, batch: int = 16
) -> dict[str, Any]:
    """Photographs of different shapes: packed, one by one, and in batches padded to the largest."""
    height, width = (max(p.shape[axis] for p in pictures) for axis in (1, 2))
    padded = torch.stack([nn.functional.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pictures])
    patches = torch.cat([_patches(picture, patch) for picture in pictures])
    grids = torch.tensor([[p.shape[1] // patch, p.shape[2] // patch] for p in pictures])
    calls: dict[str, Callable[[], object]] = {
        "packed": lambda: model(pictures),
        "one by one": lambda: [model(picture) for picture in pictures],
        "padded to the largest": lambda: [model(some) for some in padded.split(batch)],
        "packed by transformers": lambda: hf(patches, image_grid_hw=grids),
    }
    found = compete(calls, rounds, base="packed", warm=False)
    for name in calls:
        found[name]["images_per_s"] = round(len(pictures) / found[name]["median_s"], 2)
    tokens = [p.shape[1] * p.shape[2] // patch**2 for p in pictures]
    found["photos"] = {
        "count": len(pictures),
        "shapes": len({tuple(p.shape) for p in pictures}),
        "patches": [min(tokens), max(tokens)],
        "padding_share": round(1 - sum(tokens) / (len(tokens) * (height // patch) * (width // patch)), 3),
    }
    print(f"{len(pictures)} photos: {_line(found)}", flush=True)
    return found


def _patches(image: Tensor, patch: int) -> Tensor:
    """``(3, H, W)`` to ``(H W / patch^2, 3 patch^2)``."""
    tiles = image.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 0, 3, 4)
    return tiles.reshape(-1, 3 * patch * patch)


def _line(found: dict[str, Any]) -> str:
    parts = [f"{k} {v['median_s']:.3f} s" for k, v in found.items() if isinstance(v, dict) and "median_s" in v]
    return ", ".join(parts)


def run(tiny: bool = False) -> dict[str, Any]:
    """All measurements; ``tiny`` runs them on a toy model as a trial."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    geometry = TINY if tiny else VIT_B
    try:
        model = ours(geometry)
        if tiny:
            cells, side, sides, pictures, rounds = [(64, 1, 3), (64, 2, 2)], 128, (2, 4), photos(6, 16, 48, 96), 2
        else:
            cells = [(224, 1, 21), (224, 8, 5), (512, 1, 7), (512, 8, 3), (1024, 1, 3), (1024, 8, 1)]
            side, sides, pictures, rounds = 1024, (8, 16), photos(64, 16, 256, 384), 2
        result = {
            "threads": THREADS,
            "dtype": "float32",
            "geometry": {name: getattr(geometry, name) for name in Geometry.__slots__},
            "forward": sizes(model, geometry, cells),
            "windows": windows(model, side, sides, 4),
            "packing": packing(model, transformers_radio(model, geometry), geometry.patch, pictures, rounds),
        }
    finally:
        torch.set_num_threads(before)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="trial run with a toy model; saves nothing")
    if parser.parse_args().tiny:
        print(json.dumps(run(tiny=True), indent=2))
    else:
        import record

        record.write("inference", run())
