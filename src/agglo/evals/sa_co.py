"""Concept segmentation by SAM 3's decoder on the model's features."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from agglo.decoders.sam3 import Sam3
from agglo.decoding import decode
from agglo.evals._concepts import Count, Pair, favourable, measures, read_pairs, read_predictions
from agglo.evals._features import need_spatial
from agglo.evals._sam import features_for
from agglo.evals.base import Backbone, Eval, EvalContext, Place, ProbeError, device_of, frozen, input_size
from agglo.preprocess import fit
from agglo.types import ConfigError, ImageError


class SaCo(Eval):
    """Classification-gated F1 on SA-Co/Gold: SAM 3 with its trunk replaced (C-RADIOv4, arXiv:2601.17237, table 5).

    For each pair of an image and a phrase a mask per instance is predicted; phrases without an instance in the image
    are included. Masks with a score of at least 0.5 are matched one to one with the annotated ones (Hungarian, on IoU),
    at IoU thresholds of 0.50 to 0.95. The ground truth of a pair is that of the annotator with the highest agreement.
    Only pairs for which every annotator marked every instance are scored.

    Metrics, as fractions (papers report percentages): ``pmf1``, the F1 over the instances of all pairs that have any;
    ``il_mcc``, the Matthews correlation of "an instance is predicted" and "an instance is annotated"; ``cgf1``, their
    product. The benchmark's score is the mean over its seven subsets, each of which is a separate run.

    With ``decoder`` and ``images``, the model's features replace the trunk's: those of the head ``sam3``, of the one
    head as wide as the trunk, or of a model without heads its own. Images are resized to a square, as in SAM 3, and
    encoded once for all their phrases. With ``predictions``, a file is scored.

    Annotations are in COCO's layout with one ``images`` entry per *pair*: ``id``, ``file_name``, ``text_input`` (or
    ``phrase``), ``height``, ``width`` and ``is_instance_exhaustive``; ``annotations`` have ``image_id`` and
    ``segmentation`` (run lengths, as numbers or text, or polygons). Other keys are ignored. SAM 3's repository
    documents ``id``, ``file_name``, ``text_input`` and ``image_id``; the other keys are assumed.

    Args:
        annotations: one file per annotator of one subset (three for SA-Co/Gold: a, b and c); the pairs are those of
            the first.
        images: root folder of the file names.
        decoder: a SAM 3 of transformers with its tokenizer: ``facebook/sam3`` on the hub, or a folder.
        predictions: COCO results to score instead: ``image_id`` (of a pair), ``segmentation``, ``score``.
        head: to read features from.
        size: side of the square input; None for the number of cells of SAM 3's trunk (72).
    """

    needs_heads = True
    bundled = False
    places: ClassVar[Mapping[str, Place]] = {
        "annotations": "data",
        "images": "data",
        "decoder": "weights",
        "predictions": "answers",
    }

    def __init__(
        self,
        *,
        annotations: Sequence[str] = (),
        images: str | None = None,
        decoder: str | None = None,
        predictions: str | None = None,
        head: str | None = None,
        size: int | None = None,
    ) -> None:
        if not annotations or isinstance(annotations, str):
            raise ConfigError("evals.sa_co: annotations must be a list of files, one per annotator of a subset")
        if (decoder is None) == (predictions is None):
            raise ConfigError(
                "evals.sa_co: set either decoder, a SAM 3 such as facebook/sam3, to run it on the model's features, or "
                "predictions, a file of COCO results, to score it"
            )
        if decoder is not None and images is None:
            raise ConfigError("evals.sa_co: decoder needs images, the folder of the annotated images")
        if size is not None and size < 1:
            raise ConfigError(f"evals.sa_co: size must be at least 1, got {size}")
        self.annotations = tuple(os.path.expanduser(each) for each in annotations)
        self.images, self.decoder, self.predictions = (
            each and os.path.expanduser(each) for each in (images, decoder, predictions)
        )
        self.head = head
        self.size = size

    @cached_property
    def _pairs(self) -> list[Pair]:
        return read_pairs(self.annotations)

    def members(self, key: str) -> Sequence[str] | None:
        """The annotated files of ``images``: the folder may contain those of all subsets."""
        return sorted({pair.file for pair in self._pairs}) if key == "images" else None

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        pairs = [pair for pair in self._pairs if pair.exhaustive]
        if not pairs:
            raise ProbeError("no pair was marked in full by every annotator: nothing to score")
        predicted = self._read(pairs) if self.decoder is None else self._predict(self.decoder, model, pairs, context)
        counts: list[Count] = []
        names: list[str] = []
        for pair, found in predicted:
            counts.append(favourable(found, [pair.masks(true) for true in pair.truths]))
            names.append(f"{pair.id}: {pair.phrase}")
        if not counts:
            raise ProbeError("no image could be read: nothing to score")
        context.records.add_images("local_f1", names, [each.local for each in counts])
        return measures(counts)

    def _read(self, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, list[np.ndarray]]]:
        found = read_predictions(str(self.predictions), self._pairs)
        return ((pair, pair.masks(found[pair.id])) for pair in pairs)

    def _predict(
        self, decoder: str, model: Backbone, pairs: Sequence[Pair], context: EvalContext
    ) -> Iterator[tuple[Pair, list[np.ndarray]]]:
        """Pairs, image by image, with the masks predicted from the model's features."""
        need_spatial(model, "sa_co")
        by_image: dict[str, list[Pair]] = {}
        for pair in pairs:
            by_image.setdefault(pair.file, []).append(pair)
        root = Path(str(self.images))
        absent = [file for file in by_image if not (root / file).is_file()]
        if absent:
            raise ConfigError(
                f"evals.sa_co: {len(absent)} of {len(by_image)} annotated images are not in {root}, such as "
                f"{absent[0]}: set images to the folder that file_name is relative to, or download the rest"
            )
        sam = Sam3(decoder, "evals.sa_co").to(device_of(model))
        view = input_size(model, self.size or sam.side * model.spec.stride)
        for index, (file, own) in enumerate(by_image.items(), 1):
            context.report(f"image {index}/{len(by_image)}")
            try:
                image = decode(root / file, file, upright=False, size=own[0].size)
                if any(pair.size != (image.height, image.width) for pair in own):
                    raise ImageError(file, f"is {image.height}x{image.width} pixels (HxW), annotated as {own[0].size}")
            except ImageError as error:
                warnings.warn(f"skipped an image and its {len(own)} phrases: {error}", stacklevel=2)
                continue
            # Leave inference mode before yielding: collect the masks of one image.
            shown = fit(image, view, "stretch", resample=Image.Resampling.BILINEAR)[None]  # as SAM 3 does it
            with frozen(model, sam):
                out = model(shown.to(device_of(model)))
                embeddings = sam.embed(features_for(out, self.head, {sam.width}, "sa_co", file, usual="sam3"))
                found = [list(sam.segment(embeddings, pair.phrase, pair.size).masks.cpu().numpy()) for pair in own]
            yield from zip(own, found, strict=True)
