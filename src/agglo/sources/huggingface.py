"""Images in a Hugging Face dataset."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agglo.extras import require
from agglo.sources._encoded import EncodedSource
from agglo.sources._paths import expanded, not_found
from agglo.sources.base import SourceError
from agglo.types import ConfigError, ImageError

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


class HuggingFace(EncodedSource):
    """All images of one split of a Hugging Face dataset, in row order.

    The dataset is memory-mapped from Arrow files (parquet files and hub datasets are converted once, into the cache of
    the ``datasets`` package), so rows are accessed directly and only what is read takes memory. The stored bytes are
    decoded here, not by ``datasets``.

    Args:
        dataset: a dataset on the hub (``owner/name``); a folder written by ``save_to_disk``; a parquet file, a glob of
            them, or a folder that holds some. ``~`` and ``${VARIABLES}`` are expanded.
        split: name of the split; local parquet files form a single split of any name.
        config: configuration of a hub dataset that has several.
        column: column of the images; null selects the only candidate.
        label: column of the class labels; null selects the only ClassLabel column, else ``label``, else none.
        revision: branch, tag or commit of a hub dataset.
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
        split: str = "train",
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
        path = os.path.expanduser(expanded(dataset))
        rows = _local(path, split) if _is_local(path) else _hub(dataset, split, config, revision)
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
        self._prefix = f"{path.rstrip('/').rpartition('/')[2].removesuffix('.parquet')}/{split}"

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

    def _file(self, index: int, path: str) -> bytes:
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise ImageError(self.name(index), f"{path} cannot be read ({error.strerror or error})") from None


def _is_local(path: str) -> bool:
    """Whether a name is a local path, existing or not."""
    return os.path.exists(path) or path.startswith(("/", ".", "~")) or path.endswith(".parquet") or glob.has_magic(path)


def _local(path: str, split: str) -> Any:
    datasets = require("datasets", "data")
    if any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
        try:
            found = datasets.load_from_disk(path)
        except Exception as error:  # missing, truncated or foreign Arrow files raise many exception types
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"source huggingface: {path} is a damaged dataset ({first}): copy or download the folder again, or "
                "rewrite it with `save_to_disk`"
            ) from error
        if not isinstance(found, Mapping):
            return found
        if split not in found:
            raise ConfigError(f"source huggingface: {path} has no split {split!r}; choose from: {', '.join(found)}")
        return found[split]
    pattern = os.path.join(glob.escape(path), "**", "*.parquet") if os.path.isdir(path) else path
    files = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [path]
    if not files or not os.path.isfile(files[0]):
        raise ConfigError(_no_data(path))
    try:
        return datasets.load_dataset("parquet", data_files={split: files}, split=split)
    except Exception as error:  # damaged files raise many exception types
        if "no data" in str(error):
            raise ConfigError(f"source huggingface: {path} has no rows") from error
        cause = error.__cause__ or error
        raise ConfigError(f"source huggingface: {path} cannot be read as parquet ({cause})") from error


def _no_data(path: str) -> str:
    if os.path.isdir(path):
        return (
            f"source huggingface: {path} has neither `save_to_disk` output nor parquet files; use `kind: folder` for "
            "image files, `kind: webdataset` for tar files"
        )
    return f"source huggingface: {not_found(path, Path(path))}"


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
