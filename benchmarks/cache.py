"""Teacher-feature cache: training speed, cost of writing it, and integrity after kills.

``python benchmarks/cache.py 10000 20`` runs the last part alone, with 10000 images and 20 kills.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

SIZE, BATCH, STEPS, REPEATS, IMAGES = 128, 8, 7, 3, 24
DTYPES = ("fp32", "fp16", "bf16", "int8")
TEACHERS = {
    "vit_b": {"kind": "timm", "model": "vit_base_patch16_224.augreg_in21k", "weights": "random", "stage": 11},
    "lite2": {"kind": "timm", "model": "tf_efficientnet_lite2", "stage": 3},
    "hog": {"kind": "hog", "orientations": 8, "summary_weight": 0},
}


def recipe_of(folder: Path, **changes: Any) -> Any:
    """A recipe with a small student and much more expensive teachers."""
    from agglo import recipe

    return recipe.from_dict({
        "name": "cache",
        "claim": {"summary": "a benchmark"},
        "student": {"kind": "vit", "width": 192, "depth": 4, "heads": 3, "max_grid": 32},
        "teachers": TEACHERS,
        "heads": {"summary": {"kind": "mlp", "hidden": 128}, "spatial": {"kind": "mlp", "hidden": 128}},
        "targets": {"normalizer": {"kind": "phi_s"}, "estimate_images": 16},
        "data": {
            "sources": [{"kind": "folder", "path": str(folder)}],
            "views": {"crops": 1, "shift": 0.5},
            "feature_cache": None,
        },
        "partitions": [{"sizes": [SIZE], "batch": BATCH}],
        "train": {"steps": STEPS, "lr": 1e-3, "ema": 0, "log_every": 1, "save_every": 1000},
        **changes,
    })  # fmt: skip


def run() -> dict[str, Any]:
    """Run all parts."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # target statistics of 16 images
        folder = Path(name)
        write_photos(folder / "photos", IMAGES)
        return {"setting": setting(), **speed(folder), "kills": kills(10_000, 20)}


def setting() -> dict[str, Any]:
    """Settings of the speed measurement."""
    return {
        "student": "ViT, width 192, depth 4, at 128 px, batch 8",
        "teachers": "ViT-B/16 with random weights, EfficientNet-Lite2, HOG, "
        "on canvases of 192 px (margin: two patches)",
        "images": IMAGES,
        "threads": 1,
    }


def write_photos(folder: Path, count: int) -> None:
    """Crops of the photographs in scikit-image's wheel, as JPEG files."""
    from agglo.sources.photos import Photos

    folder.mkdir()
    source = Photos(split="all")
    rng = random.Random(0)
    for index in range(count):
        image = source.read(index % len(source))
        side = min(320, *image.size)
        left, top = rng.randrange(image.width - side + 1), rng.randrange(image.height - side + 1)
        image.crop((left, top, left + side, top + side)).save(folder / f"{index:03d}.jpg", quality=92)


def speed(folder: Path) -> dict[str, Any]:
    """Training speed of interleaved arms, and cost and error of each cache."""
    from agglo.training.precompute import precompute

    made = recipe_of(folder / "photos")
    caches = {}
    for dtype in DTYPES:
        written = precompute(made, folder / dtype, dtype=dtype, batch=BATCH)
        caches[dtype] = {
            "bytes_an_image": round(written.crop_bytes),
            "images_per_second": round(written.done / written.seconds, 2),
            "error_of_spread": {name: round(e["relative"], 6) for name, e in written.errors.items()},
            "worst_cell": {name: round(e["worst"], 6) for name, e in written.errors.items()},
            "append_megabytes_per_second": append_rate(folder / dtype),
        }
    rates: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    terms: dict[str, list[dict[str, float]]] = {}
    for repeat in range(REPEATS):
        for arm in ("live, new crops", "live", *DTYPES):
            lines = train(folder, arm, folder / f"{arm}-{repeat}".replace(", ", "-").replace(" ", "-"))
            rates.setdefault(arm, []).append(statistics.median(line["images_per_second"] for line in lines[2:]))
            busy = [line["seconds"].get("teachers", 0) / sum(line["seconds"].values()) for line in lines[2:]]
            shares.setdefault(arm, []).append(statistics.median(busy))
            terms[arm] = [line["terms"] for line in lines]
    live = statistics.median(rates["live"])
    for dtype in DTYPES:
        caches[dtype]["largest_relative_difference_of_a_loss"] = difference(terms["live"], terms[dtype])
        ratios = [cached / one for cached, one in zip(rates[dtype], rates["live"], strict=True)]
        caches[dtype]["speed_up"] = round(statistics.median(ratios), 2)
        caches[dtype]["speed_up_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    return {
        "images_per_second": {arm: round(statistics.median(values), 2) for arm, values in rates.items()},
        "share_of_teachers": {arm: round(statistics.median(values), 3) for arm, values in shares.items()},
        "speed_up_of_the_slowest_dtype": round(min(statistics.median(rates[d]) for d in DTYPES) / live, 2),
        "caches": caches,
    }


def train(folder: Path, arm: str, run: Path) -> list[dict[str, Any]]:
    """Metrics of one short training run of an arm."""
    from agglo.training.loop import train_model

    made = recipe_of(folder / "photos")
    views = {"crops": 0} if arm == "live, new crops" else {}
    cache = str(folder / arm) if arm in DTYPES else None
    data = made.data.model_copy(update={"feature_cache": cache, "views": made.data.views.model_copy(update=views)})
    train_model(made.model_copy(update={"data": data}), run, quiet=True)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def difference(one: list[dict[str, float]], two: list[dict[str, float]]) -> float:
    """Largest relative difference of any loss term at any step, including the resulting drift of the weights."""
    worst = max(abs(a[k] - b[k]) / abs(a[k]) for a, b in zip(one, two, strict=True) for k in a)
    return float(f"{worst:.2g}")


def append_rate(folder: Path) -> float:
    """MB/s of writing and flushing the records of a cache again, without teachers."""
    from agglo.cache.records import ShardReader, ShardWriter

    shelf = ShardReader(folder / "vit_b")
    records = []
    for key, place in shelf.locations.items():
        row = bytearray(place.bytes)
        records.append((shelf.read(key, memoryview(row)), bytes(row)))
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        pen, repeats = ShardWriter(Path(name)), 20
        began = time.perf_counter()
        for _ in range(repeats):
            for record, row in records:
                pen.append(record, [row])
        pen.finish()
        seconds = time.perf_counter() - began
    return round(repeats * sum(len(row) for _, row in records) / seconds / 1e6, 1)


# ---------------------------------------------------------------------------------------------------- kills

WRITER = """
import json, sys
import torch
torch.set_num_threads(1)
from agglo import recipe
from agglo.training.precompute import precompute
made = recipe.from_dict(json.loads(sys.argv[1]))
precompute(made, sys.argv[2], dtype="fp32", batch=32, shard_bytes=1_000_000)
"""


def kills(images: int, wanted: int) -> dict[str, Any]:
    """Write a cache of tiny images, kill and restart the writer at random times, then compare every entry.

    Three of four kills come at a random time after new records appeared, the fourth at any time after the start of the
    process.
    """
    import numpy as np
    from PIL import Image

    chance, noise = random.Random(0), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny").mkdir()
        for index in range(images):
            pixels = noise.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "tiny" / f"{index:05d}.png", compress_level=1)
        teachers = {"toy": {"kind": "toy", "stride": 8}, "hog": {"kind": "hog", "cell": 4, "summary_weight": 0}}
        made = recipe_of(folder / "tiny", teachers=teachers, partitions=[{"sizes": [16], "batch": 32}])
        made = made.model_copy(update={"data": made.data.model_copy(update={"workers": 0})})
        command = [sys.executable, "-c", WRITER, json.dumps(made.to_dict()), str(folder / "cache")]
        done, began = 0, time.perf_counter()
        while done < wanted:
            writer = subprocess.Popen(command)
            start = stored(folder / "cache")
            if done % 4 == 3:
                time.sleep(chance.uniform(0, 8))
            else:
                while stored(folder / "cache") <= start and writer.poll() is None:
                    time.sleep(0.002)
                time.sleep(chance.uniform(0, 0.6))
            if writer.poll() is not None:
                sys.exit(f"the writer finished after {done} kills; use more images")
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            done += 1
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
        return {"images": images, "kills": done, "seconds": round(seconds), **verdict(made, folder / "cache")}


def stored(folder: Path) -> int:
    """Bytes in a cache's shards."""
    return sum(path.stat().st_size for path in folder.glob("*/*.shard"))


def verdict(made: Any, folder: Path) -> dict[str, Any]:
    """Compare every entry with a live forward pass of its teacher."""
    import torch

    from agglo.cache.records import inspect, shard_numbers
    from agglo.data.shifts import RenderedBatch
    from agglo.objectives.base import build_teachers
    from agglo.training.targets import TargetSource, build_loader, load_teachers, whole_crop_features

    real = build_teachers(made)
    cached = made.model_copy(update={"data": made.data.model_copy(update={"feature_cache": str(folder)})})
    lessons = TargetSource(cached, load_teachers(cached), 16, torch.device("cpu"))
    loader = build_loader(cached, lessons)  # refuses an incomplete cache
    names, wrong, worst = set(), 0, 0.0
    steps = -(-len(loader.sources[0]) // BATCHED)
    for step in range(steps):
        batch = loader.batch(step)
        names.update(batch.names)
        found = lessons(batch, RenderedBatch(batch.images, batch.field))
        for name, teacher in real.items():
            now = whole_crop_features(teacher, batch.images, (batch.images.shape[-2], batch.images.shape[-1]), 16)[""]
            for a, b in ((now.summary, found[name].features.summary), (now.spatial, found[name].features.spatial)):
                if a is not None and b is not None:
                    off = (a - b).abs().flatten(1).amax(1)
                    wrong += int((off > 1e-5).sum())
                    worst = max(worst, float(off.max()))
    sound = {name: inspect(folder / name) for name in real}
    return {
        "missing": len(loader.sources[0]) - len(names),
        "wrong": wrong,
        "largest_difference": float(f"{worst:.2g}"),
        "records": {name: whole for name, (whole, _) in sound.items()},
        "damaged_files": sum(len(damages) for _, damages in sound.values()),
        "files": sum(len(shard_numbers(folder / name)) for name in real),
    }


BATCHED = 32

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    print(json.dumps(kills(int(sys.argv[1]), int(sys.argv[2])), indent=2))
