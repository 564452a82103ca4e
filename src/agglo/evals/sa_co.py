"""Can SAM 3 find every instance of a phrase on the model's features?"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from agglo.evals._concepts import Count, Pair, favourable, measures, read_pairs, read_predictions
from agglo.evals._decoder import features_for
from agglo.evals._features import need_spatial
from agglo.evals._sam3 import Sam3
from agglo.evals.base import Backbone, Eval, EvalContext, Place, ProbeError, device_of, frozen, input_size
from agglo.preprocess import decode, fit
from agglo.types import ConfigError, ImageError


class SaCo(Eval):
    """Classification-gated F1 on SA-Co/Gold: SAM 3 with its trunk replaced (SAM 3; C-RADIOv4; METHOD 7).

    Each pair of an image and a phrase is answered with a mask for every instance; phrases of which nothing is in the
    image count too. Masks with a score of 0.5 or more are matched one to one with the annotated ones (Hungarian, on
    IoU), at thresholds of 0.50 to 0.95; of the annotators, a pair takes the one it agrees with most. Only pairs count
    of which every annotator marked every instance.

    Metrics, as shares (papers print 100 times as much): ``pmf1``, the F1 of all instances of the pairs that have any;
    ``il_mcc``, the Matthews correlation of "something found" and "something there"; ``cgf1``, their product. The
    benchmark's number is the plain mean over its seven subsets, each of which is a run of its own.

    With ``decoder`` and ``images``, the model's features take the place of the trunk's: those of its head ``sam3`` (of
    the one head as wide as the trunk, or the model's own where it has no heads: a SAM 3 teacher's). Images are squashed
    to a square, as SAM 3 does it, and encoded once for all their phrases. With ``predictions``, a file is scored.

    The annotations' layout is taken to be COCO's with a *pair* for an image: ``images`` with ``id``, ``file_name``,
    ``text_input`` (or ``phrase``), ``height``, ``width`` and ``is_instance_exhaustive``; ``annotations`` with
    ``image_id`` and ``segmentation`` (run lengths, as numbers or text, or polygons). ``bbox``, ``area`` and ``iscrowd``
    are not read. SAM 3's repository describes ``id``, ``file_name``, ``text_input`` and ``image_id``; the rest is
    assumed.

    Args:
        annotations: the files of the annotators of one subset (of SA-Co/Gold three: a, b and c); pairs are those of
            the first.
        images: the folder below which the files named there lie.
        decoder: a SAM 3 of transformers with its tokenizer: ``facebook/sam3`` on the hub, or a folder.
        predictions: COCO results to score instead: ``image_id`` (of a pair), ``segmentation``, ``score``.
        head: whose features.
        size: side of the square that the model sees; None: as many of its cells as SAM 3's trunk has (72).
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
            raise ConfigError("evals.sa_co: annotations is a list of files, one for each annotator of a subset")
        if (decoder is None) == (predictions is None):
            raise ConfigError(
                "evals.sa_co: name a decoder, a SAM 3 such as facebook/sam3, to run it on the model's features; or "
                "predictions, a file of COCO results, to score it"
            )
        if decoder is not None and images is None:
            raise ConfigError(
                "evals.sa_co: images names the folder of the annotated images, which the decoder is to see"
            )
        if size is not None and size < 1:
            raise ConfigError(f"evals.sa_co: size is at least 1, got {size}")
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
        """Of ``images`` those that are annotated: the folder may hold the images of all subsets."""
        return sorted({pair.file for pair in self._pairs}) if key == "images" else None

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        """Measure ``model``, or score ``predictions``; deterministic.

        Raises:
            TypeError: the model has no spatial features.
            ConfigError: files that cannot be read or do not belong together, missing images, no head that fits.
            AssetError: the decoder cannot be had, or its weights are not complete.
        """
        pairs = [pair for pair in self._pairs if pair.exhaustive]
        if not pairs:
            raise ProbeError("no pair was marked in full by every annotator: there is nothing to score")
        answers = (
            self._predicted(pairs) if self.decoder is None else self._answered(self.decoder, model, pairs, context)
        )
        counts: list[Count] = []
        names: list[str] = []
        for pair, found in answers:
            counts.append(favourable(found, [pair.masks(true) for true in pair.truths]))
            names.append(f"{pair.id}: {pair.phrase}")
        if not counts:
            raise ProbeError("no image could be read: there is nothing to score")
        context.records.add_images("local_f1", names, [each.local for each in counts])
        return measures(counts)

    def _predicted(self, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, list[np.ndarray]]]:
        found = read_predictions(str(self.predictions), self._pairs)
        return ((pair, pair.masks(found[pair.id])) for pair in pairs)

    def _answered(
        self, decoder: str, model: Backbone, pairs: Sequence[Pair], context: EvalContext
    ) -> Iterator[tuple[Pair, list[np.ndarray]]]:
        """The pairs, image by image, with the masks found on the model's features."""
        need_spatial(model, "sa_co")
        by_image: dict[str, list[Pair]] = {}
        for pair in pairs:
            by_image.setdefault(pair.file, []).append(pair)
        root = Path(str(self.images))
        absent = [file for file in by_image if not (root / file).is_file()]
        if absent:
            raise ConfigError(
                f"evals.sa_co: {len(absent)} of {len(by_image)} annotated images are not below {root}, {absent[0]} "
                "among them: name the folder that file_name counts from, or download the rest"
            )
        sam = Sam3(decoder).to(device_of(model))
        view = input_size(model, self.size or sam.side * model.spec.stride)
        for index, (file, asked) in enumerate(by_image.items(), 1):
            context.report(f"image {index}/{len(by_image)}")
            try:
                image = decode(root / file, file)
            except ImageError as error:
                warnings.warn(f"skipped an image and its {len(asked)} phrases: {error}", stacklevel=2)
                continue
            if any(pair.size != (image.height, image.width) for pair in asked):
                raise ConfigError(f"{file} is {image.height}x{image.width} pixels (HxW), annotated as {asked[0].size}")
            # A generator must not be left in inference mode where it yields: the answers of one image at a time.
            shown = fit(image, view, "stretch", resample=Image.Resampling.BILINEAR)[None]  # as SAM 3 does it
            with frozen(model, sam):
                out = model(shown.to(device_of(model)))
                seen = sam.see(features_for(out, self.head, {sam.width}, "sa_co", file, usual="sam3"))
                found = [sam.answer(seen, pair.phrase, pair.size) for pair in asked]
            yield from zip(asked, found, strict=True)
