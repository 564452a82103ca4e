"""Folders of many images: listed once, listed again when they change, held in no memory."""

import logging
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agglo.sources import _index, _progress, _walk
from agglo.sources._index import Table, Writer, place, read
from agglo.sources._progress import Tally
from agglo.sources.base import SourceError
from agglo.sources.folder import Folder
from agglo.types import ConfigError
from support.datasets import names


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("AGGLO_CACHE", str(folder))
    return folder


@pytest.fixture
def kept(monkeypatch):
    """Every listing is kept, as that of a large folder would be."""
    monkeypatch.setattr(_walk, "KEPT_FROM", 0)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def age(root, seconds=60):
    """As if nothing had changed for a while."""
    then = time.time_ns() - int(seconds * 1e9)
    for folder in [root, *(p for p in root.rglob("*") if p.is_dir())]:
        os.utime(folder, ns=(then, then))


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

    monkeypatch.setattr(_walk, "_walk", walk)


def test_names_come_in_the_order_of_their_paths(tree):
    got = names(Folder(path=str(tree)))
    assert got == sorted(got)
    assert len(got) == 8
    assert got[:3] == ["images/a-b/y.jpg", "images/a.b/z.jpg", "images/a/sub/q.jpeg"]


def test_order_holds_for_any_tree(tmp_path):
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


def test_a_kept_listing_is_used_until_a_folder_changes(tree, kept, monkeypatch):
    first = names(Folder(path=str(tree)))
    with monkeypatch.context() as patch:
        forbid(patch)
        again = Folder(path=str(tree))
        assert names(again) == first
        assert again._table.path is not None  # mapped, not held
        (tree / "b/2.jpg").write_bytes(b"other content")  # what stands in the files is not part of a listing
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


def test_a_folder_that_changed_a_moment_ago_is_not_trusted(tree, kept, monkeypatch):
    os.utime(tree / "b")  # a later change could bear the same modification time
    names(Folder(path=str(tree)))
    forbid(monkeypatch)
    with pytest.raises(AssertionError, match="listed again"):
        Folder(path=str(tree))


def test_listings_differ_by_what_was_asked(tree, kept):
    assert len(Folder(path=str(tree))) == 8
    assert len(Folder(path=str(tree), recursive=False)) == 1
    assert len(Folder(path=str(tree), extensions=("png",))) == 1
    halves = [names(Folder(path=str(tree), share=share)) for share in ((0, 0.5), (0.5, 1))] * 2
    assert halves[:2] == halves[2:]
    assert sorted(halves[0] + halves[1]) == names(Folder(path=str(tree)))


def test_small_folders_leave_nothing_behind(tree, cache):
    assert len(Folder(path=str(tree))) == 8
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_listing_is_made_anew(tree, kept, cache, damage):
    first = names(Folder(path=str(tree)))
    (file,) = (cache / "indices").iterdir()
    data = file.read_bytes()
    file.write_bytes({"cut": data[:-9], "garbage": data[:40] + data[41:], "empty": b""}[damage])
    assert names(Folder(path=str(tree))) == first
    assert read(file) is not None
    assert [p.name for p in (cache / "indices").iterdir()] == [file.name]  # nothing half written


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tree, kept, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AGGLO_CACHE", str(tmp_path / "file"))
    source = Folder(path=str(tree))
    assert len(source) == 8
    assert names(pickle.loads(pickle.dumps(source))) == names(source)


def test_a_failed_write_leaves_no_file(tree, kept, cache, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_index.os, "fsync", full)
    assert len(Folder(path=str(tree))) == 8
    assert list((cache / "indices").iterdir()) == []


def test_a_mapped_listing_pickles_as_its_path(tree, kept):
    source = Folder(path=str(tree))
    text = pickle.dumps(source)
    assert b"x.png" not in text
    copy = pickle.loads(text)
    assert names(copy) == names(source)
    source._table.path.unlink()
    with pytest.raises(SourceError, match="open its source again"):
        pickle.loads(text)


def test_a_folder_that_cannot_be_listed_is_said(tree, caplog, monkeypatch):
    scandir = os.scandir

    def fail(path):
        if str(path).rstrip("/").endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(_walk.os, "scandir", fail)
    with caplog.at_level(logging.WARNING, "agglo"):
        assert len(Folder(path=str(tree))) == 6
    assert "Permission denied" in caplog.text and "/b" in caplog.text


def test_errors_after_a_kept_listing(tree, kept):
    Folder(path=str(tree))
    with pytest.raises(ConfigError, match=r"none of its 8 images falls into share"):
        Folder(path=str(tree), share=(0.0, 1e-9))
    with pytest.raises(ConfigError, match=r"none of its 8 images falls into share"):
        Folder(path=str(tree), share=(0.0, 1e-9))  # the empty listing is kept too
    with pytest.raises(ConfigError, match="no image in"):
        Folder(path=str(tree), extensions=("bmp",))
    with pytest.raises(ConfigError, match="min_side"):
        Folder(path=str(tree), min_side=-1)


def test_tables_hold_what_was_put_in(tmp_path):
    rows = [(f"n{i}/ä{'x' * (i % 7)}", i * i, 2**40 + i) for i in range(5000)]
    for path in (None, tmp_path / "t"):
        with Writer("a", "b") as writer:
            for name, a, b in rows:
                writer.add(name, a=a, b=b)
            table = writer.finish({"fact": 1}, path)
        for one in (table, pickle.loads(pickle.dumps(table))):
            got = [(one.name(i), int(one.columns["a"][i]), int(one.columns["b"][i])) for i in range(len(one))]
            assert got == rows
            assert one.name(-1) == rows[-1][0]
            assert one.facts == {"fact": 1}
    with Writer("a") as writer:
        assert len(writer.finish({}, tmp_path / "none")) == 0
    assert read(tmp_path / "absent") is None
    assert isinstance(read(tmp_path / "none"), Table)


def test_names_that_are_no_text_survive(tmp_path):
    name = os.fsdecode(b"\xff\xfe.png")
    try:
        Image.new("RGB", (3, 3)).save(tmp_path / name, "PNG")
    except OSError:
        pytest.skip("this file system allows text only")
    source = Folder(path=str(tmp_path))
    assert source.file(0) == tmp_path / name
    assert source.read(0).size == (3, 3)


def test_places_lie_in_the_cache_folder(monkeypatch):
    assert place("x", 1) == Path(os.environ["AGGLO_CACHE"]) / "indices" / place("x", 1).name
    assert place("x", 1) != place("x", 2)
    monkeypatch.delenv("AGGLO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert place("x", 1).parent == Path("/somewhere/agglo/indices")


def test_progress_is_shown_once_a_count_takes_long(caplog, monkeypatch, capsys):
    with caplog.at_level(logging.INFO, "agglo"):
        quick = Tally("listing", "images")
        quick.add()
        quick.done()
        assert not caplog.records
        slow = Tally("listing", "images", total=3000, every=0.0)
        slow.add(1500)
        slow.done()
    assert "listing: 1,500 of 3,000 images" in caplog.text
    monkeypatch.setattr(_progress.sys.stderr, "isatty", lambda: True, raising=False)
    shown = Tally("listing", "images", every=0.0)
    shown.add(7)
    shown.done()
    assert capsys.readouterr().err.endswith("\rlisting: 7 images\n")
