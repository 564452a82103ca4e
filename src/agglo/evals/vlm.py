"""Vision-language evaluation: export features for an external LLaVA training, and score its answers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from agglo.evals._answers import BENCHMARKS, score
from agglo.evals._features import check, need_spatial, read_batches, required
from agglo.evals._questions import pair, read_answers, read_truth
from agglo.evals.base import (
    SCENES_TEST,
    Backbone,
    Eval,
    EvalContext,
    FeatureError,
    Place,
    ProbeError,
    device_of,
    frozen,
    input_size,
    step_of,
)
from agglo.files import write_json
from agglo.preprocess import aspect_size, fit
from agglo.types import ConfigError

_SHARD = 1024
_TENSORS = "features-{:05d}.safetensors"


class Vlm(Eval):
    """LLaVA-1.5 (arXiv:2310.03744) on frozen features. The language model is trained elsewhere.

    With ``folder`` the features of every image are written there: the longer side is scaled to ``size``, the shorter
    one padded to a legal length, and each cell of the map is one token.

    - ``features-00000.safetensors``, ...: ``(tokens, D)`` float16, the map in row-major order, keyed by image number;
    - ``index.jsonl``: one line per image: ``image`` (its name), ``file``, ``key``, ``grid`` (height, width);
    - ``llava.json``: configuration of a LLaVA-1.5 with these features as vision tower, and of its two training stages.

    With ``answers`` and ``truth`` the answers of the trained model are scored as the benchmark does: VQA accuracy, the
    leave-one-out mean of ``min(1, equal human answers / 3)`` (``vqav2``, ``textvqa``), exact match (``gqa``), or yes/no
    classification (``pope``).

    Metrics: ``accuracy``, for ``pope`` also ``precision``, ``recall``, ``f1`` and ``yes``, the share of yes, all in
    [0, 1]; without answers ``images``, ``tokens`` (mean per image) and ``width`` of the features written.

    Args:
        folder: for the features; None writes none.
        answers: JSON lines with ``question_id``, ``text`` and ``prompt``, as LLaVA writes them. For TextVQA LLaVA's
            ``question_id`` is the image's id: answers are then matched by image and question.
        truth: the benchmark's ground truth file; for ``pope`` the label file of one category.
        questions: for ``pope`` with answers to all categories: the question file
            (``llava_pope_test.jsonl``: ``question_id``, ``image``, ``text``, ``category``).
        benchmark: ``vqav2``, ``textvqa``, ``gqa`` or ``pope``.
        size: longer side of an image in pixels.
        language_model: name in the configuration.
        source: of the images.
    """

    bundled = False
    revision = 2
    places: ClassVar[Mapping[str, Place]] = {
        "folder": "output",
        "answers": "answers",
        "truth": "data",
        "questions": "answers",
    }

    def __init__(
        self,
        *,
        folder: str | None = None,
        answers: str | None = None,
        truth: str | None = None,
        questions: str | None = None,
        benchmark: Literal["vqav2", "textvqa", "gqa", "pope"] = "textvqa",
        size: int = 432,
        language_model: str = "lmsys/vicuna-7b-v1.5",
        source: Mapping[str, Any] = SCENES_TEST,
    ) -> None:
        if folder is None and answers is None:
            raise ConfigError("evals.vlm: set folder to write features to, or answers and truth to score")
        if (answers is None) != (truth is None):
            raise ConfigError("evals.vlm: answers and truth must be set together")
        if questions is not None and (benchmark != "pope" or answers is None):
            raise ConfigError("evals.vlm: questions needs answers to pope")
        if benchmark not in BENCHMARKS:
            raise ConfigError(f"evals.vlm: benchmark must be one of {', '.join(BENCHMARKS)}, not {benchmark!r}")
        if size < 1:
            raise ConfigError(f"evals.vlm: size must be at least 1, got {size}")
        self.folder, self.answers, self.truth, self.questions = (
            each and os.path.expanduser(each) for each in (folder, answers, truth, questions)
        )
        self.benchmark = benchmark
        self.size = size
        self.language_model = language_model
        self.source = source

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.answers is not None and self.truth is not None:
            questions = read_truth(self.truth, self.benchmark)
            answers = pair(read_answers(self.answers), questions, self.benchmark, self.questions)
            found, own = score(answers, [question.truth for question in questions], self.benchmark)
            context.records.add_images("accuracy", [question.id for question in questions], own)
        if self.folder is not None:
            written = self._write(model, Path(self.folder), context)
            found = found or written
        return found

    def _write(self, model: Backbone, folder: Path, context: EvalContext) -> dict[str, float]:
        need_spatial(model, "vlm")
        folder.mkdir(parents=True, exist_ok=True)
        shard: dict[str, Tensor] = {}
        lines: list[dict[str, Any]] = []
        with frozen(model):
            for _, names, images in read_batches(context.sources.open(self.source), [], context):
                for name, image in zip(names, images, strict=True):
                    pixels = padded(image, self.size, model)[None].to(device_of(model))
                    map_ = required(check(model(pixels).spatial, "spatial", [name], 4), model)
                    key, file = f"{len(lines):08d}", _TENSORS.format(len(lines) // _SHARD)
                    shard[key] = _half(map_[0], name)
                    lines.append({"image": name, "file": file, "key": key, "grid": list(map_.shape[-2:])})
                    if len(shard) == _SHARD:
                        save_file(shard, folder / file)
                        shard = {}
        if not lines:
            raise ProbeError("no image could be read: no features to write")
        if shard:
            save_file(shard, folder / lines[-1]["file"])
        (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        width = int(model.spec.spatial or 0)
        write_json(folder / "llava.json", configuration(width, self.size, self.language_model))
        tokens = sum(line["grid"][0] * line["grid"][1] for line in lines)
        return {"images": float(len(lines)), "tokens": tokens / len(lines), "width": float(width)}


def padded(image: Image.Image, size: int, model: Backbone) -> Tensor:
    """An image with its longer side scaled to the legal length nearest to ``size``: ``(3, H, W)`` in [0, 1].

    The shorter side is padded at its end to the next legal length, with the colour that the model's normalisation maps
    to zero. A model with a fixed input size gets that size.
    """
    view, step = input_size(model, size), step_of(model)
    pixels = fit(image, view, "pad", fill=getattr(model, "fill", (0.5, 0.5, 0.5)))
    if getattr(model, "canvas", None):
        return pixels
    h, w = aspect_size((image.height, image.width), view, 1, inside=True)
    return pixels[:, : -(-h // step) * step, : -(-w // step) * step]


def _half(map_: Tensor, name: str) -> Tensor:
    """``(D, h, w)`` as tokens ``(h*w, D)`` float16.

    Raises:
        FeatureError: a value out of the range of float16.
    """
    tokens = map_.flatten(1).T.contiguous()
    if float(tokens.abs().max()) > torch.finfo(torch.float16).max:
        raise FeatureError(
            f"the spatial features of {name} reach {float(tokens.abs().max()):.3g}: the maximum of float16 is 65504"
        )
    return tokens.half()


def configuration(width: int, size: int, language_model: str) -> dict[str, Any]:
    """LLaVA-1.5 on features of ``width`` channels: its projector, trained alone, then with the language model."""
    return {
        "model": {
            "model_type": "llava",
            "language_model": language_model,
            "mm_vision_tower": "features of this folder, by index.jsonl",
            "mm_hidden_size": width,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -1,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": "longer side to image_size, shorter side padded at the end",
            "image_size": size,
        },
        "stages": [
            {"name": "pretrain", "data": "blip_laion_cc_sbu_558k", "train": ["projector"], "epochs": 1}
            | {"batch_size": 256, "learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.03}
            | {"schedule": "cosine", "max_length": 2048},
            {"name": "finetune", "data": "llava_v1_5_mix665k", "train": ["projector", "language_model"], "epochs": 1}
            | {"batch_size": 128, "learning_rate": 2e-5, "weight_decay": 0.0, "warmup_ratio": 0.03}
            | {"schedule": "cosine", "max_length": 2048},
        ],
    }
