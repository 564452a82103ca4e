"""The format of feature caches on disk: records are complete or absent, whatever happens to the writer."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from agglo.cache.records import (
    HEADER,
    Record,
    ShardReader,
    ShardWriter,
    index_file,
    inspect,
    key_of,
    shard_file,
    shard_numbers,
)
from agglo.types import AssetError


def payload(key: int, length: int = 300) -> bytes:
    """Bytes that belong to a key and to no other."""
    return np.random.Generator(np.random.Philox(key)).bytes(length)


def put(pen: ShardWriter, key: int, length: int = 300) -> None:
    pen.append(Record(key, key * 7 % 2**32, (3, 5)), [payload(key, length)])


def read(shelf: ShardReader, key: int) -> tuple[Record, bytes]:
    into = bytearray(shelf.locations[key].bytes)
    return shelf.read(key, memoryview(into)), bytes(into)


def check(folder: Path, keys, length: int = 300) -> None:
    shelf = ShardReader(folder)
    assert set(shelf.locations) == set(keys)
    for key in keys:
        record, data = read(shelf, key)
        assert record == Record(key, key * 7 % 2**32, (3, 5))
        assert data == payload(key, length)


def test_records_are_read_in_any_order_from_many_shards(tmp_path: Path) -> None:
    pen = ShardWriter(tmp_path, shard_bytes=1000)
    for key in range(1, 20):
        put(pen, key, 300 + key)
    pen.close()
    assert len(shard_numbers(tmp_path)) > 3
    assert index_file(tmp_path, 0).is_file()
    shelf = ShardReader(tmp_path)
    assert len(shelf) == 19
    for key in range(19, 0, -1):
        assert read(shelf, key)[1] == payload(key, 300 + key)
    assert inspect(tmp_path) == (19, [])


def test_writing_resumes(tmp_path: Path) -> None:
    for start in (1, 6, 11):
        pen = ShardWriter(tmp_path, shard_bytes=1500)
        assert pen.keys == set(range(1, start))
        for key in range(start, start + 5):
            put(pen, key)
        pen.close()
    check(tmp_path, range(1, 16))


@pytest.mark.parametrize("left", [1, HEADER.size - 1, HEADER.size, HEADER.size + 1, HEADER.size + 299])
def test_partial_record_is_ignored_and_truncated(tmp_path: Path, left: int) -> None:
    pen = ShardWriter(tmp_path)
    for key in (1, 2, 3):
        put(pen, key)
    pen.close()
    whole = 2 * (HEADER.size + 300)
    os.truncate(shard_file(tmp_path, 0), whole + left)
    check(tmp_path, (1, 2))
    assert inspect(tmp_path) == (2, [])  # what a kill leaves is not damage
    pen = ShardWriter(tmp_path)
    assert pen.lost == left and pen.keys == {1, 2}
    put(pen, 3)
    pen.close()
    check(tmp_path, (1, 2, 3))


def test_trailing_zeros_are_truncated(tmp_path: Path) -> None:
    """The file had its new length on the disk, its last bytes not."""
    pen = ShardWriter(tmp_path)
    put(pen, 1)
    put(pen, 2)
    pen.close()
    with shard_file(tmp_path, 0).open("r+b") as file:
        file.seek(HEADER.size + 300 + HEADER.size + 100)
        file.write(bytes(200))
    pen = ShardWriter(tmp_path)
    assert pen.keys == {1} and pen.lost == HEADER.size + 300
    pen.close()
    check(tmp_path, (1,))


def test_missing_index_is_written_later(tmp_path: Path) -> None:
    pen = ShardWriter(tmp_path, shard_bytes=700)
    for key in range(1, 8):
        put(pen, key)
    pen.close()
    index_file(tmp_path, 0).unlink()
    index_file(tmp_path, 1).with_suffix(".partial").write_bytes(b"half")
    check(tmp_path, range(1, 8))
    pen = ShardWriter(tmp_path, shard_bytes=700)
    assert pen.keys == set(range(1, 8)) and index_file(tmp_path, 0).is_file() and not [*tmp_path.glob("*.partial")]
    pen.close()
    check(tmp_path, range(1, 8))


def test_inconsistent_index_is_ignored(tmp_path: Path) -> None:
    pen = ShardWriter(tmp_path, shard_bytes=700)
    for key in range(1, 5):
        put(pen, key)
    pen.close()
    body = bytearray(index_file(tmp_path, 0).read_bytes())
    body[0] ^= 1  # another key
    index_file(tmp_path, 0).write_bytes(body)
    check(tmp_path, range(1, 5))


@pytest.mark.parametrize("byte", [HEADER.size + 5, HEADER.size + 300 + 9, HEADER.size + 300 + HEADER.size + 299])
def test_flipped_bit_is_detected_by_read_and_inspect(tmp_path: Path, byte: int) -> None:
    pen = ShardWriter(tmp_path, shard_bytes=3 * (HEADER.size + 300))
    for key in range(1, 6):
        put(pen, key)
    pen.close()
    data = bytearray(shard_file(tmp_path, 0).read_bytes())
    data[byte] ^= 4
    shard_file(tmp_path, 0).write_bytes(data)
    victim = 1 + byte // (HEADER.size + 300)
    shelf = ShardReader(tmp_path)
    with pytest.raises(AssetError, match=r"000000\.shard.*byte \d+.*delete that file.*agglo cache"):
        read(shelf, victim)
    assert read(shelf, 5)[1] == payload(5)
    whole, damages = inspect(tmp_path)
    assert [damage.file.name for damage in damages] == ["000000.shard"]
    assert whole == 4 and damages[0].intact == 2
    shard_file(tmp_path, 0).unlink()  # the next move
    pen = ShardWriter(tmp_path, shard_bytes=3 * (HEADER.size + 300))
    assert pen.keys == {4, 5}
    for key in (1, 2, 3):
        put(pen, key)
    pen.close()
    check(tmp_path, range(1, 6))
    assert inspect(tmp_path) == (5, [])


def test_truncated_full_shard_is_damage(tmp_path: Path) -> None:
    pen = ShardWriter(tmp_path, shard_bytes=2 * (HEADER.size + 300))
    for key in range(1, 4):
        put(pen, key)
    pen.close()
    os.truncate(shard_file(tmp_path, 0), HEADER.size + 310)
    assert [damage.file.name for damage in inspect(tmp_path)[1]] == ["000000.shard"]
    assert 2 not in ShardReader(tmp_path)  # its index is of a longer file


def test_a_record_of_another_length_is_refused(tmp_path: Path) -> None:
    pen = ShardWriter(tmp_path)
    put(pen, 1)
    pen.close()
    with pytest.raises(AssetError, match="300 bytes instead of 299"):
        ShardReader(tmp_path).read(1, memoryview(bytearray(299)))


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pen = ShardWriter(tmp_path)
    put(pen, 1)
    real, calls = os.pwrite, []

    def full(file: int, data, offset: int) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(file, data[:100], offset)  # what still fits is written, as the kernel does it

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        put(pen, 2)
    monkeypatch.setattr(os, "pwrite", real)
    assert len(calls) == 2 and shard_file(tmp_path, 0).stat().st_size == HEADER.size + 300
    assert pen.keys == {1}
    put(pen, 3)
    pen.close()
    check(tmp_path, (1, 3))


@pytest.mark.processes
def test_file_size_limit_leaves_intact_records(tmp_path: Path) -> None:
    """A real short write: the process may not write files beyond 2000 bytes."""
    code = (
        "import signal, resource, sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from test_cache_records import ShardWriter, put\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "pen = ShardWriter(Path(sys.argv[1]))\n"
        "try:\n    [put(pen, key) for key in range(1, 50)]\n"
        "except OSError as error:\n    print(error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, Path(__file__).parent], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "27", done.stderr  # EFBIG
    check(tmp_path, range(1, 2000 // (HEADER.size + 300) + 1))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 2000


@pytest.mark.processes
def test_readers_see_only_intact_records_during_writes_and_kills(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from test_cache_records import ShardWriter, put\n"
        "pen = ShardWriter(Path(sys.argv[1]), shard_bytes=200_000)\n"
        "for key in range(1, 4000):\n    key in pen or put(pen, key, 20_000)\n"
    )
    shelf, kills, seen = ShardReader(tmp_path), 0, 0
    while kills < 3:
        before = len(shelf)
        writer = subprocess.Popen([sys.executable, "-c", code, tmp_path, Path(__file__).parent])
        until = time.monotonic() + 30
        while len(shelf) < before + 20 and time.monotonic() < until:
            shelf.refresh()
            for key in list(shelf.locations)[-3:]:
                assert read(shelf, key)[1] == payload(key, 20_000)
                seen += 1
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        kills += 1
    assert seen > 20
    assert inspect(tmp_path)[1] == []
    shelf.refresh()
    assert sorted(shelf.locations) == list(range(1, len(shelf) + 1))


def test_reader_is_thread_safe(tmp_path: Path) -> None:
    pen = ShardWriter(tmp_path, shard_bytes=2000)
    for key in range(1, 60):
        put(pen, key)
    pen.close()
    shelf, wrong = ShardReader(tmp_path), []

    def work(seed: int) -> None:
        order = map(int, np.random.default_rng(seed).permutation(59) + 1)
        wrong.extend(key for key in order if read(shelf, key)[1] != payload(key))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_invalid_header_is_damage_in_the_last_shard_too(tmp_path: Path) -> None:
    pen = ShardWriter(tmp_path)
    for key in (1, 2, 3):
        put(pen, key)
    pen.close()
    data = bytearray(shard_file(tmp_path, 0).read_bytes())
    data[HEADER.size + 300] ^= 1
    shard_file(tmp_path, 0).write_bytes(data)
    whole, damages = inspect(tmp_path)
    assert whole == 1 and damages[0].offset == HEADER.size + 300


def test_finished_folder_can_be_extended(tmp_path: Path) -> None:
    for start in (1, 4):
        pen = ShardWriter(tmp_path)
        for key in range(start, start + 3):
            put(pen, key)
        pen.finish()
        pen.close()
    assert shard_numbers(tmp_path) == [0, 1] and index_file(tmp_path, 1).is_file()
    ShardWriter(tmp_path).finish()
    assert shard_numbers(tmp_path) == [0, 1]  # nothing was added: no empty file
    check(tmp_path, range(1, 7))
    os.truncate(shard_file(tmp_path, 1), HEADER.size + 310)
    assert [damage.file.name for damage in inspect(tmp_path)[1]] == ["000001.shard"]


def test_keys_differ_by_name_crop_and_size() -> None:
    keys = {
        key_of(name, crop, (size, size)) for name in ("a/0.png", "a/1.png", "a/0.pn") for crop in range(12)
        for size in (16, 112, 224)
    }  # fmt: skip
    assert len(keys) == 3 * 12 * 3
    assert key_of("a/0.png", 0, (16, 32)) == 5311942198561632650, "caches that exist must stay readable"
