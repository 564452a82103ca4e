"""What a model takes and gives: lists, clips, windows, intermediates, a conditioner outside, precision."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from agglo.model import HeadConfig, Model
from agglo.preprocess import Conditioner

STUDENT = {"kind": "vit", "width": 32, "depth": 4, "heads": 2, "patch": 8, "max_grid": 8, "registers": 1,
           "num_global": 2, "layer_scale": 1.0}  # fmt: skip
HEADS = {
    "a": HeadConfig({"kind": "mlp", "hidden": 16}, {"kind": "mlp", "hidden": 16}, 10, 6, slot=0),
    "b": HeadConfig(None, {"kind": "mlp", "hidden": 16, "upsample": 2}, None, 9, slot=1),
    "c": HeadConfig({"kind": "mlp", "hidden": 16}, None, 7, None, slot=2),
}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(STUDENT, HEADS, preferred_size=64).eval()


@torch.no_grad()
def test_a_list_of_anything_is_what_each_would_be_alone(model: Model, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    images = [torch.rand(3, 32, 48), photo, Image.fromarray(photo), tmp_path / "photo.png", torch.rand(1, 3, 64, 16)]
    found = model(images)
    assert [tuple(out.spatial.shape[-2:]) for out in found] == [(4, 6), (5, 7), (5, 7), (5, 7), (8, 2)]
    for image, out in zip(images, found, strict=True):
        alone = model(image)
        torch.testing.assert_close(out.summary, alone.summary, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.heads["b"].spatial, alone.heads["b"].spatial, rtol=1e-4, atol=1e-5)
        assert out.heads["b"].spatial.shape[-1] == 2 * out.spatial.shape[-1]
    assert model([]) == []


@torch.no_grad()
def test_sides_are_snapped_to_whole_windows(model: Model) -> None:
    images = torch.rand(1, 3, 40, 56)
    assert model(images).spatial.shape[-2:] == (5, 7)
    assert model(images, window=2).spatial.shape[-2:] == (4, 8)  # 2.5 windows: ties to even, as the reference rounds
    assert model(images, window=3).spatial.shape[-2:] == (6, 6)
    with pytest.raises(ValueError, match="does not divide the 5x7 patches"):
        model(images, window=2, resize=False)
    assert [out.spatial.shape[-1] for out in model([images], window=2)] == [8]


def test_windows_are_refused_where_there_are_none() -> None:
    model = Model({"kind": "hybrid"}, {}).eval()
    with pytest.raises(TypeError, match="hybrid student cannot look through windows"):
        model(torch.rand(1, 3, 64, 64), window=2)
    with pytest.raises(TypeError, match="no stack of blocks"):
        model.intermediates(torch.rand(1, 3, 64, 64), 1)


@torch.no_grad()
def test_clips_keep_their_shape(model: Model) -> None:
    clips = torch.rand(2, 3, 3, 32, 32)
    out = model(clips)
    assert out.summary.shape == (2, 3, 64)
    assert out.spatial.shape == (2, 3, 32, 4, 4)
    assert out.heads["a"].summary.shape == (2, 3, 10)
    torch.testing.assert_close(out.summary[1, 2], model(clips[1, 2]).summary[0], rtol=1e-4, atol=1e-5)


def test_frames_of_a_clip_share_their_viewport_in_training(model: Model) -> None:
    model.train()
    still = torch.rand(2, 1, 3, 32, 32).expand(-1, 3, -1, -1, -1)
    out = model(still)
    torch.testing.assert_close(out.spatial[:, 0], out.spatial[:, 2])  # same frame, same viewport
    loose = model(still.flatten(0, 1))
    assert not torch.allclose(loose.spatial[0], loose.spatial[2])
    assert model.student.patch_generator.clip_length == 1


@torch.no_grad()
def test_intermediates_are_the_blocks_outputs(model: Model) -> None:
    images = torch.rand(2, 3, 32, 48)
    first, last = model.intermediates(images, [0, -1])
    final = model(images)
    torch.testing.assert_close(last.spatial, final.spatial)
    torch.testing.assert_close(last.summary, final.summary)
    assert first.spatial.shape == final.spatial.shape
    each = model.intermediates(images, 4)
    averaged = model.intermediates(images, [1, 3], aggregation="dense")
    torch.testing.assert_close(averaged[0].spatial, (each[0].spatial + each[1].spatial) / 2)
    torch.testing.assert_close(averaged[1].summary, (each[2].summary + each[3].summary) / 2)
    assert len(model.intermediates(images, [3, 3, -1])) == 1
    for wrong in ([4], [-5], 0, 5, []):
        with pytest.raises(ValueError, match="4 blocks, 0 to 3"):
            model.intermediates(images, wrong)


@torch.no_grad()
def test_blocks_after_the_last_wanted_are_not_run(model: Model) -> None:
    model.student.blocks[2] = torch.nn.Identity()  # would fail: it takes one argument only
    assert len(model.intermediates(torch.rand(1, 3, 16, 16), [1])) == 1
    with pytest.raises(TypeError):
        model.intermediates(torch.rand(1, 3, 16, 16), [2])


@torch.no_grad()
def test_the_conditioner_can_live_in_the_loader(model: Model) -> None:
    images = torch.rand(1, 3, 32, 32)
    before = model(images).summary
    conditioner = model.take_conditioner()
    assert isinstance(conditioner, Conditioner)
    torch.testing.assert_close(model(conditioner(images)).summary, before)
    with pytest.raises(TypeError, match="conditioner was taken"):
        model(np.zeros((32, 32, 3), np.uint8))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees(model: Model, dtype: torch.dtype) -> None:
    images = torch.rand(2, 3, 64, 64)
    full = model(images)
    half = model.to(dtype)(images)
    assert half.summary.dtype == dtype
    assert half.heads["a"].summary.dtype == torch.float32
    for one, other in ((full, half), (full.heads["a"], half.heads["a"])):
        for ours, theirs in ((one.summary, other.summary), (one.tokens(), other.tokens())):
            assert torch.cosine_similarity(ours, theirs.float(), dim=-1).min() >= 0.999


def test_the_conditioner_keeps_full_precision(model: Model) -> None:
    exact = model.conditioner.mean.clone()
    assert torch.equal(model.to(torch.bfloat16).conditioner.mean, exact)


@torch.no_grad()
def test_heads_are_chosen_and_dropped(model: Model, tmp_path: Path) -> None:
    images = torch.rand(1, 3, 32, 32)
    whole = model(images)
    assert list(model(images, heads=["c"]).heads) == ["c"]
    with pytest.raises(KeyError, match=r"did you mean 'a'|this model has: a, b, c"):
        model(images, heads=["aa"])
    folder = model.save(tmp_path / "whole")
    small = Model.load(folder, heads=["c"])
    assert list(small(images).heads) == ["c"]
    torch.testing.assert_close(small(images).summary, whole.summary)
    assert Model.load(small.save(tmp_path / "small")).summary_slots == model.summary_slots == [0, 2]
