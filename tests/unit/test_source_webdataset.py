"""WebDataset shards: random access, local and remote; bad shards and images are named and counted."""

import functools
import http.server
import io
import json
import logging
import os
import pickle
import random
import socket
import tarfile
import threading

import pytest
import torch

from agglo.config import build
from agglo.data.loader import Loader
from agglo.data.views import Partition
from agglo.recipe import Views
from agglo.sources import _shards
from agglo.sources._paths import braces
from agglo.sources.base import SourceError
from agglo.sources.webdataset import WebDataset
from agglo.types import ConfigError, ImageError, MissingExtraError
from support.datasets import jpeg, names


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("AGGLO_CACHE", str(folder))
    monkeypatch.setattr(_shards, "PAUSE", 0.0)
    return folder


def write(path, members, format=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(first, count):
    members = {}
    for number in range(first, first + count):
        members[f"{number:06d}.jpg"] = jpeg(number)
        members[f"{number:06d}.json"] = json.dumps({"number": number}).encode()
        members[f"{number:06d}.seg.png"] = b"not an image"
    return members


@pytest.fixture
def shards(tmp_path):
    return [write(tmp_path / "data" / f"shard-{k:03d}.tar", samples(10 * k, 4 + k)) for k in range(3)]


EXPECTED = [f"shard-{k:03d}/{10 * k + i:06d}.jpg" for k in range(3) for i in range(4 + k)]


@pytest.mark.parametrize("pattern", ["shard-{000..002}.tar", "*.tar", "", "shard-00{0,1,2}.tar", "shard-00[0-2].tar"])
def test_shards_by_braces_glob_and_folder(shards, pattern):
    source = WebDataset(shards=str(shards[0].parent / pattern))
    assert names(source) == EXPECTED
    assert len(source) == 15
    assert source.encoded(4) == jpeg(10)
    assert source.read(14).size == (40, 30)
    assert source.name(-1) == EXPECTED[-1]
    with pytest.raises(IndexError):
        source.name(15)


def test_list_of_shards_keeps_its_order_without_duplicates(shards, monkeypatch):
    monkeypatch.setenv("SHARDS", str(shards[0].parent))
    source = WebDataset(shards=["${SHARDS}/shard-001.tar", "${SHARDS}/*.tar"])
    assert names(source)[:6] == [*EXPECTED[4:9], EXPECTED[0]]
    assert len(source) == 15
    assert len(build("sources", {"kind": "webdataset", "shards": str(shards[0])})) == 4


def test_braces_expand_as_in_a_shell():
    assert braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert braces("{3..1}") == ["3", "2", "1"]
    assert braces("{a,b{1,2}}-{x,y}") == ["a-x", "a-y", "b1-x", "b1-y", "b2-x", "b2-y"]
    assert braces("{single}{}") == ["{single}{}"]
    assert braces("{a,}b") == ["ab", "b"]
    with pytest.raises(ConfigError, match=r"more than 1,000,000 paths"):
        braces("{0..99999999}")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the package leaves files open
def test_same_images_as_the_webdataset_package(tmp_path):
    package = pytest.importorskip("webdataset")
    path = tmp_path / "made.tar"
    with package.TarWriter(str(path)) as sink:
        for number in range(5):
            sink.write({"__key__": f"folder/{number:04d}", "jpg": jpeg(number), "cls": number})
    source = WebDataset(shards=str(path))
    reference = list(package.WebDataset(str(path), shardshuffle=False))
    assert [f"made/{sample['__key__']}.jpg" for sample in reference] == names(source)
    assert [sample["jpg"] for sample in reference] == [source.encoded(i) for i in range(5)]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_unusual_names(tmp_path, format):
    long = "deep/" * 40 + "x" * 120 + ".JPG"
    members = {long: jpeg(0), "ä/ö.Jpeg": jpeg(1), "a.b.jpg": b"", "folder/jpg": b""}
    source = WebDataset(shards=str(write(tmp_path / "t.tar", members, format)))
    assert names(source) == [f"t/{long}", "t/ä/ö.Jpeg"]
    assert source.encoded(1) == jpeg(1)


def test_extension_is_all_that_follows_the_first_dot(shards, tmp_path):
    source = WebDataset(shards=str(shards[0]), extensions=("SEG.png",))
    assert names(source)[0] == "shard-000/000000.seg.png"
    odd = write(tmp_path / "odd.tar", {"img.1.jpg": jpeg(0), "img.2.jpg": jpeg(1)})
    with pytest.raises(
        ConfigError, match=r"no image in 1 shards; searched for .*found 1 \.1\.jpg.*first dot.*extensions"
    ):
        WebDataset(shards=str(odd))


def test_shards_with_equal_file_names_get_distinct_names(tmp_path):
    paths = [str(write(tmp_path / part / "000.tar", {"a.jpg": jpeg(0)})) for part in ("x", "y")]
    assert names(WebDataset(shards=paths)) == ["x/000/a.jpg", "y/000/a.jpg"]


def test_index_is_built_once_and_rebuilt_when_the_shard_changes(shards, monkeypatch, cache):
    assert len(WebDataset(shards=str(shards[1]))) == 5
    with monkeypatch.context() as patch:
        patch.setattr(_shards, "scan", lambda *a: pytest.fail("indexed again"))
        again = WebDataset(shards=str(shards[1]))
        assert names(again) == EXPECTED[4:9]
    write(shards[1], samples(50, 2))
    assert names(WebDataset(shards=str(shards[1]))) == ["shard-001/000050.jpg", "shard-001/000051.jpg"]
    with pytest.raises(SourceError, match=r"shard-001\.tar changed while in use; restart to index it again"):
        again.encoded(0)
    shards[1].unlink()
    with pytest.raises(SourceError, match=r"shard-001\.tar cannot be read .*restore it and resume"):
        again.encoded(0)


def test_damaged_index_is_rebuilt(shards, cache):
    WebDataset(shards=str(shards[0]))
    (file,) = (cache / "indices").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    assert names(WebDataset(shards=str(shards[0]))) == EXPECTED[:4]


def test_sources_pickle(shards, tmp_path, monkeypatch):
    source = pickle.loads(pickle.dumps(WebDataset(shards=str(shards[0].parent))))
    assert names(source) == EXPECTED
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AGGLO_CACHE", str(tmp_path / "file"))  # no index can be cached
    source = pickle.loads(pickle.dumps(WebDataset(shards=str(shards[0].parent))))
    assert source.encoded(4) == jpeg(10)


# ---------------------------------------------------------------------------------------------------- bad shards


def test_truncated_shard_yields_its_complete_images(shards, caplog):
    whole = shards[1].read_bytes()
    offset = WebDataset(shards=str(shards[1]))._at(3)[1].columns["offset"][3]
    for cut, images in ((int(offset) + 100, 3), (int(offset) - 300, 3), (int(offset) - 512, 3)):
        shards[1].write_bytes(whole[:cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING, "agglo"):
            source = WebDataset(shards=str(shards[0].parent))
        assert len(source) == 4 + images + 6
        assert list(source.damaged) == [str(shards[1])]
        assert "truncated" in source.damaged[str(shards[1])]
        assert "1 of 3 shards used in part" in caplog.text and "shard-001.tar" in caplog.text
        assert all(source.read(i).size == (40, 30) for i in range(len(source)))
    shards[1].write_bytes(whole[: int(offset) + 100])
    assert (
        f"{len(jpeg(13)) - 100} bytes of its last member are missing"
        in WebDataset(shards=str(shards[1])).damaged[str(shards[1])]
    )
    WebDataset(shards=str(shards[1]))
    assert WebDataset(shards=str(shards[1])).damaged  # reported for a cached index too


def test_garbage_in_the_middle_is_detected(shards):
    data = bytearray(shards[0].read_bytes())
    at = int(WebDataset(shards=str(shards[0]))._at(2)[1].columns["offset"][2]) - 512
    data[at : at + 512] = b"\x55" * 512
    shards[0].write_bytes(data)
    source = WebDataset(shards=str(shards[0]))
    assert len(source) == 2
    assert f"is damaged: no valid member header at byte {at}" in source.damaged[str(shards[0])]


BAD = {
    "text": (b"this is not a tar file" * 100, "is not a tar file .2200 bytes, beginning with b'this is "),
    "empty": (b"", "is empty"),
    "gzip": (b"\x1f\x8b\x08" + bytes(600), "is compressed with gzip.*gunzip it once"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(600), "is compressed with zstd"),
    "short": (b"abc", "is not a tar file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_files_that_are_not_shards_are_skipped(shards, kind, caplog):
    data, why = BAD[kind]
    shards[1].write_bytes(data)
    with caplog.at_level(logging.WARNING, "agglo"):
        source = WebDataset(shards=str(shards[0].parent))
    assert names(source) == EXPECTED[:4] + EXPECTED[9:]
    assert "1 of 3 shards skipped" in caplog.text
    assert list(source.damaged) == [str(shards[1])]
    with pytest.raises(ConfigError, match=rf"no image in 1 shards.*shard-001\.tar {why}"):
        WebDataset(shards=str(shards[1]))


def test_empty_archive_is_not_damaged_but_has_no_images(tmp_path):
    path = write(tmp_path / "none.tar", {})
    with pytest.raises(ConfigError, match=r"no image in 1 shards; searched for [^;]*$"):
        WebDataset(shards=str(path))


def test_missing_shards_are_named_and_counted(shards):
    with pytest.raises(ConfigError, match=r"2 of 5 shards do not exist: .*shard-003\.tar, .*shard-004\.tar"):
        WebDataset(shards=str(shards[0].parent / "shard-{000..004}.tar"))
    with pytest.raises(ConfigError, match="no shard matches"):
        WebDataset(shards=str(shards[0].parent / "*.tgz"))
    with pytest.raises(ConfigError, match="not run"):
        WebDataset(shards="pipe:cat x.tar")
    with pytest.raises(ConfigError, match="unknown protocol nonsense://"):
        WebDataset(shards="nonsense://x.tar")


def test_missing_package_is_named(monkeypatch):
    def absent(protocol):
        raise ImportError("Install s3fs to access S3")

    import fsspec

    monkeypatch.setattr(fsspec, "filesystem", absent)
    _shards._connected.cache_clear()
    with pytest.raises(MissingExtraError, match=r"s3:// shards need .* pip install s3fs"):
        WebDataset(shards="s3://bucket/{0..3}.tar")
    with pytest.raises(MissingExtraError, match=r"pip install .*\[data\]"):
        WebDataset(shards="https://host/0.tar")
    _shards._connected.cache_clear()


def test_corrupt_image_is_skipped_named_and_counted(tmp_path):
    members = {f"{i}.jpg": jpeg(i) for i in range(6)} | {"2.jpg": jpeg(2)[:300], "4.jpg": b"nothing"}
    source = WebDataset(shards=str(write(tmp_path / "t.tar", members)))
    with pytest.raises(ImageError, match=r"^t/2\.jpg: truncated"):
        source.read(2)
    loader = Loader([source], None, [Partition([16], 4)], Views(), workers=0)
    batches = list(loader.iterate(0, 6))
    assert sorted(loader.skipped) == ["t/2.jpg", "t/4.jpg"]
    assert not {n for b in batches for n in b.names} & set(loader.skipped)


# ---------------------------------------------------------------------------------------------------- remote


@pytest.fixture
def remote(shards):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in shards:
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    _shards._connected.cache_clear()
    yield memory
    memory.rm("/bucket", recursive=True)
    _shards._connected.cache_clear()


@pytest.mark.parametrize("pattern", ["memory://bucket/shard-{000..002}.tar", "memory://bucket/*.tar"])
def test_remote_shards_are_read_by_range(remote, pattern, monkeypatch):
    source = WebDataset(shards=pattern)
    assert names(source) == EXPECTED
    requests = []
    cat = type(remote).cat_file
    monkeypatch.setattr(type(remote), "cat_file", lambda s, p, **k: requests.append(k) or cat(s, p, **k))
    assert [source.encoded(i) for i in (14, 0, 4)] == [jpeg(25), jpeg(0), jpeg(10)]
    assert [k["end"] - k["start"] for k in requests] == [len(jpeg(n)) for n in (25, 0, 10)]
    assert pickle.loads(pickle.dumps(source)).encoded(4) == jpeg(10)


def test_remote_index_is_cached(remote, monkeypatch):
    WebDataset(shards="memory://bucket/*.tar")
    monkeypatch.setattr(_shards, "scan", lambda *a: pytest.fail("indexed again"))
    assert len(WebDataset(shards="memory://bucket/*.tar")) == 15


def test_network_errors_are_retried_and_skip_no_image(remote, monkeypatch):
    source = WebDataset(shards="memory://bucket/*.tar")
    cat, failures = type(remote).cat_file, [0]

    def flaky(self, path, **options):
        failures[0] += 1
        if failures[0] % 3:
            raise TimeoutError("slow")
        return cat(self, path, **options)

    monkeypatch.setattr(type(remote), "cat_file", flaky)
    assert source.encoded(0) == jpeg(0)

    def gone(self, path, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(type(remote), "cat_file", gone)
    loader = Loader([source], None, [Partition([16], 4)], Views(), workers=1)
    with pytest.raises(
        SourceError, match=r"memory:///?bucket/shard-.* after 4 attempts .*no route to host.*check the network"
    ):
        list(loader.iterate(0, 2))
    assert not loader.skipped


def test_remote_shards_are_copied_up_to_keep_gb(remote, cache, monkeypatch, shards):
    sizes = [path.stat().st_size for path in shards]
    source = WebDataset(shards="memory://bucket/*.tar", keep_gb=(sizes[0] + sizes[1]) / 1e9)
    monkeypatch.setattr(type(remote), "cat_file", lambda *a, **k: b"")
    assert [source.encoded(i) for i in (0, 5)] == [jpeg(0), jpeg(11)]
    with pytest.raises(SourceError, match="does not support range requests, or the file has changed"):
        source.encoded(10)
    copies = sorted(p.stat().st_size for p in (cache / "indices").glob("*.tar"))
    assert copies == sorted(sizes[:2])
    monkeypatch.setattr(type(remote), "get_file", lambda *a, **k: pytest.fail("copied again"))
    assert names(WebDataset(shards="memory://bucket/*.tar", keep_gb=(sizes[0] + sizes[1]) / 1e9)) == EXPECTED


def test_full_disk_falls_back_to_remote_reads(remote, cache, monkeypatch, caplog):
    monkeypatch.setattr(_shards.shutil, "disk_usage", lambda p: type("U", (), {"free": 10})())
    with caplog.at_level(logging.WARNING, "agglo"):
        source = WebDataset(shards="memory://bucket/*.tar", keep_gb=1)
    assert "is not kept" in caplog.text and source.encoded(0) == jpeg(0)
    assert not list((cache / "indices").glob("*.tar"))


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server with range requests."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path, span = self.translate_path(self.path), self.headers.get("Range")
        if span is None or not os.path.isfile(path):
            return super().do_GET()
        with open(path, "rb") as file:
            data = file.read()
        start, _, end = span.removeprefix("bytes=").partition("-")
        part = data[int(start) : int(end) + 1 if end else None]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)


def test_shards_on_a_web_server(shards):
    pytest.importorskip("aiohttp")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Ranges, directory=str(shards[0].parent))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        source = WebDataset(shards=base + "/shard-{000..002}.tar")
        assert names(source) == EXPECTED
        assert source.encoded(9) == jpeg(20)
        with pytest.raises(ConfigError, match=r"1 of 1 shards do not exist: http://127"):
            WebDataset(shards=base + "/absent.tar")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    with pytest.raises(SourceError, match="cannot be reached after 4 attempts"):
        source.encoded(0)


class FailingServer(http.server.BaseHTTPRequestHandler):
    """Responds with the status code in the path."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.send_error(int(self.path[1:4]))

    def do_HEAD(self):
        self.do_GET()


def test_unreachable_server_is_not_a_missing_shard(monkeypatch):
    pytest.importorskip("aiohttp")
    pauses = []
    monkeypatch.setattr(_shards.time, "sleep", pauses.append)
    with socket.socket() as bound:  # not listening: the port is reserved and connections are refused
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/0.tar"
        with pytest.raises(
            SourceError, match=rf"{url} cannot be reached after 4 attempts \(ClientConnect.*check the network"
        ):
            WebDataset(shards=url)
    assert len(pauses) == 3


@pytest.mark.parametrize(
    ("status", "kind", "why"),
    [
        (404, ConfigError, "1 of 1 shards do not exist"),
        (403, SourceError, "access is denied .*credentials"),
        (503, SourceError, "cannot be reached after 4 attempts .*503"),
    ],
)
def test_http_status_decides_the_error(status, kind, why):
    pytest.importorskip("aiohttp")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FailingServer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with pytest.raises(kind, match=why):
            WebDataset(shards=f"http://127.0.0.1:{server.server_port}/{status}.tar")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# ---------------------------------------------------------------------------------------------------- in training


def test_local_remote_and_resumed_batches_are_equal(remote, shards):
    partitions = [Partition([16, 24], batch=5)]

    def batches(where, start, workers):
        where = str(shards[0].parent) if where == "here" else where
        loader = Loader([WebDataset(shards=where)], None, partitions, Views(), 3, workers, cache_mb=0)
        return list(loader.iterate(start, 7))

    straight = batches("here", 0, 0)
    for where, start, workers in (
        (str(shards[0].parent), 0, 1),
        ("memory://bucket/*.tar", 0, 2),
        (str(shards[0].parent), 3, 2),
    ):
        for a, b in zip(batches(where, start, workers), straight[start:], strict=True):
            assert torch.equal(a.images, b.images)
            assert (a.names, a.views) == (b.names, b.views)


def test_concurrent_reads(shards):
    source = WebDataset(shards=str(shards[0].parent))
    wanted = [source.encoded(i) for i in range(15)]
    wrong = []

    def work(seed):
        order = random.Random(seed).choices(range(15), k=60)
        wrong.extend(i for i in order if source.encoded(i) != wanted[i])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_links_have_the_bytes_of_their_targets(tmp_path, caplog):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (("a/1.jpg", jpeg(1)), ("blob", jpeg(2))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        archive.addfile(link("a/hard.jpg", "a/1.jpg", tarfile.LNKTYPE))
        archive.addfile(link("b/soft.jpg", "../a/1.jpg"))
        archive.addfile(link("chain.jpg", "step"))
        archive.addfile(link("step", "blob"))
        archive.addfile(link("gone.jpg", "/etc/nothing.jpg"))
        archive.addfile(link("loop.jpg", "loop.jpg"))
    source = WebDataset(shards=str(path))
    assert names(source) == ["t/a/1.jpg", "t/a/hard.jpg", "t/b/soft.jpg", "t/chain.jpg"]
    assert [source.encoded(i) for i in range(4)] == [jpeg(1), jpeg(1), jpeg(1), jpeg(2)]
    assert "2 links without a target" in caplog.text


def test_joined_archives_are_read_to_the_end(shards, tmp_path, caplog):
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(shard.read_bytes() for shard in shards) + bytes(2_000_000))
    source = WebDataset(shards=str(joined))
    assert names(source) == [f"joined/{name.partition('/')[2]}" for name in EXPECTED]
    assert source.encoded(14) == jpeg(25)
    assert "damaged" not in caplog.text
    joined.write_bytes(joined.read_bytes() + b"no archive" * 100)
    assert len(WebDataset(shards=str(joined))) == 15
    assert "behind its end marker, are not an archive" in caplog.text


def test_members_that_are_left_out_are_counted_and_named(tmp_path, caplog):
    members = {"1.5_cat.jpg": jpeg(0), "1.7_dog.jpg": jpeg(1), "a.jpg": jpeg(2), "a.heic": b"", "a.json": b"{}"}
    path = write(tmp_path / "t.tar", members)
    assert names(WebDataset(shards=str(path))) == ["t/a.jpg"]
    assert "left out 3 other members of 1 shards: 1 .5_cat.jpg, 1 .7_dog.jpg, 1 .heic" in caplog.text
    caplog.clear()
    WebDataset(shards=str(path), extensions=("jpg",))  # .heic is left out on purpose, the dots hardly
    assert "left out 2 other members" in caplog.text
    caplog.clear()
    assert len(WebDataset(shards=str(path), extensions=("jpg", "5_cat.jpg", "7_dog.jpg"))) == 3
    assert not caplog.text
    with tarfile.open(path, "a") as archive:
        for name, kind in (("b.jpg", tarfile.FIFOTYPE), ("c.jpg", tarfile.CHRTYPE), ("d.jpg", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type = kind
            archive.addfile(member)
    assert len(WebDataset(shards=str(path), extensions=("jpg", "5_cat.jpg", "7_dog.jpg"))) == 3
    assert "left out 2 other members of 1 shards: 2 pipes or devices" in caplog.text


def test_existing_shards_are_not_patterns(tmp_path):
    folder = tmp_path / "set[1]*"
    path = write(folder / "a{1,2}?.tar", {"a.jpg": jpeg(0)})
    assert len(WebDataset(shards=str(path))) == 1
    assert len(WebDataset(shards=str(folder))) == 1


def test_folder_of_shards_names_compressed_ones_and_skips_pipes(shards, caplog):
    folder = shards[0].parent
    os.mkfifo(folder / "pipe.tar")
    shards[0].rename(folder / "shard-000.TAR")
    with tarfile.open(folder / "more.tar.gz", "w:gz"):
        pass
    assert len(WebDataset(shards=str(folder))) == 15
    assert "more.tar.gz is compressed with gzip" in caplog.text
    with pytest.raises(ConfigError, match=r"pipe\.tar is not a regular file"):
        WebDataset(shards=str(folder / "pipe.tar"))


def test_member_names_that_are_not_utf8_are_escaped(tmp_path):
    source = WebDataset(shards=str(write(tmp_path / "t.tar", {"caf\udce9.jpg": jpeg(0)}, tarfile.GNU_FORMAT)))
    assert names(source) == ["t/caf\\udce9.jpg"]
    assert source.encoded(0) == jpeg(0)
