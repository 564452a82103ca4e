"""Folders to vectors and back to images by text: values, order, bad images, files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from agglo.data.loader import evaluation_batches
from agglo.embedding import Embeddings, Hit, as_files, check_output, embed, embed_file, image_features, search
from agglo.evals._features import encode
from agglo.evals.base import EvalContext
from agglo.model.model import HeadConfig, Model
from agglo.types import ConfigError, StorageError

VIT = {"kind": "vit", "width": 32, "depth": 1, "heads": 2, "max_grid": 8}


class Echo(nn.Module):
    """A text tower with one fixed vector per text."""

    def __init__(self, known: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.known = known

    def encode(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([self.known[text] for text in texts])


def make_model(*, text: bool = True) -> Model:
    torch.manual_seed(0)
    head = HeadConfig({"kind": "mlp", "hidden": 16}, None, 8, None, text={"kind": "minilm"} if text else None)
    return Model(VIT, {"words": head}, preferred_size=64).eval()


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images of different shapes in two folders, and two that are none."""
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for index, size in enumerate([(40, 64), (64, 64), (100, 30), (1, 1), (16, 200)]):
        where = root / "sub" if index % 2 else root
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(where / f"{index}.png")
    (root / "2b.png").write_bytes((root / "2.png").read_bytes()[:80])
    (root / "sub" / "1b.jpg").write_bytes(b"")
    return root


def test_readable_images_are_embedded_in_order(model: Model, folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = embed(folder, model, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert [Path(name).relative_to(folder).as_posix() for name in found.names] == [
        "0.png",
        "2.png",
        "4.png",
        "sub/1.png",
        "sub/3.png",
    ]
    assert {Path(name).name for name in found.skipped} == {"2b.png", "1b.jpg"}
    assert all(Path(name).is_file() for name in [*found.names, *found.skipped])
    assert "0 bytes" in found.skipped[str(folder / "sub" / "1b.jpg")]
    assert found.summary.shape == (5, 32)
    assert found.size == (64, 64)
    assert seen[-1] == (7, 7)
    assert seen == sorted(seen)


def test_vectors_equal_the_model_on_the_centre_square(model: Model, folder: Path) -> None:
    found = embed(folder, model)
    square = folder / "sub" / "1.png"  # 64 x 64 already: no resampling between the file and the model
    with torch.no_grad():
        expected = model(square)
        aligned = model.encode_image(str(square))
    row = found.names.index(str(square))
    np.testing.assert_allclose(found.summary[row], expected.summary[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(found.aligned[row], aligned[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.aligned, axis=1), 1, atol=1e-5)


def test_embed_and_evals_encode_bit_identical_tensors(model: Model, folder: Path) -> None:
    inputs: list[torch.Tensor] = []
    handle = model.student.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    try:
        embed(folder, model, size=64)
        (embedded,), inputs[:] = list(inputs), []
        with pytest.warns(UserWarning, match="skipped an image"):
            encode(model, as_files(folder), 64, EvalContext(), want="summary")
        (evaluated,) = inputs
    finally:
        handle.remove()
    assert embedded.shape == (5, 3, 64, 64)
    assert torch.equal(embedded, evaluated)


def test_batch_size_does_not_change_vectors(model: Model, folder: Path) -> None:
    one, many = embed(folder, model, batch=1), embed(folder, model, batch=32)
    assert one.names == many.names
    assert one.skipped == many.skipped
    np.testing.assert_allclose(one.summary, many.summary, atol=1e-5)


def test_threads_read_ahead_and_change_nothing(folder: Path) -> None:
    """The same tensors and skips in the same order; at most two batches beyond the one in use are read."""
    source, reads = as_files(folder), []
    real = source.read
    source.read = lambda index: reads.append(index) or real(index)
    plain = list(evaluation_batches(source, 64, 2))
    for workers in (1, 3):
        batches = list(evaluation_batches(source, 64, 2, workers=workers))
        assert [(b.indices, b.skipped) for b in batches] == [(b.indices, b.skipped) for b in plain]
        assert all(torch.equal(a.images, b.images) for a, b in zip(batches, plain, strict=True))
    many = as_files(folder / "0.png")
    many._items *= 100
    reads.clear()
    read = many.read
    many.read = lambda index: reads.append(index) or read(index)
    batches = evaluation_batches(many, 64, 2, workers=2)
    next(batches)
    batches.close()
    assert max(reads) < 10


def test_lists_of_mixed_images_are_accepted(model: Model, folder: Path) -> None:
    path = folder / "sub" / "1.png"
    pil = Image.open(path)
    array = np.asarray(pil)
    tensor = torch.from_numpy(array.transpose(2, 0, 1).copy()).float() / 255
    found = embed([str(path), path, pil, array, tensor, "no such file.png", 3], model)
    assert len(found) == 5
    np.testing.assert_allclose(found.summary, found.summary[:1].repeat(5, 0), atol=1e-5)
    assert "no such file" in found.skipped["no such file.png"]
    assert "image 6" in found.skipped
    assert len(embed(tensor, model)) == len(embed(pil, model)) == 1
    assert len(embed(tensor[None].repeat(3, 1, 1, 1), model)) == 3


def test_training_mode_is_restored(folder: Path) -> None:
    model = make_model()
    still = embed(folder, model)
    model.train()
    np.testing.assert_array_equal(embed(folder, model).summary, still.summary)
    assert model.training


def test_non_finite_features_are_skipped(folder: Path) -> None:
    model = make_model()
    calm = model.student.forward

    def explode(images: torch.Tensor):
        features = calm(images)
        features.summary[1] = float("nan")
        return features

    model.student.forward = explode
    found = embed(folder, model)
    assert len(found) == 4
    assert "not finite" in found.skipped[str(folder / "2.png")]


def test_search_finds_the_matching_image(folder: Path) -> None:
    model = make_model()
    found = embed(folder, model)
    model._towers["words"] = Echo({"that one": torch.from_numpy(found.aligned[3])})
    hits = search(found, model, "that one", 3)
    assert hits[0] == Hit(found.names[3], pytest.approx(1, abs=1e-5))
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    by_hand = sorted(found.aligned @ found.aligned[3], reverse=True)[:3]
    np.testing.assert_allclose([hit.score for hit in hits], by_hand, atol=1e-6)
    assert len(search(found, model, "that one", 99)) == 5


def test_search_needs_a_text_tower(folder: Path) -> None:
    model = make_model(text=False)
    found = embed(folder, model)
    assert found.aligned is None
    assert list(found.columns()) == ["summary"]
    with pytest.raises(ConfigError, match="no text tower"):
        search(found, model, "cat")
    with pytest.raises(ConfigError, match="no text tower"):
        embed(folder, model, head="words")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 65}, r"multiple of 16.*64 or 80"),
        ({"size": 0}, "multiple of 16"),
        ({"batch": 0}, "at least 1"),
        ({"head": "word"}, "no head 'word'; those that have text towers: words"),
    ],
)
def test_bad_options_name_legal_values(model: Model, folder: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        embed(folder, model, **options)


def test_bad_searches(model: Model) -> None:
    found = Embeddings(("a",), np.zeros((1, 32), np.float32), None)
    with pytest.raises(ConfigError, match="empty"):
        search(found, model, "  ")
    with pytest.raises(ConfigError, match="k must be"):
        search(found, model, "cat", 0)
    with pytest.raises(ConfigError, match="embed the images again"):
        search(found, model, "cat")


def test_no_images_is_an_error(model: Model, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no images"):
        embed([], model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no image in"):
        embed(tmp_path / "empty", model)
    with pytest.raises(ConfigError, match="does not exist"):
        embed(tmp_path / "nowhere", model)
    with pytest.raises(ConfigError, match="can be read"):
        embed([folder / "2b.png"], model)


@pytest.mark.parametrize("ending", ["parquet", "npz"])
def test_saved_files_round_trip(model: Model, folder: Path, tmp_path: Path, ending: str) -> None:
    found = embed(folder, model)
    path = found.save(tmp_path / "new" / f"out.{ending}")
    if ending == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(path)
        assert table.column_names == ["path", "summary", "words"]
        assert str(table.schema.field("summary").type) == "fixed_size_list<element: float>[32]"
        columns = {name: np.array(table[name].to_pylist(), np.float32) for name in ("summary", "words")}
        names, facts = table["path"].to_pylist(), {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    else:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in ("summary", "words")}
            names, facts = file["path"].tolist(), json.loads(str(file["metadata"]))
    assert tuple(names) == found.names
    np.testing.assert_array_equal(columns["summary"], found.summary)
    np.testing.assert_array_equal(columns["words"], found.aligned)
    assert facts["agglo.size"] == "64x64"
    assert facts["agglo.head"] == "words"
    assert set(facts) == {"agglo.model", "agglo.size", "agglo.version", "agglo.head"}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_files_are_replaced_atomically_and_on_request(
    model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = embed(folder, model)
    path = found.save(tmp_path / "out.npz")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="--overwrite"):
        found.save(path)

    def fail(stream, **arrays: object) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="No space"):
        found.save(path, overwrite=True)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["out.npz"]
    for bad, message in (("out.csv", r"\.parquet or \.npz"), ("d.npz", "is a folder")):
        (tmp_path / "d.npz").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=message):
            check_output(tmp_path / bad, overwrite=True)


def test_image_features_keep_the_aspect(model: Model, folder: Path) -> None:
    looks, skipped = image_features([folder], model, size=64)
    shapes = {Path(each.name).name: tuple(each.spatial.shape) for each in looks}
    assert shapes == {
        "0.png": (32, 2, 4),
        "1.png": (32, 4, 4),
        "2.png": (32, 4, 1),
        "3.png": (32, 4, 4),
        "4.png": (32, 1, 4),
    }
    assert len(skipped) == 2
    with torch.no_grad():
        expected = model(folder / "sub" / "1.png").spatial[0]
    torch.testing.assert_close(next(e for e in looks if e.name.endswith("1.png")).spatial, expected)
    with pytest.raises(ConfigError, match="64 or 80"):
        image_features([folder], model, size=70)
    with pytest.raises(ConfigError, match=r"none of the images.*0 bytes"):
        image_features([folder / "sub" / "1b.jpg"], model)


def test_as_files_names_paths(folder: Path) -> None:
    source = as_files(folder)
    assert len(source) == 7
    assert source.name(0) == str(folder / "0.png")
    assert source.read(0).size == (64, 40)


# --- what is computed is kept -----------------------------------------------------------------------------------------


class Counting:
    """Counts the images that a model encodes; raises ``error`` at the given call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = 10**9, error: BaseException | None = None) -> None:
        from agglo.embedding import encoding

        self.images, self.calls, real = 0, 0, encoding.encode

        def encode_some(model: Model, images: torch.Tensor, head: str | None):
            self.calls += 1
            if self.calls == at and error is not None:
                raise error
            self.images += len(images)
            return real(model, images, head)

        monkeypatch.setattr(encoding, "encode", encode_some)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "no device"), RuntimeError("no memory")])
def test_stopped_embedding_continues(
    model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    whole, journal = embed(folder, model, batch=2), tmp_path / "out.parquet.partial"
    with monkeypatch.context() as patch:
        Counting(patch, 3, error)
        with pytest.raises(type(error)):
            embed(folder, model, batch=2, journal=journal)
    counting = Counting(monkeypatch)
    found = embed(folder, model, batch=2, journal=journal)
    assert counting.images < len(whole)
    assert found.names == whole.names and found.skipped == whole.skipped
    np.testing.assert_allclose(found.summary, whole.summary, atol=1e-5)
    np.testing.assert_allclose(found.aligned, whole.aligned, atol=1e-5)
    again = embed(folder, model, batch=2, journal=journal)
    assert counting.images < len(whole) and again.names == whole.names  # nothing is encoded a third time


def test_journal_belongs_to_the_content_of_its_files(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is replaced with its size and modification time kept is encoded again."""
    file, journal = tmp_path / "images" / "a.bmp", tmp_path / "journal"
    file.parent.mkdir()
    Image.new("RGB", (40, 40), "red").save(file)
    red, facts = embed(file.parent, model, journal=journal), file.stat()
    Image.new("RGB", (40, 40), "blue").save(file)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    counting = Counting(monkeypatch)
    blue = embed(file.parent, model, journal=journal)
    assert counting.images == 1
    assert np.abs(blue.summary - red.summary).max() > 1e-3


def test_journal_survives_a_kill_at_any_byte(
    model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal"
    whole = embed(folder, model, batch=1, journal=journal)
    content = journal.read_bytes()
    for length in (0, 1, 60, len(content) // 3, len(content) // 2, len(content) - 1):
        journal.write_bytes(content[:length])
        found = embed(folder, model, batch=1, journal=journal)
        assert found.names == whole.names
        np.testing.assert_array_equal(found.summary, whole.summary)
        assert len(journal.read_bytes()) == len(content)


def test_journal_of_other_images_models_or_sizes_is_not_reused(
    model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, counting = tmp_path / "journal", Counting(monkeypatch)
    embed(folder, model, journal=journal)
    assert counting.images == 5
    Image.new("RGB", (9, 9), "red").save(folder / "0.png")
    embed(folder, model, journal=journal)
    assert counting.images == 6  # the one that was replaced
    (folder / "4.png").unlink()
    assert len(embed(folder, model, journal=journal)) == 4 and counting.images == 6
    content = journal.read_bytes()
    with pytest.raises(ConfigError, match=r"size \[64, 64\], now \[32, 32\]\).*--overwrite"):
        embed(folder, model, size=32, journal=journal)
    with pytest.raises(ConfigError, match=r"another run \(model \w+, now \w+, head words, now None\)"):
        embed(folder, make_model(text=False), journal=journal)
    assert journal.read_bytes() == content and counting.images == 6


def test_full_disk_keeps_the_rows_of_finished_batches(
    model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agglo.embedding.journal import Journal

    real, calls = Journal.append, []

    def full(self: Journal, *arguments: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            self._file.write(b"a part")
            with self._writing():
                raise OSError(28, "No space left on device")
        real(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        with pytest.raises(StorageError, match=r"No space left.*free some space and run the same command again"):
            embed(folder, model, batch=1, journal=tmp_path / "journal")
    counting = Counting(monkeypatch)
    assert len(embed(folder, model, batch=1, journal=tmp_path / "journal")) == 5
    assert counting.images == 3


# --- files that are written as rows are computed ----------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["parquet", "npz"])
def test_embed_file_equals_embed_and_save(model: Model, folder: Path, tmp_path: Path, ending: str) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    whole = embed(folder, model)
    whole.save(tmp_path / f"a.{ending}")
    written = embed_file(folder, tmp_path / f"b.{ending}", model, batch=2)
    assert (written.images, written.widths, written.skipped) == (5, {"summary": 32, "words": 8}, whole.skipped)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [f"a.{ending}", f"b.{ending}"]
    a, b = (read_columns(tmp_path / f"{name}.{ending}") for name in "ab")
    assert a["path"].tolist() == b["path"].tolist()
    for column in ("summary", "words"):
        np.testing.assert_allclose(a[column], b[column], atol=1e-5)


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """The columns of an embeddings file."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name] for name in ("path", "summary", "words")}
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def test_parquet_is_written_in_row_groups(
    model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    from agglo.embedding import encoding
    from agglo.embedding.journal import Journal

    asked, read = [], Journal.read
    monkeypatch.setattr(encoding, "ROW_GROUP", 2)
    monkeypatch.setattr(Journal, "read", lambda self, rows: asked.append(len(rows)) or read(self, rows))
    embed_file(folder, tmp_path / "out.parquet", model)
    facts = parquet.ParquetFile(tmp_path / "out.parquet").metadata
    assert [facts.row_group(i).num_rows for i in range(facts.num_row_groups)] == [2, 2, 1]
    assert max(asked) == 2  # never all vectors in memory


def test_full_disk_while_the_file_is_written_keeps_every_row(
    model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")

    def full(self: object, table: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(parquet.ParquetWriter, "write_table", full)
        with pytest.raises(StorageError, match=r"out.parquet cannot be written \(No space left"):
            embed_file(folder, tmp_path / "out.parquet", model)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["out.parquet.partial"]
    counting = Counting(monkeypatch)
    assert embed_file(folder, tmp_path / "out.parquet", model).images == 5
    assert counting.images == 0


def test_unfinished_rows_of_another_size_are_discarded_on_request(
    model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.npz"
    with monkeypatch.context() as patch:
        Counting(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            embed_file(folder, out, model, batch=2)
    with pytest.raises(ConfigError, match=r"out.npz.partial holds rows of another run \(size"):
        embed_file(folder, out, model, size=32)
    assert embed_file(folder, out, model, size=32, overwrite=True).images == 5
    (tmp_path / "other.npz.partial").write_text("my notes\n")
    with pytest.raises(ConfigError, match="is not a file of unfinished embeddings"):
        embed_file(folder, tmp_path / "other.npz", model)
    assert (tmp_path / "other.npz.partial").read_text() == "my notes\n"


def test_images_in_memory_are_not_taken_from_a_journal(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(monkeypatch)
    for colour in ("red", "blue"):
        embed([Image.new("RGB", (64, 64), colour)], model, journal=tmp_path / "journal")
    assert counting.images == 2


# --- memory and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1_600_000, 16 * 10**30])
def test_sizes_that_exceed_the_memory_are_refused(model: Model, folder: Path, size: int) -> None:
    with pytest.raises(ConfigError, match=r"more than .* GB of memory.*use at most \d+ pixels, or a smaller batch"):
        embed(folder, model, size=size)
    with pytest.raises(ConfigError, match="GB of memory"):
        image_features([folder], model, size=size)


@pytest.mark.parametrize("reader", ["pandas", "polars", "duckdb", "lance"])
def test_other_libraries_read_the_parquet_file(reader: str, model: Model, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    found, path = embed(folder, model), tmp_path / "out.parquet"
    found.save(path)
    library = pytest.importorskip(reader)
    if reader == "duckdb":
        rows = library.sql(f"select summary from '{path}'").fetchnumpy()["summary"]
    elif reader == "polars":
        table = library.read_parquet(path)
        assert table.schema["summary"] == library.Array(library.Float32, 32)
        rows = table["summary"].to_numpy()
    elif reader == "pandas":
        rows = library.read_parquet(path)["summary"]
    else:
        import pyarrow.parquet

        dataset = library.write_dataset(pyarrow.parquet.read_table(path), str(tmp_path / "out.lance"))
        query = {"column": "summary", "q": found.summary[2], "k": 1}
        assert dataset.to_table(nearest=query)["path"].to_pylist() == [found.names[2]]
        rows = dataset.to_table()["summary"].to_pylist()
    np.testing.assert_array_equal(np.stack([np.asarray(row) for row in rows]), found.summary)
