"""Input size of each teacher: docs/method.md, 3.2, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agglo.config import build
from agglo.teachers.base import Teacher

TABLE = {
    # student: grid, DINOv3 input, SigLIP2 input, SAM 3 tile, SAM 3 tiles a canvas
    128: (8, 128, 384, 112, 81),
    192: (12, 192, 384, 168, 36),
    224: (14, 224, 384, 196, 25),
    256: (16, 256, 384, 224, 16),
    384: (24, 384, 384, 336, 9),
    432: (27, 432, 384, 378, 4),
    512: (32, 512, 384, 448, 4),
    768: (48, 768, 384, 672, 1),
    1024: (64, 1024, 384, 896, 1),
    1152: (72, 1152, 384, 1008, 1),
}
STUDENT = 16
FOLLOWS = {  # teachers that follow the student, with the side of their tokens
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": 16,
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": 16,
    "facebook/dinov2-giant": 14,
    "facebook/dinov2-with-registers-giant": 14,
    "google/siglip2-so400m-patch16-naflex": 16,
    "nvidia/C-RADIOv4-H": 16,
}
FIXED = {  # teachers of one size: side, patch, grid
    "google/siglip2-giant-opt-patch16-384": (384, 16, 24),
    "google/siglip2-so400m-patch14-384": (378, 14, 27),
    "google/siglip-so400m-patch14-384": (378, 14, 27),
    "openai/clip-vit-large-patch14-336": (336, 14, 24),
    "facebook/sam-vit-huge": (1024, 16, 64),
    "facebook/sam3": (1008, 14, 72),
}


@pytest.fixture(scope="module")
def published() -> Any:
    """A published teacher on the meta device, built once."""
    pytest.importorskip("transformers")
    made: dict[str, Teacher] = {}

    def teacher(name: str) -> Teacher:
        if name not in made:
            with torch.device("meta"):
                made[name] = build("teachers", {"kind": "transformers", "model": name, "weights": "random"})
        return made[name]

    return teacher


@pytest.mark.parametrize("size", TABLE)
def test_input_sizes_follow_the_table(size: int, published: Any) -> None:
    grid, dinov3, siglip2, tile, tiles = TABLE[size]
    assert size // STUDENT == grid
    dino, siglip, sam = (
        published(name)
        for name in (
            "facebook/dinov3-vit7b16-pretrain-lvd1689m",
            "google/siglip2-giant-opt-patch16-384",
            "facebook/sam3",
        )
    )
    assert dino.input_size((size, size), STUDENT) == (dinov3, dinov3)
    assert siglip.input_size((size, size), STUDENT) == (siglip2, siglip2)
    assert sam.input_size((size, size), STUDENT) == (1008, 1008)
    assert sam.matched_size((size, size), STUDENT) == (tile, tile)
    assert tile // sam.patch == grid
    assert (sam.canvas // sam.patch // grid) ** 2 == tiles


@pytest.mark.parametrize("size", TABLE)
@pytest.mark.parametrize("name", FOLLOWS)
def test_matched_size_gives_as_many_tokens_as_the_student(name: str, size: int, published: Any) -> None:
    teacher = published(name)
    wanted = teacher.input_size((size, size), STUDENT)
    assert wanted == (size * FOLLOWS[name] // STUDENT,) * 2
    assert wanted[0] // teacher.spec.stride == size // STUDENT
    assert not teacher.fixed


@pytest.mark.parametrize("name", FIXED)
def test_fixed_teachers_use_one_size(name: str, published: Any) -> None:
    teacher, (side, patch, grid) = published(name), FIXED[name]
    for size in TABLE:
        assert teacher.input_size((size, size), STUDENT) == (side, side)
        assert teacher.matched_size((size, size), STUDENT) == (size * patch // STUDENT,) * 2
    assert (teacher.canvas, teacher.native, teacher.patch, teacher.fixed) == (side, side, patch, True)
    assert side // patch == grid


def test_networks_return_the_expected_grids(published: Any) -> None:
    """Shapes on the meta device; one size per model suffices."""
    for name, size in [("facebook/dinov2-giant", 224), ("google/siglip2-so400m-patch16-naflex", 192)]:
        teacher = published(name)
        images = torch.zeros(1, 3, *teacher.input_size((size, size), STUDENT), device="meta")
        assert teacher(images).spatial.shape[-2:] == (size // STUDENT,) * 2


def test_input_sizes_of_rectangular_views(published: Any) -> None:
    assert published("facebook/dinov2-giant").input_size((224, 448), 16) == (196, 392)
    assert published("facebook/dinov2-giant").input_size((256, 256), 32) == (112, 112)
    assert published("facebook/sam3").matched_size((256, 512), 16) == (224, 448)
    assert published("facebook/sam3").input_size((256, 512), 16) == (1008, 1008)


def test_timm_teachers() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        vit = build("teachers", {"kind": "timm", "model": "vit_tiny_patch16_224", "weights": "random"})
        pyramid = build("teachers", {"kind": "timm", "model": "test_convnext", "weights": "random", "stage": 3})
    # A pyramid's stride depends on the stage, not on its input scale: it uses the student's size.
    assert pyramid.spec.stride == 32 and pyramid.patch is None
    for size in TABLE:
        assert vit.input_size((size, size), STUDENT) == (size, size)
        assert size % 32 or vit.input_size((size, size), 32) == (size // 2,) * 2
        shown = pyramid.input_size((size, size), STUDENT)[0]
        assert shown % 32 == 0 and abs(shown - size) <= 16


@pytest.mark.parametrize("size", TABLE)
def test_teachers_without_tokens_use_the_students_size(size: int) -> None:
    for options in ({"kind": "hog"}, {"kind": "hog", "cell": 4}, {"kind": "toy"}):
        teacher = build("teachers", options)
        assert teacher.patch is None and not teacher.fixed
        assert teacher.input_size((size, size), STUDENT) == (size, size)
