"""AdamW in groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math

from torch import nn, optim

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


def build_optimizer(model: Model, config: Train) -> optim.AdamW:
    """AdamW over up to four groups: student or heads, decayed or not.

    Weight decay is left off biases, norms and whatever the student excludes (METHOD 1.2). A ``scale`` in each group is
    its factor on the scheduled rate; ``backbone_lr: 0`` freezes the student.
    """
    excluded = {f"student.{name}" for name in model.student.no_weight_decay()}
    norms = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm))
        for name, _ in module.named_parameters(recurse=False)
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = config.backbone_lr if name.startswith("student.") else 1.0
        if scale == 0:
            parameter.requires_grad_(False)
            continue
        plain = parameter.ndim < 2 or name in excluded or name in norms
        groups.setdefault((scale, 0.0 if plain else config.weight_decay), []).append(parameter)
    return optim.AdamW(
        [{"params": params, "scale": scale, "weight_decay": decay} for (scale, decay), params in groups.items()],
        lr=config.lr,
        betas=config.betas,
        foreach=True,  # the fused CPU kernel walks raw memory, and channels-last gradients may be laid out otherwise
    )


def set_learning_rate(optimizer: optim.Optimizer, rate: float) -> None:
    """Give every group its share of the scheduled rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
