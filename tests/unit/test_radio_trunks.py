"""Trunks that differ from the architecture of their arguments are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from agglo.checkpoints.radio import from_checkpoint
from agglo.checkpoints.sizes import SIZES
from agglo.types import AssetError
from agglo.weights.reading import Checkpoint

TEACHERS = [{"name": "siglip2-g"}, {"name": "dino_v3"}, {"name": "sam3", "use_summary": False}]


def trunk(name: str, *, depth: int | None = None, table: int = 128, scaled: bool | None = None) -> dict[str, Tensor]:
    """The tensors of an official trunk of the published size, without memory."""
    size = SIZES[name]
    width, hidden = size.width, size.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "patch_generator.embedder.weight": (width, 3 * 16 * 16),
        "patch_generator.pos_embed": (1, table * table, width),
        "patch_generator.cls_token.token": (10, width),
        "reg_token": (1, 4, width),
        "norm.weight": (width,),
    }
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for index in range(size.depth if depth is None else depth):
        block = f"blocks.{index}."
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        for layer, shape in layers.items():
            shapes |= {f"{block}{layer}.weight": shape, f"{block}{layer}.bias": shape[:1]}
        if scaled or (scaled is None and size.layer_scale):
            shapes |= {f"{block}ls1.grandma": (width,), f"{block}ls2.grandma": (width,)}
    state = {f"base_model.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return state | {f"input_conditioner.norm_{name}": torch.ones(3, 1, 1) for name in ("mean", "std")}


def plain() -> dict[str, Tensor]:
    """A plain ViT of timm."""
    state = {k: v for k, v in trunk("vit_huge_patch16_224").items() if "patch_generator" not in k}
    more = {"patch_embed.proj.weight": (1280, 3, 16, 16), "patch_embed.proj.bias": (1280,),
            "pos_embed": (1, 197, 1280), "cls_token": (1, 1, 1280)}  # fmt: skip
    return state | {f"base_model.{key}": torch.empty(shape, device="meta") for key, shape in more.items()}


def described(state: dict[str, Tensor], model: str, **args: Any) -> dict[str, Any]:
    args = {"model": model, "model_kwargs": {}, "cpe_max_size": 2048, "teachers": TEACHERS, **args}
    return from_checkpoint(Checkpoint(state, args=args, source="here"), fill=False).student_config


@pytest.mark.parametrize("name", [name for name in SIZES if "patch16" in name and "mlpnorm" not in name])
def test_published_sizes_are_recognised(name: str) -> None:
    found = described(trunk(name), name)
    size = SIZES[name]
    assert (found["width"], found["depth"], found["mlp_hidden"]) == (size.width, size.depth, size.hidden)
    assert (found["layer_scale"] is not None) == (size.layer_scale is not None)


@pytest.mark.parametrize(
    ("state", "model", "args", "message"),
    [
        pytest.param(
            trunk("vit_base_patch16_224"), "vit_huge_patch16_224", {},
            r"here does not match its args: vit_huge_patch16_224 has depth 32, width 1280, MLP width 5120; "
            r"this one has depth 12, width 768, MLP width 3072; 240 missing \(base_model\.blocks\.12\.norm1\.weight, "
            r"(base_model\.blocks\.12\.[a-z0-9._]+, ){9}\.\.\.\)",
            id="a smaller model",
        ),
        pytest.param(
            trunk("vit_huge_patch16_224"), "vit_base_patch16_224", {},
            r"has depth 12.*this one has depth 32.*left over \(base_model\.blocks\.12\.", id="a larger model",
        ),
        pytest.param(
            trunk("vit_base_patch16_224", depth=11), "vit_base_patch16_224", {},
            r"has depth 12; this one has depth 11; 12 missing \(base_model\.blocks\.11\.norm1\.weight",
            id="without the last block",
        ),
        pytest.param(
            trunk("vit_base_patch16_v2_224", scaled=False), "vit_base_patch16_v2_224", {},
            r"layer scale yes; this one has layer scale no; 24 missing \(base_model\.blocks\.0\.ls1\.grandma",
            id="without layer scale",
        ),
        pytest.param(
            trunk("vit_base_patch16_224", scaled=True), "vit_base_patch16_224", {},
            r"layer scale no; this one has layer scale yes; 24 left over \(base_model\.blocks\.0\.ls1\.grandma",
            id="with layer scale",
        ),
        pytest.param(
            trunk("vit_base_patch16_224", table=8), "vit_base_patch16_224", {},
            r"a table of 128x128 \(patch_generator\); this one has positions cropped from a table of 8x8", id="table",
        ),
        pytest.param(
            plain(), "vit_huge_patch16_224", {},
            r"positions of a plain ViT.*3 missing \(base_model\.patch_generator\.embedder\.weight.*"
            r"4 left over \(base_model\.cls_token, base_model\.patch_embed", id="a plain ViT",
        ),
        pytest.param(
            trunk("vit_huge_patch16_224"), "vit_huge_patch16_224", {"cpe_max_size": None},
            r"has positions of a plain ViT.*this one has positions cropped", id="unexpected positions",
        ),
        pytest.param(
            trunk("vit_so400m_v2_patch16_224"), "vit_so400m_patch16_224", {},
            r"has MLP width 4304; this one has MLP width 4320", id="MLPs",
        ),
        pytest.param(
            trunk("vit_base_patch16_224"), "vit_base_patch16_224", {"model_kwargs": {"mlp_ratio": 2.0}},
            r"has MLP width 1536; this one has MLP width 3072", id="MLPs by model_kwargs",
        ),
        pytest.param(
            trunk("vit_large_patch16_224"), "dino_v2_l_student", {},
            r"keys below base_model\.inner\.", id="DINOv2's names",
        ),
    ],
)  # fmt: skip
def test_other_architectures_are_refused(
    state: dict[str, Tensor], model: str, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(AssetError, match=message):
        described(state, model, **args)


def test_model_kwargs_override_the_table() -> None:
    small = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    assert described(trunk("vit_base_patch16_224"), "vit_huge_patch16_224", model_kwargs=small)["depth"] == 12
    scaled = trunk("vit_base_patch16_v2_224")
    kwargs = {"init_values": 1e-5}
    assert described(scaled, "vit_base_patch16_224", model_kwargs=kwargs)["layer_scale"]


def test_layer_scale_of_v3_h_follows_the_file() -> None:
    """NVIDIA TAO has one, timm has none."""
    assert described(trunk("vit_huge_patch16_224"), "vit_huge_patch16_224")["layer_scale"] is None
    with pytest.warns(UserWarning, match="here has layer scales, which vit_huge_patch16_224 is not published to have"):
        assert described(trunk("vit_huge_patch16_224", scaled=True), "vit_huge_patch16_224")["layer_scale"]


def test_unknown_name_follows_its_tensors() -> None:
    found = described(trunk("vit_base_patch16_224", depth=7, table=8), "my_vit", model_kwargs={"num_heads": 12})
    assert (found["depth"], found["max_grid"]) == (7, 8)
