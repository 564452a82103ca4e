"""Our ViT against independent implementations, under random weights."""

import pytest
import torch

from agglo.checkpoints.radio import from_checkpoint
from agglo.nn.position import eval_embedding, train_embedding
from agglo.students.vit import ViT
from agglo.types import ConfigError
from agglo.weights.reading import Checkpoint

timm = pytest.importorskip("timm", reason="the timm extra is not installed")


def test_equals_timm_with_the_same_weights() -> None:
    torch.manual_seed(0)
    ours = ViT((), width=48, depth=3, heads=4, patch=8, max_grid=4, registers=2).eval()
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=0, reg_tokens=2, no_embed_class=True,
        final_norm=False,
    ).eval()  # fmt: skip
    state = {name: value for name, value in ours.state_dict().items() if name.startswith("blocks.")}
    generator = ours.patch_generator
    state["patch_embed.proj.weight"] = generator.embedder.weight.detach().view(48, 3, 8, 8)
    state["patch_embed.proj.bias"] = torch.zeros(48)
    state["pos_embed"] = generator.pos_embed.detach()
    state["cls_token"], state["reg_token"] = generator.token.detach()[None, :1], generator.token.detach()[None, 1:]
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.startswith(("norm", "fc_norm"))]
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        tokens, out = theirs.forward_features(images), ours(images)
    torch.testing.assert_close(out.summary, tokens[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.spatial.flatten(2).transpose(1, 2), tokens[:, 3:], rtol=1e-4, atol=1e-5)


def test_position_at_inference_is_the_top_left_of_the_longer_side() -> None:
    table = torch.randn(1, 4, 16, 16)
    assert torch.equal(eval_embedding(table, (16, 16)), table)
    square = eval_embedding(table, (6, 6))
    assert torch.equal(eval_embedding(table, (3, 6)), square[..., :3, :])
    assert torch.equal(eval_embedding(table, (6, 2)), square[..., :2])
    ramp = torch.linspace(0, 1, 16).expand(1, 1, 16, 16)
    halves = eval_embedding(ramp, (8, 8))[0, 0, 0]
    torch.testing.assert_close(halves, (torch.arange(8) * 2 + 0.5) / 15, rtol=1e-5, atol=1e-6)  # means of pairs


def test_training_viewports_are_crops_of_the_table() -> None:
    torch.manual_seed(0)
    ys, xs = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    table = torch.stack([xs, ys])[None]
    windows = train_embedding(table, (8, 8), batch=256, drop=0.0)
    assert windows.shape == (256, 2, 8, 8)
    width = windows[:, 0, 0, -1] - windows[:, 0, 0, 0]
    height = windows[:, 1, -1, 0] - windows[:, 1, 0, 0]
    assert windows.min() >= 0
    assert windows.max() <= 1 + 1e-6
    aspect = (width / height).log()
    inside = (width < 0.999) & (height < 0.999)
    assert aspect[inside].abs().max() <= 2 * torch.log(torch.tensor(4 / 3)) + 1e-4
    assert (width * height).sqrt().min() > 0.3  # sqrt(0.1) is the smallest scale
    assert width.std() > 0.1
    dropped = train_embedding(torch.ones(1, 1, 32, 32), (8, 8), batch=2000, drop=0.1)[:, 0, 0, 0] == 0
    assert 0.06 < dropped.float().mean() < 0.14
    assert torch.equal(train_embedding(table, (32, 32), batch=2), table)


def test_class_token_per_teacher() -> None:
    many = ViT(("a", "b", "c"), width=32, depth=1, heads=2, max_grid=4, registers=1)
    one = ViT(("a", "b", "c"), width=32, depth=1, heads=2, max_grid=4, registers=1, cls_per_teacher=False)
    assert (many.spec.slots, many.spec.summary) == (3, 96)
    assert (one.spec.slots, one.spec.summary) == (1, 32)
    assert many.patch_generator.token.shape == (4, 32)


@pytest.mark.parametrize("model_norm", [False, True])
def test_pooled_patches_of_a_plain_vit_equal_timm(model_norm: bool) -> None:
    torch.manual_seed(0)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=0, global_pool="avg",
    ).eval()  # fmt: skip
    args = {
        "model": "vit_base_patch16_224", "model_kwargs": {"embed_dim": 48, "depth": 2, "num_heads": 4}, "gp": "avg",
        "cls_token_per_teacher": False, "teachers": [{"name": "clip"}], "model_norm": model_norm,
    }  # fmt: skip
    state = {f"base_model.{name}": value for name, value in theirs.state_dict().items()}
    state["input_conditioner.norm_mean"] = torch.zeros(3, 1, 1)
    state["input_conditioner.norm_std"] = torch.ones(3, 1, 1)
    ours = from_checkpoint(Checkpoint(state, args=args, source="pooled"))
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        tokens, out = theirs.forward_features(images), ours(images, resize=False)
    torch.testing.assert_close(out.summary, tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.tokens(), tokens[:, 1:], rtol=1e-4, atol=1e-5)


def test_mean_pooling_with_several_class_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="cls_per_teacher: false"):
        ViT(("a", "b"), width=32, depth=1, heads=2, max_grid=4, pool="avg")
