"""Images in a Hugging Face dataset."""

from __future__ import annotations

import difflib
import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agglo.decoding import read_regular
from agglo.extras import require
from agglo.files import printable
from agglo.sources._encoded import EncodedSource
from agglo.sources._paths import EXTENSIONS, expanded, not_found
from agglo.sources.base import SourceError
from agglo.types import ConfigError, ImageError

_log = logging.getLogger(__name__)
_SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
"""Words in file names that mean a split, as in ``datasets.data_files``."""
_WHOLE, _FOOTER = 64 * 2**20, 2**16
"""Bytes of parquet files that are hashed whole, and of the end of each one in a larger set."""
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


class HuggingFace(EncodedSource):
    """All images of one split of a Hugging Face dataset, in row order.

    The dataset is memory-mapped from Arrow files (parquet files and hub datasets are converted once, into the cache of
    the ``datasets`` package), so rows are accessed directly and only what is read takes memory. The stored bytes are
    decoded here, not by ``datasets``.

    Args:
        dataset: a dataset on the hub (``owner/name``); a folder written by ``save_to_disk``; a local copy of a hub
            dataset, or another folder of parquet files or images; a parquet file, or a glob of them. ``~`` and
            ``${VARIABLES}`` are expanded.
        split: name of the split, as ``datasets.load_dataset`` finds it in the file names of a local folder
            (``data/train-*.parquet``, ``test/cat/1.jpg``). null selects ``train``, or the only split of parquet files
            that are named one by one.
        config: configuration of a hub dataset, or of its local copy, that has several.
        column: column of the images; null selects the only candidate.
        label: column of the class labels; null selects the only ClassLabel column, else ``label``, else none.
        revision: branch, tag or commit of a hub dataset; local data has none.
        min_side: exclude images whose shorter side is smaller (pixels); 0 disables. Counted when they are read.
        min_pixels: exclude images with fewer pixels (height times width); 0 disables.
        max_aspect: exclude images whose longer side exceeds this multiple of the shorter; 0 disables.
        skip_uniform: exclude single-colour images.

    Raises:
        ConfigError: the dataset, split or column does not exist, the image column is ambiguous, or there are no rows.
        SourceError: the hub cannot be reached.
        MissingExtraError: ``datasets`` is not installed.
    """

    def __init__(
        self,
        *,
        dataset: str,
        split: str | None = None,
        config: str | None = None,
        column: str | None = None,
        label: str | None = None,
        revision: str | None = None,
        min_side: int = 0,
        min_pixels: int = 0,
        max_aspect: float = 0.0,
        skip_uniform: bool = False,
    ) -> None:
        super().__init__(min_side, skip_uniform, min_pixels, max_aspect)
        path = expanded(dataset)
        if _is_local(path):
            if revision is not None:
                raise ConfigError(
                    f"source huggingface: {dataset} is local and has no revision {revision!r}; remove `revision`, or "
                    "use the name of the dataset on the hub"
                )
            rows, split = _local(path, split, config)
        else:
            split = split or "train"
            rows = _hub(dataset, split, config, revision)
        self.column = _image_column(rows.features, column, dataset)
        feature = rows.features[self.column]
        if type(feature).__name__ == "Image":
            rows = rows.cast_column(self.column, type(feature)(decode=False))
        if not len(rows):
            raise ConfigError(f"source huggingface: split {split!r} of {dataset} has no rows")
        self._label = _label_column(rows.features, label, dataset)
        self.classes = tuple(getattr(rows.features[self._label], "names", ())) if self._label else ()
        kept = [self.column, *([self._label] if self._label else [])]
        self._rows = rows.select_columns(kept).with_format("arrow")
        self._base = path if os.path.isdir(path) else os.path.dirname(path)
        self._prefix = printable(f"{path.rstrip('/').rpartition('/')[2].removesuffix('.parquet')}/{split}")

    def data_files(self) -> list[Path]:
        """Local files that hold the images or annotations, for hashes."""
        images = (_archive(path) or self._place(path) for path in _stored_paths(self._rows, self.column))
        return sorted({Path(file["filename"]) for file in self._rows.cache_files} | {Path(image) for image in images})

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Dataset, split and row: ``imagenet-1k/train/12``."""
        return f"{self._prefix}/{index % len(self)}"

    def encoded(self, index: int) -> bytes:
        cell = self._rows[index].column(self.column)[0].as_py()
        if isinstance(cell, str):
            cell = {"path": cell}
        if isinstance(cell, Mapping):
            path, cell = cell.get("path"), cell.get("bytes")
            if cell is None and path:
                return self._file(index, path)
        if not isinstance(cell, bytes):
            raise ImageError(self.name(index), f"column {self.column} of its row holds no image")
        return cell

    def label(self, index: int) -> int | str | None:
        """Class of an image: an index into ``classes``, else the stored value; None without a label column."""
        if self._label is None:
            return None
        value = self._rows[index].column(self._label)[0].as_py()
        if value is None or isinstance(value, str):
            return value
        return int(value) if self.classes else str(value)

    def _place(self, path: str) -> str:
        beside = os.path.join(self._base, path)
        return beside if os.path.exists(beside) else path

    def _file(self, index: int, path: str) -> bytes:
        if _archive(path) is not None:
            try:
                with require("fsspec", "data").open(path, "rb") as member:
                    return member.read()
            except Exception as error:  # damaged archives raise many exception types
                raise ImageError(self.name(index), f"{printable(path)} cannot be read ({error})") from error
        try:
            return read_regular(self._place(path), self.name(index))
        except ImageError as error:
            raise ImageError(error.name, f"{printable(path)} cannot be read ({error.why})") from None


def _archive(path: str) -> str | None:
    """The local archive in a path such as ``zip://cat/1.jpg::/data/train.zip``; None for any other path."""
    inner, chained, archive = path.rpartition("::")
    return archive if chained and "://" in inner and "://" not in archive else None


def _stored_paths(rows: Any, column: str) -> list[str]:
    """Paths in a column of images whose rows do not hold the bytes themselves."""
    pa, pc = require("pyarrow", "data"), require("pyarrow.compute", "data")
    cells = rows.data.column(column)
    if pa.types.is_struct(cells.type):
        names = {cells.type.field(i).name for i in range(cells.type.num_fields)}
        if not {"bytes", "path"} <= names:
            return []
        cells = pc.struct_field(cells, "path").filter(pc.is_null(pc.struct_field(cells, "bytes")))
    if not (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
        return []
    return [path for path in cells.to_pylist() if path]


def _is_local(path: str) -> bool:
    """Whether a name is a local path, existing or not."""
    return os.path.exists(path) or path.startswith(("/", ".", "~")) or path.endswith(".parquet") or glob.has_magic(path)


def _local(path: str, split: str | None, config: str | None) -> tuple[Any, str]:
    """The rows of local data, and the name of their split."""
    if any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
        return _saved(path, split, config)
    if os.path.isdir(path):
        return _folder(path, split or "train", config)
    files = [path] if os.path.lexists(path) or not glob.has_magic(path) else sorted(glob.glob(path, recursive=True))
    files = [file for file in files if os.path.isfile(file)]
    if not files:
        raise ConfigError(f"source huggingface: {not_found(path, Path(path))}")
    return _named_files(path, files, split, config)


def _named_files(path: str, files: Sequence[str], split: str | None, config: str | None) -> tuple[Any, str]:
    """The parquet files of a split among files that a pattern matched."""
    if config is not None:
        raise _no_config(path, config, [])
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(_split_of(file, path), []).append(file)
    chosen = split or (next(iter(splits)) if len(splits) == 1 else "train")
    for name in _split_names(chosen):
        if name not in splits:
            raise _no_split(path, name, splits)
    return _parquet(path, {name: splits[name] for name in _split_names(chosen)}, chosen, None), chosen


def _split_of(file: str, path: str) -> str:
    """Split of a parquet file: a word of its name, of its folder, or of a folder that a pattern matched."""
    if sharded := re.match(r"(.+)-\d{5}-of-\d{5}", os.path.basename(file)):
        return sharded[1]
    *folders, last = file.split(os.sep)
    common = len(os.path.commonpath([file, path]).split(os.sep)) if file != path else len(folders)
    for part in (last, *reversed(folders[common:])):
        for name, words in _SPLIT_WORDS.items():
            if re.search(rf"(?<![a-zA-Z])({words})(?![a-zA-Z])", part):
                return name
    for name, words in _SPLIT_WORDS.items():
        if folders and re.fullmatch(words, folders[-1]):
            return name
    return "train"


def _saved(path: str, split: str | None, config: str | None) -> tuple[Any, str]:
    datasets = require("datasets", "data")
    try:
        found = datasets.load_from_disk(path)
    except Exception as error:  # missing, truncated or foreign Arrow files raise many exception types
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"source huggingface: {path} is a damaged dataset ({first}): copy or download the folder again, or "
            "rewrite it with `save_to_disk`"
        ) from error
    if isinstance(found, Mapping):
        split = split or "train"
        found = _part(path, found, split)
    else:
        # One split was saved: datasets keeps its name, unless the rows were made in memory.
        known = str(found.split) if found.split is not None else _inside(path)
        names = {known} if known else {"train", os.path.basename(path.rstrip("/"))}
        if split is not None and split not in names:
            what = f"the split {known!r}" if known else "one dataset without splits"
            raise ConfigError(
                f"source huggingface: {path} holds {what}, not {split!r}; "
                + (f"set `split: {known}`, or remove `split`" if known else "remove `split`")
            )
        split = split or known or "train"
    known_config = found.info.config_name
    if config is not None and config != known_config:
        raise _no_config(path, config, [known_config] if known_config else [])
    return found, split


def _part(path: str, saved: Mapping[str, Any], split: str) -> Any:
    """The rows of one of the splits that were saved together, or of an expression such as ``train[:10%]+test``."""
    datasets = require("datasets", "data")
    for name in _split_names(split):
        if name not in saved:
            raise _no_split(path, name, saved)
    if split in saved:
        return saved[split]
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(saved[name]) for name in saved})
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"source huggingface: {path}, split {split!r}: {error}") from error
    return datasets.concatenate_datasets(
        [
            saved[part.splitname].select(
                range(part.from_ or 0, len(saved[part.splitname]) if part.to is None else part.to)
            )
            for part in parts
        ]
    )


def _split_names(split: str) -> list[str]:
    """Names of the splits in an expression such as ``train[:10%]+test``."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def _inside(path: str) -> str | None:
    """Name of the split that a folder inside ``save_to_disk`` output of several splits holds."""
    real = os.path.realpath(path)
    return os.path.basename(real) if os.path.isfile(os.path.join(os.path.dirname(real), "dataset_dict.json")) else None


def _folder(path: str, split: str, config: str | None) -> tuple[Any, str]:
    """The files of a split, found as ``datasets.load_dataset(path, config, split=split)`` finds them."""
    datasets = require("datasets", "data")
    if glob.has_magic(path):  # datasets would read the name of the folder as a pattern
        files = sorted(glob.glob(os.path.join(glob.escape(path), "**", "*.parquet"), recursive=True))
        if files:
            return _named_files(path, files, split, config)
        raise ConfigError(f"source huggingface: {path}: rename the folder, without the letters [ ] * ?")
    try:
        builder = datasets.load_dataset_builder(path, config)
    except Exception as error:  # readers raise many exception types
        first = (str(error).strip() or type(error).__name__).splitlines()
        if type(error).__name__ in ("EmptyDatasetError", "DataFilesNotFoundError", "FileNotFoundError"):
            raise ConfigError(_no_data(path)) from error
        if config is not None and "not found" in first[0]:
            raise _no_config(path, config, re.findall(r"'([^']+)'", first[0].partition("Available")[2])) from error
        raise ConfigError(f"source huggingface: {path}: {' '.join(line.strip() for line in first[:2])}") from error
    kind, files = type(builder).__module__.split(".")[-1], builder.config.data_files or {}
    if kind not in ("parquet", "imagefolder", "arrow"):
        raise ConfigError(_no_data(path))
    for name in _split_names(split):
        if name not in files:
            raise _no_split(path, name, files)
    if config is None:
        _warn_of_others(path, kind, files)
    if kind == "parquet" and split in files:
        return _parquet(path, {split: [str(file) for file in files[split]]}, split, builder.info.features), split
    try:
        # All splits at once, for the same class numbers in each.
        rows = datasets.load_dataset(path, config, split=split, verification_mode="no_checks")
    except Exception as error:
        first = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"source huggingface: {path}, split {split!r}: {first}") from error
    if kind == "imagefolder" and split in files:
        _warn_of_unlisted(path, files[split], rows)
    return rows, split


def _warn_of_unlisted(path: str, files: Sequence[str], rows: Any) -> None:
    """Name the images that ``metadata.csv`` or its like does not list: datasets leaves them out."""
    if not any(os.path.basename(file).startswith("metadata.") for file in files):
        return
    columns = [name for name, feature in rows.features.items() if type(feature).__name__ == "Image"]
    used = {os.path.realpath(found) for column in columns for found in _stored_paths(rows, column)}
    images = [file for file in files if os.path.splitext(file)[1].lower() in EXTENSIONS]
    if lost := sorted(file for file in images if os.path.realpath(file) not in used):
        _log.warning("%s: left out %d images that its metadata does not list, first %s", path, len(lost), lost[0])


def _warn_of_others(path: str, kind: str, files: Mapping[str, Sequence[str]]) -> None:
    """Name the data files of a folder that belong to none of its splits."""
    endings = {"parquet": {".parquet"}, "arrow": {".arrow"}}.get(kind, {*EXTENSIONS, ".heic", ".heif"})
    used = {os.path.realpath(file) for own in files.values() for file in own}
    found = (file for file in Path(path).rglob("*") if file.suffix.lower() in endings and file.is_file())
    lost = sorted(str(file) for file in found if os.path.realpath(file) not in used and not file.name.startswith("."))
    if lost:
        _log.warning(
            "%s: left out %d files that belong to none of the splits %s, first %s",
            path,
            len(lost),
            ", ".join(map(str, files)),
            lost[0],
        )


def _parquet(path: str, files: Mapping[str, Sequence[str]], split: str, features: Any) -> Any:
    datasets = require("datasets", "data")
    options = {"features": features} if features else {}
    try:
        # The cache of datasets knows a file by its path and time alone; the configuration's name adds its content.
        options["name"] = "-".join(files) + "-" + _version([file for own in files.values() for file in own])
        # Names are patterns to datasets.
        named = {name: [glob.escape(file) for file in own] for name, own in files.items()}
        return datasets.load_dataset("parquet", data_files=named, split=split, **options)
    except Exception as error:  # damaged files raise many exception types
        if "no data" in str(error):
            raise ConfigError(f"source huggingface: {path} has no rows") from error
        cause = error.__cause__ or error
        raise ConfigError(f"source huggingface: {path} cannot be read as parquet ({cause})") from error


def _version(files: Sequence[str]) -> str:
    """Hash of parquet files: of their content up to :data:`_WHOLE` bytes, else of their sizes and footers."""
    sizes = [os.path.getsize(file) for file in files]
    tail = None if sum(sizes) <= _WHOLE else _FOOTER
    digest = hashlib.sha256(repr(sizes).encode())
    for file, size in zip(files, sizes, strict=True):
        with open(file, "rb") as stream:
            stream.seek(0 if tail is None else max(0, size - tail))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def _no_split(path: str, split: str, known: Iterable[str]) -> ConfigError:
    return ConfigError(f"source huggingface: {path} has no split {split!r}; choose from: {', '.join(map(str, known))}")


def _no_config(path: str, config: str, known: Sequence[str]) -> ConfigError:
    how = f"choose from: {', '.join(known)}" if known else "remove `config`"
    return ConfigError(f"source huggingface: {path} has no config {config!r}; {how}")


def _no_data(path: str) -> str:
    return (
        f"source huggingface: {path} has neither `save_to_disk` output nor parquet files; use `kind: folder` for "
        "image files, `kind: webdataset` for tar files"
    )


def _hub(name: str, split: str, config: str | None, revision: str | None) -> Any:
    datasets = require("datasets", "data")
    where = f"source huggingface: {name}"
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except (ConnectionError, TimeoutError) as error:
        offline = [key for key in _OFFLINE if os.environ.get(key, "0") not in ("", "0")]
        how = f"{offline[0]} is set" if offline else "the hub cannot be reached"
        raise SourceError(
            f"{where}: {how}, and the dataset is not in the local cache. "
            + (f"Unset {offline[0]}, or on" if offline else "On")
            + f" a machine with a network run `hf download --repo-type dataset {name} --local-dir "
            f"{name.rpartition('/')[2]}`, copy the folder to this machine and use its path"
        ) from error
    except Exception as error:  # readers and the hub client raise many exception types
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "gated" in str(error).lower():
            page = f"https://huggingface.co/datasets/{name}"
            raise ConfigError(f"{where} is gated: accept its terms on {page}, then run `hf auth login`") from error
        if type(error).__name__ in ("DatasetNotFoundError", "HFValidationError", "FileNotFoundError"):
            raise ConfigError(
                f"{where}: no such dataset on the hub (or it is private: run `hf auth login`), and no local folder or "
                f"file of that name ({first})"
            ) from error
        raise ConfigError(f"{where}, split {split!r}: {first}") from error


def _image_column(features: Mapping[str, Any], wanted: str | None, dataset: str) -> str:
    """The column of the images; raises ConfigError unless there is exactly one candidate."""
    where, listed = f"source huggingface: {dataset}", _listed(features)
    if wanted is not None:
        _check_column(features, wanted, dataset)
        if _kind(features[wanted]) not in ("Image", "bytes", "path"):
            raise ConfigError(f"{where}: column {wanted!r} cannot hold images (columns: {listed})")
        return wanted
    for kind in ("Image", "bytes"):
        found = [name for name, feature in features.items() if _kind(feature) == kind]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(
                f"{where}: columns {', '.join(found)} could all hold the images; set `column` to one of them"
            )
    raise ConfigError(f"{where} has no image column; set `column` (columns: {listed})")


def _listed(features: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())


def _check_column(features: Mapping[str, Any], wanted: str, dataset: str) -> None:
    if wanted not in features:
        near = difflib.get_close_matches(wanted, features, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"source huggingface: {dataset} has no column {wanted!r}{hint} (columns: {_listed(features)})"
        )


def _label_column(features: Mapping[str, Any], wanted: str | None, dataset: str) -> str | None:
    """The column of the class labels, if any."""
    if wanted is not None:
        _check_column(features, wanted, dataset)
        return wanted
    found = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    return found[0] if len(found) == 1 else "label" if "label" in features else None


def _kind(feature: Any) -> str:
    """``Image``; ``bytes`` for possible encoded images; ``path`` for possible file names; else a readable type."""
    if type(feature).__name__ == "Image":
        return "Image"
    if isinstance(feature, Mapping):
        return "bytes" if "bytes" in feature else f"struct of {', '.join(feature)}"
    dtype = getattr(feature, "dtype", None)
    if isinstance(feature, Sequence) or dtype is None:
        return type(feature).__name__
    known = {"binary": "bytes", "large_binary": "bytes", "string": "path", "large_string": "path"}
    return known.get(dtype, str(dtype))
