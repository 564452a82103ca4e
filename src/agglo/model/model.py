"""The artefact: conditioner, student and heads in one module that any image goes into and a folder comes out of."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglo.config import build, check_options, find, nearest
from agglo.model import artefact
from agglo.model.heads import HeadConfig, Heads
from agglo.model.inputs import ImageLike, prepare, prepare_list
from agglo.model.intermediates import Aggregation, Alpha, choose, collect
from agglo.nn.feature_norm import FeatureNormalizer, IntermediateNormalizer
from agglo.nn.windows import check_side
from agglo.preprocess import Conditioner
from agglo.types import ConfigError, Features, FeatureSpec, ImageError, Output

_OPTIONAL = ("tokens", "summary_slots", "normalizers", "preferred_size", "provenance")


class Model(nn.Module):
    """Conditioner + student + heads.

    ``model(images)`` takes RGB in [0, 1] of any size and returns :class:`agglo.Output`: the backbone's ``summary``
    (the class tokens of the teachers that have a summary, concatenated) and ``spatial``, and ``heads[name]``, what the
    student believes teacher ``name`` would say, in that teacher's own space.

    Args:
        student: ``{kind, **keys}`` of the student.
        heads: by teacher name.
        tokens: names of the teachers that have a class token, in its order; those of ``heads`` when None.
        summary_slots: which class tokens are the summary; those that feed a summary head when None.
        normalizers: ``features``: the map is normalised before the heads see it; ``intermediates``: so are those of
            :meth:`intermediates` (``per_block``: with a rotation for every block). For released models that have them.
        preferred_size: the side, in pixels, at which the model is at its best.
        provenance: what is known of the training (recipe, teachers, licences, numbers); kept verbatim.
        installed: False where the configuration was downloaded, so that only built-in kinds may be named.
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
            raise ConfigError(f"summary_slots {self.summary_slots}: the student has {inner.slots} class tokens")
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
        self._said: set[str] = set()

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
                single images of any sizes and aspects, which a ViT packs into as few passes as fit, without padding.
            heads: names of the heads to run; None or ``"all"`` for all, ``()`` for none.
            resize: bring sides that are no multiple of :meth:`step` to the nearest that are; False raises instead.
            window: side, in patches, of the windows most blocks look through (ViTDet); 0 for none, None for the
                model's own setting. It must divide the patches of a tensor whose sides are whole patches; images that
                have to be resized anyway (files, arrays, lists, other sides) come to whole windows, unless one of
                their sides is less than half a window.

        Returns:
            ``summary (B, D)``, ``spatial (B, D', H / stride, W / stride)``, and the chosen heads' features; for clips
            ``(B, T, ...)``; for a list, a list of outputs of one image each.

        Raises:
            ValueError: not images in [0, 1]; or ``resize=False`` and an illegal size (the legal ones are named); or a
                window that does not divide, or that is too large (those that do, and that fit, are named). Of a list,
                the image is named by its path or its place.
            KeyError: no such head.
            TypeError: windows are asked of a student that has none.
        """
        names = self._chosen(heads)
        if isinstance(images, list | tuple):
            batches = prepare_list(self, images, resize=resize, window=window)
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
        """Sides must be a multiple of this many pixels: of a patch, or of a whole window of patches."""
        check_side(window)
        window = getattr(self.student, "window", None) if window is None else window
        return self.spec.step * (window or 1)

    def prepare(self, images: ImageLike, *, resize: bool = True, window: int | None = None) -> Tensor:
        """Any image-like to a float batch of legal size on the model's device; see :meth:`forward`."""
        return prepare(self, images, resize=resize, window=window)

    def encode(self, images: Tensor, *, window: int | None = None) -> Features:
        """The student alone, on ``(B, 3, H, W)`` of a legal size: all its class tokens, in their order."""
        return self.student(self._condition(images), **self._windowed(window))

    def decode(self, features: Features, heads: Iterable[str] | None = None) -> Output:
        """The student's features, and what the heads make of them."""
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
            images: as in :meth:`forward`, no list and no clips.
            blocks: how many of the last blocks; or their indices, negative ones from the end.
            aggregation: ``sparse``: of those blocks; ``dense``: averaged over the blocks since the one before.
            alpha: how the checkpoint's intermediate normalizer, if it has one, scales them (RADIO.md 1.6).
            norm: apply the student's final norm, if it has one.
            resize, window: as in :meth:`forward`.

        Returns:
            One for each block, ascending: ``summary (B, D)`` and ``spatial (B, D', H / stride, W / stride)``.

        Raises:
            ValueError: no such block; a list or clips.
            TypeError: this model's student is no stack of blocks.
        """
        if not self.student.depth:
            raise TypeError(f"a {self.student_config['kind']} student is no stack of blocks: it has no intermediates")
        if isinstance(images, list | tuple):
            raise ImageError("images", "a list has no intermediates: call intermediates for each of its images")
        if isinstance(images, Tensor) and images.ndim == 5:
            raise ImageError("images", "clips (B, T, 3, H, W) have no intermediates: pass clips.flatten(0, 1)")
        batch = self._condition(self.prepare(images, resize=resize, window=window))
        found = collect(
            self.student, batch, choose(blocks, self.student.depth), self.intermediate_normalizer,
            aggregation=aggregation, alpha=alpha, norm=norm, **self._windowed(window),
        )  # fmt: skip
        return [Features(self._summary(features), features.spatial) for features in found]

    def take_conditioner(self) -> nn.Module:
        """Detach the conditioner, for use in a data loader; from now on the model takes conditioned tensors only.

        Raises:
            ConfigError: it was taken before; give it back with ``model.conditioner = conditioner``.
        """
        if isinstance(self.conditioner, nn.Identity):
            raise ConfigError("this model's conditioner was taken before: keep the one that the first call returned")
        taken, self.conditioner = self.conditioner, nn.Identity()
        return taken

    def _condition(self, images: Tensor) -> Tensor:
        return self.conditioner(images).to(next(self.student.parameters()).dtype)

    def say_once(self, text: str) -> None:
        """Warn, unless this model has said so before."""
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=4)

    def _windowed(self, window: int | None) -> dict[str, int]:
        if window is not None and not self.student.windows:
            raise TypeError(f"a {self.student_config['kind']} student cannot look through windows")
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
        """The name of the head that speaks a text tower's language.

        Raises:
            TypeError: there is none, or the named one is not.
        """
        aligned = [name for name, config in self.head_configs.items() if config.text is not None]
        if head is None and aligned:
            return aligned[0]
        if head in aligned:
            return str(head)
        none = "load it with heads='text', or train with a text-aligned teacher (kind conse)"
        known = f"those that do: {', '.join(aligned)}" if aligned else none
        raise TypeError(f"{head or 'this model'} has no text tower behind it; {known}")

    def encode_text(self, texts: list[str], head: str | None = None) -> Tensor:
        """Unit-norm ``(N, D)`` embeddings of sentences, comparable with :meth:`encode_image`."""
        name = self.text_head(head)
        if name not in self._towers:
            self._towers[name] = build("text", self.head_configs[name].text or {}, installed=False)
        return self._towers[name].encode(texts).to(next(self.student.parameters()).device)

    def encode_image(self, images: ImageLike | Sequence[ImageLike], head: str | None = None) -> Tensor:
        """Unit-norm ``(B, D)`` embeddings of images in the text tower's space."""
        name = self.text_head(head)
        outputs = self(images, heads=[name])
        found = [out.heads[name].summary for out in (outputs if isinstance(outputs, list) else [outputs])]
        summaries = [summary for summary in found if summary is not None]
        if len(summaries) < len(found):
            raise TypeError(f"head {name!r} has no summary")
        return F.normalize(torch.cat(summaries).float(), dim=-1)

    # --- the folder ---

    def config(self) -> dict[str, Any]:
        """What :meth:`load` needs besides the weights, as JSON data."""
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
        """Write ``model.safetensors``, ``config.json`` and a model card; each file is replaced whole.

        Args:
            folder: created if need be; files of the same names are replaced.
            dtype: precision on disk; loading gives float32 back. Running variances stay as they are, because they span
                more than half precision holds.
            card: Markdown of the card; a plain one is written when None.

        Raises:
            ValueError: a weight is not finite, or leaves the range of ``dtype``.
        """
        return artefact.save(self, folder, dtype=dtype, card=card)

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
        """Read a folder written by :meth:`save`; the model comes back in eval mode.

        Args:
            folder: what :meth:`save` wrote.
            heads: the heads to keep; None or ``"all"`` for all, ``"text"`` for those with a text tower behind them.
            student: keys of the student to change, such as ``window``.
            dtype: of the weights.
            device: where to.

        Raises:
            ConfigError: no such folder, or its configuration does not fit this version.
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
        artefact.fill(model, folder, dtype, device)
        if heads == "text":
            heads = [name for name, head in model.head_configs.items() if head.text is not None]
        if heads is not None:
            model.keep_heads(heads)
        return model.eval()

    def keep_heads(self, heads: Iterable[str]) -> None:
        """Throw the other heads away. Class tokens and the summary stay as they are.

        Raises:
            KeyError: no such head.
        """
        kept = self._chosen(heads)
        for name in [name for name in self.heads if name not in kept]:
            del self.heads[name], self.head_configs[name]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Model:
        """A model as :meth:`config` describes it, with random weights."""
        heads = {name: HeadConfig(**head) for name, head in config["heads"].items()}
        given = {key: config[key] for key in _OPTIONAL if config.get(key) is not None}
        return cls(config["student"], heads, **given, installed=False)
