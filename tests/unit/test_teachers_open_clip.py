"""Teachers from OpenCLIP, and from folders as timm and OpenCLIP save them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agglo.config import build
from agglo.teachers import open_clip as kind
from agglo.teachers.base import spec_of
from agglo.types import AssetError, ConfigError

pytestmark = pytest.mark.libraries

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

TEXT = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TRUNK = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
CONVNET = {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear", "image_size": 96}
COCA = {**VIT, "final_ln_after_pool": True}
TOWERS = {"vit": VIT, "trunk": TRUNK, "convnet": CONVNET, "late_norm": COCA}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def save(name: str, folder: Path) -> Path:
    """A folder in the hub's layout of OpenCLIP models."""
    folder.mkdir(parents=True)
    model = {"embed_dim": 24, "vision_cfg": TOWERS[name], "text_cfg": TEXT}
    torch.manual_seed(3)
    net = open_clip.CLIP(**model)
    with torch.no_grad():
        for parameter in net.visual.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": {"mean": MEAN, "std": STD}})
    )
    save_file(net.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root, done = tmp_path_factory.mktemp("open_clip"), {}

    def folder(name: str) -> Path:
        if name not in done:
            done[name] = save(name, root / name)
        return done[name]

    return folder


def make(model: Path | str, **keys: Any) -> Any:
    return build("teachers", {"kind": "open_clip", "model": str(model), **keys})


def batch(side: int) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def by_hand(name: str, folder: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features from OpenCLIP's own loader and blocks."""
    whole = open_clip.create_model(f"local-dir:{folder}").eval().requires_grad_(False)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (MEAN, STD))
    pixels = (images - mean) / std
    visual = whole.visual
    if "trunk" in name or "convnet" in name:
        features = visual.trunk.forward_features(pixels)
        if features.ndim == 3:
            side, prefix = images.shape[-1] // 16, visual.trunk.num_prefix_tokens
            cells = [features[:, prefix + index] for index in range(side * side)]
            features = torch.stack(cells, -1).unflatten(-1, (side, side))
        return whole.encode_image(pixels), features
    tokens = visual.ln_post(visual.transformer(visual._embeds(pixels)))[:, 1:]
    side = images.shape[-1] // 8
    rows = [torch.stack([tokens[:, side * y + x] for x in range(side)], -1) for y in range(side)]
    return whole.encode_image(pixels), torch.stack(rows, -2)


@torch.no_grad()
def check(teacher: Any, name: str, folder: Path) -> None:
    images = batch(teacher.canvas)
    out = teacher(images)
    summary, spatial = by_hand(name, folder, images)
    assert torch.equal(out.summary, summary)
    assert torch.equal(out.spatial, spatial)


@pytest.mark.parametrize("name", TOWERS)
def test_features_equal_the_models(name: str, stored: Any) -> None:
    teacher = make(stored(name))
    check(teacher, name, stored(name))
    assert spec_of({"kind": "open_clip", "model": str(stored(name))}) == teacher.spec
    assert teacher.fill == tuple(MEAN)
    assert (teacher.patch is None) == (name == "convnet")
    assert teacher.input_size((432, 432), 16) == (teacher.canvas,) * 2
    assert not any("text" in key for key, _ in teacher.named_parameters())


@pytest.mark.parametrize("name", ["vit", "trunk"])
def test_planted_faults_are_detected(name: str, stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored(name)
    for fault in (
        lambda summary, spatial: (summary, spatial.mT),
        lambda summary, spatial: (summary, spatial.flatten(2).roll(1, -1).view_as(spatial)),  # a prefix left in
        lambda summary, spatial: (nn.functional.normalize(summary), spatial),
    ):
        teacher = make(folder)
        monkeypatch.setattr(teacher, "_reader", lambda *a, read=teacher.read, fault=fault: fault(*read(*a)))
        with pytest.raises(AssertionError):
            check(teacher, name, folder)
    teacher = make(folder)
    once = teacher.condition.forward
    monkeypatch.setattr(teacher.condition, "forward", lambda pixels: once(once(pixels)))
    with pytest.raises(AssertionError):
        check(teacher, name, folder)


def test_modes_and_precision(stored: Any) -> None:
    teacher, half = make(stored("vit")), make(stored("vit"), dtype="bfloat16")
    images = batch(32)
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        summary, spatial = teacher.read(teacher.condition(images), True)
    out = half(images)
    assert torch.equal(out.summary, summary.float()) and torch.equal(out.spatial, spatial.float())
    assert all(p.dtype == torch.float32 for m in half.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters())
    dense = make(stored("vit"), summary=False)
    assert dense.spec.summary is None and dense(images).summary is None
    assert torch.equal(dense(images).spatial, teacher(images).spatial)


def test_compile_wraps_the_reader(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch, "compile", lambda fn, *_, **__: lambda *a, **k: calls.append(1) or fn(*a, **k))
    check(make(stored("vit"), compile=True), "vit", stored("vit"))
    assert calls == [1]


def test_an_architecture_with_a_file(stored: Any, tmp_path: Path) -> None:
    file = tmp_path / "agglo-teacher-test.json"
    file.write_text(json.dumps({"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}))
    open_clip.add_model_config(file)
    weights = str(stored("vit") / "open_clip_model.safetensors")
    with pytest.raises(ConfigError, match="mean and std of the file are unknown, because open_clip has no tag of"):
        make(file.stem, pretrained=weights)
    teacher = make(file.stem, pretrained=weights, mean=MEAN, std=STD)
    assert teacher.fill == tuple(MEAN) and teacher.processor["std"] == STD
    assert torch.equal(teacher(batch(32)).spatial, make(stored("vit"))(batch(32)).spatial)
    state = load_file(stored("vit") / "open_clip_model.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "w.pt")
    pickled = make(file.stem, pretrained=str(tmp_path / "w.pt"), mean=MEAN, std=STD)
    assert torch.equal(pickled(batch(32)).spatial, teacher(batch(32)).spatial)
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "evil.pt")
    with pytest.raises(AssetError, match="never read"):
        make(file.stem, pretrained=str(tmp_path / "evil.pt"), mean=MEAN, std=STD)


@pytest.mark.parametrize(
    ("model", "file", "mean", "std"),
    [
        ("MobileCLIP2-S0", "open_clip_model.safetensors", 0.0, 1.0),
        ("ViT-B-16-SigLIP2", "open_clip_model.safetensors", 0.5, 0.5),
        ("ViT-B-32", "mine.safetensors", open_clip.OPENAI_DATASET_MEAN[0], open_clip.OPENAI_DATASET_STD[0]),
        ("ViT-L-14", "vit_l_14-laion400m_e31-69988bb6.pt", open_clip.OPENAI_DATASET_MEAN[0], None),
    ],
)
def test_file_has_the_pixels_of_its_tags(model: str, file: str, mean: float, std: float | None, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"")
    pixels = kind._find(model, str(tmp_path / file), None, random=False).pixels
    assert pixels.mean[0] == mean and std in (None, pixels.std[0])


def test_pixels_that_are_not_known_must_be_given(stored: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"the tags of ViT-L-14 have different ones. Set both.*`mean: \[0.5"):
        make("ViT-L-14", pretrained=str(file))
    folder = tmp_path / "folder"
    shutil.copytree(stored("vit"), folder)
    content = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": content["model_cfg"]}))
    with pytest.raises(ConfigError, match="has no mean and std in `preprocess_cfg`"):
        make(folder)
    assert make(folder, mean=MEAN, std=STD).fill == tuple(MEAN)
    for keys, message in (
        ({"mean": MEAN}, "std: None is not three numbers"),
        ({"mean": [0.5], "std": STD}, "mean: .* is not three numbers"),
        ({"mean": [124, 116, 104], "std": STD}, r"pixels in \[0, 1\]"),
        ({"mean": MEAN, "std": [0, 1, 1]}, "contains 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(folder, **keys)


def test_file_of_a_tag_with_the_other_gelu_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ViT-B-32.pt"  # OpenAI's own name of its file
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"have different GELUs.*model: ViT-B-32-quickgelu"):
        make("ViT-B-32", pretrained=str(file))


def test_nominal_side_not_divisible_by_the_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOWERS, "odd", {**VIT, "image_size": 36})
    teacher = make(save("odd", tmp_path / "odd"))
    assert (teacher.canvas, teacher.unseen) == (32, 4)
    full = batch(36)
    _, spatial = by_hand("odd", tmp_path / "odd", full)
    torch.testing.assert_close(teacher(full[..., :32, :32]).spatial, spatial, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "ViT-H-14-379-quickgelu"}, "did you mean 'ViT-H-14-378-quickgelu'"),
        ({"pretrained": "dfn5c"}, "did you mean 'dfn5b'"),
        ({"model": "ViT-H-14-378", "pretrained": "dfn5b"}, "model: ViT-H-14-378-quickgelu"),
        ({"model": "apple/DFN5B-CLIP-ViT-H-14-378"}, "model: hf-hub:apple/DFN5B-CLIP-ViT-H-14-378"),
    ],
)
def test_refuses_names(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("teachers", {"kind": "open_clip", **keys})


def test_refuses_folders(stored: Any, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(stored("vit"), folder)
    save_file({"visual.proj": torch.zeros(3, 3)}, folder / "open_clip_model.safetensors")
    with pytest.raises(AssetError, match="of another size"):
        make(folder)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(AssetError, match=r"holds no weights. Put open_clip_model\.safetensors"):
        make(folder)
    make(folder, weights="random")  # its architecture is enough for that
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(AssetError, match="lacks embed_dim or vision_cfg"):
        make(folder)
    with pytest.raises(ConfigError, match="32x32 only"):
        make(stored("vit"))(batch(64))
    with pytest.raises(AssetError, match="HF_HUB_OFFLINE is set"):
        make("hf-hub:apple/DFN5B-CLIP-ViT-H-14-378")


def test_text_uses_the_named_tower(stored: Any) -> None:
    options = {"kind": "open_clip", "model": str(stored("vit"))}
    teacher = make(stored("vit"), text=options)
    assert torch.equal(teacher.encode_text(["a dog"]), build("text", options).encode(["a dog"]))
    with pytest.raises(TypeError, match="text-aligned"):
        make(stored("vit")).encode_text(["a dog"])
    assert kind.OpenCLIPTeacher.spec_of(model=str(stored("vit")), summary=False).summary is None


# --- timm's folders ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer with registers in timm's hub layout."""
    folder = tmp_path_factory.mktemp("timm") / "vit"
    net = timm.create_model("test_vit", num_classes=7, reg_tokens=4, class_token=True)
    config = {"mean": MEAN, "std": STD, "input_size": [3, 96, 96], "license": "Apache-2.0"}
    net.pretrained_cfg.update(config)
    timm.models.save_for_hf(net, folder, model_config=config, model_args={"reg_tokens": 4}, safe_serialization=True)
    return folder


@torch.no_grad()
def check_timm(teacher: Any, folder: Path, norm: bool) -> None:
    """The teacher equals timm's own blocks bit for bit."""
    reference = timm.create_model(f"local-dir:{folder}", pretrained=True, dynamic_img_size=True)
    reference.eval().requires_grad_(False)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (MEAN, STD))
    images = torch.rand(2, 3, 64, 96)
    hidden = reference.patch_embed((images - mean) / std)
    hidden = reference.norm_pre(reference.patch_drop(reference._pos_embed(hidden)))
    for block in reference.blocks:
        hidden = block(hidden)
    final = reference.norm(hidden)
    tokens = (final if norm else hidden)[:, 5:]  # a class token and four registers
    out = teacher(images)
    assert out.spatial.shape[-2:] == (4, 6)
    for y in range(4):
        for x in range(6):
            assert torch.equal(out.spatial[:, :, y, x], tokens[:, 6 * y + x])
    assert torch.equal(out.summary, reference.forward_head(final, pre_logits=True))


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
@pytest.mark.parametrize("norm", [False, True])
def test_timm_folder(prefix: str, norm: bool, timm_folder: Path) -> None:
    options = {"kind": "timm", "model": f"{prefix}{timm_folder}", "norm": norm}
    teacher = build("teachers", options)
    check_timm(teacher, timm_folder, norm)
    assert (teacher.stage, teacher.patch, teacher.native, teacher.licence) == (5, 16, 96, "Apache-2.0")
    assert teacher.fill == tuple(MEAN)
    assert spec_of(options) == teacher.spec


@pytest.mark.parametrize("fault", ["a prefix left in", "transposed", "normalised twice"])
def test_planted_faults_of_timm_are_detected(fault: str, timm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = build("teachers", {"kind": "timm", "model": str(timm_folder)})
    net, condition = teacher.backbone.net, teacher.backbone.condition
    read = net.forward_intermediates

    def wrong(*arguments: Any, **keys: Any) -> Any:
        final, (spatial,) = read(*arguments, **keys)
        if fault == "transposed":
            return final, [spatial.flatten(2).unflatten(2, (6, 4)).mT]
        return final, [spatial.flatten(2).roll(1, -1).view_as(spatial)]

    if fault == "normalised twice":
        monkeypatch.setattr(teacher.backbone, "condition", lambda images: condition(condition(images)))
    else:
        monkeypatch.setattr(net, "forward_intermediates", wrong)
    with pytest.raises(AssertionError):
        check_timm(teacher, timm_folder, norm=False)


def test_timm_folder_refusals(timm_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(timm_folder, folder)
    for file in folder.glob("*.bin"):
        file.unlink()
    options = {"kind": "timm", "model": str(folder)}
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(AssetError, match="cannot be loaded"):
        build("teachers", options)
    (folder / "model.safetensors").unlink()
    with pytest.raises(AssetError, match="holds no weights"):
        build("teachers", options)
    build("teachers", {**options, "weights": "random"})
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(ConfigError, match="kind: transformers"):
        build("teachers", options)
    with pytest.raises(AssetError, match="HF_HUB_OFFLINE is set"):
        build("teachers", {"kind": "timm", "model": "hf_hub:someone/something"})
    with pytest.raises(ConfigError, match="hf_hub:OWNER/NAME"):
        build("teachers", {"kind": "timm", "model": "someone/something", "weights": "random"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "LocalEntryNotFoundError",
            "timm/vit_tiny.*HF_HUB_OFFLINE is set and model.safetensors .*`model: FOLDER`",
        ),
        ("GatedRepoError", "timm/vit_tiny.*: the repository is gated: accept its licence on http.*HF_TOKEN"),
        ("TimeoutError", r"cannot be downloaded \(TimeoutError: late\)"),
    ],
)
def test_timm_download_errors(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    kind = getattr(errors, name, TimeoutError)

    def refuse(*_: Any, **__: Any) -> None:
        raise kind.__new__(kind, "late") if name == "GatedRepoError" else kind("late")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", refuse)
    with pytest.raises(AssetError, match=message):
        build("teachers", {"kind": "timm", "model": "vit_tiny_patch16_224", "weights": "hub"})


def test_timm_download_error_names_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    known = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    monkeypatch.setattr(known, "hf_hub_id", None)
    monkeypatch.setattr(known, "url", "https://nowhere.invalid/w.pth")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda model: known)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(
        AssetError, match=r"cannot be downloaded from \S*nowhere\.invalid/w\.pth \(no route\).*`weights: FILE`"
    ):
        build("teachers", {"kind": "timm", "model": "vit_tiny_patch16_224", "weights": "hub"})


def test_misspelt_timm_model_suggests_names() -> None:
    with pytest.raises(ConfigError, match="did you mean 'vit_base_patch16_224'") as caught:
        build("teachers", {"kind": "timm", "model": "vit_bse_patch16_224"})
    assert len(str(caught.value)) < 400  # and not every name that timm knows


def test_timm_precision_and_compile(timm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, images = {"kind": "timm", "model": str(timm_folder)}, torch.rand(2, 3, 64, 96)
    whole, half = build("teachers", options), build("teachers", {**options, "dtype": "bfloat16"})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        summary, spatial = whole._encode(images, True)
    out = half(images)
    assert torch.equal(out.summary, summary.float()) and torch.equal(out.spatial, spatial.float())
    assert out.spatial.dtype == torch.float32 and not torch.equal(out.spatial, whole(images).spatial)
    assert all(p.dtype == torch.float32 for m in half.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters())
    calls = []
    monkeypatch.setattr(torch, "compile", lambda fn, *_, **__: lambda *a, **k: calls.append(1) or fn(*a, **k))
    fused = build("teachers", {**options, "compile": True})
    assert torch.equal(fused(images).spatial, whole(images).spatial) and calls == [1]
