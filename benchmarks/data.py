"""From JPEG files on disk to batches of 224 px views on one core, compared with torchvision."""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIDE = 224
BATCH = 8
REPEATS = 15
TURN = 48
"""Minimum number of images per turn of each implementation."""
SIZES = ((500, 375), (640, 480), (800, 600), (1024, 768), (1280, 960), (1600, 1200))
PHOTOS = ("astronaut", "chelsea", "china", "coffee", "flower", "motorcycle_left", "rocket", "retina")
QUALITY = 87
GRAIN = 3.0
"""Standard deviation (of 255) of added sensor noise: enlarged photographs lack it and decode too fast."""
SCALES = {"scale 0.08 to 1 (torchvision's default)": (0.08, 1.0), "scale 0.35 to 1 (ours)": (0.35, 1.0)}
ASPECT = (3 / 4, 4 / 3)


def run() -> dict[str, Any]:
    """Images per second of every implementation, on generated photographs of all sizes and on real ones."""
    import record

    with tempfile.TemporaryDirectory() as name, one_core():
        folder = Path(name)
        write_photos(folder / "mixed", SIZES)
        for size in SIZES[:: len(SIZES) - 1]:
            write_photos(folder / "x".join(map(str, size)), (size,))
        sets = {path.name: path for path in sorted(folder.iterdir())}
        real = record.SHARED / "data" / "imagenet_samples"
        if real.is_dir():
            sets["imagenet_samples"] = real
        result: dict[str, Any] = {"side": SIDE, "batch": BATCH, "threads": 1, "quality": QUALITY, "grain": GRAIN}
        result["sets"] = {name: contest(path) for name, path in sets.items()}
        result["load_average"] = round(os.getloadavg()[0], 1)
        result["closeness"] = closeness(folder / "mixed")
    return result


def contest(folder: Path, most: int = 96) -> dict[str, Any]:
    """Images per second: median of interleaved repeats, and ratio to torchvision in the same repeat.

    By wall-clock time and by CPU time; the latter excludes other programs on the core.
    """
    files = sorted(str(path) for path in folder.iterdir())[:most]
    shapes = [Image.open(file).size for file in files]
    bits = 8 * sum(map(os.path.getsize, files)) / sum(w * h for w, h in shapes)
    result: dict[str, Any] = {"images": len(files), "bits_per_pixel": round(bits, 2)}
    for title, scale in SCALES.items():
        contestants = {
            "torchvision": torchvision_tensors(files, scale),
            "torchvision through Pillow": torchvision_pillow(files, scale),
            "agglo": agglo(folder, scale, len(files)),
            "agglo, images read whole": agglo(folder, scale, len(files), max_side=1 << 20),
        }
        for once in contestants.values():
            once()
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
        for _ in range(REPEATS):
            for name, once in contestants.items():
                rates[name].append(turn(once, -(-TURN // len(files))))
        result[title] = {name: ranking(values, rates["torchvision"]) for name, values in rates.items()}
    return result


def turn(once: Callable[[], int], passes: int) -> tuple[float, float]:
    """Images per second of wall-clock time and of CPU time."""
    clock, own = time.perf_counter(), time.process_time()
    count = sum(once() for _ in range(passes))
    return count / (time.perf_counter() - clock), count / (time.process_time() - own)


def ranking(values: list[tuple[float, float]], base: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians, and medians of the ratios to ``base`` in the same repeat."""
    clock, own = ([pair[k] for pair in values] for k in (0, 1))
    return {
        "images_per_second": round(statistics.median(clock), 1),
        "spread": [round(min(clock), 1), round(max(clock), 1)],
        "times_torchvision": round(statistics.median(a / b[0] for a, b in zip(clock, base, strict=True)), 2),
        "images_per_processor_second": round(statistics.median(own), 1),
        "times_torchvision_by_processor": round(statistics.median(a / b[1] for a, b in zip(own, base, strict=True)), 2),
    }


def torchvision_tensors(files: list[str], scale: tuple[float, float]) -> Callable[[], int]:
    """torchvision's decoder and crop on tensors: its fastest path."""
    from torchvision.io import ImageReadMode, decode_image, read_file
    from torchvision.transforms import v2

    crop = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, scale=scale, ratio=ASPECT, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )

    def once() -> int:
        for start in range(0, len(files), BATCH):
            batch = [crop(decode_image(read_file(file), ImageReadMode.RGB)) for file in files[start : start + BATCH]]
            torch.stack(batch)
        return len(files)

    return once


def torchvision_pillow(files: list[str], scale: tuple[float, float]) -> Callable[[], int]:
    """The path of ``ImageFolder``."""
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms import v2

    crop = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, scale=scale, ratio=ASPECT),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )

    def once() -> int:
        for start in range(0, len(files), BATCH):
            torch.stack([crop(default_loader(file)) for file in files[start : start + BATCH]])
        return len(files)

    return once


def agglo(folder: Path, scale: tuple[float, float], count: int, max_side: int | None = None) -> Callable[[], int]:
    """The training loader without cache and threads."""
    from agglo.data.loader import Loader
    from agglo.data.views import Partition
    from agglo.recipe import Views
    from agglo.sources.folder import Folder

    class First(Folder):
        """Limited to the files of the other implementations."""

        def __len__(self) -> int:
            return min(count, super().__len__())

    policy = Views(scale=scale, aspect=ASPECT)
    loader = Loader(
        [First(path=str(folder))], None, [Partition([SIDE], BATCH)], policy, workers=0, cache_mb=0, max_side=max_side
    )
    steps = iter(range(1_000_000))

    def once() -> int:
        return sum(len(loader.batch(next(steps)).images) for _ in range(max(1, count // BATCH)))

    return once


def closeness(folder: Path, steps: int = 6) -> dict[str, Any]:
    """Mean and worst difference, in 1/255, of views of partially decoded images from views of whole images.

    For scale: the difference between the bilinear kernel, torchvision's default, and our bicubic one.
    """
    from torch.nn.functional import interpolate

    from agglo.data.loader import Loader
    from agglo.data.views import Partition, render
    from agglo.recipe import Views
    from agglo.sources.folder import Folder

    source = Folder(path=str(folder))
    loader = Loader([source], None, [Partition([SIDE], BATCH)], Views(), workers=0, cache_mb=0)
    index = {source.name(i): i for i in range(len(source))}
    parts, kernels = [], []
    for step in range(steps):
        batch = loader.batch(step)
        for image, view, name in zip(batch.images, batch.views, batch.names, strict=True):
            if max(view.scale) > 0.5:
                continue  # read at full resolution
            photo = source.read(index[name])
            whole = render(photo, view).float()
            x0, y0, x1, y1 = (round(edge) for edge in view.box)
            window = torch.from_numpy(np.array(photo.crop((x0, y0, x1, y1)))).permute(2, 0, 1)[None]
            other = interpolate(window, view.size, mode="bilinear", align_corners=False, antialias=True)[0].float()
            parts.append(float((255 * image - whole).abs().mean()))
            kernels.append(float(((other.flip(-1) if view.flip else other) - whole).abs().mean()))
    return {
        "views": len(parts),
        "in_part_or_whole": {"mean": round(statistics.mean(parts), 3), "worst": round(max(parts), 3)},
        "bilinear_or_bicubic": {"mean": round(statistics.mean(kernels), 3), "worst": round(max(kernels), 3)},
    }


def write_photos(folder: Path, sizes: tuple[tuple[int, int], ...]) -> None:
    """Real photographs, enlarged to each size, with the grain of a sensor."""
    from agglo.sources.photos import Photos

    source, rng = Photos(split="all"), np.random.default_rng(0)
    index = {source.name(i).rpartition("/")[2]: i for i in range(len(source))}
    folder.mkdir(parents=True)
    for name in PHOTOS:
        photo = source.read(index[name])
        for width, height in sizes:
            zoom = max(width / photo.width, height / photo.height)
            box = (0, 0, width / zoom, height / zoom)
            pixels = np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS, box=box), np.float32)
            grain = rng.normal(0, GRAIN, (height, width, 1)).astype(np.float32)
            out = io.BytesIO()
            Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=QUALITY)
            (folder / f"{name}-{width}x{height}.jpg").write_bytes(out.getvalue())


@contextmanager
def one_core():
    """This process on one core, torch on one thread."""
    threads, cores = torch.get_num_threads(), None
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores is not None:
            os.sched_setaffinity(0, cores)


if __name__ == "__main__":
    import record

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    record.write("data", run())
