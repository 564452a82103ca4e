"""``agglo.segment``: masks of images from texts, boxes or points, by SAM 3 on a student's features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agglo.decoders.dense import shares, text_scores
from agglo.decoders.sam3 import Found, advice, instances, load, load_tokenizer, text_length, tokenize
from agglo.extras import require
from agglo.integrations.sam3 import install
from agglo.model.inputs import ImageLike
from agglo.model.model import Model
from agglo.preprocess import image_name, read_image
from agglo.segmentation.instances import Instances, boxes_of
from agglo.segmentation.prompts import Box, Point, Prompts
from agglo.types import AssetError, ConfigError
from agglo.zoo.loading import DEFAULT
from agglo.zoo.loading import load as load_model

DECODER, STUDENT = "facebook/sam3", "c-radio_v4-so400m"
"""The defaults: C-RADIOv4 was distilled from this SAM 3."""
TRACKED = ("sam3_video", "sam3_tracker_video")
"""Types of checkpoints that have a tracker."""
BACKGROUND = ("background",)
_WHERE = "segment"


class Segmenter(Protocol):
    """Segments one image."""

    def __call__(self, image: Image.Image, prompts: Prompts, name: str = ...) -> Instances:
        """The instances of all prompts."""
        ...


class Sam3Segmenter:
    """SAM 3 with a student as its trunk: concepts by Sam3Model, single objects by the tracker on one frame.

    Args:
        model: a model with a ``sam3`` head, or its name or folder.
        decoder: a SAM 3 checkpoint: a folder or a name on the hub.
        head: to read; None for ``sam3``.
        window: side of the student's attention windows in patches; see :func:`agglo.integrations.sam3.install`.
        threshold: instances with lower scores are left out.
        device: of all weights.
        points: load the tracker, which takes points, instead of the concept model, which takes texts and boxes.

    Raises:
        ConfigError: the student does not fit.
        AssetError: a checkpoint cannot be read or lacks weights.
    """

    def __init__(
        self,
        model: Model | str,
        decoder: str,
        *,
        head: str | None = None,
        window: int | None = None,
        threshold: float = 0.5,
        device: str | torch.device = "cpu",
        points: bool = False,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ConfigError(f"{_WHERE}: threshold {threshold} is not between 0 and 1")
        sam = load_tracked(decoder, "Sam3TrackerVideoModel") if points else load(decoder, _WHERE)
        self.tokenizer = None if points else load_tokenizer(decoder, _WHERE)
        student = load_model(model, heads=[head or "sam3"]) if isinstance(model, str) else model
        installed = install(sam, student, window=window, head=head)
        self.sam: Any = installed.model.to(device).eval()
        self.processor: Any = installed.processor
        self.threshold, self.device = threshold, torch.device(device)

    @torch.inference_mode()
    def __call__(self, image: Image.Image, prompts: Prompts, name: str = "image") -> Instances:
        """The instances of all prompts in an RGB image; texts share one pass of the student.

        Raises:
            ConfigError: a box or point outside the image; a text of more tokens than the text encoder takes; points
                for the concept model, or texts and boxes for the tracker.
        """
        size = (image.height, image.width)
        prompts.check_inside(size, name)
        if bool(prompts.points) == (self.tokenizer is not None):
            raise ConfigError(f"{_WHERE}: points need Sam3Segmenter(..., points=True), texts and boxes points=False")
        if prompts.points:
            return self._object(image, prompts, name)
        texts = prompts.texts or ("visual",)  # SAM 3's own text for a box alone
        words = tokenize(self.tokenizer, texts, text_length(self.sam), _WHERE).to(self.device)
        inputs = self.processor(images=image, return_tensors="pt")
        vision = self.sam.get_vision_features(pixel_values=inputs["pixel_values"].to(self.device))
        found, labels = [], []
        for index in range(len(texts)):
            one = slice(index, index + 1)
            out = self.sam(
                vision_embeds=vision,
                input_ids=words["input_ids"][one],
                attention_mask=words["attention_mask"][one],  # without it other masks come out, silently
                **_boxes(prompts, size, self.device),
            )
            each = instances(out, size, self.threshold)
            order = each.scores.argsort(descending=True)
            found.append(Found(*(part.to(order.device)[order].cpu() for part in each)))
            labels += [prompts.texts[index] if prompts.texts else "box"] * len(order)
        return _instances(name, size, found, labels)

    def _object(self, image: Image.Image, prompts: Prompts, name: str) -> Instances:
        size = (image.height, image.width)
        session = self.processor.init_video_session(
            video=[np.asarray(image)], inference_device=self.device, dtype=torch.float32
        )
        self.processor.add_inputs_to_inference_session(
            session,
            frame_idx=0,
            obj_ids=1,
            input_points=[[[[x, y] for x, y, _ in prompts.points]]],
            input_labels=[[[int(label) for *_, label in prompts.points]]],
        )
        out = self.sam(session, frame_idx=0)
        masks = self.processor.post_process_masks([out.pred_masks], [list(size)])[0][:, 0].cpu()
        scores = out.object_score_logits.flatten().sigmoid().float().cpu()
        kept = scores >= self.threshold
        found = Found(masks[kept], scores[kept], torch.zeros(int(kept.sum()), 4))
        return _instances(name, size, [found], ["points"] * len(found.scores))


def load_tracked(decoder: str, kind: str) -> Any:
    """A SAM 3 with a tracker, in float32 and eval mode.

    Args:
        decoder: a folder, or a name on the hub.
        kind: class of transformers.

    Raises:
        AssetError: it cannot be read, has no tracker, or lacks weights.
    """
    transformers = require("transformers", "teachers")
    try:
        stored = transformers.AutoConfig.from_pretrained(decoder).model_type
        if stored not in TRACKED:  # transformers would make a tracker of full size with random weights
            raise AssetError(
                f"{decoder} is a {stored} checkpoint without a tracker, which points and videos need: use {DECODER} "
                f"or another of type {' or '.join(TRACKED)}; or use texts or boxes"
            )
        model, info = getattr(transformers, kind).from_pretrained(
            decoder, output_loading_info=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        raise AssetError(f"{_WHERE}: no SAM 3 tracker in {decoder!r} ({error}); {advice(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise AssetError(f"{decoder} lacks {len(missing)} weights of SAM 3's tracker, such as {missing[0]}")
    return model.eval().requires_grad_(False)


def _boxes(prompts: Prompts, size: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """Boxes as SAM 3 takes them: ``(1, N, 4)`` float32 normalised ``cxcywh``, and labels ``(1, N)``."""
    if not prompts.boxes:
        return {}
    x0, y0, x1, y1, label = torch.tensor(prompts.boxes, dtype=torch.float32, device=device).unbind(1)
    height, width = size
    centred = torch.stack([(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height], 1)
    return {"input_boxes": centred[None], "input_boxes_labels": label[None].long()}


def _instances(name: str, size: tuple[int, int], found: Sequence[Found], labels: Sequence[str]) -> Instances:
    masks = np.concatenate([each.masks.numpy() for each in found])
    scores = np.concatenate([each.scores.float().numpy() for each in found])
    kept: Any = masks.any((1, 2))  # without those that have no pixel above one half
    return Instances(
        name, size, masks[kept], scores[kept], boxes_of(masks[kept]),
        tuple(label for label, keep in zip(labels, kept, strict=True) if keep),
    )  # fmt: skip


class DenseSegmenter:
    """Masks without SAM 3: each pixel goes to the most similar text; see :func:`agglo.decoders.dense.text_scores`.

    One mask per text, of all its instances together. Its score is the mean probability of its text over the mask.

    Args:
        model: a model with a text-aligned head, or its name or folder.
        head: the text-aligned head; None for the first.
        background: texts that compete and are not returned; they keep pixels of other things from going to a text.
        slide: side of sliding windows in pixels; see :func:`agglo.decoders.dense.image_cells`.
        outliers: see :func:`agglo.decoders.dense.without_outliers`.
        threshold: masks with lower scores are left out.
        device: of the weights.

    Raises:
        ConfigError: the model has no text-aligned head.
    """

    def __init__(
        self,
        model: Model | str,
        *,
        head: str | None = None,
        background: Sequence[str] = BACKGROUND,
        slide: int | None = None,
        outliers: float | None = None,
        threshold: float = 0.0,
        device: str | torch.device = "cpu",
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ConfigError(f"{_WHERE}: threshold {threshold} is not between 0 and 1")
        loaded = load_model(model, heads="text" if head is None else [head]) if isinstance(model, str) else model
        try:
            self.head = loaded.text_head(head)
        except TypeError as error:
            raise ConfigError(f"{_WHERE}: {error}") from None
        self.model = loaded.to(device).eval()
        self.background, self.threshold = tuple(background), threshold
        self.options = {"head": self.head, "slide": slide, "outliers": outliers}

    @torch.inference_mode()
    def __call__(self, image: Image.Image, prompts: Prompts, name: str = "image") -> Instances:
        """One mask per text that has pixels.

        Raises:
            ConfigError: boxes or points, which this method does not take.
        """
        if prompts.boxes or prompts.points:
            raise ConfigError(f"{_WHERE}: method 'dense' takes texts only; use method 'sam3' for boxes and points")
        found = shares(text_scores(self.model, image, [*prompts.texts, *self.background], **self.options)).cpu()
        nearest, count = found.argmax(0), len(prompts.texts)
        masks = torch.stack([nearest == index for index in range(count)])
        scores = (found[:count] * masks).sum((1, 2)) / masks.sum((1, 2)).clamp_min(1)
        kept = masks.flatten(1).any(1) & (scores >= self.threshold)
        labels = [text for text, keep in zip(prompts.texts, kept.tolist(), strict=True) if keep]
        part = Found(masks[kept], scores[kept], torch.zeros(len(labels), 4))
        return _instances(name, (image.height, image.width), [part], labels)


def segmenter(
    prompts: Prompts,
    *,
    method: str = "sam3",
    model: Model | str | None = None,
    decoder: str = DECODER,
    head: str | None = None,
    window: int | None = None,
    background: Sequence[str] = BACKGROUND,
    slide: int | None = None,
    outliers: float | None = None,
    threshold: float | None = None,
    device: str | torch.device = "cpu",
) -> Segmenter:
    """The model that segments what prompts describe; arguments of :func:`segment`."""
    if method == "dense":
        least = 0.0 if threshold is None else threshold
        chosen = DEFAULT if model is None else model
        return DenseSegmenter(
            chosen, head=head, background=background, slide=slide, outliers=outliers, threshold=least, device=device
        )
    if method != "sam3":
        raise ConfigError(f"{_WHERE}: method is {method!r}; use 'sam3' or 'dense'")
    if slide is not None or outliers is not None:
        raise ConfigError(f"{_WHERE}: slide and outliers are of method 'dense'; leave them out for 'sam3'")
    return Sam3Segmenter(
        STUDENT if model is None else model, decoder, head=head, window=window, device=device,
        threshold=0.5 if threshold is None else threshold, points=bool(prompts.points),
    )  # fmt: skip


def segment(
    images: ImageLike | Path | Sequence[ImageLike],
    text: str | Sequence[str] | None = None,
    *,
    boxes: Sequence[Box] = (),
    points: Sequence[Point] = (),
    method: Literal["sam3", "dense"] = "sam3",
    model: Model | str | None = None,
    decoder: str = DECODER,
    head: str | None = None,
    window: int | None = None,
    background: Sequence[str] = BACKGROUND,
    slide: int | None = None,
    outliers: float | None = None,
    threshold: float | None = None,
    device: str | torch.device = "cpu",
) -> list[Instances]:
    """Segment what texts, boxes or points describe: SAM 3 with a student as its trunk, or a text-aligned map alone.

    Args:
        images: one image (path, PIL, array, tensor), or a list of them.
        text: a concept ("shoe"), or several; every instance of each is returned.
        boxes: ``(x0, y0, x1, y1)`` in pixels, examples of the concept; a fifth entry 0 marks an example of what it is
            not. With or without one text.
        points: ``(x, y)`` or ``(x, y, label)`` in pixels, of one object: label 1 inside, 0 outside.
        method: ``sam3``; or ``dense``: one mask per text from the model's text-aligned map, without SAM 3.
        model: a model with a ``sam3`` head (``dense``: with a text-aligned one), or its name or folder; None for
            C-RADIOv4-SO400M (``dense``: agglo-lite).
        decoder: a SAM 3 checkpoint: a folder, or a name on the hub.
        head: to read from; None for ``sam3`` (``dense``: the first text-aligned one).
        window: side of the student's attention windows in patches; 0 for none, None for the model's own setting.
        background: of ``dense``: texts that compete and are not returned.
        slide: of ``dense``: encode the image in windows of this side in pixels; None for one pass.
        outliers: of ``dense``: replace tokens whose norm exceeds the median by this many deviations; None for none.
        threshold: instances with lower scores are left out; in [0, 1]; None for 0.5 (``dense``: 0).
        device: of all weights.

    Returns:
        One :class:`~agglo.segmentation.instances.Instances` per image.

    Raises:
        ConfigError: no prompt, or a wrong one; a student that does not fit.
        AssetError: a checkpoint is gated, not reachable, or lacks weights.
        ImageError: an image cannot be read.
    """
    prompts = Prompts.of(text, boxes, points)
    many: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
    run = segmenter(
        prompts, method=method, model=model, decoder=decoder, head=head, window=window, background=background,
        slide=slide, outliers=outliers, threshold=threshold, device=device,
    )  # fmt: skip
    return [run(read_image(each), prompts, image_name(each)) for each in many]
