"""What agglo keeps in a dataset: reasons of failures, scales of heatmaps, how each field was computed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agglo.extras import require
from agglo.integrations.fiftyone.maps import Scale
from agglo.integrations.fiftyone.reading import Read

_log = logging.getLogger(__name__)
ERROR_FIELD = "agglo_error"
"""Field of a sample with the reason why its image was skipped."""
DEPENDS = ("hash", "size", "dtype", "head", "text", "window")
"""Entries of a record whose change makes a field's values incomparable."""
INFO = "agglo"
"""Key of what agglo stores: in ``dataset.info`` the scales of heatmaps, in the ``info`` of a field its record."""


class Failures:
    """Reasons of skipped samples, written to their datasets after a call."""

    def __init__(self) -> None:
        self._bad: dict[str, dict[str, str]] = {}
        self._good: dict[str, list[str]] = {}

    def add(self, items: Sequence[Read]) -> None:
        """Note the samples of a batch."""
        for item in items:
            if item.why is not None:
                _log.warning("skipped %s: %s", item.sample or "an image", item.why)
            if item.sample is None or item.dataset is None:
                continue
            if item.why is None:
                self._good.setdefault(item.dataset, []).append(item.sample)
            else:
                self._bad.setdefault(item.dataset, {})[item.sample] = item.why

    def write(self) -> list[tuple[str, str]]:
        """Set the field of skipped samples, and clear it where an image could be read this time.

        Returns:
            Sample id and reason of those skipped.
        """
        for dataset_id in {*self._bad, *self._good}:
            dataset = find_dataset(dataset_id)
            if dataset is None:
                continue
            bad = self._bad.get(dataset_id, {})
            if dataset.has_sample_field(ERROR_FIELD):
                before = set(dataset.exists(ERROR_FIELD).values("id"))
                mended = before.intersection(self._good.get(dataset_id, ()))
                if mended:
                    dataset.set_values(ERROR_FIELD, dict.fromkeys(mended), key_field="id")
            elif bad:
                fields: Any = require("fiftyone.core.fields", "fiftyone")
                dataset.add_sample_field(ERROR_FIELD, fields.StringField, description="why agglo skipped the sample")
            if bad:
                dataset.set_values(ERROR_FIELD, bad, key_field="id")
        found = [each for bad in self._bad.values() for each in bad.items()]
        self._bad, self._good = {}, {}
        return found


class Scales:
    """Scales of heatmaps: one set per dataset and input, kept in the dataset."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], dict[str, Scale]] = {}

    def dataset(self, samples: Sequence[Any]) -> Any:
        """The dataset of samples or frames, or None."""
        found = getattr(samples[0], "dataset", None) if samples else None
        return found

    def get(
        self, dataset: Any, key: str, names: Sequence[str], fit: Callable[[], dict[str, Scale]]
    ) -> dict[str, Scale]:
        """The scales of the layers ``names``; fitted and stored if one is missing.

        Args:
            dataset: a FiftyOne dataset, or None to keep them in memory only.
            key: what they depend on: model and input.
            names: of the layers.
            fit: computes those of all layers.
        """
        known = self._of(dataset, key)
        missing = [name for name in names if name not in known]
        if missing:
            fitted = fit()
            known |= {name: fitted[name] for name in missing}
            if dataset is not None:
                _store(dataset, key, {name: known[name] for name in missing})
        return known

    def has(self, dataset: Any, key: str, names: Sequence[str]) -> bool:
        """Whether the scales of the layers ``names`` exist."""
        return set(names) <= set(self._of(dataset, key))

    def _of(self, dataset: Any, key: str) -> dict[str, Scale]:
        at = ("" if dataset is None else str(dataset._doc.id), key)  # a name can be given again
        if at not in self._known:
            self._known[at] = {} if dataset is None else _stored(dataset, key)
        return self._known[at]


def _stored(dataset: Any, key: str) -> dict[str, Scale]:
    found = (dataset.info.get(INFO) or {}).get("scales") or {}
    return {each["layer"]: Scale.parse(each["scale"]) for each in found if each["input"] == key}


def _store(dataset: Any, key: str, scales: Mapping[str, Scale]) -> None:
    # A list, because prompts and sizes contain characters that MongoDB refuses in keys.
    info = dict(dataset.info.get(INFO) or {})
    added = [{"input": key, "layer": name, "scale": scale.dump()} for name, scale in scales.items()]
    info["scales"] = [*(info.get("scales") or []), *added]
    dataset.info[INFO] = info
    dataset.save()


def field_record(dataset: Any, field: str) -> dict[str, Any] | None:
    """How a field was computed (``AggloModel.record``), or None if agglo did not record it."""
    found = _field(dataset, field)
    return None if found is None else (found.info or {}).get(INFO)


def record_field(dataset: Any, field: str, record: Mapping[str, Any]) -> None:
    """Store how a field is computed with the field itself, where the App shows it; deleted with the field."""
    found = _field(dataset, field)
    if found is None or dataset._is_generated:  # FiftyOne cannot save facts about fields of a view of frames
        return
    found.info = {**(found.info or {}), INFO: dict(record)}
    found.description = f"{record['model']}, {record['size']}, {record['dtype']}"
    found.save()


def record_fields(samples: Any, names: Sequence[str], record: Mapping[str, Any]) -> None:
    """Store how fields were computed; warns where other samples keep values of another model or size.

    Args:
        samples: the collection that was computed.
        names: of the fields; those that do not exist are left out.
        record: ``AggloModel.record``.
    """
    dataset = samples._dataset
    for name in names:
        before = field_record(dataset, name)
        changed = [key for key in DEPENDS if before is not None and before.get(key) != record.get(key)]
        if before is not None and changed and len(samples) < len(dataset):
            _log.warning(
                "field %r: samples outside of this view keep results of %s with another %s, which are not comparable",
                name, before["model"], " and ".join(changed),
            )  # fmt: skip
        record_field(dataset, name, record)


def _field(dataset: Any, field: str) -> Any:
    is_frames = dataset.media_type == "video" and dataset.has_frame_field(field)
    return dataset.get_field(f"frames.{field}" if is_frames else field)


def find_dataset(dataset_id: str) -> Any:
    """The dataset of an id, or None if it was deleted."""
    fiftyone: Any = require("fiftyone", "fiftyone")
    bson: Any = require("bson", "fiftyone")
    connection: Any = require("fiftyone.core.odm", "fiftyone").get_db_conn()
    entry = connection.datasets.find_one({"_id": bson.ObjectId(dataset_id)}, {"name": True})
    return None if entry is None else fiftyone.load_dataset(entry["name"])
