"""Conditioner, student and heads as one module that takes images of any size and saves to a folder."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglo.config import build, check_options, find, nearest
from agglo.model import artefact
from agglo.model.heads import HeadConfig, Heads
from agglo.model.inputs import ImageLike, InputRules, prepare, prepare_list
from agglo.model.intermediates import Aggregation, Alpha, choose, collect
from agglo.nn.feature_norm import FeatureNormalizer, IntermediateNormalizer
from agglo.nn.windows import check_window_value
from agglo.preprocess import Conditioner
from agglo.types import ConfigError, Features, FeatureSpec, ImageError, Output

_OPTIONAL = ("tokens", "summary_slots", "normalizers", "preferred_size", "provenance")


class Model(nn.Module):
    """Conditioner + student + heads.

    ``model(images)`` takes RGB in [0, 1] of any size and returns :class:`agglo.Output`: the backbone's ``summary``
    (the class tokens of the teachers that have a summary, concatenated) and ``spatial``, and ``heads[name]``, the
    student's prediction of teacher ``name``'s features, in that teacher's feature space.

    Args:
        student: ``{kind, **keys}`` of the student.
        heads: by teacher name.
        tokens: names of the teachers that have a class token, in its order; those of ``heads`` when None.
        summary_slots: class tokens that form the summary; those that feed a summary head when None.
        normalizers: ``features``: normalise the map before the heads; ``intermediates``: normalise the maps of
            :meth:`intermediates` (``per_block``: with one rotation per block). For released models that have them.
        preferred_size: recommended side of the input, in pixels.
        provenance: facts on the training (recipe, teachers, licences, numbers); kept verbatim.
        installed: False for a downloaded configuration, which may name built-in kinds only.
    """

    def __init__(
        self,
        student: Mapping[str, Any],
        heads: Mapping[str, HeadConfig],
        *,
        tokens: Sequence[str] | None = None,
        summary_slots: Sequence[int] | None = None,
        normalizers: Mapping[Literal["features", "intermediates"], Literal[True, "per_block"]] | None = None,
        preferred_size: int = 224,
        provenance: Mapping[str, Any] | None = None,
        installed: bool = True,
    ) -> None:
        super().__init__()
        self.student_config = check_options("students", student, "student", installed=installed)
        self.head_configs = dict(heads)
        self.tokens = tuple(heads if tokens is None else tokens)
        self.normalizers, self.provenance = dict(normalizers or {}), dict(provenance or {})
        self.preferred_size = preferred_size
        self.student = build("students", self.student_config, self.tokens, installed=installed)
        self.conditioner: nn.Module = Conditioner(self.student.mean, self.student.std)
        inner: FeatureSpec = self.student.spec
        built = {name: Heads(config, inner, installed=installed) for name, config in heads.items()}
        self.heads: dict[str, Heads] = nn.ModuleDict(built)  # type: ignore[assignment]
        with_summary = sorted({c.slot for c in heads.values() if c.summary is not None}) or [0]
        self.summary_slots = list(with_summary if summary_slots is None else summary_slots) if inner.slots > 1 else [0]
        if not set(self.summary_slots) <= set(range(inner.slots)):
            raise ConfigError(f"summary_slots: {self.summary_slots} exceeds 0 to {inner.slots - 1}, the class tokens")
        summary = None if inner.summary is None else inner.summary // inner.slots * len(self.summary_slots)
        self.spec = FeatureSpec(summary, inner.spatial, inner.stride, inner.step, len(self.summary_slots))
        width = inner.spatial or 0
        self.feature_normalizer = FeatureNormalizer(width) if "features" in self.normalizers else None
        per_block = self.normalizers.get("intermediates") == "per_block"
        self.intermediate_normalizer = (
            IntermediateNormalizer(self.student.depth, width, per_block=per_block)
            if "intermediates" in self.normalizers
            else None
        )
        self._towers: dict[str, Any] = {}
        self._warned: set[str] = set()

    # --- inference ---

    @overload
    def forward(
        self, images: ImageLike, *, heads: Iterable[str] | None = ..., resize: bool = ..., window: int | None = ...
    ) -> Output: ...

    @overload
    def forward(
        self,
        images: Sequence[ImageLike],
        *,
        heads: Iterable[str] | None = ...,
        resize: bool = ...,
        window: int | None = ...,
    ) -> list[Output]: ...

    def forward(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        heads: Iterable[str] | None = None,
        resize: bool = True,
        window: int | None = None,
    ) -> Output | list[Output]:
        """Encode images.

        Args:
            images: ``(B, 3, H, W)`` or ``(3, H, W)`` in [0, 1]; one PIL image, ``(H, W, 3)`` array, or path; clips
                ``(B, T, 3, H, W)``, whose frames share one viewport of the position table in training; or a list of
                single images of any sizes and aspects, which a ViT packs into few passes, without padding.
            heads: names of the heads to run; None or ``"all"`` for all, ``()`` for none.
            resize: resize sides that are not a multiple of :meth:`step` to the nearest one; False raises instead.
            window: side, in patches, of ViTDet's attention windows; 0 for none, None for the model's own setting. It
                must divide the patch grid of a tensor whose sides are whole patches; all other images (files, arrays,
                lists, other sides) are resized to whole windows, unless a side is less than half a window.

        Returns:
            ``summary (B, D)``, ``spatial (B, D', H / stride, W / stride)``, and the chosen heads' features; for clips
            ``(B, T, ...)``; for a list, a list of outputs of one image each.

        Raises:
            ValueError: not images in [0, 1]; an illegal size with ``resize=False``; a window that does not divide the
                grid or is too large. The message has the legal values and, for a list, the image's path or index.
            KeyError: no such head.
            TypeError: ``window`` is given and the student has no windowed attention.
        """
        names = self._chosen(heads)
        if isinstance(images, list | tuple):
            batches = prepare_list(images, self._input_rules(window), resize=resize)
            found = self.student.forward_list([self._condition(b) for b in batches], **self._windowed(window))
            return [self.decode(features, names) for features in found]
        if isinstance(images, Tensor) and images.ndim == 5:
            return self._clips(images, names, resize, window)
        batch = self.prepare(images, resize=resize, window=window)  # type: ignore[arg-type]
        return self.decode(self.encode(batch, window=window), names)

    def _clips(self, clips: Tensor, heads: list[str], resize: bool, window: int | None) -> Output:
        count, frames = clips.shape[:2]
        self.student.set_clip_length(frames)
        try:
            out = self.decode(
                self.encode(self.prepare(clips.flatten(0, 1), resize=resize, window=window), window=window), heads
            )
        finally:
            self.student.set_clip_length(1)

        per_clip = {
            name: f.map(lambda t: t.unflatten(0, (count, frames))) for name, f in [("", out), *out.heads.items()]
        }
        backbone = per_clip.pop("")
        return Output(backbone.summary, backbone.spatial, per_clip)

    def step(self, window: int | None = None) -> int:
        """Sides must be a multiple of this many pixels: one patch, or one window of patches."""
        check_window_value(window)
        window = getattr(self.student, "window", None) if window is None else window
        return self.spec.step * (window or 1)

    def prepare(self, images: ImageLike, *, resize: bool = True, window: int | None = None) -> Tensor:
        """Convert images to a float batch of legal size on the model's device; arguments of :meth:`forward`."""
        return prepare(images, self._input_rules(window), resize=resize)

    def encode(
        self,
        images: Tensor,
        *,
        window: int | None = None,
        blocks: Collection[int] = (),
        into: dict[int, Features] | None = None,
    ) -> Features:
        """Features of the student alone for ``(B, 3, H, W)`` of a legal size, with all its class tokens.

        Args:
            images: RGB in [0, 1].
            window: as in :meth:`forward`.
            blocks: blocks whose features, with the final norm, are stored in ``into`` by index in the same pass;
                requires ``student.depth > 0``.
            into: dictionary to fill.
        """
        captured = {"blocks": blocks, "into": into} if blocks else {}
        return self.student(self._condition(images), **self._windowed(window), **captured)

    def decode(self, features: Features, heads: Iterable[str] | None = None) -> Output:
        """Apply the heads to the student's features."""
        names = self._chosen(heads)
        if self.feature_normalizer is not None and features.spatial is not None:
            features = Features(features.summary, self.feature_normalizer(features.spatial))
        found = {name: self.heads[name](features) for name in names}
        return Output(self._summary(features), features.spatial, found)

    def intermediates(
        self,
        images: ImageLike,
        blocks: int | Sequence[int],
        *,
        aggregation: Aggregation = "sparse",
        alpha: Alpha = "post-alpha",
        norm: bool = False,
        resize: bool = True,
        window: int | None = None,
    ) -> list[Features]:
        """Features after chosen blocks; blocks after the last chosen one are not run.

        Args:
            images: as in :meth:`forward`, without lists and clips.
            blocks: number of last blocks; or indices, negative ones from the end.
            aggregation: ``sparse``: features of those blocks; ``dense``: averages over the blocks since the previous
                one.
            alpha: how the checkpoint's intermediate normalizer, if any, scales them (docs/checkpoints.md, 1.6).
            norm: apply the student's final norm, if any.
            resize, window: as in :meth:`forward`.

        Returns:
            One for each block, ascending: ``summary (B, D)`` and ``spatial (B, D', H / stride, W / stride)``.

        Raises:
            ValueError: no such block; a list or clips.
            TypeError: the student is not a stack of blocks.
        """
        if not self.student.depth:
            raise TypeError(f"a {self.student_config['kind']} student is not a stack of blocks: no intermediates")
        if isinstance(images, list | tuple):
            raise ImageError("images", "is a list; call intermediates for each of its images")
        if isinstance(images, Tensor) and images.ndim == 5:
            raise ImageError("images", "are clips (B, T, 3, H, W); pass clips.flatten(0, 1)")
        batch = self._condition(self.prepare(images, resize=resize, window=window))
        found = collect(
            self.student, batch, choose(blocks, self.student.depth), self.intermediate_normalizer,
            aggregation=aggregation, alpha=alpha, norm=norm, **self._windowed(window),
        )  # fmt: skip
        return [Features(self._summary(features), features.spatial) for features in found]

    def take_conditioner(self) -> nn.Module:
        """Detach and return the conditioner, for use in a data loader; the model then takes conditioned tensors only.

        Raises:
            ConfigError: it was taken before; put it back with ``model.conditioner = conditioner``.
        """
        if isinstance(self.conditioner, nn.Identity):
            raise ConfigError("this model's conditioner was taken before: keep the one that the first call returned")
        taken, self.conditioner = self.conditioner, nn.Identity()
        return taken

    def _condition(self, images: Tensor) -> Tensor:
        return self.conditioner(images).to(next(self.student.parameters()).dtype)

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=4)

    def _input_rules(self, window: int | None) -> InputRules:
        return InputRules(
            step=self.spec.step,
            window=self.step(window) // self.spec.step,
            windowed=self.student.windows,
            conditioned=isinstance(self.conditioner, nn.Identity),
            device=next(self.student.parameters()).device,
            max_size=self.provenance.get("max_size"),
            warn=self._warn_once,
        )

    def _windowed(self, window: int | None) -> dict[str, int]:
        if window is not None and not self.student.windows:
            raise TypeError(f"window={window}: a {self.student_config['kind']} student has no windowed attention")
        return {} if window is None else {"window": window}

    def _chosen(self, heads: Iterable[str] | None) -> list[str]:
        if heads is None or heads == "all":
            return list(self.heads)
        chosen = [heads] if isinstance(heads, str) else list(heads)
        for name in chosen:
            if name not in self.heads:
                has = f"this model has: {', '.join(self.heads) or 'none; load it with heads=[...]'}"
                raise KeyError(f"no head {name!r}{nearest(name, self.heads)}; {has}")
        return chosen

    def _summary(self, features: Features) -> Tensor | None:
        summary, slots = features.summary, self.student.spec.slots
        if summary is None or self.summary_slots == list(range(slots)):
            return summary
        return summary.unflatten(1, (slots, -1))[:, self.summary_slots].flatten(1)

    # --- language ---

    def text_head(self, head: str | None = None) -> str:
        """The name of the head whose summary is comparable with text: ``head``, or the first one.

        Raises:
            TypeError: no head has a text tower, or ``head`` has none.
        """
        aligned = [name for name, config in self.head_configs.items() if config.text is not None]
        if head is None and aligned:
            return aligned[0]
        if head in aligned:
            return str(head)
        advice = "load it with heads='text', or train it with a text-aligned teacher (conse, open_clip, ...)"
        if not aligned:
            raise TypeError(f"{head or 'this model'} has no text tower; {advice}")
        wrong = f"{head} has no text tower" if head in self.head_configs else f"no head {head!r}"
        raise TypeError(f"{wrong}; those that have text towers: {', '.join(aligned)}")

    @torch.no_grad()
    def encode_text(self, texts: list[str], head: str | None = None) -> Tensor:
        """Unit-norm ``(N, D)`` embeddings of sentences, comparable with :meth:`encode_image`, without gradients."""
        name = self.text_head(head)
        if name not in self._towers:
            self._towers[name] = build("text", self.head_configs[name].text or {}, installed=False)
        return self._towers[name].encode(texts).to(next(self.student.parameters()).device)

    @torch.no_grad()
    def encode_image(self, images: ImageLike | Sequence[ImageLike], head: str | None = None) -> Tensor:
        """Unit-norm ``(B, D)`` embeddings of images in the text tower's space, without gradients."""
        name = self.text_head(head)
        outputs = self(images, heads=[name])
        found = [out.heads[name].summary for out in (outputs if isinstance(outputs, list) else [outputs])]
        summaries = [summary for summary in found if summary is not None]
        if len(summaries) < len(found):
            raise TypeError(f"head {name!r} has no summary")
        return F.normalize(torch.cat(summaries).float(), dim=-1)

    # --- the folder ---

    def config(self) -> dict[str, Any]:
        """The configuration that :meth:`load` reads, as JSON data."""
        current = {**self.student_config, **self.student.settings()}
        student = {key: value for key, value in current.items() if key != "init"}
        return {
            "format": artefact.FORMAT,
            "student": student,
            "heads": {
                name: {field: getattr(config, field) for field in HeadConfig.__slots__}
                for name, config in self.head_configs.items()
            },
            "tokens": list(self.tokens),
            "summary_slots": self.summary_slots,
            "normalizers": self.normalizers,
            "preferred_size": self.preferred_size,
            "provenance": self.provenance,
        }

    def save(self, folder: str | Path, *, dtype: torch.dtype = torch.float32, card: str | None = None) -> Path:
        """Write ``model.safetensors``, ``config.json`` and a model card, replacing files of these names atomically.

        Args:
            folder: created if needed.
            dtype: precision on disk; running variances, whose range exceeds half precision, keep theirs.
            card: Markdown of the card; a plain one is written when None.

        Raises:
            ValueError: a weight is not finite in ``dtype``; the conditioner was taken; or the student is in a state
                that cannot be saved.
            StorageError: a file cannot be written.
        """
        if not isinstance(self.conditioner, Conditioner):
            raise ValueError("this model's conditioner was taken: restore it with model.conditioner = conditioner")
        folder, config = Path(folder), artefact.config_text(self.config())
        if card is None:
            parameters = sum(p.numel() for p in self.parameters())
            kind = self.student_config["kind"]
            card = artefact.plain_card(folder.name, kind, parameters, self.spec.stride, self.provenance)
        texts = {artefact.CARD: card, artefact.CONFIG: config}
        return artefact.write_folder(folder, self.state_dict().items(), texts, dtype, keep=("running_var",))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        heads: Iterable[str] | None = None,
        student: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Model:
        """Load a folder written by :meth:`save`: in eval mode, parameters without gradients, as :func:`agglo.load`.

        Args:
            folder: written by :meth:`save`.
            heads: the heads to keep; None or ``"all"`` for all, ``"text"`` for those with a text tower.
            student: keys of the student to change, such as ``window``.
            dtype: of the weights.
            device: of the weights.

        Raises:
            ConfigError: not a saved model, or its configuration does not fit this version.
            AssetError: the weights are damaged or belong to another configuration.
            KeyError: no such head.
        """
        folder = Path(folder)
        config = artefact.read_config(folder)
        try:
            kind = find("students", str(config["student"]["kind"]), installed=False)
            with torch.device("meta") if kind.builds_on_meta else contextlib.nullcontext():
                model = cls.from_config({**config, "student": {**config["student"], **(student or {})}})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{folder / artefact.CONFIG}: not a model's configuration ({error})") from None
        artefact.load_weights(model, folder, dtype, device)
        if heads == "text":
            heads = [name for name, head in model.head_configs.items() if head.text is not None]
        if heads is not None:
            model.keep_heads(heads)
        return model.eval().requires_grad_(False)

    def keep_heads(self, heads: Iterable[str]) -> None:
        """Remove the other heads. Class tokens and the summary are unchanged.

        Raises:
            KeyError: no such head.
        """
        kept = self._chosen(heads)
        for name in [name for name in self.heads if name not in kept]:
            del self.heads[name], self.head_configs[name]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Model:
        """A model of this :meth:`config`, with random weights."""
        heads = {name: HeadConfig(**head) for name, head in config["heads"].items()}
        given = {key: config[key] for key in _OPTIONAL if config.get(key) is not None}
        return cls(config["student"], heads, **given, installed=False)
