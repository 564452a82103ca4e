"""Teachers that the student already agrees with are dropped at random."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from agglo import dist
from agglo.balancers._weights import Weighted, teacher_of

# Keeps the draws apart from others that are made of the same seed and step.
_STREAM = 0x7D0


class TeacherDrop(Weighted):
    """Teacher dropping after UNIC (arXiv:2408.05088): the worst teacher of an image stays, each other one may go.

    For each image the teacher of the greatest loss is kept, and every other one is dropped with probability ``p``,
    each on its own. With ``m_t`` = 1 for a teacher that is kept, in an image of ``T`` teachers::

        L = Σ_k w_k mean_b( c_t(k),b L_k,b ),    c_t = T m_t / Σ_t m_t

    so every image weighs as much as without dropping (UNIC divides by the sum over the batch, which favours images
    that keep many teachers). A teacher's loss is the mean of its terms by their weights, so one without a summary
    competes on equal terms; losses must be normalised (PHI-S, angular) for "greatest" to mean anything. Terms of no
    teacher are never dropped.

    Images are told apart when ``per_image`` is given; otherwise one draw decides for the whole batch. Draws depend on
    (seed, step) alone, so a resumed run repeats them; a caller that does not pass the step has the same draw always.
    In eval mode nothing is dropped. A value that is not finite never makes its teacher the worst; it does no harm
    where that teacher is dropped.

    Off by default (C-RADIOv4 uses ``fixed``).

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
        """Which teacher ``(T, B)`` stays for which image; of ``parts`` equal parts of a batch these are one."""
        # A teacher's loss: the mean of its terms by their weights.
        scores = torch.stack(
            [
                torch.stack([self.weights[name] * rows[name].detach().float() for name in names]).sum(0)
                / sum(self.weights[name] for name in names)
                for names in members.values()
            ]
        )
        worst = torch.where(scores.isfinite(), scores, float("-inf")).argmax(0, keepdim=True)
        seed = int(np.random.SeedSequence([_STREAM, self.seed, step]).generate_state(1)[0])
        # One row for each announced teacher: who is absent does not change the draws of the others.
        # For the images of all processes, of which this one takes its own.
        images = scores.shape[1]
        draws = torch.rand(len(self.teachers), parts * images, generator=torch.Generator().manual_seed(seed))
        draws = draws[:, dist.local_slice(images)] if parts > 1 else draws
        present = [self.teachers.index(teacher) for teacher in members]
        kept = (draws[present] >= self.p).to(scores.device, non_blocking=True)
        return kept.scatter(0, worst, True)


def _rows(names: list[str], terms: Mapping[str, Tensor], per_image: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Each term as ``(B,)``, or as ``(1,)`` when images are not told apart."""
    if per_image is None:
        return {name: terms[name].reshape(1) for name in names}
    missing = [name for name in names if name not in per_image]
    if missing:
        raise ValueError(f"per_image lacks {', '.join(missing)}: pass every term of a teacher by image, or none")
    batch = per_image[names[0]].shape
    for name in names:
        shape = per_image[name].shape
        if len(shape) != 1 or shape != batch:
            raise ValueError(f"per_image[{name!r}] must be (B,) like the others, {tuple(batch)}; got {tuple(shape)}")
    return {name: per_image[name] for name in names}
