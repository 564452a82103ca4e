"""Inference of a model: lists, clips, windows, intermediates, a detached conditioner, precision."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import agglo
from agglo.model.model import HeadConfig, Model
from agglo.preprocess import Conditioner
from agglo.types import ConfigError, ImageError

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
def test_list_equals_single_calls(model: Model, tmp_path: Path) -> None:
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
@pytest.mark.parametrize("at", ["call", "load"])
def test_tensors_of_whole_patches_are_not_resized_to_windows(model: Model, at: str, tmp_path: Path) -> None:
    """A tensor of whole patches: the window divides them, or those that do are named, with resizing and without."""
    images = torch.rand(2, 3, 64, 96)  # 8x12 patches

    def run(window: int, images: torch.Tensor, **options: bool) -> torch.Tensor:
        if at == "call":
            return model(images, window=window, **options).spatial
        return agglo.load(model.save(tmp_path / "saved"), window=window)(images, **options).spatial

    assert run(4, images).shape[-2:] == (8, 12)
    for window in (3, 5, 32):
        for tensor in (images, images[0], images[None]):
            with pytest.raises(ConfigError, match=f"window {window} does not divide the 8x12 patches.*do: 2, 4; or"):
                run(window, tensor)
        with pytest.raises(ConfigError, match="does not divide the 8x12 patches"):
            run(window, images, resize=False)
    with pytest.raises(ConfigError, match="no window of 2 patches or more does"):
        run(2, torch.rand(1, 3, 40, 56))
    with pytest.raises(ConfigError, match="does not divide the 8x12 patches"):
        model.intermediates(images, 1, window=5)


@torch.no_grad()
@pytest.mark.parametrize("at", ["call", "load"])
def test_other_images_are_resized_to_whole_windows(model: Model, at: str) -> None:
    photo = np.zeros((40, 56, 3), np.uint8)  # 5x7 patches, if patches were all that mattered

    def size(window: int, images: object) -> tuple[int, ...]:
        if at == "load":
            model.student.window = window
        out = model(images, window=window if at == "call" else None)
        return tuple((out[0] if isinstance(out, list) else out).spatial.shape[-2:])

    assert size(0, photo) == (5, 7)
    assert size(2, photo) == (4, 8)  # 2.5 windows: ties to even, as the reference rounds
    assert size(3, photo) == (6, 6)
    assert size(2, torch.rand(1, 3, 41, 56)) == (6, 8)
    assert size(2, [torch.rand(1, 3, 40, 56)]) == (4, 8)
    assert size(2, [photo, torch.rand(3, 40, 56)]) == (4, 8)
    assert size(10, photo) == (10, 10)  # both sides are half a window at least
    for image in (photo, [photo], [torch.rand(3, 40, 56)], torch.rand(1, 3, 41, 56)):
        with pytest.raises(ConfigError, match=r"do not fill half a window of 32 patches, 256 .*fit: 2, 3, 4, .*10; or"):
            size(32, image)
    with pytest.raises(ConfigError, match=r"^images\[1\]: images of 40x56 pixels \(HxW\) do not fill half"):
        size(32, [np.zeros((160, 160, 3), np.uint8), photo])  # the small photograph of the list is named
    with pytest.raises(ConfigError, match="no window does; or pass window=0"):
        size(6, np.zeros((7, 56, 3), np.uint8))  # refused, without a warning that it is stretched


def test_windows_are_refused_for_students_without_windows() -> None:
    model = Model({"kind": "hybrid"}, {}).eval()
    with pytest.raises(TypeError, match="window=2: a hybrid student has no windowed attention"):
        model(torch.rand(1, 3, 64, 64), window=2)
    with pytest.raises(TypeError, match="hybrid student is not a stack of blocks"):
        model.intermediates(torch.rand(1, 3, 64, 64), 1)


@torch.no_grad()
def test_clips_keep_their_shape(model: Model) -> None:
    clips = torch.rand(2, 3, 3, 32, 32)
    out = model(clips)
    assert out.summary.shape == (2, 3, 64)
    assert out.spatial.shape == (2, 3, 32, 4, 4)
    assert out.heads["a"].summary.shape == (2, 3, 10)
    torch.testing.assert_close(out.summary[1, 2], model(clips[1, 2]).summary[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tokens_of_clips_are_row_major_positions(model: Model) -> None:
    clips = torch.rand(2, 3, 3, 32, 48)
    out, alone = model(clips), model(clips[1, 2]).tokens()
    assert out.tokens().shape == (2, 3, 24, 32)
    assert torch.equal(out.tokens()[1, 2, 6 * 2 + 5], out.spatial[1, 2, :, 2, 5])
    torch.testing.assert_close(out.tokens()[1, 2], alone[0], rtol=1e-4, atol=1e-5)
    assert out.heads["b"].tokens().shape == (2, 3, 4 * 24, 9)


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
    for wrong in ([4], [-5], 0, 5, [], None, [None], "last", 1.5):
        with pytest.raises(ConfigError, match="4 blocks, 0 to 3"):
            model.intermediates(images, wrong)  # type: ignore[arg-type]
    for several, instead in (([images[0]], "for each of its images"), (images[None], r"clips\.flatten\(0, 1\)")):
        with pytest.raises(ImageError, match=instead):
            model.intermediates(several, 1)  # type: ignore[arg-type]


@torch.no_grad()
def test_blocks_after_the_last_chosen_one_are_not_run(model: Model) -> None:
    model.student.blocks[2] = torch.nn.Identity()  # would fail: it takes one argument only
    assert len(model.intermediates(torch.rand(1, 3, 16, 16), [1])) == 1
    with pytest.raises(TypeError):
        model.intermediates(torch.rand(1, 3, 16, 16), [2])


@torch.no_grad()
def test_the_conditioner_can_be_detached_and_restored(model: Model) -> None:
    images = torch.rand(1, 3, 32, 32)
    before = model(images).summary
    conditioner = model.take_conditioner()
    assert isinstance(conditioner, Conditioner)
    torch.testing.assert_close(model(conditioner(images)).summary, before)
    with pytest.raises(TypeError, match="conditioner was taken"):
        model(np.zeros((32, 32, 3), np.uint8))
    for bad in (float("nan"), float("inf"), -float("inf")):
        wrong = conditioner(images)
        wrong[0, 1, 2, 3] = bad
        with pytest.raises(ImageError, match="NaN or infinity"):
            model(wrong)
    with pytest.raises(ImageError, match=r"images: has no pixels \(shape \(0, 3, 32, 32\)\)"):
        model(images[:0])
    with pytest.raises(ConfigError, match="taken before: keep the one that the first call returned"):
        model.take_conditioner()
    model.conditioner = conditioner
    assert model.take_conditioner() is conditioner


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


def test_a_list_holds_single_images() -> None:
    """Whatever the student: a batch in a list would give other images' features."""
    for student in (STUDENT, {"kind": "hybrid"}, {"kind": "vit_1d"}):
        made = Model(student, {}).eval()
        with pytest.raises(ValueError, match=r"images\[1\]: is a batch of 2"):
            made([torch.rand(1, 3, 64, 64), torch.rand(2, 3, 64, 64)])


def test_invalid_images_of_a_list_are_named(model: Model, tmp_path: Path) -> None:
    good, small = np.zeros((64, 64, 3), np.uint8), tmp_path / "small.png"
    Image.fromarray(good[:20, :20]).save(small)
    with pytest.raises(ConfigError, match=rf"^{small}: images of 20x20 pixels \(HxW\) do not fill half a window of 8"):
        model([good, small], window=8)
    with pytest.raises(ConfigError, match=r"^images\[1\]: .*height 20 and width 20 must be a multiple of 8"):
        model([good, torch.rand(3, 20, 20)], resize=False)
    with pytest.raises(ImageError, match=r"^images\[1\]: contains NaN"):
        model([good, torch.full((3, 64, 64), float("nan"))])
    with pytest.raises(ImageError, match=rf"^{tmp_path / 'none.png'}: no such file"):
        model([good, str(tmp_path / "none.png")])


@torch.no_grad()
def test_settings_are_saved_with_a_model(model: Model, tmp_path: Path) -> None:
    images = torch.rand(1, 3, 64, 64)
    model.student.window = 2
    again = Model.load(model.save(tmp_path / "windowed"))
    assert torch.equal(again(images).spatial, model(images).spatial)
    one = Model({"kind": "vit_1d"}, {}).eval()
    one.student.num_tokens = 3
    assert torch.equal(Model.load(one.save(tmp_path / "short"))(images).spatial, one(images).spatial)
    hybrid = Model({"kind": "hybrid"}, {}).eval()
    hybrid.student.change_window(2)
    with pytest.raises(ValueError, match=r"save before student\.change_window"):
        hybrid.save(tmp_path / "hybrid")
    model.take_conditioner()
    with pytest.raises(ValueError, match="conditioner was taken"):
        model.save(tmp_path / "bare")
    assert not (tmp_path / "bare").exists()


def test_misspelt_options_are_named(model: Model) -> None:
    images = torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match="alpha: 'zzz' is not one of post-alpha, pre-alpha, none"):
        model.intermediates(images, 1, alpha="zzz")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="aggregation: 'dens'"):
        model.intermediates(images, 1, aggregation="dens")  # type: ignore[arg-type]
    assert len(model.intermediates(images, np.int64(2))) == 2  # type: ignore[arg-type]
    for window in (-1, 1, 2.0, True):
        with pytest.raises(ValueError, match=r"window: .* is neither 0 \(none\) nor an integer"):
            model(images, window=window)  # type: ignore[arg-type]


@torch.no_grad()
def test_compiled_model_calls_its_blocks_in_every_mode(model: Model, tmp_path: Path) -> None:
    """Compilation is switched off inside, so that what is tested is the wiring: every path calls the blocks."""
    folder = model.save(tmp_path / "model")
    with torch.compiler.set_stance("force_eager"):
        compiled = agglo.load(folder, compile=True)
        images = torch.rand(1, 3, 32, 48)
        assert all(block._compiled_call_impl is not None for block in compiled.student.blocks)
        assert torch.equal(compiled(images).spatial, model(images).spatial)
        assert torch.equal(compiled([images])[0].spatial, compiled(images).spatial)
