"""Every configuration of the reference implementation's golden vectors: official layout in, reference numbers out.

The folder is ``$AGGLO_SHARED/golden/radio`` (``../shared`` by default); whatever configurations of the same format lie
there are walked. The limit is the one its README states: ``max|a - e| / std(e) <= 5e-5`` in float32 on the CPU.
"""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from agglo.checkpoints.radio import Release, from_checkpoint
from agglo.model.model import Model
from agglo.preprocess import nearest_size
from agglo.students._patches import PatchGenerator
from agglo.weights.reading import Checkpoint
from support.parity import error

ROOT = Path(__file__).parents[2]
FOLDER = (ROOT / os.environ.get("AGGLO_SHARED", "../shared")).resolve() / "golden" / "radio"
LIMIT = 5e-5
CONFIGS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
MODELS = [name for name, config in CONFIGS.items() if "args" in config or config.get("layout") == "huggingface"]
CASES = [pytest.param(name, case, id=f"{name}-{case['id']}") for name in MODELS for case in CONFIGS[name]["cases"]]

pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(not MODELS, reason=f"no golden vectors in {FOLDER}: set AGGLO_SHARED"),
]


def seeded(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights drawn by name (rule in the README of the folder)."""
    recipe = config["seeded_weights"]
    state = {}
    for key, shape in recipe["shapes"].items():
        name = key.removeprefix("base_model.")
        if key.startswith("input_conditioner."):
            mean = key.endswith("norm_mean")
            clip = (0.48145466, 0.4578275, 0.40821073) if mean else (0.26862954, 0.26130258, 0.27577711)
            state[key] = torch.tensor(clip).view(3, 1, 1)
            continue
        part, seed = recipe["seed_parts"]
        source = np.random.RandomState(zlib.crc32(f"{part}:{seed}:{name}".encode()) & 0xFFFFFFFF)
        z = torch.from_numpy(source.standard_normal(shape).astype(np.float32))
        leaf = name.rpartition(".")[2]
        if leaf == "grandma":
            z = 0.5 + 0.1 * z
        elif leaf == "bias":
            z = 0.1 * z
        elif leaf == "weight" and len(shape) == 1:
            z = 1 + 0.1 * z
        else:
            z = z * shape[-1] ** -0.5
        state[key] = z
    for key, total in recipe.get("abs_sum_check", {}).items():
        assert float(state[key].double().abs().sum()) == pytest.approx(total, rel=1e-6)
    return state


def weights(config: dict[str, Any]) -> dict[str, Tensor]:
    if config.get("seeded_weights"):
        return seeded(config)
    return load_file(FOLDER / config["weights"])


def built(config: dict[str, Any], case: dict[str, Any], dtype: torch.dtype = torch.float32) -> Model:
    load = case.get("load", {})
    meta = config.get("config", config)
    resource = config.get("resource", {})
    checkpoint = Checkpoint(weights(config), args=meta["args"], config=config.get("config", {}), source=config["name"])
    heads = load.get("adaptor_names") or meta.get("adaptor_names")
    rule = {"num_windowed": resource.get("vitdet_num_windowed"), "num_global": resource.get("vitdet_num_global", 4)}
    return from_checkpoint(
        checkpoint,
        heads=heads,
        dtype=dtype,
        release=Release(**rule, align_corners=case.get("align_corners", False)),
        window=load.get("vitdet_window_size"),
        neck=load.get("neck_name"),
    )


def answers(model: Model, images: Tensor, case: dict[str, Any]) -> dict[str, Tensor]:
    """Our outputs under the case's names."""
    kwargs, found = case.get("kwargs", {}), {}
    for step in case.get("pre", []):
        if step == "switch_to_deploy":
            model.student.deploy()
        else:
            assert step[0] == "change_window_size", step
            model.student.change_window(step[1])

    def put(prefix: str, features: Any) -> None:
        found[f"{prefix}summary"] = features.summary
        found[f"{prefix}features"] = features.tokens()

    if case.get("call") == "forward_intermediates":
        names = {"aggregation": "aggregation", "norm_alpha_scheme": "alpha", "norm": "norm"}
        options = {ours: kwargs[theirs] for theirs, ours in names.items() if theirs in kwargs}
        last = model.intermediates(images, kwargs["indices"], alpha="none")[-1] if kwargs.get("stop_early") else None
        put("final.", last or model(images))
        for index, features in enumerate(model.intermediates(images, kwargs["indices"], resize=False, **options)):
            put(f"intermediates.{index}.", features)
            found[f"intermediates.{index}"] = features.tokens()
    elif any(key.startswith("encoder.") for key in case["outputs"]):
        slots, count = model.summary_slots, model.student.spec.slots
        necks = model.student.necks(model.conditioner(images), num_tokens=kwargs.get("num_tokens"))
        for neck, features in necks.items():
            put(f"{neck}.", features)
            found[f"{neck}.summary"] = features.summary.unflatten(1, (count, -1))[:, slots].flatten(1)
    else:
        if "num_tokens" in kwargs:
            model.student.num_tokens = kwargs["num_tokens"]
        if case.get("call") == "forward_external_preproc":
            images = found["conditioned"] = model.take_conditioner()(images)
        out = model(images, resize=False)
        put("", out)
        put("backbone.", out)
        for name, features in out.heads.items():
            put(f"{name}.", features)
    return found


def compared(name: str, case: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each output of a case: its name, ours, and the reference's."""
    config = CONFIGS[name]
    stored = load_file(FOLDER / config["io"])
    images = stored[f"input/{case['input']}"].float() / 255
    with torch.inference_mode():
        found = answers(built(config, case, dtype), images, case)
    assert case["outputs"]
    for output, shape in case["outputs"].items():
        actual = found[output]
        if len(shape) == 4 and actual.ndim == 3:
            actual = actual.transpose(1, 2).unflatten(2, tuple(shape[2:]))
        if case.get("subsample") and actual.ndim == 3:
            actual = actual[:, :: case["subsample"]]
        expected = stored[f"{case['id']}/{output}"]
        if config.get("args", {}).get("gp") == "avg" and expected.ndim == 3:
            expected = expected[:, expected.shape[1] - actual.shape[1] :]  # the reference keeps the prefix among them
        yield output, actual, expected


@pytest.mark.parametrize(("name", "case"), CASES)
def test_equals_the_reference(name: str, case: dict[str, Any]) -> None:
    for output, actual, expected in compared(name, case, torch.float32):
        assert error(actual, expected) <= LIMIT, output


HALVES = [
    case
    for case in CASES
    if "seeded" not in str(case.id)
    and "call" not in case.values[1]
    # Both necks of RADIO1D at once are a method of the student, below the model's precision.
    and not any(output.startswith("encoder.") for output in case.values[1]["outputs"])
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("name", "case"), HALVES)
def test_half_precision_stays_close(name: str, case: dict[str, Any], dtype: torch.dtype) -> None:
    for output, actual, expected in compared(name, case, dtype):
        cosine = torch.cosine_similarity(actual.float(), expected, dim=1 if actual.ndim == 4 else -1)
        assert cosine.min() >= 0.999, (output, float(cosine.min()))


@pytest.mark.parametrize("name", MODELS)
def test_properties_equal_the_wrappers(name: str) -> None:
    for case in CONFIGS[name]["cases"]:
        model = built(CONFIGS[name], case)
        if model.student_config["kind"] != "vit":
            continue  # the reference's other students answer these with errors
        ours = {
            "patch_size": model.spec.stride,
            "min_resolution_step": model.step(),
            "summary_idxs": model.summary_slots,
            "summary_dim": model.spec.summary,
            "embed_dim": model.spec.spatial,
            "num_summary_tokens": model.student.patch_generator.tokens,
            "num_cls_tokens": model.student.spec.slots,
        }
        expected = case.get("model_properties", {})
        wrong = {
            key: (value, expected[key])
            for key, value in ours.items()
            if not isinstance(expected.get(key, ""), str) and expected[key] != value
        }
        assert not wrong, case["id"]


@pytest.mark.parametrize("name", [n for n in MODELS if CONFIGS[n].get("args", {}).get("spectral_reparam")])
def test_spectral_weights_equal_the_references(name: str) -> None:
    state = load_file(FOLDER / CONFIGS[name]["io"])
    effective = {k.removeprefix("effective/"): v for k, v in state.items() if k.startswith("effective/")}
    model = built(CONFIGS[name], CONFIGS[name]["cases"][0])
    assert len(effective) > 5
    for key, expected in effective.items():
        head = key.startswith("adaptor.")
        ours = key.replace("adaptor.", "heads.").replace("head_mlp", "summary").replace("feat_mlp", "spatial")
        ours = ours.replace("final.2", "fc2") if head else f"student.{key}"
        torch.testing.assert_close(model.get_parameter(ours).detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [n for n, c in CONFIGS.items() if c.get("layout") == "patch_generator"])
def test_training_positions_for_recorded_draws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[name]
    stored = load_file(FOLDER / config["io"])
    grid, width = config["pos_grid"][0], config["embed_dim"]
    table = next(v for k, v in stored.items() if k.startswith("weights/") and k.endswith("pos_embed"))
    real = torch.rand
    for case in config["cases"]:
        aligned = case.get("align_corners", False)
        generator = PatchGenerator(width, config["patch_size"], grid, 1, 0.0, align_corners=aligned)
        generator.pos_embed.data.copy_(table)
        generator.train(not case.get("eval"))
        generator.clip_length = case["num_video_frames"] or 1 if "num_video_frames" in case else 1
        draws = iter([stored[k] for n in ("u_scale", "u_aspect", "u_pos") if (k := f"{case['id']}/{n}") in stored])
        assert case.get("eval") or f"{case['id']}/u_scale" in stored
        monkeypatch.setattr(torch, "rand", lambda *a, draws=draws, **k: next(draws))
        found = generator.positions(tuple(case["grid"]), case["batch"])
        monkeypatch.setattr(torch, "rand", real)
        assert error(found.detach(), stored[f"{case['id']}/pos_enc"]) <= LIMIT, case["id"]


@pytest.mark.parametrize("name", [n for n, c in CONFIGS.items() if c.get("layout") == "table"])
def test_nearest_resolutions(name: str) -> None:
    rows = CONFIGS[name]["rows"]
    assert rows
    for row in rows:
        assert list(nearest_size((row["height"], row["width"]), row["step"])) == row["out"], row
