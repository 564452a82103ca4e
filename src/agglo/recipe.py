"""The recipe: everything a training run is, as one strict tree that every YAML file must fit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from agglo.config import Strict, check_options, explain, nearest, override, read_yaml, write_yaml
from agglo.types import ConfigError

RECIPES = Path(__file__).parent / "recipes"

Kind = dict[str, Any]
"""``{"kind": name, **keys}``, checked against the kind's constructor."""


class Claim(Strict):
    """What the recipe promises, so that a reader knows what to expect before running it."""

    summary: str
    hardware: str = ""
    time: str = ""
    expect: str = ""
    source: str = ""


def _lifted(cls: type[Strict], inner: str, data: Any) -> Any:
    """The YAML writes a kind's own keys beside ours; here they part."""
    if not isinstance(data, Mapping) or inner in data:
        return data
    own = set(cls.model_fields) - {inner}
    return {
        inner: {key: value for key, value in data.items() if key not in own},
        **{key: value for key, value in data.items() if key in own},
    }


class TeacherEntry(Strict):
    """One teacher and how the student answers to it.

    Args:
        teacher: the kind and its keys (written flat in YAML: ``{kind: timm, model: ..., spatial_weight: 1}``).
        summary_weight: weight of the summary term; 0 switches it off (METHOD 2.11). null: 1 where the teacher has a
            summary, else 0; what is asked of a teacher that does not have it is refused.
        spatial_weight: weight of the spatial term, likewise.
        summary_head, spatial_head: override the recipe's ``heads:`` for this teacher.
        mosaic: for a teacher of one size: many small views on one canvas, maps cut back (METHOD 3.4).
        upsampler: for a teacher of one size: a larger image, a finer map (``{kind: featsharp, weights: runs/...}``).
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
        return _lifted(cls, "teacher", data)


class Heads(Strict):
    """The default heads of every teacher."""

    summary: Kind = {"kind": "mlp"}
    spatial: Kind = {"kind": "mlp"}


class Targets(Strict):
    """How targets are put on common footing, and from how many images that is estimated before step 0 (D-3)."""

    normalizer: Kind = {"kind": "phi_s"}
    estimate_images: int = Field(default=1024, gt=0)


class Mesa(Strict):
    """Agreement with the averaged student on another crop (SE-MESA, METHOD 2.5).

    Args:
        loss: the kind and its keys (written flat in YAML: ``{kind: se_mesa, weight: 1}``).
        weight: of the term, once it has its full strength.
        start: step at which it begins; an average that is young is no teacher yet.
        ramp: steps over which its weight then grows from 0.
    """

    loss: Kind = {"kind": "se_mesa"}
    weight: float = Field(default=1.0, gt=0)
    start: int = Field(default=0, ge=0)
    ramp: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, data: Any) -> Any:
        return _lifted(cls, "loss", data)

    def share(self, step: int) -> float:
        """Which part of the weight a step has."""
        if step < self.start:
            return 0.0
        return min(1.0, (step - self.start + 1) / self.ramp) if self.ramp else 1.0


class Losses(Strict):
    """The distance of each term; ``mesa`` is left out when null."""

    summary: Kind = {"kind": "angular"}
    spatial: Kind = {"kind": "mse"}
    mesa: Mesa | None = None


class SourceEntry(Strict):
    """A source and the share of samples drawn from it."""

    source: Kind
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, data: Any) -> Any:
        return _lifted(cls, "source", data)


class Views(Strict):
    """Random crops that student and teachers share.

    Args:
        scale: share of the image's area in a crop, uniform in this range.
        aspect: width / height of a crop, log-uniform in this range.
        flip: probability of a mirror image.
        mixup: probability that a batch is blended with itself in another order, for student *and* teachers.
        shift: student, teachers and averaged student look at crops shifted by ``round(N(0, shift))`` of their own
            patches (METHOD 2.4); 0.5 in C-RADIOv4, 0 for one crop for all.
        canvas: shorter side, in pixels, at which a crop is rendered at least, for teachers that look at more pixels
            than the student. ``auto``: at each size, that of whoever looks at most pixels; null: the student's.
        crops: so many fixed crops of each image, one a pass over the images, instead of a new one every time. Teachers
            then look at whole canvases, and shifted views are slices of what they say (``agglo cache``); 0 draws anew.
        roam: with fixed crops, the student's view lies up to this many of its patches from the canvas's middle, each
            axis and sample by itself; the canvas is that much larger.
    """

    scale: tuple[float, float] = (0.35, 1.0)
    aspect: tuple[float, float] = (0.75, 4 / 3)
    flip: float = Field(default=0.5, ge=0, le=1)
    mixup: float = Field(default=0.0, ge=0, le=1)
    shift: float = Field(default=0.0, ge=0)
    canvas: int | Literal["auto"] | None = None
    crops: int = Field(default=0, ge=0)
    roam: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _roams(self) -> Views:
        if self.roam and not self.crops:
            raise ConfigError("data.views.roam needs fixed crops to roam in: set data.views.crops, e.g. 2")
        if self.crops and self.canvas == "auto":  # what was written once must not change with who reads it
            raise ConfigError("data.views.canvas: auto depends on the teachers: fixed crops need a number, or null")
        return self

    @field_validator("canvas", mode="before")
    @classmethod
    def _pixels(cls, value: Any) -> Any:
        if value in (None, "auto") or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            return value
        raise ConfigError(f"data.views.canvas: a positive number of pixels, auto, or null; got {value!r}")

    @field_validator("scale", "aspect")
    @classmethod
    def _ordered(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"must be a range (low, high) with 0 < low <= high, not {value}")
        if info.field_name == "scale" and value[1] > 1:
            raise ValueError(f"a crop cannot be larger than its image: at most 1, not {value[1]}")
        return value


class Data(Strict):
    """Where images come from and how they are cropped.

    Args:
        feature_cache: the folder that ``agglo cache`` wrote; what the teachers say is then read and not computed.
    """

    sources: list[SourceEntry] = Field(min_length=1)
    views: Views = Views()
    workers: int = Field(default=1, ge=0)
    cache_mb: int = Field(default=1024, ge=0)
    feature_cache: str | None = None

    @model_validator(mode="after")
    def _cached(self) -> Data:
        if self.feature_cache is not None and not self.views.crops:
            raise ConfigError(
                "data.feature_cache holds what teachers say of fixed crops: set data.views.crops to what "
                "`agglo cache` was given"
            )
        if self.feature_cache is not None and self.views.mixup:
            raise ConfigError("data.feature_cache holds no blends of images: set data.views.mixup=0")
        return self


class Partition(Strict):
    """A set of resolutions with the batch that fits them; each step draws one partition, then one size (METHOD 3.1).

    Args:
        sizes: sides of the student's square views, in pixels.
        batch: images a step.
        weight: share of steps.
        teachers: names of those that teach at these sizes; all when null. One that teaches in some partitions only is
            why a student switches modes (RADIOv2.5): for recipes that had it so.
    """

    sizes: list[int] = Field(min_length=1)
    batch: int = Field(gt=0)
    weight: float = Field(default=1.0, gt=0)
    teachers: list[str] | None = Field(default=None, min_length=1)


class Objective(Strict):
    """What is trained: a student by distillation, or the upsampler of one teacher (METHOD 4.2).

    Args:
        kind: ``distill``, or ``upsample``; all other keys are those of ``upsample``.
        views: of each image and step, at the teacher's size, that the finer map must explain.
        zoom: how many times larger a view shows what it shows, log-uniform in this range. FeatSharp's is around 1; up
            to the upsampler's factor, views are also the teacher at the higher resolution.
        rotation: degrees that a view is turned by at most.
        perspective: deviation of the noise on a view's corners, in half sides, uniform in this range.
        seam: weight of cells beside a border between tiles.
        uncertainty: weigh cells by a predicted variance.
    """

    kind: Literal["distill", "upsample"] = "distill"
    views: int = Field(default=5, gt=0)
    zoom: tuple[float, float] = (0.95, 1 / 0.95)
    rotation: float = Field(default=5.0, ge=0, le=45)
    perspective: tuple[float, float] = (0.01, 0.05)
    seam: float = Field(default=2.0, ge=1)
    uncertainty: bool = True

    @field_validator("zoom", "perspective")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"must be a range (low, high) with 0 < low <= high, not {value}")
        return value

    def trains_student(self, student: Mapping[str, Any], stages: Sequence[Any]) -> bool:
        """Whether the recipe's student is what learns.

        Raises:
            ConfigError: the objective does not go with a student, stages, or its own keys.
        """
        if self.kind == "distill":
            odd = sorted(self.model_fields_set - {"kind"})
            if odd:
                raise ConfigError(f"objective.{odd[0]}: a key of `kind: upsample`; distillation takes none")
            return True
        for key, value in (("student", student), ("stages", stages)):
            if value:
                raise ConfigError(f"objective: upsample trains a teacher's upsampler: leave `{key}:` out")
        return False

    def flat(self) -> dict[str, Any]:
        """As the YAML tree that reads back to it."""
        return {"kind": self.kind} if self.kind == "distill" else self.model_dump(mode="json")


class Train(Strict):
    """The optimisation.

    Args:
        steps: optimiser steps.
        lr: peak learning rate; linear over ``warmup_steps``, then cosine to ``lr * final_lr``.
        backbone_lr: factor on ``lr`` for the student below its heads, which may start from trained weights.
        head_steps: steps at the start in which only the heads learn, so that their first, random gradients do not
            wreck a student that starts from trained weights (METHOD 5.2); it then warms up over ``warmup_steps`` too.
        weight_decay: AdamW's, left off biases, norms, position tables and class tokens.
        ema: decay of the averaged weights, which are what is evaluated and exported; 0 switches averaging off. Its
            early steps use ``min(ema, (1 + step) / (10 + step))``.
        clip: largest gradient norm, or null.
        precision: ``fp32``, or ``bf16`` autocast (only fast where the hardware has it).
        freeze_norm_statistics: keep the running statistics of BatchNorm as they start.
        damp: sigma of the multiplicative noise on the student's linear weights (DAMP, METHOD 2.7); 0 for none.
        spectral: spectral reparametrisation of the student's linear layers while it trains (METHOD 2.9).
        windows: ViTDet's windows as an augmentation (METHOD 2.10): sides in patches, of which one that divides the
            step's grid is drawn; empty for none.
        window_share: share of steps that look through windows.
        start_from: a run or saved model whose student, and heads of teachers of the same name, training starts from;
            heads of other teachers start anew, statistics and schedule too (METHOD 5.1).
        patience: how many steps in a row may have a loss that is not finite; they are skipped, counted and named.
    """

    steps: int = Field(gt=0)
    lr: float = Field(default=1e-3, gt=0)
    backbone_lr: float = Field(default=1.0, ge=0)
    final_lr: float = Field(default=0.01, ge=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)
    head_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.02, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    ema: float = Field(default=0.9996, ge=0, lt=1)
    clip: float | None = Field(default=None, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    freeze_norm_statistics: bool = False
    damp: float = Field(default=0.0, ge=0, lt=1)
    spectral: bool = False
    windows: list[int] = []
    window_share: float = Field(default=0.5, ge=0, le=1)
    start_from: str | None = None
    patience: int = Field(default=5, ge=0)
    seed: int = 0
    log_every: int = Field(default=10, gt=0)
    save_every: int = Field(default=500, gt=0)


class Auxiliary(Strict):
    """A further spatial head of a teacher, on a block inside the student (METHOD 10c); trained, never exported.

    Args:
        depth: the block: its index from 0 where it is a whole number, the share of the blocks up to and with it where
            it is a fraction (0.33: the block that ends the lower third; 1.0: the last).
        weight: of its term at step 0, from where it falls linearly; it is added to whatever the balancer makes of the
            others.
        until: the share of the run after which it is 0.
    """

    depth: int | float
    weight: float = Field(default=0.25, gt=0)
    until: float = Field(default=0.66, gt=0, le=1)

    @field_validator("depth")
    @classmethod
    def _legal(cls, value: int | float) -> int | float:
        if value < 0 or (isinstance(value, float) and not 0 < value <= 1):
            raise ValueError(f"must be the index of a block from 0 on, or a share in (0, 1], not {value}")
        return value

    def share(self, step: int, total: int) -> float:
        """Its weight at a step."""
        return self.weight * max(0.0, 1 - step / (self.until * total))


class Stage(Strict):
    """One stage of a run that has several: the recipe with some of its teachers and some changes.

    Args:
        name: of its folder, below ``stages/``.
        teachers: names of those that teach in it; all when null.
        set: assignments ``key.path=value``, as on the command line.
    """

    name: str = Field(pattern=r"^[\w-]+$")
    teachers: list[str] | None = None
    set: list[str] = []


class Recipe(Strict):
    """A training run. Read one with :func:`load`; ``agglo recipes`` lists those that ship."""

    name: str
    claim: Claim
    objective: Objective = Objective()
    student: Kind = {}
    teachers: dict[str, TeacherEntry] = Field(min_length=1)
    heads: Heads = Heads()
    targets: Targets = Targets()
    losses: Losses = Losses()
    balancer: Kind = {"kind": "fixed"}
    auxiliary: dict[str, Auxiliary] = {}
    data: Data
    partitions: list[Partition] = Field(min_length=1)
    train: Train
    stages: list[Stage] = []
    evals: list[Kind] = []
    smoke: list[str] = []

    @model_validator(mode="after")
    def _kinds(self) -> Recipe:
        """Fill in and check every ``{kind: ...}`` of the tree against its constructor."""
        if self.objective.trains_student(self.student, self.stages):
            _check(self.student, "students", "student")
        for name, entry in self.teachers.items():
            if not name or "/" in name or "." in name:
                raise ConfigError(f"teachers.{name}: a teacher's name must not be empty nor hold '/' or '.'")
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
                raise ConfigError("losses.mesa needs an averaged student: set train.ema, e.g. 0.9996")
        _check(self.balancer, "balancers", "balancer")
        self._check_auxiliary()
        self._check_partitions()
        self._check_stages()
        for index, entry in enumerate(self.data.sources):
            _check(entry.source, "sources", f"data.sources.{index}")
        for index, entry in enumerate(self.evals):
            _check(entry, "evals", f"evals.{index}")
        return self

    def _check_auxiliary(self) -> None:
        for name in self.auxiliary:
            if name not in self.teachers:
                raise ConfigError(f"auxiliary.{name}: no teacher of that name{nearest(name, self.teachers)}")
            if self.teachers[name].spatial_weight == 0:
                raise ConfigError(
                    f"auxiliary.{name}: it learns a map whose weight is 0: set teachers.{name}.spatial_weight"
                )

    def _check_partitions(self) -> None:
        for index, partition in enumerate(self.partitions):
            for name in partition.teachers or ():
                if name not in self.teachers:
                    raise ConfigError(f"partitions.{index}.teachers: no teacher {name!r}{nearest(name, self.teachers)}")
        if self.data.feature_cache is not None and any(partition.teachers for partition in self.partitions):
            raise ConfigError("partitions: a feature cache holds all teachers at all sizes: leave `teachers:` out")
        if all(partition.teachers is not None for partition in self.partitions):
            idle = set(self.teachers).difference(*(partition.teachers or () for partition in self.partitions))
            if idle and not self.stages:
                raise ConfigError(f"partitions: teacher {min(idle)!r} teaches in none of them; add it to one")

    def _check_stages(self) -> None:
        taken: set[str] = set()
        for index, stage in enumerate(self.stages):
            if stage.name in taken:
                raise ConfigError(f"stages.{index}.name: {stage.name!r} is taken; each stage needs a folder of its own")
            taken.add(stage.name)
            for name in stage.teachers or ():
                if name not in self.teachers:
                    raise ConfigError(f"stages.{index}.teachers: no teacher {name!r}{nearest(name, self.teachers)}")
            self.stage(index)  # its changes must fit, and that is found out before the first stage runs

    def stage(self, index: int) -> Recipe:
        """The recipe of one stage, as a run of its own.

        Raises:
            ConfigError: its changes do not fit.
        """
        chosen, tree = self.stages[index], self.flat()
        tree["stages"] = []
        tree["name"] = f"{self.name}-{chosen.name}"
        if chosen.teachers is not None:
            tree["teachers"] = {name: tree["teachers"][name] for name in self.teachers if name in chosen.teachers}
            tree["auxiliary"] = {name: entry for name, entry in tree["auxiliary"].items() if name in chosen.teachers}
            tree["partitions"] = [part for p in tree["partitions"] if (part := _with(p, chosen.teachers)) is not None]
        return decode(override(tree, chosen.set, _OWN), f"{self.name}, stage {chosen.name}")

    def flat(self) -> dict[str, Any]:
        """The resolved recipe as the YAML tree that reads back to it."""
        data = self.model_dump(mode="json")
        data["objective"] = self.objective.flat()
        if not data["student"]:
            del data["student"]
        for name, entry in data["teachers"].items():
            data["teachers"][name] = {**entry.pop("teacher"), **entry}
        if data["losses"]["mesa"] is not None:
            data["losses"]["mesa"] = {**data["losses"]["mesa"].pop("loss"), **data["losses"]["mesa"]}
        data["data"]["sources"] = [{**entry.pop("source"), **entry} for entry in data["data"]["sources"]]
        return data

    def yaml(self) -> str:
        """:meth:`flat` as YAML text."""
        return write_yaml(self.flat())


_OWN = {
    *(set(TeacherEntry.model_fields) - {"teacher"}),
    *(set(SourceEntry.model_fields) - {"source"}),
    *(set(Mesa.model_fields) - {"loss"}),
}
"""Keys that stand beside a kind's own in the YAML, and stay when an override names another kind."""


def _with(partition: dict[str, Any], teachers: Collection[str]) -> dict[str, Any] | None:
    """A partition with some of the teachers, or None where none of them teaches in it."""
    if partition["teachers"] is None:
        return partition
    kept = [name for name in partition["teachers"] if name in teachers]
    return {**partition, "teachers": kept} if kept else None


def _check(options: Kind, point: str, where: str) -> None:
    checked = check_options(point, options, where)
    options.clear()
    options.update(checked)


def decode(data: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """A mapping to a recipe.

    Raises:
        ConfigError: it does not fit; the message holds one line for each problem.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{name}:\n" + explain(error, data, "", Recipe)) from None


def names() -> list[str]:
    """The recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(name_or_path: str, overrides: Iterable[str] = (), *, smoke: bool = False) -> Recipe:
    """Read a recipe by name or path, then apply overrides.

    Args:
        name_or_path: ``"quickstart"``, or a YAML file.
        overrides: ``key.path=value`` assignments; applied last, so they win over ``smoke``.
        smoke: shrink the recipe by its own ``smoke`` list first.

    Raises:
        ConfigError: no such recipe, or it does not fit.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ConfigError(f"no recipe {name_or_path!r}{nearest(name_or_path, names())}")
    data = read_yaml(path.read_text(encoding="utf-8"), path.name)
    if smoke:
        data = override(data, data.get("smoke", []), _OWN)
    return decode(override(data, overrides, _OWN), path.name)
