"""Auxiliary heads on intermediate blocks of the student (docs/method.md, 10c), off by default.

They predict the same normalised map as the teacher's final head, and their weight decays to 0. They belong to the
objective: checkpoints contain them, the exported model does not.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from agglo.config import build
from agglo.heads.base import Head
from agglo.recipe import Recipe
from agglo.students.base import Student
from agglo.types import ConfigError, FeatureSpec


class AuxiliaryHeads(nn.Module):
    """The heads of a recipe's ``auxiliary:``, which may be empty.

    Args:
        recipe: the run.
        specs: of the teachers.
        student: whose blocks the heads read.

    Raises:
        ConfigError: the student is not a stack of blocks, has no such block, or the teacher has no map.
    """

    def __init__(self, recipe: Recipe, specs: Mapping[str, FeatureSpec], student: Student) -> None:
        super().__init__()
        self.entries = recipe.auxiliary
        self.heads: dict[str, Head] = nn.ModuleDict()  # type: ignore[assignment]
        self.blocks: dict[str, int] = {}
        for name, entry in recipe.auxiliary.items():
            if student.depth == 0:
                raise ConfigError(
                    f"auxiliary.{name}: a {recipe.student['kind']} student is not a stack of equal blocks: use a "
                    "student of kind vit, or remove `auxiliary:`"
                )
            if specs[name].spatial is None:
                raise ConfigError(f"auxiliary.{name}: the teacher has no map to predict")
            self.blocks[name] = _block(entry.depth, student.depth, f"auxiliary.{name}.depth")
            kind = recipe.teachers[name].spatial_head or recipe.heads.spatial
            self.heads[name] = build("heads", kind, student.spec.spatial, specs[name].spatial, where="heads.spatial")

    def predict(self, name: str, spatial: Tensor) -> Tensor:
        """A teacher's map, float32, from the map ``(B, D', h, w)`` of its block."""
        head = self.heads[name]
        return head(spatial.to(next(head.parameters()).dtype)).float()

    def weights(self, step: int, total: int) -> dict[str, float]:
        """The positive weights at a step, by teacher."""
        found = {name: entry.weight_at(step, total) for name, entry in self.entries.items()}
        return {name: weight for name, weight in found.items() if weight > 0}


def _block(depth: int | float, blocks: int, where: str) -> int:
    """The index of a block: ``depth``, or for a fraction of the depth ``round(depth * blocks) - 1``."""
    if isinstance(depth, float):
        return max(1, round(blocks * depth)) - 1
    if depth >= blocks:
        legal = f"the student has the blocks 0 to {blocks - 1}"
        raise ConfigError(f"{where}: {legal}, not {depth}; or give a fraction of the depth, such as 0.33")
    return depth
