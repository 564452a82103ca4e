"""Foreign checkpoints: read lazily without running code; errors name the cause."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from agglo.hub import fetch
from agglo.types import AssetError
from agglo.weights.reading import assign, read_folder, read_hub, read_safetensors, verify_sha256
from agglo.weights.tensors import Joined, Mapped, Renamed

STATE = {"base_model.a": torch.arange(12.0).reshape(3, 4), "base_model.b": torch.ones(5, dtype=torch.float16)}
ZIP = pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])


class Foreign:
    """An object of a hostile or careless checkpoint."""

    def __reduce__(self):
        return (print, ("code of the file ran",))


class Other:
    pass


def save_hub(path, content, archive=True):
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    return path


def same(tensors, expected):
    assert set(tensors) == set(expected)
    for key, tensor in expected.items():
        assert tensors[key].dtype == tensor.dtype
        torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=0)


# --- hub pickles ------------------------------------------------------------------------------------------------------


@ZIP
def test_hub_pickle_has_tensors_and_plain_args(tmp_path, archive):
    args = argparse.Namespace(
        model="vit_base_patch16_224",
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        cpe_max_size=np.int64(2048),
        lr=np.float64(0.5),
        amp=np.bool_(True),
        output=Path("runs/x"),
        teachers=[argparse.Namespace(name="clip", size=(224, 224)), OrderedDict(name="sam", use_summary=False)],
        tags={"b", "a"},
        resume=None,
    )
    file = save_hub(
        tmp_path / "x.pth.tar", {"state_dict": STATE, "args": args, "arch": args.model, "epoch": 3}, archive
    )
    checkpoint = read_hub(file)
    same(checkpoint.tensors, STATE)
    assert checkpoint.args == {
        "model": "vit_base_patch16_224",
        "dtype": "bfloat16",
        "device": "cpu",
        "cpe_max_size": 2048,
        "lr": 0.5,
        "amp": True,
        "output": "runs/x",
        "teachers": [{"name": "clip", "size": [224, 224]}, {"name": "sam", "use_summary": False}],
        "tags": ["a", "b"],
        "resume": None,
    }
    assert [type(checkpoint.args[key]) for key in ("cpe_max_size", "lr", "amp")] == [int, float, bool]
    assert json.loads(json.dumps(checkpoint.args)) == checkpoint.args
    assert (checkpoint.config, checkpoint.source, checkpoint.ema) == ({}, str(file), False)


def test_moving_average_takes_precedence(tmp_path):
    average = {key: tensor * 2 for key, tensor in STATE.items()}
    file = save_hub(tmp_path / "x.pth.tar", {"state_dict": STATE, "state_dict_ema": average, "args": {"dtype": None}})
    checkpoint = read_hub(file)
    same(checkpoint.tensors, average)
    assert checkpoint.ema
    without = save_hub(tmp_path / "y.pth.tar", {"state_dict": STATE, "state_dict_ema": None})
    assert not read_hub(without).ema


def test_bare_state_dict_and_extras_beside_tensors(tmp_path):
    same(read_hub(save_hub(tmp_path / "x.pth.tar", STATE)).tensors, STATE)
    same(read_hub(save_hub(tmp_path / "y.pth.tar", {"state_dict": {**STATE, "version": 2}})).tensors, STATE)


@ZIP
def test_foreign_objects_are_named_and_not_run(tmp_path, capfd, archive):
    content = {"state_dict": STATE, "args": argparse.Namespace(callback=Foreign())}
    file = save_hub(tmp_path / "evil.pth.tar", content, archive)
    with pytest.raises(AssetError, match=r"(?s)evil\.pth\.tar.*print.*safetensors release.*sandbox"):
        read_hub(file)
    assert "code of the file ran" not in capfd.readouterr().out


def test_foreign_objects_are_all_named_and_the_conversion_works(tmp_path, monkeypatch):
    args = argparse.Namespace(a=Other(), b=np.zeros(2), dtype=torch.float16, teachers=[argparse.Namespace(name="clip")])
    save_hub(tmp_path / "x.pth.tar", {"state_dict": STATE, "args": args, "optimizer": Other()})
    with pytest.raises(AssetError) as caught:
        read_hub(tmp_path / "x.pth.tar")
    message = str(caught.value)
    assert all(name in message for name in (f"{__name__}.Other", "multiarray._reconstruct", "numpy.ndarray"))
    assert "argparse.Namespace" not in message
    # The code in the message writes a file that can be read.
    monkeypatch.chdir(tmp_path)
    code = "\n".join(line[4:] for line in message.splitlines() if line.startswith("    "))
    exec(code, {})
    converted = read_hub("converted.pth.tar")
    same(converted.tensors, STATE)
    assert converted.args["dtype"] == "float16"
    assert converted.args["teachers"] == [{"name": "clip"}]


def test_numpy_scalars_other_than_numbers(tmp_path):
    named = save_hub(tmp_path / "x.pth.tar", {"state_dict": STATE, "args": {"a": np.str_("né")}})
    assert read_hub(named).args == {"a": "né"}
    with pytest.raises(AssetError, match=r"holds more than weights \(numpy\.dtype\.M8\)"):
        read_hub(save_hub(tmp_path / "x.pth.tar", {"state_dict": STATE, "args": {"a": np.datetime64("2026")}}))


def test_torchscript_is_refused(tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "x.pth.tar"))
    with pytest.raises(AssetError, match="TorchScript"):
        read_hub(tmp_path / "x.pth.tar")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([1, 2], "holds a list"),
        ({"model": STATE, "epoch": 1}, "it holds model, epoch"),
        ({"state_dict": STATE, "args": 3}, "its args are int"),
    ],
)
def test_other_layouts_are_refused(tmp_path, content, complaint):
    with pytest.raises(AssetError, match=complaint):
        read_hub(save_hub(tmp_path / "x.pth.tar", content))


def test_recursive_args_are_refused(tmp_path):
    args = argparse.Namespace()
    args.me = args
    with pytest.raises(AssetError, match="recursive args"):
        read_hub(save_hub(tmp_path / "x.pth.tar", {"state_dict": STATE, "args": args}))


@ZIP
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_truncated_pickles_are_refused(tmp_path, archive, share):
    state = {f"x{i}": torch.zeros(100) for i in range(10)}
    data = save_hub(tmp_path / "x.pth.tar", {"state_dict": state}, archive).read_bytes()
    (tmp_path / "x.pth.tar").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(AssetError, match=r"x\.pth\.tar is damaged or truncated.*download it again") as caught:
        read_hub(tmp_path / "x.pth.tar")
    assert "weights_only" not in str(caught.value)  # torch would have the user trust the file


def test_reading_restores_the_global_allow_list(tmp_path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = torch.serialization.get_safe_globals()
        read_hub(save_hub(tmp_path / "x.pth.tar", {"state_dict": STATE, "args": argparse.Namespace(a=1)}))
        with pytest.raises(AssetError):
            read_hub(save_hub(tmp_path / "y.pth.tar", {"state_dict": STATE, "args": Other()}))
        assert set(torch.serialization.get_safe_globals()) == set(before)


# --- safetensors and folders ------------------------------------------------------------------------------------------


def test_tensors_are_views_of_the_file(tmp_path):
    save_file(STATE, tmp_path / "m.safetensors")
    tensors = read_safetensors(tmp_path / "m.safetensors").tensors
    same(tensors, STATE)
    tensors["base_model.a"].zero_()  # private: only this process sees it
    same(load_file(tmp_path / "m.safetensors"), STATE)
    with pytest.raises(KeyError):
        tensors["c"]


def test_iterating_over_names_opens_no_file():
    def never():
        raise AssertionError("opened")

    tensors = Mapped(["a", "b"], never)
    assert list(tensors) == ["a", "b"] and len(tensors) == 2 and "a" in tensors and "c" not in tensors
    renamed = Renamed(tensors, {"a": "x"})
    assert list(renamed) == ["x", "b"] and "x" in renamed and "a" not in renamed
    joined = Joined({"a": tensors, "b": tensors})
    assert list(joined) == ["a", "b"] and "b" in joined and len(joined) == 2
    with pytest.raises(AssertionError, match="opened"):
        renamed["x"]


WRONG = {
    "web page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>" * 9, "is a web page"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
        "is a git-lfs pointer.*git lfs pull",
    ),
    "text": (b"Repository not found, or you have no access to it \xc3\xa9", "is text.*begins with 'Repository not"),
    "empty": (b"", "is empty"),
    "noise": (bytes(range(256)) * 8, "is damaged or truncated"),
}


@pytest.mark.parametrize("read", [read_safetensors, read_hub])
@pytest.mark.parametrize(("content", "complaint"), WRONG.values(), ids=WRONG)
def test_other_file_formats_are_named(tmp_path, read, content, complaint):
    file = tmp_path / ("model.safetensors" if read is read_safetensors else "model.pth.tar")
    file.write_bytes(content)
    with pytest.raises(AssetError, match=f"{file.name} {complaint}"):
        read(file)


def test_swapped_formats_are_named(tmp_path):
    save_file(STATE, tmp_path / "x.pth.tar")
    with pytest.raises(AssetError, match="is a safetensors file, not a torch checkpoint"):
        read_hub(tmp_path / "x.pth.tar")
    save_hub(tmp_path / "x.safetensors", STATE)
    with pytest.raises(AssetError, match=r"is a zip archive.*\.pth\.tar"):
        read_safetensors(tmp_path / "x.safetensors")
    with pytest.raises(AssetError, match="has the suffix of a safetensors file"):
        read_hub(tmp_path / "x.safetensors")


@pytest.mark.parametrize("size", [6, 60, -1])
def test_truncated_safetensors_state_their_size(tmp_path, size):
    save_file(STATE, tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(data[:size])
    complaint = f"is truncated: .* of {len(data)} bytes" if size < 0 else "is (truncated|damaged or truncated|text)"
    with pytest.raises(AssetError, match=complaint):
        read_safetensors(tmp_path / "m.safetensors")


@pytest.mark.parametrize("read", [read_safetensors, read_hub])
def test_missing_files_are_refused(tmp_path, read):
    with pytest.raises(AssetError, match=r"cannot be read \(No such file"):
        read(tmp_path / "missing.bin")
    with pytest.raises(AssetError, match="is a folder"):
        read(tmp_path)


def test_folder_has_config_and_args(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    config = {"args": {"dtype": "bfloat16", "teachers": [{"name": "clip"}]}, "patch_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = read_folder(tmp_path)
    same(checkpoint.tensors, STATE)
    assert (checkpoint.config, checkpoint.args, checkpoint.ema) == (config, config["args"], False)


def write_shards(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    homes = dict(zip(STATE, names, strict=True))
    for key, name in homes.items():
        save_file({key: STATE[key]}, folder / Path(name).name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))


def test_shards_are_one_mapping(tmp_path):
    write_shards(tmp_path)
    checkpoint = read_folder(tmp_path)
    same(checkpoint.tensors, STATE)
    assert checkpoint.config == {} and checkpoint.args == {}


def test_missing_shard_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(AssetError, match=r"1 of 2 shards are missing \(model-00002-of-00002"):
        read_folder(tmp_path)


def test_index_that_does_not_match_is_refused(tmp_path):
    write_shards(tmp_path, ("../a.safetensors", "b.safetensors"))
    with pytest.raises(AssetError, match=r"outside its folder \(\.\./a"):
        read_folder(tmp_path)
    write_shards(tmp_path, ("a.safetensors", "b.safetensors"))
    save_file({"other": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(AssetError, match=r"does not match its shards: 1 tensors are missing \(base_model\.b\)"):
        read_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(AssetError, match="no weight_map"):
        read_folder(tmp_path)


def test_folders_without_weights(tmp_path):
    with pytest.raises(AssetError, match=r"is empty: download config\.json and model\.safetensors"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AssetError, match=r"holds no weights \(config\.json\)"):
        read_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(AssetError, match=r"but pytorch_model\.bin: use the path of that file"):
        read_folder(tmp_path)
    with pytest.raises(AssetError, match="is not a folder"):
        read_folder(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{", "damaged or truncated|is text"), ("[]", "holds a list"), ("<html>", "is a web page")],
)
def test_invalid_config_is_refused(tmp_path, text, complaint):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(AssetError, match=complaint):
        read_folder(tmp_path)


def test_sha256_mismatch_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    right = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert verify_sha256(tmp_path / "x", right) == tmp_path / "x"
    with pytest.raises(AssetError, match=f"{right}, expected 00; download it again"):
        verify_sha256(tmp_path / "x", "00")


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_offline_error_names_the_files_to_download(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError) as caught:
        fetch("nvidia/C-RADIOv4-H", ["config.json", "model.safetensors"])
    message = str(caught.value)
    for part in ("nvidia/C-RADIOv4-H", "HF_HUB_OFFLINE is set", "config.json, model.safetensors", "agglo.load("):
        assert part in message
    assert "://" not in message


def test_cached_files_need_no_network(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--nvidia--RADIO"
    snapshot = repository / "snapshots" / commit
    (snapshot / "deep").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in ("config.json", "deep/model.safetensors"):
        (snapshot / name).write_text(name)
    folder = fetch("nvidia/RADIO", ["deep/model.safetensors", "config.json"])
    assert folder == snapshot
    with pytest.raises(AssetError, match=r"other\.bin is not in the local cache"):
        fetch("nvidia/RADIO", ["config.json", "other.bin"])


def test_all_files_come_from_one_commit(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def download(repo, file, *, revision):
        asked.append((file, revision))
        return str(tmp_path / "abc123" / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert fetch("a/b", ["x", "y/z"], "v1") == tmp_path / "abc123"
    assert asked == [("x", "v1"), ("y/z", "abc123")]


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        ("GatedRepoError", "gated: accept its licence on http.*/a/b,"),
        ("RepositoryNotFoundError", "no such repository"),
        ("RevisionNotFoundError", "no revision 'v1'"),
        ("RemoteEntryNotFoundError", "no file x"),
        ("LocalEntryNotFoundError", "not in the local cache"),
        ("HfHubHTTPError", "x cannot be downloaded"),
    ],
)
def test_download_errors_name_the_cause(monkeypatch, error, complaint):
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error)

    def download(*_, **__):
        failure = kind.__new__(kind)
        failure.args = ("no",)
        raise failure

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(AssetError, match=rf"a/b on the Hugging Face hub at v1: .*{complaint}"):
        fetch("a/b", ["x"], "v1")


def test_fetch_refuses_invalid_arguments():
    with pytest.raises(AssetError, match="no such repository"):
        fetch("a/b/c", ["x"])
    with pytest.raises(ValueError, match="at least one file"):
        fetch("a/b", [])


# --- Renamed ----------------------------------------------------------------------------------------------------------


def test_renamed_by_mapping_and_by_function():
    same(Renamed(STATE, {"base_model.a": "a", "base_model.b": None}), {"a": STATE["base_model.a"]})
    kept = Renamed(STATE, lambda key: key.removeprefix("base_model.") if key.endswith("a") else None)
    same(kept, {"a": STATE["base_model.a"]})
    same(Renamed(kept, {"a": "z"}), {"z": STATE["base_model.a"]})


def test_transform_and_derived():
    source = {"q": torch.ones(2, 3), "k": torch.zeros(2, 3), "bias": torch.arange(3.0)}
    renamed = Renamed(
        source,
        {"q": None, "k": None, "bias": "b"},
        transform=lambda name, tensor: tensor + 1 if name == "b" else tensor,
        derived={"qk": lambda tensors: torch.cat([tensors["q"], tensors["k"]])},
    )
    same(renamed, {"b": torch.arange(1.0, 4.0), "qk": torch.cat([source["q"], source["k"]])})
    assert len(renamed) == 2


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(AssetError, match=r"base_model\.b and base_model\.a are both renamed to x"):
        Renamed(STATE, dict.fromkeys(STATE, "x"))


# --- assign -----------------------------------------------------------------------------------------------------------


def meta_model():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))


def reference():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))
    model[1].num_batches_tracked.fill_(7)
    return model


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("computed", [False, True])
def test_assign_fills_a_meta_module(tmp_path, dtype, computed):
    expected = reference()
    save_file(expected.state_dict(), tmp_path / "m.safetensors")
    tensors = read_safetensors(tmp_path / "m.safetensors").tensors
    model = meta_model()
    model[0].bias.requires_grad_(False)
    assign(model, Renamed(tensors, {}, transform=lambda _, t: t * 1) if computed else tensors, dtype)
    same(model.state_dict(), (expected.to(dtype) if dtype else expected).state_dict())
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.requires_grad and not model[0].bias.requires_grad
    assert model[1].num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_eight_bit_weights(tmp_path, kind, dtype):
    weight = torch.arange(-6.0, 6.0).reshape(3, 4)
    broken = weight.clone()
    broken[1, 1] = float("nan")
    for name, values in {"whole": weight, "broken": broken}.items():
        save_file({"weight": values.to(kind)}, tmp_path / f"{name}.safetensors")
    with torch.device("meta"):
        model = nn.Linear(4, 3, bias=False)
    assign(model, read_safetensors(tmp_path / "whole.safetensors").tensors, dtype)
    assert model.weight.dtype == (dtype or kind) and torch.equal(model.weight.float(), weight)
    with pytest.warns(UserWarning, match="NaN or infinity in 1 of 1 tensors"):
        assign(model, read_safetensors(tmp_path / "broken.safetensors").tensors, dtype)


def test_parameters_share_the_mapped_file_unless_cast(tmp_path):
    save_file({"weight": torch.ones(3, 4)}, tmp_path / "m.safetensors")
    with torch.device("meta"):
        one, two, cast = (nn.Linear(4, 3, bias=False) for _ in range(3))
    tensors = read_safetensors(tmp_path / "m.safetensors").tensors
    assign(one, tensors)
    assign(two, tensors)
    assign(cast, tensors, torch.float16)
    with torch.no_grad():
        one.weight.zero_()  # training one model changes neither the other nor the file
    (tmp_path / "m.safetensors").rename(tmp_path / "moved.safetensors")
    assert two.weight.sum() == 12 and cast.weight.sum() == 12
    assert load_file(tmp_path / "moved.safetensors")["weight"].sum() == 12


def test_views_in_a_pickle_become_contiguous_parameters(tmp_path):
    whole = torch.arange(24.0).reshape(6, 4)
    save_hub(tmp_path / "x.pth.tar", {"state_dict": {"weight": whole[3:].T.contiguous().T}})
    with torch.device("meta"):
        layer = nn.Linear(4, 3, bias=False)
    assign(layer, read_hub(tmp_path / "x.pth.tar").tensors)
    assert layer.weight.is_contiguous()
    torch.testing.assert_close(layer.weight.data, whole[3:])


def test_tied_parameters_stay_tied():
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
        model["b"].weight = model["a"].weight
    assign(model, {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)})
    assert model["a"].weight is model["b"].weight
    assert not model["a"].weight.is_meta


def test_other_architecture_lists_the_first_ten_names():
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(15))
    tensors = {f"{i}.weight": torch.ones(1, 1) for i in range(12, 15)} | {"head.bias": torch.ones(1)}
    with pytest.raises(AssetError) as caught:
        assign(model, tensors, source="x.pth.tar")
    message = str(caught.value)
    assert message.startswith("x.pth.tar is of another architecture: 12 of 15 tensors are missing (0.weight, ")
    assert "9.weight, …)" in message and "10.weight" not in message
    assert "1 are left over (head.bias)" in message


def test_differing_shapes_are_listed():
    model = meta_model()
    tensors = {**reference().state_dict(), "0.weight": torch.ones(5, 4), "2.weight": torch.ones(2, 9)}
    with pytest.raises(AssetError, match=r"2 shapes differ \(0\.weight: expected \(3, 4\), found \(5, 4\); 2\.weight"):
        assign(model, tensors)


class Positions(nn.Module):
    """A module with a non-persistent buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.arange(3.0), persistent=False)


class SelfMade(Positions):
    def materialize_buffers(self, device):
        self.steps = torch.arange(3.0, device=device)


def test_non_persistent_buffers_are_computed():
    with torch.device("meta"):
        good, bad = nn.Sequential(SelfMade()), nn.Sequential(Positions())
    assign(good, {})
    assert good[0].steps.tolist() == [0, 1, 2]
    with pytest.raises(
        NotImplementedError, match=r"0 \(Positions\): steps is not in checkpoints; .*materialize_buffers"
    ):
        assign(bad, {})


def test_copying_releases_the_file_regularly():
    """Copies and file are never in memory together."""
    megabytes, opened = 4, []
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(6))

    def open_file():
        opened.append(True)
        return lambda key: torch.full((1024, 1024), float(key[0]))

    tensors = Mapped([f"{i}.weight" for i in range(6)], open_file)
    assign(model, tensors, torch.float64)
    assert len(opened) == 2, f"{6 * megabytes} MB in windows of more than 8 MB"
    assert [layer.weight[0, 0].item() for layer in model] == list(range(6))


MEASURE = """
import sys, torch
from pathlib import Path
from torch import nn
from agglo.weights.reading import assign, read_hub, read_safetensors
from agglo.weights.tensors import Renamed

def peak():  # of this program alone; getrusage would count what its parent had in memory before it started this one
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

def load(file, dtype, n):
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(n))
    tensors = (read_hub if file.endswith("tar") else read_safetensors)(file).tensors
    assign(model, Renamed(tensors, lambda key: key.removeprefix("x.")), dtype)
    return sum(p.detach().sum().item() for p in model.parameters()), sum(p.nbytes for p in model.parameters())

small, large, n, dtype = sys.argv[1:]
load(small, getattr(torch, dtype), 1)  # code is loaded, threads are started
before = peak()
total, weights = load(large, getattr(torch, dtype), int(n))
print((peak() - before) / weights)
"""


@pytest.mark.processes
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("stored", "suffix"), [(torch.float32, "safetensors"), (torch.float16, "safetensors"), (torch.float16, "pth.tar")]
)
def test_peak_memory_is_the_weights_and_little_more(tmp_path, stored, suffix):
    layers = 32  # 128 MB in float32
    for name, n in (("small", 1), ("large", layers)):
        state = {f"x.{i}.weight": torch.rand(1024, 1024).to(stored) for i in range(n)}
        if suffix == "safetensors":
            save_file(state, tmp_path / f"{name}.{suffix}")
        else:
            save_hub(tmp_path / f"{name}.{suffix}", {"state_dict": state})
    files = [str(tmp_path / f"{name}.{suffix}") for name in ("small", "large")]
    command = [sys.executable, "-c", MEASURE, *files, str(layers), "float32"]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.5 < ratio < 1.15


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/fd")
def test_only_nearly_complete_files_are_prefetched(tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *_: asked.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    state = {f"x.{i}.weight": torch.rand(64, 64) for i in range(8)}
    save_file(state, tmp_path / "one.safetensors")
    save_hub(tmp_path / "two.pth.tar", {"state_dict": state})
    for file, read in (("one.safetensors", read_safetensors), ("two.pth.tar", read_hub)):
        tensors = read(tmp_path / file).tensors
        assert not asked, "a file that is opened may never be read"
        for count in (8, 4):
            with torch.device("meta"):
                module = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(count))
            wanted = {f"{i}.weight" for i in range(count)}

            def ours(key, wanted=wanted):
                return name if (name := key.removeprefix("x.")) in wanted else None

            assign(module, Renamed(tensors, ours))
            assert asked == ([file] if count == 8 else []), "half of a file is not all of it"
            asked.clear()
        tensors.release()


def test_paths_of_other_systems_are_plain_names(tmp_path):
    args = argparse.Namespace(output=PurePosixPath("/data/run"))
    save_hub(tmp_path / "x.pth.tar", {"state_dict": STATE, "args": args})
    assert read_hub(tmp_path / "x.pth.tar").args == {"output": "/data/run"}
