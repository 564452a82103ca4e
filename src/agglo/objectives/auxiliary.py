"""Teachers assigned to depths: auxiliary heads on blocks inside the student (METHOD 10c). Off by default.

They read what the student's one forward pass leaves on its way, learn the same normalised map as the teacher's final
head, and fade out; all losses at the last block stay. They are part of the objective: a checkpoint holds them, and the
exported model does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

from agglo.config import build
from agglo.heads.base import Head
from agglo.recipe import Recipe
from agglo.students.base import Student
from agglo.types import ConfigError, Features, FeatureSpec


class Ladder(nn.Module):
    """The auxiliary heads of a recipe.

    Args:
        recipe: the run; its ``auxiliary:`` may be empty.
        specs: what each teacher returns.
        student: on whose blocks the heads sit; may be None where there are none.

    Raises:
        ConfigError: the student shows no blocks, has no such block, or the teacher has no map.
    """

    def __init__(self, recipe: Recipe, specs: Mapping[str, FeatureSpec], student: Student | None) -> None:
        super().__init__()
        self.entries = recipe.auxiliary
        self.heads: dict[str, Head] = nn.ModuleDict()  # type: ignore[assignment]
        self.blocks: dict[str, int] = {}
        for name, entry in recipe.auxiliary.items():
            if student is None or student.depth == 0:
                raise ConfigError(
                    f"auxiliary.{name}: a {recipe.student['kind']} student is no stack of equal blocks and shows none "
                    "on the way: use a student of kind vit, or leave `auxiliary:` out"
                )
            if specs[name].spatial is None:
                raise ConfigError(f"auxiliary.{name}: the teacher has no map for such a head to learn")
            self.blocks[name] = _block(entry.depth, student.depth, f"auxiliary.{name}.depth")
            kind = recipe.teachers[name].spatial_head or recipe.heads.spatial
            self.heads[name] = build("heads", kind, student.spec.spatial, specs[name].spatial, where="heads.spatial")

    def predict(self, name: str, early: Tensor) -> Tensor:
        """What a teacher's head makes of its block's map ``(B, D', h, w)``, float32."""
        head = self.heads[name]
        return head(early.to(next(head.parameters()).dtype)).float()

    def shares(self, step: int, total: int) -> dict[str, float]:
        """The weights of a step, of those terms that still have one."""
        found = {name: entry.share(step, total) for name, entry in self.entries.items()}
        return {name: share for name, share in found.items() if share > 0}


def _block(depth: int | float, blocks: int, where: str) -> int:
    """The index of a block; ``round(L share)`` blocks end with it where it is a share (METHOD 10c)."""
    if isinstance(depth, float):
        return max(1, round(blocks * depth)) - 1
    if depth >= blocks:
        legal = f"the student has the blocks 0 to {blocks - 1}"
        raise ConfigError(f"{where}: {legal}, not {depth}; a share of them, such as 0.33, is legal too")
    return depth


@contextlib.contextmanager
def shown(student: Student, blocks: Collection[int]) -> Iterator[dict[int, Features]]:
    """While it lasts, the student's forward pass also leaves what its ``blocks`` return, by index.

    The pass is the one that is made anyway: the student is called as always, with whatever hooks it has, and answers as
    always. The final norm, where there is one, is applied to what is left on the way too.
    """
    seen: dict[int, Features] = {}
    if not blocks:
        yield seen
        return
    last = student.depth - 1

    def forward(images: Tensor, *, window: int | None = None) -> Features:
        student.visit(images, {*blocks, last}, seen.__setitem__, norm=True, window=window)
        return seen[last]

    student.forward = forward  # the instance's own, which is found before the class's
    try:
        yield seen
    finally:
        del student.forward
