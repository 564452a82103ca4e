"""Official checkpoints with random weights: all layouts give one model, and errors name the cause."""

import argparse
import hashlib
import json
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import agglo
from agglo.checkpoints.radio import available_heads, from_checkpoint, read
from agglo.checkpoints.trunks import published
from agglo.cli.main import app
from agglo.config import build
from agglo.exports._vit import fitting
from agglo.exports.transformers import _check
from agglo.model.model import Model
from agglo.teachers._published import COPIES_ALIGN, advice, is_repository, is_version
from agglo.teachers.base import spec_of
from agglo.types import AssetError, ConfigError
from agglo.weights.reading import Checkpoint
from agglo.zoo import loading as zoo
from support.checkpoints import ARGS, TEACHERS, WIDTH, official_state


def hugging_face(state: Mapping[str, Tensor], heads: Mapping[str, int]) -> dict[str, Tensor]:
    """The same tensors under the names of the Hugging Face repositories."""
    found = {}
    for key, tensor in state.items():
        if key.startswith("base_model."):
            found[f"radio_model.model.{key.removeprefix('base_model.')}"] = tensor
        elif key.startswith("input_conditioner."):
            found[f"radio_model.{key}"] = tensor
    for name, index in heads.items():
        for theirs, ours in (("_heads", "head_mlp"), ("_feature_projections", "feat_mlp")):
            prefix = f"{theirs}.{index}."
            found |= {
                f"radio_model.adaptors.{name}.{ours}.{k.removeprefix(prefix)}": v
                for k, v in state.items()
                if k.startswith(prefix)
            }
    return found | {"radio_model.summary_idxs": torch.tensor([0, 1])}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return official_state()


@pytest.fixture(scope="module")
def pickle(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "tiny_v4.pth.tar"
    torch.save({"state_dict": state, "args": argparse.Namespace(**ARGS), "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def folder(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "Tiny-v4"
    path.mkdir()
    tensors = hugging_face(state, {"dino_v3": 1, "siglip2-g": 0})
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
    adaptors = {
        "dino_v3": {"head_idx": 1, "summary": {}, "feature": {"upsample_factor": 2}},
        "siglip2-g": {"head_idx": 0, "summary": {}, "feature": {"upsample_factor": 1}},
    }
    config = {"args": ARGS, "version": "tiny", "patch_size": 16, "max_resolution": 1024,
              "preferred_resolution": [96, 96], "adaptor_names": None, "adaptor_configs": adaptors}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


@torch.inference_mode()
def test_both_layouts_give_one_model(pickle: Path, folder: Path) -> None:
    images = torch.rand(2, 3, 64, 96)
    hub = agglo.load(pickle, heads=["dino_v3", "siglip2-g"])
    hf = agglo.load(folder, heads=["dino_v3", "siglip2-g"])
    one, other = hub(images), hf(images)
    assert one.summary.shape == (2, 2 * WIDTH)
    assert one.heads["dino_v3"].spatial.shape == (2, 9, 8, 12)
    assert torch.equal(one.summary, other.summary)
    for name in ("dino_v3", "siglip2-g"):
        assert torch.equal(one.heads[name].summary, other.heads[name].summary)
        assert torch.equal(one.heads[name].spatial, other.heads[name].spatial)
    assert (hf.preferred_size, hf.provenance["max_size"]) == (96, 1024)
    assert hub.student.registers == 7
    assert not hub.training


@torch.inference_mode()
def test_exported_release_is_a_teacher(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    teacher = {"kind": "transformers", "model": str(folder)}
    for refused in (lambda: build("teachers", teacher), lambda: spec_of(teacher)):
        with pytest.raises(
            ConfigError, match=rf"NVIDIA's own layout.*`agglo export {folder} --to transformers -o FOLDER`"
        ):
            refused()
    model = agglo.load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # parts that the layout does not support
        agglo.export(model, "transformers", tmp_path / "native")
    made = build("teachers", {**teacher, "model": str(tmp_path / "native")})
    images = torch.rand(2, 3, 64, 96)
    ours, theirs = model(images), made(images)
    assert made.spec == spec_of({**teacher, "model": str(tmp_path / "native")}) and made.spec.summary == 2 * WIDTH
    torch.testing.assert_close(theirs.summary, ours.summary, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.spatial, ours.spatial, rtol=1e-5, atol=1e-5)
    assert made.fill == pytest.approx((0.45,) * 3) and made.processor["std"] == pytest.approx([0.27] * 3)


def printed(error: pytest.ExceptionInfo[ConfigError], folder: Path) -> list[str]:
    """The arguments of the command in an error, with an output folder."""
    return shlex.split(str(error.value).split("`")[1].replace("FOLDER", str(folder)))[1:]


@pytest.mark.parametrize("name", ["nvidia/C-RADIOv3-H", "nvidia/C-RADIOv3-B@main", "c-radio_v3-h", "nvidia/RADIO"])
def test_advised_command_makes_a_teacher(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C-RADIOv3-B and -H by repository have align_corners, unlike transformers: the command has the version name."""
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match="NVIDIA's own layout") as caught:
        build("teachers", {"kind": "transformers", "model": name})
    monkeypatch.setattr(zoo, "fetch_model", lambda repo, revision: folder)
    done = CliRunner().invoke(app, printed(caught, tmp_path / "native"))
    assert done.exit_code == 0, done.output
    made = build("teachers", {"kind": "transformers", "model": str(tmp_path / "native")})
    images = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(made(images).spatial, agglo.load(folder)(images).spatial, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", ["C-RADIOv3-H", "c-radio_v3-b"])
def test_download_with_aligned_corners_is_converted_without(version: str, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    download = tmp_path / version if version.startswith("C") else tmp_path / "mine"
    download.mkdir()
    (download / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (download / "config.json").write_text(json.dumps(config | {"version": version}))
    with pytest.raises(ConfigError, match="NVIDIA's own layout") as caught:
        build("teachers", {"kind": "transformers", "model": str(download)})
    call = str(caught.value).split("`")[1].replace("FOLDER", str(tmp_path / "native"))
    assert call.startswith("agglo.export(agglo.load(")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # parts that the layout does not support
        eval(call, {"agglo": agglo})
    assert build("teachers", {"kind": "transformers", "model": str(tmp_path / "native")}).spec.summary == 2 * WIDTH


@pytest.mark.parametrize(
    ("args", "config", "why"),
    [
        ({"model": "eradio_large_fullres_ws16"}, {}, "its trunk is not a transformer"),
        ({"model": "radio1d_huge_patch16_224"}, {}, "its tokens are one-dimensional"),
        ({"model": "dino_v2_g_student"}, {}, "a norm after its last block"),
        ({"model_norm": True}, {}, "a norm after its last block"),
        ({"model": "vit_huge_patch16_224_mlpnorm"}, {}, "norms inside its MLPs"),
        ({}, {"feature_normalizer_config": {"embed_dim": 32}}, "its map is normalised"),
    ],
)
def test_unsupported_releases_get_no_export_command(
    args: dict[str, Any], config: dict[str, Any], why: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"args": {**ARGS, **args}, **config}))
    with pytest.raises(ConfigError, match=f"transformers cannot represent it: .*{why}") as caught:
        build("teachers", {"kind": "transformers", "model": str(tmp_path)})
    assert "agglo export" not in str(caught.value)


@pytest.mark.parametrize("entry", zoo.HUB.values(), ids=lambda entry: entry.name)
def test_advice_on_every_release_matches_the_export(entry: zoo.HubModel) -> None:
    largest, (head, *_) = entry.release.max_size, entry.teachers
    options = published(entry.architecture, entry.patch, entry.registers, largest)
    normalizers: dict[Any, Any] = {"features": True} if entry.name.endswith("-norm") else {}
    with torch.device("meta"):
        model = Model(options, {}, tokens=[head], normalizers=normalizers)
    message = advice("teachers.transformers", entry.name)
    try:
        _check(fitting(model, "RadioModel"), model)
    except ConfigError:
        assert "transformers cannot represent it" in message
    else:
        assert f"`agglo export {entry.name} --to transformers -o FOLDER`" in message
    assert (entry.name in COPIES_ALIGN) == entry.copy_aligns
    assert is_version(entry.name) and is_repository(entry.repo)
    if entry.file is None:
        assert f"`agglo export {entry.name} --to" in advice("teachers.transformers", entry.repo)


@pytest.mark.parametrize("name", ["nvidia/RADIO-g", "nvidia/e-radio-x", "e-radio_v2", "nvidia/RADIO1D-H"])
def test_unsupported_releases_are_refused_offline(name: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=f"{name} is a RADIO .*transformers cannot represent it"):
        build("teachers", {"kind": "transformers", "model": name})
    spec_of({"kind": "transformers", "model": "nvidia/C-RADIOv4-H", "weights": "random"})  # published for transformers


def test_repository_in_transformers_layout_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any revision and under any name."""
    pytest.importorskip("transformers")
    teacher = {"kind": "transformers", "model": "nvidia/C-RADIOv4-H@v1"}
    assert spec_of(teacher) == spec_of({**teacher, "model": "nvidia/C-RADIOv4-H"})
    for name in (
        "nvidia/C-RADIOv4-H@v1",
        "hf-hub:nvidia/C-RADIOv4-H@v1",
        "radio/mine",
        "radio/v2-x",
        "nvidia/radiology",
    ):
        with pytest.raises(AssetError, match="HF_HUB_OFFLINE is set"):
            build("teachers", {**teacher, "model": name})
    snapshot = tmp_path / "snapshots" / "abc123"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # parts that the layout does not support
        agglo.export(agglo.load(folder), "transformers", snapshot)

    def download(repo: str, file: str, revision: str | None = None) -> str:
        if not (snapshot / file).is_file():
            raise errors.EntryNotFoundError("no")
        requested.add((repo, revision))
        return str(snapshot / file)

    errors, requested = pytest.importorskip("huggingface_hub.errors"), set()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for name in ("nvidia/C-RADIOv4-H", "nvidia/C-RADIOv5-B"):
        assert build("teachers", {**teacher, "model": f"{name}@v1"}).spec.summary == 2 * WIDTH
        assert {(name, "v1"), (name, "abc123")} <= requested


def test_heads_are_loaded_on_request(pickle: Path) -> None:
    assert list(agglo.load(pickle).heads) == []
    assert list(agglo.load(pickle, heads="sam3").heads) == ["sam3"]
    assert list(agglo.load(pickle, heads="all").heads) == ["siglip2-g", "dino_v3", "sam3"]
    aligned = agglo.load(pickle, heads="text")
    assert list(aligned.heads) == ["siglip2-g"]
    assert aligned.head_configs["siglip2-g"].text == {"kind": "siglip2", "repo": "siglip2-g-384"}
    assert available_heads(read(pickle)) == ["siglip2-g", "dino_v3", "sam3"]
    with pytest.raises(ConfigError, match=r"no head 'dino_v2'.*did you mean 'dino_v3'.*dino_v3, sam3, siglip2-g"):
        agglo.load(pickle, heads=["dino_v2"])


@torch.inference_mode()
def test_saved_model_equals_the_checkpoint(pickle: Path, tmp_path: Path) -> None:
    model = agglo.load(pickle, heads="all")
    again = agglo.load(model.save(tmp_path / "ours"))
    images = torch.rand(1, 3, 48, 80)
    one, other = model(images), again(images)
    assert torch.equal(one.summary, other.summary)
    assert torch.equal(one.heads["dino_v3"].spatial, other.heads["dino_v3"].spatial)
    assert again.student.windowed == model.student.windowed


@torch.inference_mode()
def test_options_at_load(pickle: Path) -> None:
    images = torch.rand(1, 3, 64, 64)
    plain, windowed = agglo.load(pickle), agglo.load(pickle, window=2)
    assert windowed.step() == 32
    assert torch.equal(windowed(images).spatial, plain(images, window=2).spatial)
    assert not torch.allclose(plain(images).spatial, agglo.load(pickle, align_corners=True)(images).spatial, atol=1e-3)
    half = agglo.load(pickle, heads="all", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.conditioner.mean.dtype == torch.float32
    assert torch.cosine_similarity(half(images).summary.float(), plain(images).summary).min() > 0.999
    with pytest.raises(ConfigError, match="neck"):
        agglo.load(pickle, neck="decoder")


@torch.inference_mode()
def test_moving_average_takes_precedence(state: dict[str, Tensor], tmp_path: Path) -> None:
    average = {key: tensor * 0.5 for key, tensor in state.items()}
    content = {"state_dict": state, "state_dict_ema": average, "args": argparse.Namespace(**ARGS)}
    torch.save(content, tmp_path / "ema.pth.tar")
    found = agglo.load(tmp_path / "ema.pth.tar")
    assert torch.equal(found.student.blocks[1].attn.qkv.weight, average["base_model.blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize("version", [1, 2])
def test_spectral_weights_are_materialised(state: dict[str, Tensor], version: int) -> None:
    """By the formula, in float64, with one more power iteration."""
    spectral = dict(state)
    expected = {}
    for module, parts in {"base_model.blocks.0.mlp.fc1": 1, "base_model.blocks.0.attn.qkv": 3}.items():
        weight = spectral.pop(f"{module}.weight")
        spectral[f"{module}.parametrizations.weight.original"] = weight
        chunks = []
        for index, rows in enumerate(weight.chunk(parts)):
            prefix = f"{module}.parametrizations.weight.0." + (f"parts.{index}." if parts > 1 else "")
            u, v, scale = torch.randn(len(rows)), torch.randn(rows.shape[1]), torch.tensor([[0.3 + index]])
            spectral |= {f"{prefix}_u": u, f"{prefix}_v": v, f"{prefix}scale": scale}
            if version == 2:
                spectral[f"{prefix}_sn_version"] = torch.tensor(2)
            exact = rows.double()
            u = exact @ v.double()
            u = u / u.norm()
            v = exact.T @ u
            v = v / v.norm()
            gain = torch.log1p(scale.double().exp()) + 0.05 if version == 2 else scale.double()
            chunks.append(exact * gain / (u @ exact @ v + 1e-6))
        expected[module] = torch.cat(chunks)
    model = from_checkpoint(Checkpoint(spectral, args={**ARGS, "spectral_reparam": True}, source="spectral"))
    for module, weight in expected.items():
        found = model.get_parameter(f"student.{module.removeprefix('base_model.')}.weight")
        torch.testing.assert_close(found.detach(), weight.float(), rtol=1e-5, atol=1e-6)


def test_damp_wrappers_are_the_identity(state: dict[str, Tensor]) -> None:
    wrapped = dict(state)
    key = "base_model.blocks.2.mlp.fc2"
    wrapped[f"{key}.parametrizations.weight.original"] = weight = wrapped.pop(f"{key}.weight")
    model = from_checkpoint(Checkpoint(wrapped, args={**ARGS, "damp": 0.1}, source="damp"))
    assert torch.equal(model.student.blocks[2].mlp.fc2.weight, weight)


def changed(state: dict[str, Tensor], **args: Any) -> Checkpoint:
    return Checkpoint(state, args={**ARGS, **args}, source="changed")


def test_mismatches_are_named(state: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'vit_huge_patch16_224'"):
        from_checkpoint(changed(state, model="vit_hug_patch16_224", model_kwargs={}))
    holes = {k: v for k, v in state.items() if not k.startswith("base_model.blocks.1.norm1")}
    with pytest.raises(AssetError, match=r"missing \(student\.blocks\.1\.norm1"):
        from_checkpoint(changed(holes))
    more = {**state, "base_model.blocks.0.attn.q_norm.weight": torch.ones(8)}
    with pytest.raises(AssetError, match=r"left over \(student\.blocks\.0\.attn\.q_norm\.weight"):
        from_checkpoint(changed(more))
    with pytest.warns(UserWarning, match="1 tensors are not used: student.odd"):
        from_checkpoint(changed({**state, "base_model.odd": torch.ones(1)}))
    with pytest.raises(AssetError, match=r"base_model\.blocks\.0"):
        from_checkpoint(changed({"something.else": torch.ones(1)}))
    with pytest.raises(ConfigError, match="no training arguments"):
        from_checkpoint(Checkpoint(state, source="nameless"))
    with pytest.raises(AssetError, match=r"another size.*patch_generator|blocks"):
        from_checkpoint(changed({**state, "base_model.blocks.3.mlp.fc1.weight": torch.ones(2, 2)}))
    with pytest.raises(ConfigError, match="not an option of a released model"):
        from_checkpoint(changed(state), windw=4)


def test_teacher_listed_twice_is_refused(state: dict[str, Tensor]) -> None:
    twice = [TEACHERS[0], TEACHERS[0], *TEACHERS[1:]]
    with pytest.raises(ConfigError, match="listed twice"):
        from_checkpoint(changed(state, teachers=[*twice, {"name": "late", "type": "generic"}]))


def test_invalid_pixels_are_refused(pickle: Path) -> None:
    model = agglo.load(pickle)
    bad = torch.rand(1, 3, 32, 32)
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model(bad)
    with pytest.raises(ValueError, match="divide by 255"):
        model(torch.rand(1, 3, 32, 32) * 255)
    with torch.inference_mode():
        bytes_ = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
        with pytest.warns(UserWarning, match="divided by 255"):
            converted = model(bytes_).summary
        assert torch.equal(converted, model(bytes_.float() / 255).summary)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(bytes_)  # warns once
        with pytest.warns(UserWarning, match="below one patch are stretched to 16"):
            assert model(torch.rand(1, 3, 5, 9)).spatial.shape[-2:] == (1, 1)
    with pytest.raises(ValueError, match="nearest legal height: 16"):
        model(torch.rand(1, 3, 5, 16), resize=False)


def test_larger_images_run_with_a_warning(folder: Path) -> None:
    model = agglo.load(folder)
    with torch.inference_mode(), pytest.warns(UserWarning, match="images exceed the 1024 pixels"):
        assert model(torch.rand(1, 3, 32, 1040)).spatial.shape[-1] == 65


def test_local_copy_of_a_release_keeps_its_facts(state: dict[str, Tensor], folder: Path, tmp_path: Path) -> None:
    """By the pickle's name, or the version in config.json."""
    giant = tmp_path / "c-radio_v2-g_half.pth.tar"
    torch.save({"state_dict": state, "args": argparse.Namespace(**ARGS)}, giant)
    assert agglo.load(giant).student_config["num_global"] == 8
    assert agglo.load(giant).provenance["license"] == "NVIDIA Open Model License"
    assert agglo.load(tmp_path).student_config["num_global"] == 8  # the only pickle of a folder
    copies = {
        "c-radio_v2-g": (8, False),
        "c-radio_v3-b": (4, True),
        "c-radio_v3-l": (4, False),
        "unheard-of": (4, False),
    }
    for version, expected in copies.items():
        copy = tmp_path / version
        copy.mkdir()
        (copy / "model.safetensors").symlink_to(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"version": version}))
        found = agglo.load(copy).student_config
        assert (found["num_global"], found["align_corners"]) == expected
        assert agglo.load(copy, align_corners=False).student_config["align_corners"] is False


def test_repository_name_identifies_the_release(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By owner/name, and by the name of a download, regardless of the version in config.json."""
    download = tmp_path / "C-RADIOv3-B"
    download.mkdir()
    for file in folder.iterdir():
        (download / file.name).symlink_to(file)
    monkeypatch.setattr(zoo, "fetch_model", lambda repo, revision: folder)
    for name, expected in {
        "nvidia/C-RADIOv3-B": ("NVIDIA Open Model License", 2048, True),
        "nvidia/c-radiov2-g": ("NVIDIA Open Model License", 2048, False),
        "someone/else": ("unknown", 1024, False),
        str(download): ("NVIDIA Open Model License", 2048, True),
        "c-radio_v3-b": ("NVIDIA Open Model License", 2048, False),  # by version name: as torch.hub's code does
    }.items():
        model = agglo.load(name)
        facts = (model.provenance["license"], model.provenance["max_size"], model.student_config["align_corners"])
        assert facts == expected, name
    assert agglo.load("nvidia/C-RADIOv2-g").student_config["num_global"] == 8


@pytest.mark.parametrize("kind", ["transformers", "timm"])
def test_export_warns_about_heads(pickle: Path, kind: str, tmp_path: Path) -> None:
    """Even if none of them is loaded."""
    with pytest.warns(UserWarning, match=r"does not support the heads \(siglip2-g, dino_v3, sam3\); omitted"):
        agglo.export(pickle, kind, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Left out, because" in card
    assert "the heads (siglip2-g, dino_v3, sam3)" in card


def test_non_finite_weights_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    key = "base_model.blocks.1.mlp.fc1.weight"
    broken = state[key].clone()
    broken[0, 3] = float("nan")
    torch.save({"state_dict": {**state, key: broken}, "args": argparse.Namespace(**ARGS)}, tmp_path / "nan.pth.tar")
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.warns(
            UserWarning, match=r"NaN or infinity in 1 of \d+ tensors \(student\.blocks\.1\.mlp\.fc1\.weight"
        ):
            agglo.load(tmp_path / "nan.pth.tar", dtype=dtype)


def test_damaged_args_name_the_source(state: dict[str, Tensor]) -> None:
    tableless = {k: v for k, v in state.items() if not k.endswith("pos_embed")}
    with pytest.raises(AssetError, match=r"changed: .*patch_generator\.pos_embed"):
        from_checkpoint(changed(tableless))
    for teachers in ([{"type": "generic"}], ["siglip2-g"]):
        with pytest.raises(AssetError, match="changed: its args or tensors"):
            from_checkpoint(changed(state, teachers=teachers))
    with pytest.raises(AssetError, match="changed: its args or tensors"):
        from_checkpoint(changed({**state, "base_model.blocks.x.y": torch.ones(1)}))


def test_unsupported_pickle_protocols_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": state, "args": argparse.Namespace(**ARGS)}, tmp_path / "new.pth.tar", pickle_protocol=4)
    with pytest.raises(AssetError, match="a pickle protocol that torch's safe reader does not support"):
        agglo.load(tmp_path / "new.pth.tar")


def test_precision_and_device_are_checked_first(pickle: Path, folder: Path) -> None:
    assert next(agglo.load(pickle, dtype="bfloat16").parameters()).dtype == torch.bfloat16
    for dtype in (torch.int8, "double", "bf17"):
        with pytest.raises(ConfigError, match="dtype: must be auto, float32, bfloat16 or float16"):
            agglo.load(pickle, dtype=dtype)
    for device in ("gpu", "cuda:99", "xpu"):
        with pytest.raises(ConfigError, match="is not available; use cpu"):
            agglo.load(pickle, device=device)
    for window in (-3, 1):
        with pytest.raises(ConfigError, match=r"window: .* is neither 0 \(none\) nor an integer"):
            agglo.load(pickle, window=window)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert agglo.load(folder, sha256=digest.upper())
    with pytest.raises(AssetError, match=r"sha256|corrupt"):
        agglo.load(folder, sha256="0" * 64)


def test_options_of_our_own_models(pickle: Path, tmp_path: Path) -> None:
    ours = agglo.load(pickle, heads="all").save(tmp_path / "ours")
    assert agglo.load(ours, window=2).step() == 32
    assert list(agglo.load(ours, heads="text").heads) == ["siglip2-g"]
    with pytest.raises(ConfigError, match="neck"):
        agglo.load(ours, neck="decoder")
