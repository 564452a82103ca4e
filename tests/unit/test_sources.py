"""The folder and photos sources."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agglo.config import build
from agglo.sources import photos as photos_module
from agglo.sources.folder import Folder
from agglo.sources.photos import PHOTOS, Photos
from agglo.types import AssetError, ConfigError, ImageError, MissingExtraError
from support.datasets import names


def paint(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), colour).save(path)


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "pets"
    for name in ("dogs/b.png", "cats/z.JPG", "cats/a.png", "cats/siamese/q.webp", "top.bmp"):
        paint(root / name)
    (root / "notes.txt").write_text("x")
    paint(root / ".cache/hidden.png")
    paint(root / "cats/._a.png")
    return root


def test_folder_is_sorted_and_skips_hidden_and_other_files(tree):
    source = Folder(path=str(tree))
    assert names(source) == [
        "pets/cats/a.png",
        "pets/cats/siamese/q.webp",
        "pets/cats/z.JPG",
        "pets/dogs/b.png",
        "pets/top.bmp",
    ]
    assert names(Folder(path=str(tree), recursive=False)) == ["pets/top.bmp"]
    assert names(Folder(path=str(tree), extensions=("PNG",))) == ["pets/cats/a.png", "pets/dogs/b.png"]
    assert source.read(0).size == (4, 3)
    assert source.file(0) == tree / "cats/a.png"


def test_folder_names_do_not_depend_on_the_spelling_of_the_path(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert names(Folder(path=".")) == names(Folder(path=str(tree)))
    monkeypatch.setenv("HOME", str(tree.parent))
    assert names(Folder(path="~/pets")) == names(Folder(path=str(tree)))


def test_folder_labels(tree):
    source = Folder(path=str(tree))
    assert [source.label(i) for i in range(5)] == ["cats", "cats/siamese", "cats", "dogs", None]
    assert source.labels() is None
    (tree / "top.bmp").unlink()
    assert Folder(path=str(tree)).labels() == ["cats", "cats/siamese", "cats", "dogs"]


def test_folder_accepts_a_single_image_of_any_extension(tmp_path):
    paint(tmp_path / "one.png")
    (tmp_path / "one.png").rename(tmp_path / "one.dat")
    source = Folder(path=str(tmp_path / "one.dat"))
    assert len(source) == 1
    assert source.read(0).getpixel((0, 0)) == (255, 0, 0)


def test_folder_follows_links_once(tree):
    os.symlink(tree, tree / "dogs/loop", target_is_directory=True)
    outside = tree.parent / "more"
    paint(outside / "c.png")
    os.symlink(outside, tree / "linked", target_is_directory=True)
    assert len(Folder(path=str(tree))) == 6


def test_folder_errors_name_the_searched_extensions(tree):
    with pytest.raises(ConfigError, match=r"pet' does not exist; did you mean .*pets"):
        Folder(path=str(tree.parent / "pet"))
    empty = tree.parent / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"no image in .*empty.*sub-folders for .*\*\.jpg"):
        Folder(path=str(empty))
    (empty / "a.csv").write_text("")
    (empty / "b.csv").write_text("")
    (empty / "README").write_text("")
    with pytest.raises(ConfigError, match=r"found 3 other files \(2 \.csv, 1 no ending\)"):
        Folder(path=str(empty))
    (tree / "top.bmp").unlink()
    with pytest.raises(ConfigError, match=r"2 sub-folders: set `recursive: true`"):
        Folder(path=str(tree), recursive=False)


def test_folder_names_a_bad_image(tree):
    (tree / "cats/a.png").write_bytes(b"")
    source = pickle.loads(pickle.dumps(Folder(path=str(tree))))
    with pytest.raises(ImageError, match=r"^pets/cats/a\.png: is empty"):
        source.read(0)


def test_folder_is_a_kind(tree):
    assert len(build("sources", {"kind": "folder", "path": str(tree), "extensions": [".png"]})) == 2


def test_photo_splits_partition_the_table():
    splits = {split: Photos(split=split) for split in ("train", "heldout", "all")}
    assert names(splits["all"]) == [f"photos/{p.name}" for p in PHOTOS]
    assert sorted(names(splits["train"]) + names(splits["heldout"])) == sorted(names(splits["all"]))
    assert len({p.sha256 for p in PHOTOS}) == len({p.name for p in PHOTOS}) == len(PHOTOS) == 22
    by_name = {p.name: p for p in PHOTOS}
    assert by_name["motorcycle_left"].heldout == by_name["motorcycle_right"].heldout
    for query in {p.query for p in PHOTOS}:  # a query that two photos share must be in one split
        assert len({p.heldout for p in PHOTOS if p.query == query}) == 1


def test_photos_decode():
    source = Photos(split="all")
    for index, photo in enumerate(source.photos):
        image = source.read(index)
        assert image.mode == "RGB"
        assert min(image.size) > 100, photo.name
        assert np.asarray(image).std() > 5, photo.name


@pytest.mark.processes
def test_photos_do_not_import_the_packages():
    code = (
        "import sys; from agglo.sources.photos import Photos; Photos(split='all').read(0);"
        "assert not {'skimage', 'sklearn', 'scipy'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_photos_unknown_split():
    with pytest.raises(ConfigError, match="no split 'test'; choose from: train, heldout, all"):
        Photos(split="test")


def test_photos_missing_package(monkeypatch):
    monkeypatch.setattr(photos_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'scikit-image.*pip install .*\[quickstart\]"'):
        Photos()


def test_photos_corrupted_or_missing_file_is_an_asset_error(monkeypatch, tmp_path):
    real = Photos(split="all")
    for photo, path in zip(real.photos, real._paths, strict=True):
        data = bytearray(path.read_bytes())
        data[-20] ^= 1
        if photo.name != "brick":
            (tmp_path / photo.file).write_bytes(data)
    monkeypatch.setattr(photos_module, "_folder", lambda package: tmp_path)
    source = Photos(split="all")
    for index in range(2):
        with pytest.raises(AssetError, match=r"(sha256|cannot be read).*pip install --force-reinstall scikit-image"):
            source.read(index)


def test_shares_of_a_folder_are_disjoint_complete_and_stable(tmp_path: Path) -> None:
    for index in range(60):
        Image.new("RGB", (2, 2), (index, 0, 0)).save(tmp_path / f"{index:02d}.png")
    halves = [Folder(path=str(tmp_path), share=share) for share in ((0.0, 0.5), (0.5, 1.0))]
    names = [{half.name(i) for i in range(len(half))} for half in halves]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 60
    assert 15 < len(names[0]) < 45
    (tmp_path / "00.png").unlink()  # other files do not change the split of an image
    again = Folder(path=str(tmp_path), share=(0.0, 0.5))
    assert {again.name(i) for i in range(len(again))} == {name for name in names[0] if not name.endswith("/00.png")}
    with pytest.raises(ConfigError, match="share"):
        Folder(path=str(tmp_path), share=(0.5, 0.5))


def test_variables_in_paths_are_expanded_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    monkeypatch.setenv("SOME_IMAGES", str(tmp_path))
    assert len(Folder(path="${SOME_IMAGES}")) == 1
    monkeypatch.delenv("SOME_IMAGES")
    with pytest.raises(ConfigError, match="SOME_IMAGES is not set"):
        Folder(path="${SOME_IMAGES}/x")
