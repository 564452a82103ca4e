"""Large folders: the listing is cached on disk, memory-mapped, and repeated when a folder changes."""

import logging
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agglo.sources import _index, folder
from agglo.sources._index import ProgressCounter, Table, TableWriter, index_path, read
from agglo.sources.base import SourceError
from agglo.sources.folder import Folder
from agglo.types import ConfigError, ImageError
from support.datasets import names


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("AGGLO_CACHE", str(path))
    return path


@pytest.fixture
def cached(monkeypatch):
    """Cache every listing, as for a large folder."""
    monkeypatch.setattr(folder, "_CACHED_FROM", 0)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def age(root, seconds=60):
    """Set modification times in the past."""
    then = time.time_ns() - int(seconds * 1e9)
    for path in [root, *(p for p in root.rglob("*") if p.is_dir())]:
        os.utime(path, ns=(then, then))


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "images"
    for name in ("b/2.jpg", "b/10.jpg", "a/x.png", "a-b/y.jpg", "a.b/z.jpg", "a/sub/q.jpeg", "top.jpg", "é/ü.jpg"):
        touch(root / name)
    touch(root / "a/notes.txt")
    age(root)
    return root


def forbid(monkeypatch):
    def walk(*args):
        raise AssertionError("the folder was listed again")

    monkeypatch.setattr(folder._Walk, "names", walk)


def test_names_are_sorted_by_path(tree):
    got = names(Folder(path=str(tree)))
    assert got == sorted(got)
    assert len(got) == 8
    assert got[:3] == ["images/a-b/y.jpg", "images/a.b/z.jpg", "images/a/sub/q.jpeg"]


def test_random_trees_are_sorted_by_path(tmp_path):
    rng = np.random.default_rng(0)
    letters = list("ab-./_0é")
    root = tmp_path / "random"
    made = set()
    for _ in range(150):
        parts = ["x" + "".join(rng.choice([c for c in letters if c != "/"], 2)) for _ in range(rng.integers(1, 4))]
        path = root.joinpath(*parts[:-1], parts[-1] + ".png")
        if not any(p.is_file() for p in path.parents if p != root.parent) and not path.is_dir():
            touch(path)
            made.add("random/" + path.relative_to(root).as_posix())
    assert names(Folder(path=str(root))) == sorted(made)


def test_cached_listing_is_used_until_a_folder_changes(tree, cached, monkeypatch):
    first = names(Folder(path=str(tree)))
    with monkeypatch.context() as patch:
        forbid(patch)
        again = Folder(path=str(tree))
        assert names(again) == first
        assert again._table.path is not None  # memory-mapped
        (tree / "b/2.jpg").write_bytes(b"other content")  # file contents do not invalidate a listing
        assert names(Folder(path=str(tree))) == first
    changes = (
        lambda: touch(tree / "b/3.jpg"),
        lambda: (tree / "b/3.jpg").unlink(),
        lambda: (tree / "a").rename(tree / "c"),
        lambda: touch(tree / "new/deep/4.jpg"),
        lambda: (tree / "new/deep/4.jpg").rename(tree / "new/deep/5.jpg"),
    )
    for change in changes:
        age(tree)
        names(Folder(path=str(tree)))
        change()
        now = names(Folder(path=str(tree)))
        assert now == sorted(
            f"images/{p.relative_to(tree).as_posix()}"
            for p in tree.rglob("*.*")
            if p.suffix in (".jpg", ".png", ".jpeg")
        )


def test_listing_of_a_recently_changed_folder_is_not_reused(tree, cached, monkeypatch):
    os.utime(tree / "b")  # a later change could have the same modification time
    names(Folder(path=str(tree)))
    forbid(monkeypatch)
    with pytest.raises(AssertionError, match="listed again"):
        Folder(path=str(tree))


def test_listings_are_cached_per_options(tree, cached):
    assert len(Folder(path=str(tree))) == 8
    assert len(Folder(path=str(tree), recursive=False)) == 1
    assert len(Folder(path=str(tree), extensions=("png",))) == 1
    halves = [names(Folder(path=str(tree), share=share)) for share in ((0, 0.5), (0.5, 1))] * 2
    assert halves[:2] == halves[2:]
    assert sorted(halves[0] + halves[1]) == names(Folder(path=str(tree)))


def test_small_folders_are_not_cached(tree, cache):
    assert len(Folder(path=str(tree))) == 8
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_listing_is_rebuilt(tree, cached, cache, damage):
    first = names(Folder(path=str(tree)))
    (file,) = (cache / "indices").iterdir()
    data = file.read_bytes()
    file.write_bytes({"cut": data[:-9], "garbage": data[:40] + data[41:], "empty": b""}[damage])
    assert names(Folder(path=str(tree))) == first
    assert read(file) is not None
    assert [p.name for p in (cache / "indices").iterdir()] == [file.name]  # no temporary file left


def test_unwritable_cache_falls_back_to_memory(tree, cached, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AGGLO_CACHE", str(tmp_path / "file"))
    source = Folder(path=str(tree))
    assert len(source) == 8
    assert names(pickle.loads(pickle.dumps(source))) == names(source)


def test_failed_write_leaves_no_file(tree, cached, cache, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_index.os, "fsync", full)
    assert len(Folder(path=str(tree))) == 8
    assert list((cache / "indices").iterdir()) == []


def test_mapped_listing_pickles_as_its_path(tree, cached):
    source = Folder(path=str(tree))
    text = pickle.dumps(source)
    assert b"x.png" not in text
    copy = pickle.loads(text)
    assert names(copy) == names(source)
    source._table.path.unlink()
    with pytest.raises(SourceError, match="open the source again to rebuild it"):
        pickle.loads(text)


def test_folder_that_cannot_be_listed_is_logged(tree, caplog, monkeypatch):
    scandir = os.scandir

    def fail(path):
        if str(path).rstrip("/").endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(folder.os, "scandir", fail)
    with caplog.at_level(logging.WARNING, "agglo"):
        assert len(Folder(path=str(tree))) == 6
    assert "Permission denied" in caplog.text and "/b" in caplog.text


def test_errors_with_a_cached_listing(tree, cached):
    Folder(path=str(tree))
    with pytest.raises(ConfigError, match=r"share \[0\.0, 1e-09\] selects none of its 8 images"):
        Folder(path=str(tree), share=(0.0, 1e-9))
    with pytest.raises(ConfigError, match=r"share \[0\.0, 1e-09\] selects none of its 8 images"):
        Folder(path=str(tree), share=(0.0, 1e-9))  # the empty listing is cached too
    with pytest.raises(ConfigError, match="no image in"):
        Folder(path=str(tree), extensions=("bmp",))
    with pytest.raises(ConfigError, match="min_side"):
        Folder(path=str(tree), min_side=-1)


def test_tables_return_the_rows_written(tmp_path):
    rows = [(f"n{i}/ä{'x' * (i % 7)}", i * i, 2**40 + i) for i in range(5000)]
    for path in (None, tmp_path / "t"):
        with TableWriter("a", "b") as writer:
            for name, a, b in rows:
                writer.add(name, a=a, b=b)
            table = writer.finish({"fact": 1}, path)
        for one in (table, pickle.loads(pickle.dumps(table))):
            got = [(one.name(i), int(one.columns["a"][i]), int(one.columns["b"][i])) for i in range(len(one))]
            assert got == rows
            assert one.name(-1) == rows[-1][0]
            assert one.facts == {"fact": 1}
    with TableWriter("a") as writer:
        assert len(writer.finish({}, tmp_path / "none")) == 0
    assert read(tmp_path / "absent") is None
    assert isinstance(read(tmp_path / "none"), Table)


def test_non_utf8_names_round_trip(tmp_path):
    name = os.fsdecode(b"\xff\xfe.png")
    try:
        Image.new("RGB", (3, 3)).save(tmp_path / name, "PNG")
    except OSError:
        pytest.skip("this file system requires UTF-8 names")
    source = Folder(path=str(tmp_path))
    assert source.file(0) == tmp_path / name
    assert source.read(0).size == (3, 3)


def test_index_paths_are_in_the_cache_folder(monkeypatch):
    assert index_path("x", 1) == Path(os.environ["AGGLO_CACHE"]) / "indices" / index_path("x", 1).name
    assert index_path("x", 1) != index_path("x", 2)
    monkeypatch.delenv("AGGLO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert index_path("x", 1).parent == Path("/somewhere/agglo/indices")


def test_progress_is_shown_for_slow_counts(caplog, monkeypatch, capsys):
    with caplog.at_level(logging.INFO, "agglo"):
        quick = ProgressCounter("listing", "images")
        quick.add()
        quick.done()
        assert not caplog.records
        slow = ProgressCounter("listing", "images", total=3000, every=0.0)
        slow.add(1500)
        slow.done()
    assert "listing: 1,500 of 3,000 images" in caplog.text
    monkeypatch.setattr(_index.sys.stderr, "isatty", lambda: True, raising=False)
    shown = ProgressCounter("listing", "images", every=0.0)
    shown.add(7)
    shown.done()
    assert capsys.readouterr().err.endswith("\rlisting: 7 images\n")


def test_common_endings_are_read_and_others_are_counted(tmp_path, caplog):
    for name in ("a.jpg", "b.JFIF", "c.jpe", "d.jif", "e.heic", "f.heic", "g", "h.txt", "h.json", ".hidden.heic"):
        touch(tmp_path / "photos" / name)
    assert len(Folder(path=str(tmp_path / "photos"))) == 4
    assert "left out 3 other files" in caplog.text
    assert "2 .heic, 1 no ending; name the endings of images in `extensions`" in caplog.text
    caplog.clear()
    assert len(Folder(path=str(tmp_path / "photos"), extensions=(".heic",))) == 2
    assert not caplog.text


def test_left_out_files_are_named_again_from_a_cached_listing(tmp_path, cached, caplog):
    for name in ("a.jpg", "e.heic"):
        touch(tmp_path / "photos" / name)
    age(tmp_path / "photos")
    for _ in range(2):
        caplog.clear()
        Folder(path=str(tmp_path / "photos"))
        assert "1 .heic" in caplog.text


def test_pipes_are_left_out_and_broken_links_are_named(tmp_path, caplog):
    root = tmp_path / "photos"
    touch(root / "a.jpg")
    os.mkfifo(root / "pipe.jpg")
    (root / "device.jpg").symlink_to("/dev/zero")
    (root / "broken.jpg").symlink_to("nowhere.jpg")
    source = Folder(path=str(root))
    assert names(source) == ["photos/a.jpg", "photos/broken.jpg"]
    assert "2 pipes or devices" in caplog.text
    with pytest.raises(ImageError, match=r"photos/broken\.jpg: no such file"):
        source.read(1)
    with pytest.raises(ConfigError, match=r"pipe\.jpg is a pipe or a device"):
        Folder(path=str(root / "pipe.jpg"))


def test_existing_paths_are_taken_literally(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("~", "~nobody", "${NOT_SET}", "a[1]*", "$HOME"):
        touch(Path(name) / "1.jpg")
        assert names(Folder(path=name)) == [f"{name}/1.jpg"]
    monkeypatch.setenv("PHOTOS", str(tmp_path / "a[1]*"))
    assert names(Folder(path="${PHOTOS}")) == ["a[1]*/1.jpg"]


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    folder_name = os.fsencode(tmp_path / "photos") + b"/caf\xe9"
    try:
        os.makedirs(folder_name)
        with open(folder_name + b"/\xfc.png", "wb") as file:
            Image.new("RGB", (3, 2)).save(file, "PNG")
    except OSError:
        pytest.skip("this file system stores UTF-8 only")
    source = Folder(path=str(tmp_path / "photos"))
    assert names(source) == ["photos/caf\\udce9/\\udcfc.png"]
    assert source.label(0) == "caf\\udce9"
    assert source.read(0).size == (3, 2)
    assert source.file(0).is_file()
    source.name(0).encode()


def test_share_applies_to_a_single_file(tmp_path):
    touch(tmp_path / "a.jpg")
    value = folder._hash("a.jpg")
    assert len(Folder(path=str(tmp_path / "a.jpg"), share=(0.0, value + 0.01))) == 1
    with pytest.raises(ConfigError, match="selects none of its 1 images"):
        Folder(path=str(tmp_path / "a.jpg"), share=(0.0, value))
