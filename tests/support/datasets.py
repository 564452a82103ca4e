"""Data sets of a few small images in the layouts that the sources read; each function returns the source's keys."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agglo.data.views import draw_positions, image_at
from agglo.sources.base import Source
from agglo.weights.bundled import imagenet_wnids

H, W = 24, 32


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (H, W)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def grey(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def small_png(values: np.ndarray, bits: int, transparent: int | None = None) -> bytes:
    """A grey PNG of 1, 2, 4, 8 or 16 bits per pixel, which Pillow cannot write for 2 and 4."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    digits = (values[..., None] >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(digits.reshape(height, -1).astype(np.uint8), axis=1)
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))]
    if transparent is not None:
        parts.append(chunk(b"tRNS", struct.pack(">H", transparent)))
    parts.append(chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def stripes(count: int) -> np.ndarray:
    """A mask ``(H, W)`` uint8 whose rows go through ``count`` values."""
    return np.tile((np.arange(H) % count).astype(np.uint8)[:, None], (1, W))


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def jpeg(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A JPEG file of noise; ``size`` is (W, H)."""
    rng = np.random.default_rng(number)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def imagenet(root: Path) -> dict[str, Any]:
    for split in ("train", "val"):
        for number in (0, 7, 999):
            for i in range(2):
                picture(root / split / imagenet_wnids()[number] / f"{split}_{i}.JPEG", number + i)
    return {"path": str(root), "split": "val"}


def ade20k(root: Path) -> dict[str, Any]:
    base = root / "ADEChallengeData2016"
    for split in ("training", "validation"):
        for i in range(2):
            picture(base / "images" / split / f"ADE_{i}.jpg", i)
            grey(base / "annotations" / split / f"ADE_{i}.png", stripes(4))
    rows = "\n".join(f"{i}\t0.1\t1\t1\tthing {i}, other name" for i in range(1, 151))
    (base / "objectInfo150.txt").write_text(f"Idx\tRatio\tTrain\tVal\tName\n{rows}\n")
    return {"path": str(root), "split": "val"}


def voc(root: Path) -> dict[str, Any]:
    base = root / "VOCdevkit" / "VOC2012"
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, names in (("train", ("2007_01", "2007_02")), ("val", ("2007_03", "2007_04"))):
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            picture(base / "JPEGImages" / f"{name}.jpg", i)
            mask = Image.fromarray(np.where(stripes(5) == 4, 255, stripes(5)).astype(np.uint8), "P")
            mask.putpalette([k % 256 for k in range(768)])
            (base / "SegmentationClass").mkdir(exist_ok=True)
            mask.save(base / "SegmentationClass" / f"{name}.png")
    return {"path": str(root), "split": "val"}


def camvid(root: Path) -> dict[str, Any]:
    for split in ("train", "val", "test"):
        for i in range(2):
            picture(root / split / f"{i}.png", i)
            grey(root / f"{split}annot" / f"{i}.png", stripes(12))
    return {"path": str(root), "split": "val"}


def cifar(root: Path) -> dict[str, Any]:
    base = root / "cifar-10-batches-bin"
    base.mkdir()
    (base / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        rows = rng.integers(0, 256, (4, 3073), dtype=np.uint8)
        rows[:, 0] = (0, 3, 9, 3)
        rows.tofile(base / name)
    return {"path": str(root), "split": "test"}


def cifar100(root: Path) -> dict[str, Any]:
    """The Python version: pickles, as they are published."""
    base = root / "cifar-100-python"
    base.mkdir()
    names = [f"fine {i}".encode() for i in range(100)]
    (base / "meta").write_bytes(pickle.dumps({b"fine_label_names": names, b"coarse_label_names": []}, 2))
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        rows = rng.integers(0, 256, (3, 3072), dtype=np.uint8)
        batch = {b"data": rows, b"fine_labels": [5, 99, 0], b"coarse_labels": [0, 1, 2]}
        (base / split).write_bytes(pickle.dumps(batch, 2))
    return {"path": str(root), "split": "test"}


def spair(root: Path) -> dict[str, Any]:
    base = root / "SPair-71k"
    for category in ("cat", "dog"):
        for i in range(3):
            picture(base / "JPEGImages" / category / f"{category}_{i}.jpg", i)
        for i in range(2):
            entry = {
                "src_imname": f"{category}_{i}.jpg", "trg_imname": f"{category}_{i + 1}.jpg", "category": category,
                "src_kps": [[3, 4], [10, 5]], "trg_kps": [[6, 7], [12, 9]], "trg_bndbox": [2, 3, 22, 13],
            }  # fmt: skip
            file = base / "PairAnnotation" / "test" / f"{i:06d}-{category}_{i}-{category}_{i + 1}:{category}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(entry))
    return {"path": str(root), "split": "test"}


def navi(root: Path) -> dict[str, Any]:
    """A wall that a camera looks at, 0.5 m away, from three places."""
    scene = root / "navi_v1.0" / "wall" / "multiview-00-phone"
    entries = []
    for i in range(4):
        picture(scene / "images" / f"{i:03d}.jpg", i)
        grey(scene / "depth" / f"{i:03d}.png", np.full((H, W), round(655350 / 500), np.uint16))
        grey(scene / "masks" / f"{i:03d}.png", (stripes(2) * 255).astype(np.uint8))
        camera = {"q": [1.0, 0.0, 0.0, 0.0], "t": [10.0 * i, 0.0, 500.0], "focal_length": 40.0, "camera_model": "phone"}
        entries.append({
            "object_id": "wall", "camera": camera, "filename": f"{i:03d}.jpg", "image_size": [H, W],
            "scene_name": "multiview-00", "split": "train" if i == 3 else "val",
        })  # fmt: skip
    (scene / "annotations.json").write_text(json.dumps(entries))
    return {"path": str(root), "split": "val"}


def nyu(root: Path) -> dict[str, Any]:
    for split in ("train", "test"):
        for i in range(2):
            picture(root / split / f"{i:05d}_colors.png", i)
            depth = 1000 + 10 * np.arange(W)[None].repeat(H, 0)
            grey(root / split / f"{i:05d}_depth.png", depth.astype(np.uint16))
    return {"path": str(root), "split": "test"}


def coco(root: Path) -> dict[str, Any]:
    images = [{"id": 7 + i, "file_name": f"{i}.jpg", "height": H, "width": W} for i in range(2)]
    for i in range(2):
        picture(root / "val2017" / f"{i}.jpg", i)

    def annotation(number: int, category: int, shape: Any, box: list[int], area: int) -> dict[str, Any]:
        known = {"id": number, "image_id": 7, "category_id": category, "segmentation": shape}
        return {**known, "bbox": box, "area": area, "iscrowd": 0}

    square = [4, 4, 20, 4, 20, 16, 4, 16]
    small = [6, 6, 10, 6, 10, 10, 6, 10]
    crowd = {"size": [H, W], "counts": [0, 2 * H, H * W - 2 * H]}
    objects = [
        annotation(1, 18, [small], [6, 6, 4, 4], 16),
        annotation(2, 3, [square], [4, 4, 16, 12], 192),
        {**annotation(3, 3, crowd, [0, 0, 2, H], 2 * H), "iscrowd": 1},
    ]
    categories = [{"id": 3, "name": "car"}, {"id": 18, "name": "dog"}]
    (root / "annotations").mkdir()
    facts = {"images": images, "annotations": objects, "categories": categories}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(facts))
    captions = {"images": images, "annotations": [{"id": 1, "image_id": 8, "caption": "A dog in a car. "}]}
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps(captions))
    return {"path": str(root), "split": "val"}


MAKERS = {f.__name__: f for f in (imagenet, ade20k, voc, camvid, cifar, spair, navi, nyu, coco)}


def draw_indices(seed, start, count, lengths, weights=None):
    """``(source, index)`` of samples ``start .. start + count``, as the loader draws them."""
    drawn = draw_positions(start, count, lengths if weights is None else weights)
    return [(source, image_at(seed, source, position, lengths[source])) for source, position in drawn]
