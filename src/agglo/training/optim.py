"""AdamW with parameter groups, and the learning rate schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn, optim

from agglo.heads.base import Head
from agglo.objectives.base import Objective
from agglo.recipe import Train


def learning_rate(step: int, config: Train) -> float:
    """Linear warm-up to ``lr`` over ``warmup_steps``, then cosine decay to ``lr * final_lr`` at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(1, config.steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    floor = config.lr * config.final_lr
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def student_factor(step: int, config: Train) -> float:
    """The student's factor on the rate: 0 for ``head_steps``, linear warm-up, then ``backbone_lr``."""
    if step < config.head_steps or config.head_steps == 0:
        return 0.0 if config.head_steps else config.backbone_lr
    return config.backbone_lr * min(1.0, (step - config.head_steps + 1) / max(1, config.warmup_steps))


def build_optimizer(model: nn.Module, config: Train, objective: Objective | None = None) -> optim.AdamW:
    """AdamW over up to four groups: student (and heads that follow it) or the rest, with weight decay or without.

    Biases, norms, scalars and :meth:`Objective.no_weight_decay` have no weight decay. ``backbone_lr: 0`` freezes the
    student. The objective's parameters (a balancer's, auxiliary heads) learn at the heads' rate.

    On CUDA the update is one fused kernel, which can skip the step by a flag on the device (:func:`is_deferred`).
    """
    excluded = (objective or Objective).no_weight_decay(model)
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
    for parameter in objective.parameters() if objective is not None else ():
        groups.setdefault((False, 0.0 if parameter.ndim < 2 else config.weight_decay), []).append(parameter)
    fused = bool(groups) and all(parameter.is_cuda for group in groups.values() for parameter in group)
    return optim.AdamW(
        [{"params": params, "student": student, "weight_decay": decay} for (student, decay), params in groups.items()],
        lr=config.lr,
        betas=config.betas,
        # The fused CPU kernel ignores strides, and channels-last gradients may have others than their parameters.
        **{"fused" if fused else "foreach": True},
    )


def is_deferred(optimizer: optim.Optimizer) -> bool:
    """Whether :func:`update` reads its flag on the device, without a synchronisation."""
    return bool(optimizer.defaults.get("fused"))


def update(optimizer: optim.Optimizer, good: Tensor) -> None:
    """One optimiser step if ``good``, a bool scalar on the device, is True; otherwise nothing changes."""
    if is_deferred(optimizer):
        _align(optimizer)
        # The fused kernel reads this flag, which gradient scalers set too.
        optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(good):
        optimizer.step()
    else:
        optimizer.zero_grad(set_to_none=True)


def _align(optimizer: optim.Optimizer) -> None:
    """Give gradients the strides of their parameters (channels-last): the fused kernel ignores strides."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None and gradient.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(gradient)


def set_learning_rate(optimizer: optim.Optimizer, step: int, config: Train) -> float:
    """Set every group's learning rate; returns that of the heads."""
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate * student_factor(step, config) if group["student"] else rate
    return rate
