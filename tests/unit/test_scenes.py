"""The bundled scenes archive: contents and consistent geometry."""

from __future__ import annotations

import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from agglo.sources import scenes as module
from agglo.sources.scenes import BUNDLED, SPLITS, SceneAnnotation, Scenes
from agglo.types import AssetError, ImageError


@pytest.fixture(scope="module")
def everything() -> Scenes:
    return Scenes(split="all")


@pytest.fixture(scope="module")
def annotations(everything: Scenes) -> list[SceneAnnotation]:
    return [everything.annotation(k) for k in range(len(everything))]


def unit_rays(note: SceneAnnotation) -> np.ndarray:
    """``(3, H, W)`` camera-frame directions with z = 1 through the pixel centres."""
    y, x = np.indices(note.depth.shape) + 0.5
    return np.stack([(x - note.K[0, 2]) / note.K[0, 0], (y - note.K[1, 2]) / note.K[1, 1], np.ones_like(x)])


def sample(image: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Bilinear values of ``(H, W)`` at ``(N, 2)`` points with pixel centres at +0.5."""
    grid = xy - 0.5
    j, i = np.floor(grid).astype(int).T
    u, v = (grid - np.floor(grid)).T
    top = image[i, j] * (1 - u) + image[i, j + 1] * u
    return top * (1 - v) + (image[i + 1, j] * (1 - u) + image[i + 1, j + 1] * u) * v


def test_counts(everything: Scenes) -> None:
    assert BUNDLED.stat().st_size < 12_000_000
    sizes = {split: len(Scenes(split=split)) for split in SPLITS}
    assert sizes == {"train": 160, "val": 64, "test": 96}
    assert len(everything) == sum(sizes.values()) >= 256
    assert len(everything.classes) == len(set(everything.classes)) == 16
    assert everything.meta["licence"] == "CC0-1.0"
    assert len({everything.name(k) for k in range(len(everything))}) == len(everything)


def test_subjects_are_balanced() -> None:
    for split in SPLITS:
        source = Scenes(split=split)
        counts = np.bincount([source.label(k) for k in range(len(source))], minlength=16)
        assert counts.min() == counts.max() > 0


def test_splits_share_no_identity(annotations: list[SceneAnnotation], everything: Scenes) -> None:
    seen: dict[str, set[str]] = {split: set() for split in SPLITS}
    for note in annotations:
        seen[note.split] |= {item.identity for item in note.objects}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not seen[first] & seen[second]
    for split in SPLITS:
        assert seen[split] <= {name for names in everything.meta["identities"][split].values() for name in names}


def test_images_decode(everything: Scenes) -> None:
    height, width = everything.meta["size"]
    for k in range(len(everything)):
        image = everything.read(k)
        assert image.size == (width, height) and image.mode == "RGB"
        assert 20 < np.asarray(image).mean() < 235 and np.asarray(image).std() > 8


def test_masks_and_objects(annotations: list[SceneAnnotation], everything: Scenes) -> None:
    for note in annotations:
        assert 2 <= len(note.objects) <= 5
        assert set(np.unique(note.instances)) <= {0, *(item.instance for item in note.objects)}
        for item in note.objects:
            mask = note.instances == item.instance
            assert mask.sum() == item.pixels > 0
            assert (note.semantic[mask] == everything.classes.index(item.category) + 1).all()
            ys, xs = np.nonzero(mask)
            assert item.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert (note.semantic[note.instances == 0] == 0).all()
        subject = note.objects[0]
        assert everything.classes[note.label] == subject.category
        assert subject.pixels == max(item.pixels for item in note.objects)


def test_captions_name_visible_objects(annotations: list[SceneAnnotation], everything: Scenes) -> None:
    for note in annotations:
        shown = {item.category for item in note.objects if item.pixels}
        subject = everything.classes[note.label]
        assert note.caption == note.captions[0]
        assert note.captions[1] in (f"a photo of a {subject}", f"a photo of an {subject}")
        for caption in note.captions:
            named = {name for name in everything.classes if re.search(rf"\b{name}s?\b", caption)}
            assert subject in named and named <= shown


def test_depth_is_metric_and_finite(annotations: list[SceneAnnotation]) -> None:
    for note in annotations:
        assert note.depth.dtype == np.float32 and note.depth.min() > 0.3 and note.depth.max() < 13.1
        pose = note.cam_from_world
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-9)
        assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)
        world = np.einsum("ij,jhw->ihw", pose[:3, :3].T, unit_rays(note) * note.depth - pose[:3, 3, None, None])
        assert world[2].min() > -0.02  # no point lies under the floor (the bare floor beside a rug is 14 mm lower)
        for item in note.objects:  # objects have toy size
            extent = np.ptp(world[:, note.instances == item.instance], axis=1)
            assert extent.max() < 0.9


def test_correspondences_reproject(annotations: list[SceneAnnotation], everything: Scenes) -> None:
    for pair in everything.pairs():
        first, second = annotations[pair.first], annotations[pair.second]
        assert (first.scene, first.view, second.scene, second.view) == (second.scene, 0, first.scene, 1)
        assert pair.points.dtype == np.float32 and pair.points.shape[1:] == (2, 2) and len(pair.points) >= 64
        start, end = pair.points[:, 0].astype(float), pair.points[:, 1].astype(float)
        column, row = np.floor(start).astype(int).T
        depth = first.depth[row, column].astype(float)
        local = np.concatenate([start, np.ones((len(start), 1))], 1) @ np.linalg.inv(first.K).T * depth[:, None]
        motion = second.cam_from_world @ np.linalg.inv(first.cam_from_world)
        seen = local @ motion[:3, :3].T + motion[:3, 3]
        projected = (seen @ second.K.T)[:, :2] / seen[:, 2:]
        assert np.abs(projected - end).max() < 0.75
        assert np.abs(sample(second.depth, end) / seen[:, 2] - 1).max() < 0.015
        there = second.instances[np.floor(end[:, 1]).astype(int), np.floor(end[:, 0]).astype(int)]
        here = first.instances[row, column]
        assert (here == there).all() and (here > 0).mean() >= 0.5


def test_views_differ(annotations: list[SceneAnnotation]) -> None:
    for first, second in zip(annotations[::2], annotations[1::2], strict=True):
        azimuth = [np.degrees(np.arctan2(*note.cam_from_world[2, :2])) for note in (first, second)]
        assert 9.5 < abs(azimuth[0] - azimuth[1]) < 45.5


def test_normals_face_the_camera(annotations: list[SceneAnnotation]) -> None:
    for note in annotations:
        np.testing.assert_allclose(np.linalg.norm(note.normals, axis=0), 1, atol=1e-5)
        rays = unit_rays(note)
        facing = (note.normals * rays / np.linalg.norm(rays, axis=0)).sum(0)
        assert facing.max() < 0.02  # 8-bit rounding of grazing normals
        assert (note.normals[2] < 0).mean() > 0.99


def test_normals_agree_with_depth(annotations: list[SceneAnnotation]) -> None:
    for note in annotations[::4]:
        points = unit_rays(note) * note.depth
        right, down = points[:, 1:-1, 2:] - points[:, 1:-1, :-2], points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
        normal = np.cross(down, right, axis=0)
        normal /= np.linalg.norm(normal, axis=0)
        inner = note.normals[:, 1:-1, 1:-1]
        d = note.depth
        bend = np.abs(d[1:-1, 2:] + d[1:-1, :-2] - 2 * d[1:-1, 1:-1]) + np.abs(
            d[2:, 1:-1] + d[:-2, 1:-1] - 2 * d[1:-1, 1:-1]
        )
        same = [
            note.instances[1 + a : a - 1 or None, 1 + b : b - 1 or None] == note.instances[1:-1, 1:-1]
            for a, b in ((0, 1), (0, -1), (1, 0), (-1, 0))
        ]
        smooth = np.all(same, axis=0) & (bend < 0.004 * d[1:-1, 1:-1])
        angle = np.degrees(np.arccos(np.clip((normal * inner).sum(0), -1, 1)))[smooth]
        assert smooth.mean() > 0.5 and np.median(angle) < 2 and np.mean(angle < 15) > 0.9


def test_unknown_split_error_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="train, val, test, all"):
        Scenes(split="dev")


def test_changed_archive_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHA256", "0" * 64)
    with pytest.raises(AssetError, match="reinstall"):
        len(Scenes())


def test_other_files_are_refused(tmp_path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"no archive")
    for name in ("bad.tar", "missing.tar"):
        with pytest.raises(AssetError, match=name):
            len(Scenes(path=str(tmp_path / name)))


def test_truncated_image_is_named(tmp_path) -> None:
    source = Scenes(split="test")
    len(source)
    data = bytearray(BUNDLED.read_bytes())
    scene = source.name(0).split("/")[1]
    offset, size = source._members[f"{scene}/v0.webp"]
    data[offset : offset + size] = bytes(size)
    (tmp_path / "damaged.tar").write_bytes(data)
    with pytest.raises(ImageError, match=f"scenes/{scene}/v0"):
        Scenes(split="test", path=str(tmp_path / "damaged.tar")).read(0)


def test_pickles_and_threads() -> None:
    source = Scenes(split="val")
    expected = [source.read(k).tobytes() for k in range(8)]
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda k: copy.read(k).tobytes(), range(8))) == expected
