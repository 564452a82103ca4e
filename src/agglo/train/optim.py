"""AdamW in groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn, optim

from agglo.heads.base import Head
from agglo.model import Model
from agglo.recipe import Train


def learning_rate(step: int, config: Train) -> float:
    """Linear warm-up to ``lr`` over ``warmup_steps``, then half a cosine down to ``lr * final_lr`` at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(1, config.steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    floor = config.lr * config.final_lr
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def student_share(step: int, config: Train) -> float:
    """The student's factor on the scheduled rate: 0 for ``head_steps``, a linear warm-up, then ``backbone_lr``."""
    if step < config.head_steps or config.head_steps == 0:
        return 0.0 if config.head_steps else config.backbone_lr
    return config.backbone_lr * min(1.0, (step - config.head_steps + 1) / max(1, config.warmup_steps))


def build_optimizer(model: Model, config: Train, others: Iterable[nn.Parameter] = ()) -> optim.AdamW:
    """AdamW over up to four groups: student (and heads that follow it) or heads, decayed or not.

    Weight decay is left off biases, norms and whatever the student excludes (METHOD 1.2). ``backbone_lr: 0`` freezes
    the student. ``others`` (a balancer's parameters) learn at the heads' rate, without decay.
    """
    excluded = {f"student.{name}" for name in model.student.no_weight_decay()}
    norms = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm))
        for name, _ in module.named_parameters(recurse=False)
    }
    heads = [name for name, module in model.named_modules() if isinstance(module, Head) and module.follows_student]
    followers = tuple(f"{name}." for name in ["student", *heads])
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        student = name.startswith(followers)
        if student and config.backbone_lr == 0:
            parameter.requires_grad_(False)
            continue
        plain = parameter.ndim < 2 or name in excluded or name in norms
        groups.setdefault((student, 0.0 if plain else config.weight_decay), []).append(parameter)
    if extra := list(others):
        groups.setdefault((False, 0.0), []).extend(extra)
    return optim.AdamW(
        [{"params": params, "student": student, "weight_decay": decay} for (student, decay), params in groups.items()],
        lr=config.lr,
        betas=config.betas,
        foreach=True,  # the fused CPU kernel walks raw memory, and channels-last gradients may be laid out otherwise
    )


def set_learning_rate(optimizer: optim.Optimizer, step: int, config: Train) -> float:
    """Give every group its rate at a step; returns the heads' rate."""
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate * student_share(step, config) if group["student"] else rate
    return rate
