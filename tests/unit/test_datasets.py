"""Datasets in their published layouts: contents, and errors when they are missing or incomplete."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agglo.config import build
from agglo.evals._probe import truth_of
from agglo.evals.correspondence import project
from agglo.sources._dataset import normals_from_depth, read_mask
from agglo.sources.base import ReadRequest
from agglo.types import ConfigError, ImageError
from agglo.weights.bundled import imagenet_classes, imagenet_wnids
from support import datasets as tiny


def source(kind: str, root: Path, **keys):
    return build("sources", {"kind": kind, **tiny.MAKERS[kind](root), **keys})


def refused(kind: str, **keys) -> str:
    with pytest.raises(ConfigError) as error:
        build("sources", {"kind": kind, **keys})
    return str(error.value)


@pytest.mark.parametrize("kind", tiny.MAKERS)
def test_missing_dataset_error_names_download_and_structure(kind: str, tmp_path: Path) -> None:
    line = refused(kind, path=str(tmp_path / "nowhere"))
    assert "does not exist" in line
    assert "Get it from" in line
    assert "; expected: " in line
    (tmp_path / "empty").mkdir()
    assert "Get it from" in refused(kind, path=str(tmp_path / "empty"))


@pytest.mark.parametrize("kind", tiny.MAKERS)
def test_unknown_split_error_lists_the_known_ones(kind: str, tmp_path: Path) -> None:
    keys = tiny.MAKERS[kind](tmp_path)
    line = refused(kind, **{**keys, "split": "tset"})
    assert "no split 'tset'; choose from: " in line
    assert keys["split"] in line


@pytest.mark.parametrize("kind", tiny.MAKERS)
def test_pickled_copies_read_the_same_images(kind: str, tmp_path: Path) -> None:
    made = source(kind, tmp_path)
    names = [made.name(i) for i in range(len(made))]
    assert len(set(names)) == len(names) > 0
    assert all(name.startswith(kind) and str(tmp_path) not in name for name in names)
    copy = pickle.loads(pickle.dumps(made))
    for i in range(len(made)):
        assert copy.read(i).tobytes() == made.read(i).tobytes()
        assert made.read(i).mode == "RGB"


@pytest.mark.parametrize(
    ("kind", "victim", "what"),
    [
        ("ade20k", "ADEChallengeData2016/annotations/validation/ADE_1.png", "1 of 2 masks are missing"),
        ("ade20k", "ADEChallengeData2016/images/validation/ADE_1.jpg", "1 of 2 images are missing"),
        ("voc", "VOCdevkit/VOC2012/SegmentationClass/2007_04.png", "1 of 2 masks are missing"),
        ("voc", "VOCdevkit/VOC2012/JPEGImages/2007_04.jpg", "1 of 2 images are missing"),
        ("voc", "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", "val.txt is missing"),
        ("camvid", "valannot/1.png", "1 of 2 masks are missing"),
        ("camvid", "val/1.png", "1 of 2 images are missing"),
        ("cifar", "cifar-10-batches-bin/test_batch.bin", "1 of 1 batches are missing"),
        ("spair", "SPair-71k/JPEGImages/cat/cat_0.jpg", "1 of 6 images are missing"),
        ("navi", "navi_v1.0/wall/multiview-00-phone/depth/001.png", "1 of 3 depth maps are missing"),
        ("navi", "navi_v1.0/wall/multiview-00-phone/masks/001.png", "1 of 3 masks are missing"),
        ("nyu", "test/00001_depth.png", "1 of 2 depth maps are missing"),
        ("nyu", "test/00001_colors.png", "1 of 2 images are missing"),
        ("coco", "val2017/1.jpg", "1 of 2 images are missing"),
        ("coco", "annotations/instances_val2017.json", "1 of 1 annotation files are missing"),
    ],
)
def test_missing_files_are_counted(kind: str, victim: str, what: str, tmp_path: Path) -> None:
    keys = tiny.MAKERS[kind](tmp_path)
    build("sources", {"kind": kind, **keys})
    (tmp_path / victim).unlink()
    line = refused(kind, **keys)
    assert what in line


def test_imagenet_labels_index_all_1000_classes(tmp_path: Path) -> None:
    made = source("imagenet", tmp_path)
    assert len(made) == 6
    assert {made.label(i) for i in range(6)} == {0, 7, 999}
    assert made.classes == imagenet_classes()
    assert made.name(0) == f"imagenet/val/{imagenet_wnids()[0]}/val_0.JPEG"


def test_imagenet_class_names_and_unknown_or_empty_folders(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("Tench", "great_white-shark"):
            tiny.picture(tmp_path / split / name / "0.png")
    made = build("sources", {"kind": "imagenet", "path": str(tmp_path)})
    assert [made.classes[made.label(i)] for i in range(2)] == ["tench", "great white shark"]
    (tmp_path / "val" / imagenet_wnids()[5]).mkdir()
    assert "1 of 3 classes" in refused("imagenet", path=str(tmp_path))
    (tmp_path / "val" / imagenet_wnids()[5]).rename(tmp_path / "val" / "unicorn")
    assert "unicorn" in refused("imagenet", path=str(tmp_path))
    assert "{kind: folder}" in refused("imagenet", path=str(tmp_path))


def test_imagenet_val_without_class_folders_is_an_error(tmp_path: Path) -> None:
    tiny.picture(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    assert "sort the images" in refused("imagenet", path=str(tmp_path))


def test_masks_follow_the_segmentation_contract(tmp_path: Path) -> None:
    for kind, values, classes in (
        ("ade20k", {1, 2, 3, 255}, 150),  # 0 is "not annotated"
        ("voc", {0, 1, 2, 3, 255}, 20),
        ("camvid", {*range(1, 12), 255}, 11),
    ):
        made = source(kind, tmp_path / kind)
        assert len(made.classes) == classes
        mask = made.annotation(0).semantic
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) == values
        truth_of(made, 0, "semantic", (tiny.H, tiny.W), (16, 16))  # has the size of the image
    assert source("ade20k", tmp_path / "again").classes[2] == "thing 3"


def test_camvid_nested_folders_and_foreign_class_lists(tmp_path: Path) -> None:
    tiny.picture(tmp_path / "val" / "images" / "a.png")
    mask = tiny.grey(tmp_path / "val" / "labels" / "a.png", tiny.stripes(12))
    made = build("sources", {"kind": "camvid", "path": str(tmp_path)})
    assert made.name(0) == "camvid/val/images/a.png"
    tiny.grey(mask, tiny.stripes(20))
    with pytest.raises(ConfigError, match="class 19"):
        made.annotation(0)
    tiny.picture(mask)
    with pytest.raises(ImageError, match="picture"):
        made.annotation(0)


def test_cifar_formats(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    ten = source("cifar", tmp_path / "a")
    assert [ten.label(i) for i in range(4)] == [0, 3, 9, 3]
    assert ten.read(0).size == (32, 32)
    data = np.fromfile(tmp_path / "a" / "cifar-10-batches-bin" / "test_batch.bin", np.uint8)[1:3073]
    assert np.array(ten.read(0))[0, 5].tolist() == [data[5], data[1024 + 5], data[2048 + 5]]
    (tmp_path / "b").mkdir()
    hundred = build("sources", {"kind": "cifar", **tiny.cifar100(tmp_path / "b")})
    assert (len(hundred.classes), hundred.label(1), hundred.classes[5]) == (100, 99, "fine 5")
    images = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "c.npz", x_test=images, y_test=[1, 0], names=["cat", "dog"])
    small = build("sources", {"kind": "cifar", "path": str(tmp_path / "c.npz")})
    assert [small.classes[small.label(i)] for i in range(2)] == ["dog", "cat"]
    np.savez(tmp_path / "d.npz", x_test=images, y_test=[1, 2], names=["cat", "dog"])
    assert "label 2" in refused("cifar", path=str(tmp_path / "d.npz"))


def test_cifar_truncated_and_malicious_files(tmp_path: Path) -> None:
    keys = tiny.cifar(tmp_path)
    file = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    file.write_bytes(file.read_bytes()[:-5])
    assert "is truncated" in refused("cifar", **keys)
    (tmp_path / "b").mkdir()
    keys = tiny.cifar100(tmp_path / "b")
    (tmp_path / "b" / "cifar-100-python" / "test").write_bytes(
        b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR."
    )
    assert "it refers to os.system" in refused("cifar", **keys)
    assert not (tmp_path / "owned").exists()


def test_spair_pairs_have_points_boxes_and_categories(tmp_path: Path) -> None:
    made = source("spair", tmp_path)
    pairs = made.pairs()
    assert [pair.category for pair in pairs].count("cat") == 2
    first = next(pair for pair in pairs if pair.category == "cat")
    assert made.name(first.first) == "spair/JPEGImages/cat/cat_0.jpg"
    assert first.points.tolist() == [[[3, 4], [6, 7]], [[10, 5], [12, 9]]]
    assert first.box == (2, 3, 22, 13)
    assert made.classes[made.label(first.first)] == "cat"
    one = build("sources", {"kind": "spair", "path": str(tmp_path), "pairs": 1})
    assert sorted(pair.category for pair in one.pairs()) == ["cat", "dog"]


def test_navi_geometry_is_consistent_between_views(tmp_path: Path) -> None:
    """A point of the wall, lifted with the depth and camera of one view, projects correctly into the other."""
    import torch

    made = source("navi", tmp_path)
    assert len(made) == 3  # one image belongs to the other split
    assert [(pair.first, pair.second) for pair in made.pairs()] == [(0, 1), (1, 2)]
    one, two = made.annotation(0), made.annotation(1)
    assert np.allclose(one.depth, 0.5, atol=2e-4)
    assert set(np.unique(one.instances)) == {0, 1}
    inner = one.normals[:, 1:-1, 1:-1]
    assert np.allclose(inner, np.array([0, 0, -1.0])[:, None, None], atol=1e-3)  # faces the camera
    world = torch.tensor([[0.0, 0.0, 0.0]], dtype=torch.float64)  # the object's origin
    assert torch.allclose(project(world, one), torch.tensor([[16.0, 12.0]], dtype=torch.float64))
    assert torch.allclose(project(world, two), torch.tensor([[16.0 + 40 * 10 / 500, 12.0]], dtype=torch.float64))


def test_navi_cameras_that_look_along_negative_z_are_converted(tmp_path: Path) -> None:
    from agglo.sources.navi import _pose

    pose = _pose({"q": [2.0, 0, 0, 0], "t": [10, 20, -500]})
    assert np.allclose(pose[:3, 3], [0.01, -0.02, 0.5])
    assert np.isclose(np.linalg.det(pose[:3, :3]), 1)
    turned = _pose({"q": [np.cos(0.3), 0, np.sin(0.3), 0], "t": [0, 0, 500]})
    assert np.allclose(turned[:3, :3], [[np.cos(0.6), 0, np.sin(0.6)], [0, 1, 0], [-np.sin(0.6), 0, np.cos(0.6)]])


def test_normals_from_depth_of_a_plane_and_an_edge() -> None:
    K = np.array([[50.0, 0, 16], [0, 50.0, 12], [0, 0, 1]])
    normal = np.array([0.3, -0.2, -1.0]) / np.linalg.norm([0.3, -0.2, -1.0])
    y, x = np.mgrid[0:24, 0:32] + 0.5
    rays = np.stack(((x - 16) / 50, (y - 12) / 50, np.ones_like(x)))
    depth = -2.0 / np.einsum("c,chw->hw", normal, rays)  # normal . X = -2
    found = normals_from_depth(depth, K)
    assert np.abs(found[:, 1:-1, 1:-1] - normal[:, None, None]).max() < 1e-5
    assert np.isnan(found[:, 0]).all()
    depth[:, 16:] *= 2
    depth[5, 5] = 0
    broken = normals_from_depth(depth, K)
    assert np.isnan(broken[:, 1:-1, 15:17]).all()
    assert np.isnan(broken[:, 4:7, 5]).all()
    assert np.isfinite(broken[:, 10, 10]).all()


def test_nyu_image_pairs_and_array_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = source("nyu", tmp_path)
    known = made.annotation(0)
    assert known.depth.dtype == np.float32
    assert np.isclose(known.depth[0, 3], 1.03)
    assert known.depth.shape == (tiny.H, tiny.W) == known.normals.shape[1:]
    assert np.isclose(known.K[0, 0], 518.8579 * tiny.W / 640, atol=1e-3)
    folder = tmp_path / "arrays" / "test"
    folder.mkdir(parents=True)
    np.savez(folder / "a.npz", image=np.zeros((8, 9, 3), np.uint8), depth=np.ones((8, 9), np.float32))
    arrays = build("sources", {"kind": "nyu", "path": str(tmp_path / "arrays")})
    assert arrays.read(0).size == (9, 8)
    assert arrays.annotation(0).depth.max() == 1
    np.savez(folder / "b.npz", picture=np.zeros((8, 9, 3), np.uint8))
    with pytest.raises(ImageError, match="none of image, rgb"):
        build("sources", {"kind": "nyu", "path": str(tmp_path / "arrays")}).read(1)
    assert not caplog.text
    np.savez(tmp_path / "test" / "a.npz", image=np.zeros((8, 9, 3), np.uint8), depth=np.ones((8, 9), np.float32))
    assert len(build("sources", {"kind": "nyu", "path": str(tmp_path)})) == 1
    assert "left out 2 pairs of images beside 1 arrays" in caplog.text


def test_nyu_labelled_mat_file(tmp_path: Path) -> None:
    h5py, scipy_io = pytest.importorskip("h5py"), pytest.importorskip("scipy.io")
    rng = np.random.default_rng(0)
    images, depths = rng.integers(0, 256, (4, 3, 12, 8), dtype=np.uint8), rng.random((4, 12, 8)).astype(np.float32) + 1
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["depths"] = images, depths
    scipy_io.savemat(tmp_path / "splits.mat", {"trainNdxs": [[1], [3]], "testNdxs": [[2], [4]]})
    made = build("sources", {"kind": "nyu", "path": str(tmp_path)})
    assert [made.name(i) for i in range(2)] == ["nyu/test/00001", "nyu/test/00003"]
    assert made.read(1).size == (12, 8)
    assert np.array_equal(np.array(made.read(1))[2, 5], images[3, :, 5, 2])
    assert np.isclose(made.annotation(1).depth[2, 5], depths[3, 5, 2])
    scipy_io.savemat(tmp_path / "splits.mat", {"trainNdxs": [[1]], "testNdxs": [[2], [9]]})
    assert "1 of 2 images of test are not in" in refused("nyu", path=str(tmp_path))


def test_coco_small_objects_are_on_top_and_crowds_are_ignored(tmp_path: Path) -> None:
    made = source("coco", tmp_path)
    known = made.annotation(0)
    assert made.classes == ("car", "dog")
    assert [(o.instance, o.category, o.box) for o in known.objects] == [
        (1, "car", (4, 4, 20, 16)),
        (2, "dog", (6, 6, 10, 10)),
    ]
    assert known.instances[5, 5] == 1 and known.instances[7, 7] == 2 and known.instances[20, 20] == 0
    assert known.semantic[7, 7] == 2 and known.semantic[5, 5] == 1 and known.semantic[0, 30] == 0
    assert (known.semantic[:, :2] == 255).all() and known.semantic[0, 2] == 0
    assert int((known.instances == 2).sum()) == 16
    assert int((known.instances == 1).sum()) == 192 - 16
    assert known.masks.sum((1, 2)).tolist() == [192, 16]  # the car is whole below the dog
    assert made.annotation(1).captions == ("A dog in a car.",)
    assert made.annotation(0).caption is None


def test_coco_invalid_run_lengths_are_refused(tmp_path: Path) -> None:
    from agglo.sources.coco import mask_of

    column = mask_of({"size": [2, 3], "counts": [1, 2, 3]}, (2, 3), "x")
    assert column.tolist() == [[False, True, False], [True, False, False]]
    with pytest.raises(ConfigError, match="run lengths are for"):
        mask_of({"size": [2, 2], "counts": [4]}, (2, 3), "x")
    with pytest.raises(ConfigError, match="compressed run lengths"):
        mask_of({"size": [2, 3], "counts": "abc"}, (2, 3), "x")


def test_masks_of_the_wrong_size_are_refused_by_the_eval(tmp_path: Path) -> None:
    keys = tiny.ade20k(tmp_path)
    tiny.grey(tmp_path / "ADEChallengeData2016" / "annotations" / "validation" / "ADE_0.png", np.ones((5, 6), np.uint8))
    made = build("sources", {"kind": "ade20k", **keys})
    with pytest.raises(ConfigError, match="sizes must be equal"):
        truth_of(made, 0, "semantic", (tiny.H, tiny.W), (16, 16))


def test_damaged_image_is_named_and_others_are_read(tmp_path: Path) -> None:
    made = source("voc", tmp_path)
    made.file(0).write_bytes(b"nothing")
    with pytest.raises(ImageError, match="2007_03"):
        made.read(0)
    assert isinstance(made.read(1), Image.Image)


# --- images and their ground truth ------------------------------------------------------------------------------------


def tag_orientation(path: Path, orientation: int) -> None:
    """Write an EXIF orientation into an image file, whose stored pixels stay."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    if path.suffix == ".png":
        with Image.open(path) as image:
            image.save(path, exif=exif)
        return
    data, block = path.read_bytes(), exif.tobytes()
    path.write_bytes(data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:])


MAPPED = ("ade20k", "voc", "camvid", "coco", "nyu", "spair")


@pytest.mark.parametrize("kind", MAPPED)
@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_ground_truth_lies_on_the_stored_pixels(kind: str, orientation: int, tmp_path: Path) -> None:
    made = source(kind, tmp_path)
    before = [np.asarray(made.read(i)) for i in range(len(made))]
    for file in [*tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.png")]:
        if not re.search("annot|SegmentationClass|_depth", str(file.relative_to(tmp_path))):
            tag_orientation(file, orientation)
    again = build("sources", {"kind": kind, **keys_of(kind, tmp_path)})
    for i, pixels in enumerate(before):
        found = np.asarray(again.read(i))
        assert found.shape == pixels.shape
        assert np.abs(found.astype(int) - pixels).max() <= 2
        if hasattr(again, "annotation"):
            known = again.annotation(i)
            for field in ("semantic", "instances", "depth"):
                if hasattr(known, field):
                    assert getattr(known, field).shape == pixels.shape[:2]


def keys_of(kind: str, root: Path) -> dict[str, str]:
    return {"path": str(root), "split": "test" if kind in ("nyu", "spair") else "val"}


def test_navi_photographs_are_turned_upright_as_their_depth_is(tmp_path: Path) -> None:
    made = source("navi", tmp_path)
    plain = np.asarray(made.read(0))
    Image.fromarray(np.rot90(plain).copy()).save(made.file(0), quality=100, subsampling=0)
    tag_orientation(made.file(0), 6)  # a phone stores portraits lying on their side
    assert np.asarray(made.read(0)).shape == plain.shape == (*made.annotation(0).depth.shape, 3)
    assert np.abs(np.asarray(made.read(0)).astype(int) - plain).mean() < 8
    upright = np.asarray(made.read(1))
    tag_orientation(made.file(1), 3)
    assert np.abs(np.asarray(made.read(1)).astype(int) - upright[::-1, ::-1]).mean() < 8


def test_a_mask_drawn_on_the_upright_image_turns_the_image(tmp_path: Path) -> None:
    made = source("voc", tmp_path)
    tag_orientation(made.file(0), 6)
    assert made.read(0).size == (tiny.W, tiny.H)
    tiny.grey(made._masks[0], np.zeros((tiny.W, tiny.H), np.uint8))
    assert made.read(0).size == (tiny.H, tiny.W)


def test_training_views_of_masked_images_use_the_stored_pixels(tmp_path: Path) -> None:
    made = source("voc", tmp_path)
    plain = np.asarray(made.read(0))
    tag_orientation(made.file(0), 6)
    part = made.read_part(0, lambda size: ReadRequest(1, size[0]))
    assert part.size == (tiny.H, tiny.W)
    assert np.abs(part.array.astype(int) - plain).max() <= 2


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_keep_their_class_numbers(bits: int, tmp_path: Path) -> None:
    made = source("voc", tmp_path)
    levels = np.arange(tiny.H * tiny.W).reshape(tiny.H, tiny.W) % 2**bits
    made._masks[0].write_bytes(tiny.small_png(levels, bits))
    assert (made.annotation(0).semantic == levels).all()


@pytest.mark.parametrize("kind", ["ade20k", "voc", "camvid"])
def test_masks_of_16_bits_keep_their_class_numbers_or_are_named(kind: str, tmp_path: Path) -> None:
    made = source(kind, tmp_path)
    expected = made.annotation(0).semantic
    tiny.grey(made._masks[0], read_mask(made._masks[0]).astype(np.uint16))
    assert (made.annotation(0).semantic == expected).all()
    tiny.grey(made._masks[0], np.full((tiny.H, tiny.W), 300, np.uint16))
    with pytest.raises(ConfigError, match=r"\.png holds class 300; expected 0 to \d+, and 255"):
        made.annotation(0)


@pytest.mark.parametrize(
    ("dtype", "options", "why"),
    [
        ("uint16", {"byteorder": ">", "compression": "deflate"}, None),
        ("uint8", {"photometric": "miniswhite"}, "0 is white"),
        ("int16", {"byteorder": ">"}, "big-endian signed 16-bit"),
    ],
)
def test_masks_in_tiff_files_keep_their_class_numbers_or_are_named(
    dtype: str, options: dict[str, str], why: str | None, tmp_path: Path
) -> None:
    tifffile = pytest.importorskip("tifffile")
    file, values = tmp_path / "a.tif", np.arange(12).reshape(3, 4)
    tifffile.imwrite(file, values.astype(dtype), **options)
    if why is None:
        assert (read_mask(file) == values).all()
    else:
        with pytest.raises(ImageError, match=why):
            read_mask(file)


@pytest.mark.parametrize("kind", ["nyu", "navi"])
def test_depth_maps_of_8_bits_are_named(kind: str, tmp_path: Path) -> None:
    made = source(kind, tmp_path)
    file = next(tmp_path.rglob("test/00000_depth.png" if kind == "nyu" else "depth/000.png"))
    tiny.grey(file, np.full((tiny.H, tiny.W), 7, np.uint8))
    with pytest.raises(ImageError, match=r"\.png: is a depth map of 8 bits, without a unit"):
        made.annotation(0)


@pytest.mark.parametrize("depth", [np.full((8, 9), 1200, np.uint16), np.ones((1, 8, 9), np.float32)])
def test_nyu_array_depth_in_another_unit_or_shape_is_named(depth: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    np.savez(tmp_path / "test" / "a.npz", image=np.zeros((8, 9, 3), np.float32), depth=depth)
    made = build("sources", {"kind": "nyu", "path": str(tmp_path)})
    assert made.read(0).size == (9, 8)
    with pytest.raises(ImageError, match=r"depth is .*; expected floats \(H, W\) in metres"):
        made.annotation(0)


def test_nyu_reads_the_mat_file_that_is_named(tmp_path: Path) -> None:
    h5py, scipy_io = pytest.importorskip("h5py"), pytest.importorskip("scipy.io")
    with h5py.File(tmp_path / "mine.mat", "w") as file:
        file["images"], file["depths"] = np.zeros((2, 3, 12, 8), np.uint8), np.ones((2, 12, 8), np.float32)
    scipy_io.savemat(tmp_path / "splits.mat", {"trainNdxs": [[1]], "testNdxs": [[2]]})
    assert len(build("sources", {"kind": "nyu", "path": str(tmp_path / "mine.mat")})) == 1


# --- damaged entries --------------------------------------------------------------------------------------------------


def coco_file(root: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    tiny.coco(root)
    file = root / "annotations" / "instances_val2017.json"
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts))
    return root


def test_coco_annotations_of_unlisted_images_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    coco_file(tmp_path, lambda facts: facts["annotations"].append({**facts["annotations"][0], "image_id": 99}))
    made = build("sources", {"kind": "coco", "path": str(tmp_path)})
    assert len(made.annotation(0).objects) == 2
    assert "left out 1 of 4 annotations, whose images are not listed" in caplog.text


@pytest.mark.parametrize("key", ["area", "bbox", "segmentation", "category_id"])
def test_coco_missing_keys_are_named(key: str, tmp_path: Path) -> None:
    made = build("sources", {"kind": "coco", "path": str(coco_file(tmp_path, lambda f: f["annotations"][0].pop(key)))})
    with pytest.raises(ImageError, match=rf"coco/val2017/0.jpg: .*val2017.json: annotation 1 lacks the key '{key}'"):
        made.annotation(0)
    assert made.annotation(1).captions == ("A dog in a car.",)  # the other images go on
    everywhere = tmp_path / "everywhere"
    everywhere.mkdir()
    coco_file(everywhere, lambda facts: [each.pop(key) for each in facts["annotations"]])
    made = build("sources", {"kind": "coco", "path": str(everywhere)})
    with pytest.raises(ConfigError, match=rf"instances_val2017.json: no annotation has the key '{key}'"):
        made.annotation(1)
    assert made.captions(1) == ("A dog in a car.",)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda facts: facts.pop("categories"), "has no list 'categories'"),
        (lambda facts: facts.pop("images"), "has no list 'images'"),
        (lambda facts: facts.update(annotations={}), "has no list 'annotations'"),
        (lambda facts: facts["annotations"][0].update(image_id="7"), r"annotations\[0\] has image_id '7' \(str\)"),
        (lambda facts: facts["annotations"][0].pop("image_id"), r"annotations\[0\] lacks the key 'image_id'"),
        (lambda facts: [each.pop("height") for each in facts["images"]], r"images\[0\] lacks the key 'height'"),
        (lambda facts: facts["images"][0].update(id="7"), "ids of images are text and others numbers"),
    ],
)
def test_coco_files_without_structure_are_named(
    change: Callable[[dict[str, Any]], None], why: str, tmp_path: Path
) -> None:
    coco_file(tmp_path, change)
    with pytest.raises(ConfigError, match=rf"instances_val2017\.json.*{why}"):
        build("sources", {"kind": "coco", "path": str(tmp_path)})


def test_coco_damaged_annotation_costs_its_image(tmp_path: Path) -> None:
    for number, entry in enumerate(
        (
            {"category_id": 5},
            {"bbox": [1, 2]},
            {"bbox": [5, 5, -3, 4]},
            {"segmentation": {"counts": [1]}},
            {"segmentation": [[2, 3, float("nan"), 3, 9, 9]]},
            {"area": "x"},
        )
    ):
        root = tmp_path / str(number)
        root.mkdir()
        coco_file(root, lambda facts, entry=entry: facts["annotations"][0].update(entry))
        made = build("sources", {"kind": "coco", "path": str(root)})
        with pytest.raises(ImageError, match=r"coco/val2017/0.jpg: .*instances_val2017.json"):
            made.annotation(0)
        made.annotation(1)


@pytest.mark.parametrize("what", ["images", "categories"])
def test_coco_repeated_ids_are_left_out_and_counted(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second entry of an id would shift the images or classes after it."""
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
    tiny.coco(tmp_path / "once")
    made = build("sources", {"kind": "coco", "path": str(tmp_path / "once")})
    coco_file(tmp_path / "twice", lambda facts: facts[what].insert(1, facts[what][0]))
    again = build("sources", {"kind": "coco", "path": str(tmp_path / "twice")})
    assert f"{what}[1] (repeats the id" in caplog.text
    assert (len(again), again.classes) == (len(made), made.classes)
    for i in range(len(made)):
        assert np.array_equal(again.annotation(i).semantic, made.annotation(i).semantic)


def test_coco_captions_without_text_are_no_queries(tmp_path: Path) -> None:
    tiny.coco(tmp_path)
    file = tmp_path / "annotations" / "captions_val2017.json"
    facts = json.loads(file.read_text())
    before = build("sources", {"kind": "coco", "path": str(tmp_path)}).captions(1)
    facts["annotations"] += [{**facts["annotations"][-1], "id": 90 + i, "caption": t} for i, t in enumerate(("  ", ""))]
    file.write_text(json.dumps(facts))
    assert build("sources", {"kind": "coco", "path": str(tmp_path)}).captions(1) == before


def test_damaged_entries_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.spair(tmp_path)
    files = sorted((tmp_path / "SPair-71k" / "PairAnnotation" / "test").glob("*.json"))
    files[0].write_text("{")
    made = build("sources", {"kind": "spair", "path": str(tmp_path)})
    assert len(made.pairs()) == len(files) - 1
    assert f"1 of {len(files)} entries are damaged, first {files[0]}" in caplog.text
    for file in files:
        file.write_text('{"category": "cat"}')
    assert "lacks the key 'src_imname'. Get it from" in refused("spair", path=str(tmp_path))
    navi = tmp_path / "navi"
    navi.mkdir()
    tiny.navi(navi)
    file = next(navi.rglob("annotations.json"))
    entries = json.loads(file.read_text())
    del entries[0]["camera"]["focal_length"]
    file.write_text(json.dumps(entries))
    assert len(build("sources", {"kind": "navi", "path": str(navi)})) == 2
    assert f"1 of 4 entries are damaged, first {file}, entry 0 lacks the key 'focal_length'" in caplog.text


def test_lists_in_other_encodings(tmp_path: Path) -> None:
    tiny.ade20k(tmp_path)
    names = tmp_path / "ADEChallengeData2016" / "objectInfo150.txt"
    names.write_bytes(names.read_bytes().replace(b"thing 3", b"caf\xe9"))
    assert source_classes(tmp_path)[2] == "caf\\udce9"
    names.write_bytes(b"\xef\xbb\xbf" + names.read_bytes())
    assert len(source_classes(tmp_path)) == 150


def source_classes(root: Path) -> tuple[str, ...]:
    return build("sources", {"kind": "ade20k", "path": str(root)}).classes
