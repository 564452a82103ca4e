"""Classification by free text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.config import nearest
from agglo.evals._cache import Encoded
from agglo.evals._features import check_aspect, encode, encode_texts
from agglo.evals._labels import class_names
from agglo.evals._probe import rank_of
from agglo.evals.base import SCENES_TEST, Backbone, Eval, EvalContext, FeatureError
from agglo.extras import require
from agglo.sources.base import Source
from agglo.types import ConfigError
from agglo.weights.bundled import imagenet_classes, imagenet_wnids

_TEMPLATES = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES", "base": None}


class ZeroShot(Eval):
    """Zero-shot classification: the class whose name, as text, is most similar to the image (CLIP, arXiv:2103.00020).

    A class's vector is the normalised mean, over templates, of the unit-norm embeddings of its name; an image's is
    ``encode_image``, or the normalised summary of a text-aligned teacher without that method. The score is their
    cosine; ties go to the first class.

    Metrics: ``top1`` and ``top5``, the share of images whose class is among the k highest scores, in [0, 1].

    Args:
        templates: sentences with ``{}`` for the class name; or ``openai``, the 80 templates of CLIP, ``simple``, seven
            of them with equal accuracy on ImageNet, or ``base``, RADIO's single one. The first two are read from the
            open_clip package.
        classes: ``source``: the source's ``classes``, or the names of its labels; ``imagenet``: all 1000 classes, with
            labels from the WordNet id at the beginning of each file name (``n01440764_tench.jpg``); or a list of names
            that includes every label of the source.
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        aspect: ``crop``: the centre of each image at the aspect of ``size``; ``keep``: the whole image, scaled to cover
            ``size``, as RADIO does. A teacher with a fixed input size gets crops either way, with a warning.
        source: the images.
    """

    needs_text = True

    def __init__(
        self,
        *,
        templates: str | list[str] | tuple[str, ...] = ("a photo of a {}",),
        classes: str | list[str] = "source",
        size: int | tuple[int, int] = 128,
        aspect: Literal["crop", "keep"] = "crop",
        source: Mapping[str, Any] = SCENES_TEST,
    ) -> None:
        if isinstance(templates, str):
            templates = named_templates(templates)
        if not templates:
            raise ConfigError('evals.zero_shot: templates is empty; use "{}" for the class name alone')
        wrong = next((template for template in templates if "{}" not in template), None)
        if wrong is not None:
            raise ConfigError(f"evals.zero_shot: template {wrong!r} has no {{}} for the class name")
        if isinstance(classes, str) and classes not in ("source", "imagenet"):
            raise ConfigError(
                f"evals.zero_shot: classes {classes!r}{nearest(classes, ('source', 'imagenet'))}, or a list"
            )
        self.templates = tuple(templates)
        self.classes = classes
        self.size = size
        self.aspect = check_aspect("zero_shot", aspect)
        self.source = source

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        # Texts first: a model without a text tower raises before any image is encoded.
        encode_texts(model, [self.templates[0].replace("{}", "thing")], "zero_shot")
        images = encode(model, self.source, self.size, context, want="text", aspect=self.aspect)
        if images.summary is None:
            raise FeatureError(f"{type(model).__name__} returned no image embeddings")
        names, truth = self.labels(images, context.sources.open(self.source))
        bank = class_bank(model, names, self.templates)
        if bank.shape[1] != images.summary.shape[1]:
            raise FeatureError(f"texts have {bank.shape[1]} channels and images {images.summary.shape[1]}")
        ranks = [
            rank_of(chunk @ bank.T, labels)
            for chunk, labels in zip(images.summary.split(1024), truth.split(1024), strict=True)
        ]
        rank = torch.cat(ranks)
        context.records.add_by_class("top1", images.names, [names[i] for i in truth.tolist()], (rank < 1).double())
        return {f"top{k}": float((rank < k).double().mean()) for k in (1, 5)}

    def labels(self, images: Encoded, source: Source) -> tuple[list[str], Tensor]:
        """Names of the candidate classes, and the index of each image's class."""
        if self.classes == "imagenet":
            number = {wnid: i for i, wnid in enumerate(imagenet_wnids())}
            wnids = [PurePath(name).name.split(".")[0].split("_")[0] for name in images.names]
            bad = next((name for name, wnid in zip(images.names, wnids, strict=True) if wnid not in number), None)
            if bad is not None:
                raise ConfigError(
                    f"{bad}: no ImageNet-1k WordNet id; name files like n01440764_tench.jpg, or set `classes`"
                )
            return list(imagenet_classes()), torch.tensor([number[wnid] for wnid in wnids])
        found = class_names(source, images.index)
        numbers = [source.label(i) for i in images.index] if hasattr(source, "label") else []  # type: ignore[attr-defined]
        if self.classes == "source" and getattr(source, "classes", ()) and not any(isinstance(n, str) for n in numbers):
            # By index, not by name: two classes of ImageNet have the name "crane".
            return list(source.classes), torch.tensor(numbers)  # type: ignore[attr-defined]
        own: Sequence[str] = getattr(source, "classes", ()) or sorted(set(found))
        names = list(own if isinstance(self.classes, str) else self.classes)
        absent = next((name for name in found if name not in names), None)
        if absent is not None:
            raise ConfigError(
                f"evals.zero_shot: the source labels images {absent!r}, not in classes{nearest(absent, names)}"
            )
        number = {name: i for i, name in reversed(list(enumerate(names)))}
        return names, torch.tensor([number[name] for name in found])


def named_templates(name: str) -> tuple[str, ...]:
    """Templates of a named set, with ``{}`` for the class name.

    Raises:
        ConfigError: an unknown name.
        MissingExtraError: ``openai`` or ``simple``, and open_clip is not installed.
    """
    if name not in _TEMPLATES:
        hint = "or a list of sentences with {} for the class name"
        raise ConfigError(f"evals.zero_shot: templates {name!r}{nearest(name, _TEMPLATES)}, {hint}")
    attribute = _TEMPLATES[name]
    if attribute is None:
        return ("an image of a {}.",)
    # open_clip has them as functions of the class name.
    return tuple(fill("{}") for fill in getattr(require("open_clip", "teachers"), attribute))


def class_bank(model: object, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Unit-norm ``(V, D)``: the normalised mean, over templates, of each name's unit-norm embeddings."""
    readable = [name.replace("_", " ") for name in names]
    mean = sum(
        encode_texts(model, [template.replace("{}", name) for name in readable], "zero_shot") for template in templates
    )
    return F.normalize(torch.as_tensor(mean), dim=1)
