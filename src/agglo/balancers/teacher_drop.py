"""Teacher dropping: teachers with a small loss are left out at random."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from agglo import dist
from agglo.balancers._weights import Weighted, teacher_of

# Separates these draws from others with the same seed and step.
_STREAM = 0x7D0


class TeacherDrop(Weighted):
    """Teacher dropping (UNIC, arXiv:2408.05088): keeps the teacher with the largest loss, drops others at random.

    Per image, the teacher with the largest loss is kept, and every other one is dropped with probability ``p``,
    independently. With ``m_t = 1`` for a kept teacher, and ``T`` teachers::

        L = Σ_k w_k mean_b( c_t(k),b L_k,b ),    c_t = T m_t / Σ_t m_t

    so that every image keeps its total weight (UNIC divides by the sum over the batch, which favours images that keep
    many teachers). A teacher's loss is the weighted mean of its terms; terms must be normalised (PHI-S, angular) to be
    comparable. Terms without a teacher are never dropped. C-RADIOv4 uses ``fixed``.

    Without ``per_image`` one draw decides for the whole batch. Draws depend on (seed, step) only, so a resumed run
    repeats them. In eval mode nothing is dropped. A loss that is not finite never counts as the largest, and has no
    effect if its teacher is dropped.

    Args:
        weights: term name to the recipe's weight.
        p: probability that a teacher other than the worst is dropped, in [0, 1].
        seed: of the draws.

    Raises:
        ValueError: ``p`` is not in [0, 1], or ``seed`` is negative.
    """

    weighs_images = True

    def __init__(self, weights: Mapping[str, float], /, *, p: float = 0.5, seed: int = 0) -> None:
        super().__init__(weights)
        if not 0 <= p <= 1:
            raise ValueError(f"p must be in [0, 1], got {p}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.p = p
        self.seed = seed
        self.teachers = tuple(dict.fromkeys(t for t in map(teacher_of, self.names) if t is not None))

    def combine(
        self, terms: dict[str, Tensor], *, step: int, total: int, per_image: Mapping[str, Tensor] | None
    ) -> Tensor:
        members: dict[str, list[str]] = {}
        for name in terms:
            teacher = teacher_of(name)
            if teacher is not None:
                members.setdefault(teacher, []).append(name)
        if not self.training or len(members) < 2:
            return self.weigh(terms)
        rows = _rows([name for names in members.values() for name in names], terms, per_image)
        kept = self._kept(members, rows, step, 1 if per_image is None else dist.world_size())
        coefficients = len(members) * kept / kept.sum(0)
        balanced = dict(terms)
        for index, names in enumerate(members.values()):
            for name in names:
                row = torch.where(kept[index], rows[name], 0.0)
                balanced[name] = (coefficients[index] * row).mean()
        return self.weigh(balanced)

    @torch.no_grad()
    def _kept(self, members: Mapping[str, list[str]], rows: Mapping[str, Tensor], step: int, parts: int) -> Tensor:
        """Mask ``(T, B)`` of the teachers kept per image; the batch is one of ``parts`` equal parts."""
        # A teacher's loss: the weighted mean of its terms.
        scores = torch.stack(
            [
                torch.stack([self.weights[name] * rows[name].detach().float() for name in names]).sum(0)
                / sum(self.weights[name] for name in names)
                for names in members.values()
            ]
        )
        worst = torch.where(scores.isfinite(), scores, float("-inf")).argmax(0, keepdim=True)
        seed = int(np.random.SeedSequence([_STREAM, self.seed, step]).generate_state(1)[0])
        # One row for every teacher of the recipe and one column for every image of all ranks: the draws depend neither
        # on absent teachers nor on the number of ranks.
        images = scores.shape[1]
        draws = torch.rand(len(self.teachers), parts * images, generator=torch.Generator().manual_seed(seed))
        draws = draws[:, dist.local_slice(images)] if parts > 1 else draws
        present = [self.teachers.index(teacher) for teacher in members]
        kept = (draws[present] >= self.p).to(scores.device, non_blocking=True)
        return kept.scatter(0, worst, True)


def _rows(names: list[str], terms: Mapping[str, Tensor], per_image: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Each term as ``(B,)``, or as ``(1,)`` without ``per_image``."""
    if per_image is None:
        return {name: terms[name].reshape(1) for name in names}
    missing = [name for name in names if name not in per_image]
    if missing:
        raise ValueError(f"per_image lacks {', '.join(missing)}: pass every teacher's terms per image, or none")
    batch = per_image[names[0]].shape
    for name in names:
        shape = per_image[name].shape
        if len(shape) != 1 or shape != batch:
            raise ValueError(f"per_image[{name!r}] must be (B,) like the others, {tuple(batch)}; got {tuple(shape)}")
    return {name: per_image[name] for name in names}
