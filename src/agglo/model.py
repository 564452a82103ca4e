"""The artefact: conditioner, student and heads in one module that any image goes into and a folder comes out of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agglo.config import build, check_options, nearest
from agglo.preprocess import Conditioner, check_size, load_image, snap, to_batch
from agglo.recipe import Recipe
from agglo.recipe import load as load_recipe
from agglo.types import AssetError, ConfigError, Features, FeatureSpec, Output, StorageError

if TYPE_CHECKING:
    from agglo.teachers.base import Teacher

FORMAT = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"

ImageLike = Tensor | Image.Image | np.ndarray | str | Path


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """One teacher's pair of heads, as data.

    Args:
        summary: ``{kind, **keys}`` of the summary head, or None.
        spatial: the same of the spatial head.
        summary_width: D of the teacher's summary.
        spatial_width: channels of the teacher's map.
        slot: which class token feeds the summary head, where the student has several.
        text: ``{kind, **keys}`` of the text tower whose embeddings the summary can be compared with, or None.
    """

    summary: dict[str, Any] | None
    spatial: dict[str, Any] | None
    summary_width: int | None
    spatial_width: int | None
    slot: int = 0
    text: dict[str, Any] | None = None


class Heads(nn.Module):
    """A teacher's heads: ``summary`` and ``spatial``, each of which may be absent."""

    def __init__(self, config: HeadConfig, spec: FeatureSpec, *, installed: bool = True) -> None:
        super().__init__()
        self.slot, self.slots = (config.slot if spec.slots > 1 else 0), spec.slots
        self.summary = self.spatial = None
        if config.summary is not None and spec.summary is not None:
            source = spec.summary // spec.slots
            self.summary = build("heads", config.summary, source, config.summary_width, installed=installed)
        if config.spatial is not None:
            self.spatial = build("heads", config.spatial, spec.spatial, config.spatial_width, installed=installed)

    def forward(self, features: Features) -> Features:
        """Student features to this teacher's space."""
        summary = spatial = None
        if self.summary is not None and features.summary is not None:
            summary = self.summary(features.summary.unflatten(1, (self.slots, -1))[:, self.slot])
        if self.spatial is not None and features.spatial is not None:
            spatial = self.spatial(features.spatial)
        return Features(summary, spatial)


class Model(nn.Module):
    """Conditioner + student + heads.

    ``model(images)`` takes RGB in [0, 1] of any size and returns :class:`agglo.Output`: the backbone's ``summary``
    (the class tokens of the teachers that have a summary, concatenated) and ``spatial``, and ``heads[name]``, what the
    student believes teacher ``name`` would say, in that teacher's own space.

    Args:
        student: ``{kind, **keys}`` of the student.
        heads: by teacher name, in the order of the student's class tokens.
        preferred_size: the side, in pixels, at which the model is at its best.
        provenance: what is known of the training (recipe, teachers, licences, numbers); kept verbatim.
        installed: False where the configuration was downloaded, so that only built-in kinds may be named.
    """

    def __init__(
        self,
        student: Mapping[str, Any],
        heads: Mapping[str, HeadConfig],
        *,
        preferred_size: int = 224,
        provenance: Mapping[str, Any] | None = None,
        installed: bool = True,
    ) -> None:
        super().__init__()
        self.student_config = check_options("students", student, "student", installed=installed)
        self.head_configs = dict(heads)
        self.preferred_size = preferred_size
        self.provenance = dict(provenance or {})
        self.student = build("students", self.student_config, tuple(heads), installed=installed)
        self.conditioner = Conditioner(self.student.mean, self.student.std)
        inner: FeatureSpec = self.student.spec
        built = {name: Heads(config, inner, installed=installed) for name, config in heads.items()}
        self.heads: dict[str, Heads] = nn.ModuleDict(built)  # type: ignore[assignment]
        with_summary = sorted({c.slot for c in heads.values() if c.summary is not None}) or [0]
        self.summary_slots = with_summary if inner.slots > 1 else [0]
        summary = None if inner.summary is None else inner.summary // inner.slots * len(self.summary_slots)
        self.spec = FeatureSpec(summary, inner.spatial, inner.stride, inner.step, len(self.summary_slots))
        self._towers: dict[str, Any] = {}

    # --- inference ---

    def forward(self, images: ImageLike, *, heads: Iterable[str] | None = None, resize: bool = True) -> Output:
        """Encode images.

        Args:
            images: ``(B, 3, H, W)`` or ``(3, H, W)`` in [0, 1]; or one PIL image, ``(H, W, 3)`` array, or path.
            heads: names of the heads to run; None for all, ``()`` for none.
            resize: bring sides that are no multiple of ``spec.step`` to the nearest that are; False raises instead.

        Returns:
            ``summary (B, D)``, ``spatial (B, D', H / stride, W / stride)``, and the chosen heads' features.

        Raises:
            ValueError: not images in [0, 1]; or ``resize=False`` and an illegal size (the legal ones are named).
            KeyError: no such head.
        """
        return self.decode(self.encode(self.prepare(images, resize=resize)), heads)

    def prepare(self, images: ImageLike, *, resize: bool = True) -> Tensor:
        """Any image-like to a float batch of legal size on the model's device."""
        batch = to_batch(images) if isinstance(images, Tensor) and images.ndim == 4 else load_image(images)[None]
        weight = next(self.student.parameters())
        batch = batch.to(weight.device, torch.float32)
        if resize:
            return snap(batch, self.spec.step)
        check_size(batch.shape[-2], batch.shape[-1], self.spec.step)
        return batch

    def encode(self, images: Tensor) -> Features:
        """The student alone, on ``(B, 3, H, W)`` of a legal size: all its class tokens, in their order."""
        dtype = next(self.student.parameters()).dtype
        return self.student(self.conditioner(images).to(dtype))

    def decode(self, features: Features, heads: Iterable[str] | None = None) -> Output:
        """The student's features, and what the heads make of them."""
        chosen = list(self.heads) if heads is None else list(heads)
        for name in chosen:
            if name not in self.heads:
                raise KeyError(f"no head {name!r}{nearest(name, self.heads)}")
        summary = features.summary
        if summary is not None and len(self.summary_slots) != self.student.spec.slots:
            summary = summary.unflatten(1, (self.student.spec.slots, -1))[:, self.summary_slots].flatten(1)
        return Output(summary, features.spatial, {name: self.heads[name](features) for name in chosen})

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
        known = f"those that do: {', '.join(aligned)}" if aligned else "train with a text-aligned teacher (kind conse)"
        raise TypeError(f"{head or 'this model'} has no text tower behind it; {known}")

    def encode_text(self, texts: list[str], head: str | None = None) -> Tensor:
        """Unit-norm ``(N, D)`` embeddings of sentences, comparable with :meth:`encode_image`."""
        name = self.text_head(head)
        if name not in self._towers:
            self._towers[name] = build("text", self.head_configs[name].text or {}, installed=False)
        return self._towers[name].encode(texts).to(next(self.student.parameters()).device)

    def encode_image(self, images: ImageLike, head: str | None = None) -> Tensor:
        """Unit-norm ``(B, D)`` embeddings of images in the text tower's space."""
        name = self.text_head(head)
        summary = self(images, heads=[name]).heads[name].summary
        if summary is None:
            raise TypeError(f"head {name!r} has no summary")
        return F.normalize(summary.float(), dim=-1)

    # --- the folder ---

    def config(self) -> dict[str, Any]:
        """What :meth:`load` needs besides the weights, as JSON data."""
        student = {key: value for key, value in self.student_config.items() if key != "init"}
        return {
            "format": FORMAT,
            "student": student,
            "heads": {
                name: {field: getattr(config, field) for field in HeadConfig.__slots__}
                for name, config in self.head_configs.items()
            },
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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {}
        for name, tensor in self.state_dict().items():
            cast = tensor.is_floating_point() and not name.endswith("running_var")
            state[name] = (tensor.to(dtype) if cast else tensor).contiguous().cpu()
            if not torch.isfinite(state[name]).all():
                raise ValueError(f"{name} is not finite as {dtype}: nothing was saved to {folder}")
        write_tensors(state, folder / f"{WEIGHTS}.partial")
        texts = {CONFIG: json.dumps(self.config(), indent=2) + "\n", CARD: card or plain_card(self, folder.name)}
        for file, text in texts.items():
            (folder / f"{file}.partial").write_text(text, encoding="utf-8")
        for file in (WEIGHTS, *texts):
            (folder / f"{file}.partial").replace(folder / file)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Model:
        """Read a folder written by :meth:`save`; the model comes back in eval mode, in float32.

        Raises:
            ConfigError: no such folder, or its configuration does not fit this version.
            AssetError: the weights are damaged or belong to another configuration.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
            raise ConfigError(f"{folder} is no saved model: it must hold {CONFIG} and {WEIGHTS}")
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            model = cls._from_config(config)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f"{folder / CONFIG}: not a model's configuration ({error})") from None
        try:
            model.load_state_dict(load_file(folder / WEIGHTS))
        except (SafetensorError, RuntimeError, OSError) as error:
            first = str(error).strip().splitlines()[0]
            raise AssetError(
                f"{folder / WEIGHTS} is damaged or of another model ({first}): fetch or save it again"
            ) from None
        return model.eval()

    @classmethod
    def _from_config(cls, config: Mapping[str, Any]) -> Model:
        if config.get("format") != FORMAT:
            raise ConfigError(
                f"config.json has format {config.get('format')!r}, this agglo reads {FORMAT}: upgrade agglo"
            )
        return cls(
            config["student"],
            {name: HeadConfig(**head) for name, head in config["heads"].items()},
            preferred_size=int(config.get("preferred_size", 224)),
            provenance=config.get("provenance"),
            installed=False,
        )


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        StorageError: it cannot be written; nothing of it is left.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", "agglo": str(FORMAT)})
    except (SafetensorError, OSError) as error:
        path.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written ({error}): free some space or name another folder") from None


def plain_card(model: Model, name: str) -> str:
    """A card for a model that has not been measured: what it is, what it learned from, under which licences."""
    facts = model.provenance
    teachers = "\n".join(f"- `{n}`: {t}" for n, t in facts.get("teachers", {}).items()) or "- unknown"
    return (
        f"---\nlibrary_name: agglo\nlicense: {facts.get('license', 'other')}\n"
        "tags: [agglomerative, feature-extraction]\n---\n\n"
        f"# {name}\n\nAn agglomerative vision backbone: `{model.student_config['kind']}` student, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, stride {model.spec.stride}.\n\n"
        f'```python\nimport agglo\n\nmodel = agglo.load("{name}")\n```\n\nTeachers and their licences:\n\n{teachers}\n'
    )


def head_configs(recipe: Recipe, specs: Mapping[str, FeatureSpec]) -> dict[str, HeadConfig]:
    """The heads that a recipe asks for, given what its teachers return; a weight of 0 means no head.

    Raises:
        ConfigError: a teacher is asked for a summary or a map that it does not have.
    """
    configs = {}
    for slot, (name, entry) in enumerate(recipe.teachers.items()):
        spec = specs[name]
        summary = spec.summary is not None and entry.summary_weight > 0
        spatial = spec.spatial is not None and entry.spatial_weight > 0
        if not summary and not spatial:
            raise ConfigError(
                f"teachers.{name}: nothing to learn; it has "
                f"{'no' if spec.summary is None else 'a'} summary and {'no' if spec.spatial is None else 'a'} map"
            )
        configs[name] = HeadConfig(
            summary=(entry.summary_head or recipe.heads.summary) if summary else None,
            spatial=(entry.spatial_head or recipe.heads.spatial) if spatial else None,
            summary_width=spec.summary,
            spatial_width=spec.spatial,
            slot=slot,
            text=entry.teacher.get("text") if summary else None,
        )
    return configs


def create(recipe: Recipe | str, teachers: Mapping[str, Teacher] | None = None, *, initialize: bool = True) -> Model:
    """A new, untrained model from a recipe.

    Args:
        recipe: the recipe, its name or its path.
        teachers: the recipe's teachers by name; built here when None, since heads take their widths from them.
        initialize: start from the weights that the recipe names and from what the teachers know (a vocabulary); False
            where other weights will be loaded.

    Raises:
        ConfigError: the recipe does not fit.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    if teachers is None:
        teachers = {name: build("teachers", entry.teacher) for name, entry in recipe.teachers.items()}
    specs = {name: teacher.spec for name, teacher in teachers.items()}
    sizes = [size for partition in recipe.partitions for size in partition.sizes]
    model = Model(recipe.student, head_configs(recipe, specs), preferred_size=max(sizes))
    if initialize:
        model.student.initialize()
        for name, heads in model.heads.items():
            for head in (heads.summary, heads.spatial):
                if head is not None:
                    head.initialize(model.student, teachers[name])
    return model
