"""How a recipe is optimised: the ``objective:``, ``train:``, ``auxiliary:`` and ``stages:`` parts of its tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from agglo.config import Strict
from agglo.types import ConfigError


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
