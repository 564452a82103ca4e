"""The recipe: the whole configuration of a training run, as one strict tree of YAML keys."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from agglo.config import (
    Strict,
    check_options,
    explain,
    find,
    merge,
    nearest,
    override,
    read_yaml,
    refuse_large,
    write_yaml,
)  # fmt: skip
from agglo.files import read_utf8
from agglo.types import ConfigError

RECIPES = Path(__file__).parent / "recipes"

Kind = dict[str, Any]
"""``{"kind": name, **keys}``, checked against the kind's constructor."""

STUDENT: dict[str, Any] = {"student": True}
"""Marks keys about a student (:data:`agglo.objectives.base.STUDENT_KEYS`)."""


def ordered(value: tuple[float, float]) -> tuple[float, float]:
    """A range with ``0 < low <= high``.

    Raises:
        ValueError: it is not.
    """
    if not 0 < value[0] <= value[1]:
        raise ValueError(f"must be a range (low, high) with 0 < low <= high, not {value}")
    return value


class Claim(Strict):
    """Cost and expected results of a run, shown by ``agglo recipes``."""

    summary: str = ""
    hardware: str = ""
    time: str = ""
    expect: str = ""
    source: str = ""


def _split(cls: type[Strict], inner: str, data: Any) -> Any:
    """Split keys of the entry from keys of the kind, which the YAML writes side by side."""
    if not isinstance(data, Mapping) or inner in data:
        return data
    own = set(cls.model_fields) - {inner}
    return {
        inner: {key: value for key, value in data.items() if key not in own},
        **{key: value for key, value in data.items() if key in own},
    }


class TeacherEntry(Strict):
    """One teacher and its loss terms.

    Args:
        teacher: the kind and its keys (written flat in YAML: ``{kind: timm, model: ..., spatial_weight: 1}``).
        summary_weight: weight of the summary term; 0 removes it. null: 1 if the teacher has a summary, else 0. A
            positive weight for an output that the teacher lacks is an error.
        spatial_weight: weight of the spatial term, likewise.
        summary_head, spatial_head: override the recipe's ``heads:`` for this teacher.
        mosaic: for a teacher with one input size: pack many small views into one forward pass.
        upsampler: for a teacher with one input size: larger images and finer maps (``{kind: featsharp, weights:
            runs/...}``).
    """

    teacher: Kind
    summary_weight: float | None = Field(default=None, ge=0)
    spatial_weight: float | None = Field(default=None, ge=0)
    summary_head: Kind | None = None
    spatial_head: Kind | None = None
    mosaic: bool = False
    upsampler: Kind | None = None

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, data: Any) -> Any:
        return _split(cls, "teacher", data)


class Heads(Strict):
    """The default heads of all teachers."""

    summary: Kind = {"kind": "mlp"}
    spatial: Kind = {"kind": "mlp"}


class Targets(Strict):
    """Normalisation of the targets.

    Args:
        normalizer: applied to each teacher's map.
        estimate_images: images of the pre-pass that estimates its statistics before the first step.
    """

    normalizer: Kind = Field(default={"kind": "phi_s"}, json_schema_extra=STUDENT)
    estimate_images: int = Field(default=1024, gt=0)


class Mesa(Strict):
    """Agreement of the student with its EMA on another crop (SE-MESA; docs/method.md, 2.5).

    Args:
        loss: the kind and its keys (written flat in YAML: ``{kind: se_mesa, weight: 1}``).
        weight: of the term at full strength.
        start: first step of the term; the EMA of the first steps is not a useful target.
        ramp: steps over which the weight then grows from 0.
    """

    loss: Kind = {"kind": "se_mesa"}
    weight: float = Field(default=1.0, gt=0)
    start: int = Field(default=0, ge=0)
    ramp: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, data: Any) -> Any:
        return _split(cls, "loss", data)

    def ramp_at(self, step: int) -> float:
        """The factor in [0, 1] on the weight at a step."""
        if step < self.start:
            return 0.0
        return min(1.0, (step - self.start + 1) / self.ramp) if self.ramp else 1.0


class Losses(Strict):
    """The loss of each term; no ``mesa`` term if null."""

    summary: Kind = {"kind": "angular"}
    spatial: Kind = {"kind": "mse"}
    mesa: Mesa | None = None


class SourceEntry(Strict):
    """A source and its weight in the sampling."""

    source: Kind
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, data: Any) -> Any:
        return _split(cls, "source", data)


class Views(Strict):
    """Random crops, shared by student and teachers.

    Args:
        scale: area of a crop as a fraction of the image's, uniform in this range.
        aspect: width / height of a crop relative to its output, log-uniform in this range. Where an image is too narrow
            for both ranges, the area gives way.
        flip: probability of a horizontal flip.
        mixup: probability that a batch is blended with a permutation of itself, for student and teachers alike.
        shift: student, teachers and EMA student see crops shifted by ``round(N(0, shift))`` of their own patches
            (C-RADIOv4: 0.5); 0: all see the same crop.
        canvas: minimum shorter side, in pixels, at which crops are rendered, for teachers with larger inputs than the
            student. ``auto``: the largest input of any teacher, per size; null: the student's size.
        crops: number of fixed crops per image, cycled one per epoch; 0 draws a new crop every time. Teachers then see
            whole crops, and shifted views are slices of their maps, so that a feature cache can be used.
        roam: with fixed crops: largest offset of the student's view from the middle of the crop, in its patches, per
            axis and sample. The crop is larger by that margin.
    """

    scale: tuple[float, float] = (0.35, 1.0)
    aspect: tuple[float, float] = (0.75, 4 / 3)
    flip: float = Field(default=0.5, ge=0, le=1)
    mixup: float = Field(default=0.0, ge=0, le=1)
    shift: float = Field(default=0.0, ge=0, json_schema_extra=STUDENT)
    canvas: int | Literal["auto"] | None = None
    crops: int = Field(default=0, ge=0, json_schema_extra=STUDENT)
    roam: int = Field(default=0, ge=0, json_schema_extra=STUDENT)

    @model_validator(mode="after")
    def _check_crops(self) -> Views:
        if self.roam and not self.crops:
            raise ConfigError("data.views.roam needs fixed crops: set data.views.crops, e.g. 2")
        if self.crops and self.canvas == "auto":  # a cache must not depend on the run that reads it
            raise ConfigError("data.views.canvas: auto depends on the teachers: fixed crops need a number, or null")
        return self

    @field_validator("canvas", mode="before")
    @classmethod
    def _check_canvas(cls, value: Any) -> Any:
        if value in (None, "auto") or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            return value
        raise ConfigError(f"data.views.canvas: must be a positive number of pixels, auto, or null; got {value!r}")

    @field_validator("scale", "aspect")
    @classmethod
    def _check_range(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if info.field_name == "scale" and value[1] > 1:
            raise ValueError(f"a crop is at most as large as its image: at most 1, not {value[1]}")
        return ordered(value)


class Data(Strict):
    """Images and how they are cropped.

    Args:
        sources: the data sets, mixed by weight.
        views: the crops.
        workers: threads that read and crop ahead; 0 for none.
        cache_mb: memory for decoded images, in MiB.
        feature_cache: folder that ``agglo cache`` wrote; targets are then read instead of computed.
    """

    sources: list[SourceEntry] = Field(min_length=1)
    views: Views = Views()
    workers: int = Field(default=1, ge=0, le=1024)
    cache_mb: int = Field(default=1024, ge=0)
    feature_cache: str | None = Field(default=None, json_schema_extra=STUDENT)

    @model_validator(mode="after")
    def _check_cache(self) -> Data:
        if self.feature_cache is not None and not self.views.crops:
            raise ConfigError("data.feature_cache needs fixed crops: set data.views.crops as for `agglo cache`")
        if self.feature_cache is not None and self.views.mixup:
            raise ConfigError("data.feature_cache has no features of blended images: set data.views.mixup=0")
        return self


class Partition(Strict):
    """Sizes that share a batch size; each step draws one partition, then one of its sizes.

    Args:
        sizes: sides of the student's square views, in pixels.
        batch: images per step.
        weight: relative frequency of the partition.
        teachers: names of the teachers used at these sizes; null for all. Teachers that differ by size are the cause of
            RADIOv2.5's mode switching; use them to reproduce such recipes.
    """

    sizes: list[int] = Field(min_length=1)
    batch: int = Field(gt=0)
    weight: float = Field(default=1.0, gt=0)
    teachers: list[str] | None = Field(default=None, min_length=1)


class Train(Strict):
    """The optimisation.

    Args:
        steps: optimiser steps.
        lr: peak learning rate: linear warm-up over ``warmup_steps``, then cosine decay to ``lr * final_lr``.
        backbone_lr: factor on ``lr`` for the student without its heads; 0 freezes it.
        final_lr: factor on ``lr`` at the last step.
        warmup_steps: steps of the linear warm-up.
        head_steps: first steps, in which only the heads learn, to protect a student that starts from trained weights;
            its own warm-up follows.
        weight_decay: of AdamW; not applied to biases, norms, position tables and class tokens.
        betas: of AdamW.
        ema: decay of the averaged weights, which are evaluated and exported; 0 for no averaging. Early steps use
            ``min(ema, (1 + step) / (10 + step))``.
        clip: largest gradient norm, or null.
        precision: ``fp32``, or ``bf16`` autocast (fast only where the hardware supports it).
        freeze_norm_statistics: keep BatchNorm's running statistics as they are at the start.
        damp: standard deviation of the multiplicative noise on the student's linear weights (DAMP); 0 for none.
        spectral: spectral reparametrisation of the student's linear layers during training.
        windows: sides, in patches, of ViTDet windows used as augmentation: one that divides the step's grid is drawn;
            empty for none.
        window_share: fraction of the steps with windows.
        start_from: run, saved model or released name to take the student and the heads of teachers of the same name
            from; other heads, statistics and the schedule start anew.
        patience: number of consecutive non-finite steps that are skipped before the run stops.
        seed: of everything random in the run.
        log_every: steps between lines of ``metrics.jsonl``.
        save_every: steps between checkpoints.
    """

    steps: int = Field(gt=0)
    lr: float = Field(default=1e-3, gt=0)
    backbone_lr: float = Field(default=1.0, ge=0, json_schema_extra=STUDENT)
    final_lr: float = Field(default=0.01, ge=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)
    head_steps: int = Field(default=0, ge=0, json_schema_extra=STUDENT)
    weight_decay: float = Field(default=0.02, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    ema: float = Field(default=0.9996, ge=0, lt=1)
    clip: float | None = Field(default=None, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    freeze_norm_statistics: bool = Field(default=False, json_schema_extra=STUDENT)
    damp: float = Field(default=0.0, ge=0, lt=1, json_schema_extra=STUDENT)
    spectral: bool = Field(default=False, json_schema_extra=STUDENT)
    windows: list[int] = Field(default=[], json_schema_extra=STUDENT)
    window_share: float = Field(default=0.5, ge=0, le=1, json_schema_extra=STUDENT)
    start_from: str | None = Field(default=None, json_schema_extra=STUDENT)
    patience: int = Field(default=5, ge=0)
    seed: int = 0
    log_every: int = Field(default=10, gt=0)
    save_every: int = Field(default=500, gt=0)


class Auxiliary(Strict):
    """An auxiliary spatial head of a teacher on an intermediate block; trained, never exported.

    Args:
        depth: the block: its index from 0, or a fraction of the depth (0.33: the last block of the lower third; 1.0:
            the last block).
        weight: of its term at step 0, decaying linearly; added to the balanced loss.
        until: fraction of the run at which the weight reaches 0.
    """

    depth: int | float
    weight: float = Field(default=0.25, gt=0)
    until: float = Field(default=0.66, gt=0, le=1)

    @field_validator("depth")
    @classmethod
    def _check_depth(cls, value: int | float) -> int | float:
        if value < 0 or (isinstance(value, float) and not 0 < value <= 1):
            raise ValueError(f"must be a block index from 0 on, or a fraction in (0, 1], not {value}")
        return value

    def weight_at(self, step: int, total: int) -> float:
        """The weight at a step of a run of ``total`` steps."""
        return self.weight * max(0.0, 1 - step / (self.until * total))


class Stage(Strict):
    """One stage of a run with several: the recipe with some of its teachers and some changes.

    Args:
        name: of its folder below ``stages/``.
        teachers: names of its teachers; null for all.
        set: assignments ``key.path=value``, as on the command line.
    """

    name: str = Field(pattern=r"^[\w-]+$")
    teachers: list[str] | None = None
    set: list[str] = []


class Recipe(Strict):
    """A training run. Read one with :func:`load`; ``agglo recipes`` lists the bundled ones."""

    name: str
    claim: Claim = Claim()
    objective: Kind = {"kind": "distill"}
    student: Kind = {}
    teachers: dict[str, TeacherEntry] = Field(min_length=1)
    heads: Heads = Field(default=Heads(), json_schema_extra=STUDENT)
    targets: Targets = Targets()
    losses: Losses = Field(default=Losses(), json_schema_extra=STUDENT)
    balancer: Kind = Field(default={"kind": "fixed"}, json_schema_extra=STUDENT)
    auxiliary: dict[str, Auxiliary] = Field(default={}, json_schema_extra=STUDENT)
    data: Data
    partitions: list[Partition] = Field(min_length=1)
    train: Train
    stages: list[Stage] = []
    evals: list[Kind] = Field(default=[], json_schema_extra=STUDENT)
    smoke: list[str] = []

    @model_validator(mode="after")
    def _kinds(self) -> Recipe:
        """Fill in and check every ``{kind: ...}`` of the tree against its constructor."""
        _check(self.objective, "objectives", "objective")
        self._check_student()
        for name, entry in self.teachers.items():
            if not name or "/" in name or "." in name:
                raise ConfigError(f"teachers.{name}: a teacher's name must not be empty or contain '/' or '.'")
            _check(entry.teacher, "teachers", f"teachers.{name}")
            for key in ("summary_head", "spatial_head"):
                if getattr(entry, key) is not None:
                    _check(getattr(entry, key), "heads", f"teachers.{name}.{key}")
            if entry.upsampler is not None:
                _check(entry.upsampler, "upsamplers", f"teachers.{name}.upsampler")
        _check(self.heads.summary, "heads", "heads.summary")
        _check(self.heads.spatial, "heads", "heads.spatial")
        _check(self.targets.normalizer, "normalizers", "targets.normalizer")
        _check(self.losses.summary, "losses", "losses.summary")
        _check(self.losses.spatial, "losses", "losses.spatial")
        if self.losses.mesa is not None:
            _check(self.losses.mesa.loss, "losses", "losses.mesa")
            if self.train.ema == 0:
                raise ConfigError("losses.mesa needs the EMA student: set train.ema, e.g. 0.9996")
        _check(self.balancer, "balancers", "balancer")
        self._check_auxiliary()
        self._check_partitions()
        self._check_stages()
        for index, entry in enumerate(self.data.sources):
            _check(entry.source, "sources", f"data.sources.{index}")
        for index, entry in enumerate(self.evals):
            _check(entry, "evals", f"evals.{index}")
        return self

    def _check_student(self) -> None:
        kind = self.objective["kind"]
        if _trains_student(kind):
            _check(self.student, "students", "student")
            return
        for key, value in (("student", self.student), ("stages", self.stages)):
            if value:
                raise ConfigError(f"objective {kind} trains no student: remove `{key}:`")

    def _check_auxiliary(self) -> None:
        for name in self.auxiliary:
            if name not in self.teachers:
                raise ConfigError(f"auxiliary.{name}: no teacher of that name{nearest(name, self.teachers)}")
            if self.teachers[name].spatial_weight == 0:
                raise ConfigError(
                    f"auxiliary.{name}: the weight of the teacher's map is 0: set teachers.{name}.spatial_weight"
                )

    def _check_partitions(self) -> None:
        for index, partition in enumerate(self.partitions):
            for name in partition.teachers or ():
                if name not in self.teachers:
                    raise ConfigError(f"partitions.{index}.teachers: no teacher {name!r}{nearest(name, self.teachers)}")
        if self.data.feature_cache is not None and any(partition.teachers for partition in self.partitions):
            raise ConfigError("partitions: a feature cache holds all teachers at all sizes: remove `teachers:`")
        if all(partition.teachers is not None for partition in self.partitions):
            idle = set(self.teachers).difference(*(partition.teachers or () for partition in self.partitions))
            if idle and not self.stages:
                raise ConfigError(f"partitions: teacher {min(idle)!r} is in none of them; add it to one")

    def _check_stages(self) -> None:
        taken: set[str] = set()
        for index, stage in enumerate(self.stages):
            if stage.name in taken:
                raise ConfigError(f"stages.{index}.name: {stage.name!r} is used twice; stage names must be unique")
            taken.add(stage.name)
            for name in stage.teachers or ():
                if name not in self.teachers:
                    raise ConfigError(f"stages.{index}.teachers: no teacher {name!r}{nearest(name, self.teachers)}")
            self.stage(index)  # refuse changes that do not fit before the first stage runs

    def stage(self, index: int) -> Recipe:
        """The recipe of one stage.

        Raises:
            ConfigError: its changes do not fit the recipe.
        """
        chosen, tree = self.stages[index], self.to_dict()
        tree["stages"] = []
        tree["name"] = f"{self.name}-{chosen.name}"
        if chosen.teachers is not None:
            tree["teachers"] = {name: tree["teachers"][name] for name in self.teachers if name in chosen.teachers}
            tree["auxiliary"] = {name: entry for name, entry in tree["auxiliary"].items() if name in chosen.teachers}
            tree["partitions"] = [
                part for p in tree["partitions"] if (part := _restricted(p, chosen.teachers)) is not None
            ]
        return from_dict(override(tree, chosen.set, _ENTRY_KEYS), f"{self.name}, stage {chosen.name}")

    @property
    def sizes(self) -> list[int]:
        """The sides of all partitions in pixels, ascending, each once."""
        return sorted({size for partition in self.partitions for size in partition.sizes})

    def to_dict(self) -> dict[str, Any]:
        """The complete recipe as a tree of plain values; :func:`from_dict` is the inverse."""
        data = self.model_dump(mode="json")
        if not data["student"]:
            del data["student"]
        for name, entry in data["teachers"].items():
            data["teachers"][name] = {**entry.pop("teacher"), **entry}
        if data["losses"]["mesa"] is not None:
            data["losses"]["mesa"] = {**data["losses"]["mesa"].pop("loss"), **data["losses"]["mesa"]}
        data["data"]["sources"] = [{**entry.pop("source"), **entry} for entry in data["data"]["sources"]]
        return data

    def to_yaml(self) -> str:
        """:meth:`to_dict` as YAML text."""
        return write_yaml(self.to_dict())


_ENTRY_KEYS = {
    *(set(TeacherEntry.model_fields) - {"teacher"}),
    *(set(SourceEntry.model_fields) - {"source"}),
    *(set(Mesa.model_fields) - {"loss"}),
}
"""Keys of entries that the YAML writes beside a kind's; an override of ``kind`` keeps them."""


def _restricted(partition: dict[str, Any], teachers: Collection[str]) -> dict[str, Any] | None:
    """A partition restricted to some of its teachers, or None if none is left."""
    if partition["teachers"] is None:
        return partition
    kept = [name for name in partition["teachers"] if name in teachers]
    return {**partition, "teachers": kept} if kept else None


def _trains_student(objective: str) -> bool:
    """:attr:`agglo.objectives.base.Objective.trains_student` of a kind, found by its name.

    Not typed: the objectives import this module.
    """
    found: Any = find("objectives", objective)
    return found.trains_student


def _check(options: Kind, point: str, where: str) -> None:
    checked = check_options(point, options, where)
    options.clear()
    options.update(checked)


def from_dict(data: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """Build a recipe from a mapping.

    Raises:
        ConfigError: invalid; the message has one line per problem.
    """
    refuse_large(data, name)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{name}:\n" + explain(error, data, "", Recipe)) from None


def names() -> list[str]:
    """Names of the bundled recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(name_or_path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = (), *, smoke: bool = False) -> Recipe:
    """Read a recipe by name or path, then apply overrides.

    Args:
        name_or_path: ``"quickstart"``, a YAML file, or a run folder.
        overrides: ``key.path=value`` assignments, or values by dotted key; applied last, so they win over ``smoke``.
        smoke: first shrink the recipe by its own ``smoke`` list.

    Raises:
        ConfigError: no such recipe, or an invalid one.
    """
    path = _find(name_or_path, Path())
    return _changed(_read(path), overrides, smoke, path.name)


def changed(recipe: Recipe, overrides: Iterable[str] | Mapping[str, Any], *, smoke: bool) -> Recipe:
    """A recipe with overrides, as for :func:`load`."""
    return _changed(recipe.to_dict(), overrides, smoke, recipe.name) if overrides or smoke else recipe


def _changed(data: dict[str, Any], overrides: Iterable[str] | Mapping[str, Any], smoke: bool, name: str) -> Recipe:
    if smoke:
        data = override(data, data.get("smoke", []), _ENTRY_KEYS)
    return from_dict(override(data, overrides, _ENTRY_KEYS), name)


def run_of(name_or_path: str | Path) -> Path | None:
    """The run folder that a recipe argument names, or None if it is a recipe's name or a file."""
    path = Path(name_or_path).expanduser()
    return path if str(name_or_path) not in names() and (path / "recipe.yaml").is_file() else None


def _find(name_or_path: str | Path, beside: Path) -> Path:
    """The file of a recipe; a relative path starts at ``beside``."""
    path = Path(name_or_path).expanduser()
    if str(name_or_path) in names():
        return RECIPES / f"{name_or_path}.yaml"
    path = beside / path
    if path.is_dir():
        if not (path / "recipe.yaml").is_file():
            raise ConfigError(f"{path} is a folder without recipe.yaml, not a run folder: name a recipe or a YAML file")
        path = path / "recipe.yaml"
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise ConfigError(f"no recipe {str(name_or_path)!r}{nearest(str(name_or_path), names())}")
    return path


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tree of a recipe file, with what it inherits from ``base``; its name is the file's by default."""
    chain = (*above, path.resolve())
    data = read_yaml(read_utf8(path), path.name)
    base = data.pop("base", None)
    data = {"name": path.stem, **data}
    if base is None:
        return data
    if not isinstance(base, str):
        raise ConfigError(f"{path.name}, base: must be the name of a recipe, a YAML file or a run folder; got {base!r}")
    try:
        parent = _find(base, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path.name}, base: {error}") from None
    if parent.resolve() in chain:
        circle = " -> ".join(each.name for each in (*chain[chain.index(parent.resolve()) :], parent))
        raise ConfigError(f"{path.name}, base: the recipes inherit from each other ({circle}): remove one `base:`")
    inherited = {key: value for key, value in _read(parent, chain).items() if key not in ("name", "claim")}
    tree = merge(inherited, data, _ENTRY_KEYS)
    for key in ("teachers", "auxiliary"):  # null leaves out an entry of the base
        if isinstance(tree.get(key), dict):
            tree[key] = {name: entry for name, entry in tree[key].items() if entry is not None}
    return tree
