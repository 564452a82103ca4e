"""Near-duplicates and leaks between splits, by exact cosine distance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from agglo.config import nearest
from agglo.extras import require
from agglo.integrations.fiftyone.index import check_limits, similarity
from agglo.integrations.fiftyone.vectors import check_options, collection_name, load_index
from agglo.types import ConfigError


def near_duplicates(
    samples: Any,
    threshold: float = 0.15,
    *,
    embeddings: Any = None,
    similarity_index: Any = None,
    model: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Find near-duplicates within a collection.

    By summaries of agglo-lite, copies of 120 photographs that were recompressed (JPEG, quality 30), halved, mirrored,
    or cropped by a tenth on each side lie below 0.12 in nine of ten cases and below 0.19 in all; 400 different
    photographs are at least 0.26 apart. Other models need their own threshold: ``index.plot_distances()`` shows the
    distances. Text-aligned vectors are not suited: different photographs of one kind of thing have almost the same.

    Args:
        samples: dataset or view; samples outside a view are not compared.
        threshold: largest cosine distance of a duplicate, in [0, 2]; 0 finds exact copies.
        embeddings: as in :func:`~agglo.integrations.fiftyone.index.similarity`.
        similarity_index: an index of that function, or its brain key, in place of ``embeddings``.
        model: as there.
        model_kwargs: as there.
        options: as there.

    Returns:
        The index, restricted to ``samples``, with FiftyOne's ``duplicate_ids``, ``unique_ids``, ``neighbors_map``
        (distances are cosine distances) and ``duplicates_view()``.

    Raises:
        ConfigError: a threshold outside [0, 2], another kind of index, or vectors that cannot be used.
    """
    check_limits(threshold, None)
    index = _index(samples, embeddings, similarity_index, model, model_kwargs, options)
    index.use_view(samples)
    index.find_duplicates(thresh=threshold)
    return index


def leaky_splits(
    samples: Any,
    splits: Any,
    threshold: float = 0.15,
    *,
    embeddings: Any = None,
    similarity_index: Any = None,
    model: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> LeakySplits:
    """Find near-duplicates between splits: every pair within the threshold whose samples are in different splits.

    FiftyOne 1.22.1 compares each duplicate only with its nearest kept sample, and misses pairs.

    Args:
        samples: dataset or view.
        splits: a list of tags; or the name of a field with the split's name; or a mapping of names to views.
        threshold: largest cosine distance of a leak, in [0, 2].
        embeddings: as in :func:`near_duplicates`, and so are the other arguments.
        similarity_index: as there.
        model: as there.
        model_kwargs: as there.
        options: as there.

    Raises:
        ConfigError: a field or tag that does not exist, fewer than two splits, or as in :func:`near_duplicates`.
    """
    check_limits(threshold, None)
    views = split_views(samples, splits)
    index = _index(samples, embeddings, similarity_index, model, model_kwargs, options)
    result = LeakySplits(samples, index, views)
    result.find_leaks(threshold)
    return result


class LeakySplits:
    """Leaks between splits, with the methods of FiftyOne's ``LeakySplitsIndex``.

    Args:
        samples: dataset or view.
        index: a similarity index of :func:`~agglo.integrations.fiftyone.index.similarity`.
        views: view by name of the split.
    """

    def __init__(self, samples: Any, index: Any, views: Mapping[str, Any]) -> None:
        self.samples = samples
        self.split_views = dict(views)
        self.thresh: float | None = None
        self.pairs: list[tuple[str, str, float]] = []
        """``(id, id, cosine distance)`` of each leak, nearest first; a sample in two splits is a pair with itself."""
        self._index = index
        self._splits: dict[str, set[str]] = {}
        for name, view in self.split_views.items():
            for each in view.values("id"):
                self._splits.setdefault(each, set()).add(name)

    @property
    def leak_ids(self) -> list[str]:
        """Ids of all samples that leak, those of the nearest pair first."""
        return list(dict.fromkeys(each for pair in self.pairs for each in pair[:2]))

    def find_leaks(self, thresh: float) -> None:
        """Find the pairs of different splits within a cosine distance."""
        self._index.use_view(self.samples)
        rows, distances = self._index._radius_neighbors(thresh=thresh, return_dists=True)
        ids = self._index.current_sample_ids
        pairs = [(each, each, 0.0) for each, names in self._splits.items() if len(names) > 1]
        for first, (near, far) in enumerate(zip(rows, distances, strict=True)):
            for second, distance in zip(near.tolist(), far.tolist(), strict=True):
                if first < second and self._differ(str(ids[first]), str(ids[second])):
                    pairs.append((str(ids[first]), str(ids[second]), distance))
        self.thresh = thresh
        self.pairs = sorted(pairs, key=lambda pair: pair[2])

    def _differ(self, first: str, second: str) -> bool:
        """Whether two samples are in splits, and not both in the same one only."""
        one, other = self._splits.get(first, set()), self._splits.get(second, set())
        return bool(one and other) and len(one | other) > 1

    def leaks_view(self) -> Any:
        """A view of the samples that leak, nearest pair first."""
        return self.samples.select(self.leak_ids, ordered=True)

    def no_leaks_view(self, view: Any = None) -> Any:
        """``view``, or all samples, without those that leak."""
        return (self.samples if view is None else view).exclude(self.leak_ids)

    def leaks_for_sample(self, sample_or_id: Any) -> Any:
        """A view of a sample and the samples of other splits that it leaks to, nearest first."""
        own = sample_or_id if isinstance(sample_or_id, str) else sample_or_id.id
        others = [each for pair in self.pairs if own in pair[:2] for each in pair[:2] if each != own]
        return self.samples.select([own, *dict.fromkeys(others)], ordered=True)

    def tag_leaks(self, tag: str = "leak") -> None:
        """Tag the samples that leak."""
        self.leaks_view().tag_samples(tag)


def split_views(samples: Any, splits: Any) -> dict[str, Any]:
    """View by split, of a list of tags, the name of a field, or a mapping of names to views.

    Raises:
        ConfigError: a tag or field does not exist, or there are fewer than two splits.
    """
    expression = require("fiftyone", "fiftyone").ViewField
    if isinstance(splits, Mapping):
        views = dict(splits)
    elif isinstance(splits, str):
        if not samples.has_field(splits):
            raise ConfigError(
                f"dataset {collection_name(samples)} has no field {splits!r}"
                + nearest(splits, samples.get_field_schema())
            )
        several = isinstance(samples.get_field(splits), require("fiftyone", "fiftyone").ListField)
        views = {
            str(value): samples.match(expression(splits).contains(value) if several else expression(splits) == value)
            for value in samples.distinct(splits)
        }
    else:
        views = _tag_views(samples, splits)
    if len(views) < 2:
        raise ConfigError(f"leaky_splits: {len(views)} split in {splits!r}; at least two are needed")
    return views


def _tag_views(samples: Any, tags: Iterable[str]) -> dict[str, Any]:
    known = samples.distinct("tags")
    for tag in tags:
        if tag not in known:
            raise ConfigError(f"dataset {collection_name(samples)} has no tag {tag!r}" + nearest(tag, known))
    return {tag: samples.match_tags(tag) for tag in tags}


def _index(
    samples: Any, embeddings: Any, similarity_index: Any, model: Any, model_kwargs: Any, options: Mapping[str, Any]
) -> Any:
    """The given index, or a new one over the vectors."""
    if similarity_index is None:
        return similarity(samples, embeddings=embeddings, model=model, model_kwargs=model_kwargs, **options)
    check_options(options)
    if embeddings is not None or model is not None:
        raise ConfigError("give either similarity_index or embeddings and model")
    index = similarity_index
    if isinstance(index, str):  # a copy: the one that FiftyOne keeps would stay restricted to these samples
        index = load_index(samples, index, cache=False)
    if getattr(index.config, "method", None) != "cosine":
        raise ConfigError(
            f"index {index.key!r} ({index.config.method}) does not measure cosine distances; "
            "build one with agglo.integrations.fiftyone.similarity"
        )
    return index
