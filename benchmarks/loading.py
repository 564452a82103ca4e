"""From a checkpoint on disk to the first output, against the time of reading the file, and peak memory.

The files have the official layouts and C-RADIOv4-H's size (652 M weights, random, no heads). Every measurement is a
new process after all imports; the page cache is first brought to the same state: `warm` (the file was just read) or
`cold` (evicted from the kernel's cache; a host may still hold it). `read` reads the bytes as one object; `copy` loads
the tensors into memory in the model's dtype with the library of the file format alone. From half precision to float32
that is twice the bytes of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

THREADS = 2
SIDE = 64
"""Pixels of the first image: its forward pass is cheap relative to reading the weights."""

C_RADIO_V4_H = {"embed_dim": 1280, "depth": 32, "num_heads": 16, "hidden": 5120, "cpe_max_size": 2048}
TOY = {"embed_dim": 64, "depth": 2, "num_heads": 2, "hidden": 256, "cpe_max_size": 256}

CASES = {
    "safetensors float32, as stored": ("float32", "folder", None),
    "safetensors bfloat16, as stored": ("bfloat16", "folder", None),
    "safetensors bfloat16 to float32": ("bfloat16", "folder", "float32"),
    "pth.tar float16 to float32": ("float16", "pth.tar", "float32"),
}
"""Name → dtype of the file, layout, dtype of the model (None: as stored)."""


# --- the files --------------------------------------------------------------------------------------------------------


def arguments(geometry: dict[str, int]) -> dict[str, Any]:
    """Training arguments stored in such a checkpoint."""
    names = ("siglip2-g", "dino_v3", "sam3")
    return {
        "model": "vit_huge_patch16_224",
        "model_kwargs": {key: geometry[key] for key in ("embed_dim", "depth", "num_heads")},
        "cpe_max_size": geometry["cpe_max_size"],
        "cls_token_per_teacher": True,
        "register_multiple": 10,
        "cpe_num_registers": None,
        "teachers": [{"name": name, "type": "generic", "use_summary": name != "sam3"} for name in names],
        "mlp_version": "v2",
        "spectral_reparam": False,
        "damp": None,
        "dtype": "float32",
    }


def shapes(geometry: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The trunk's keys below ``base_model.``, including layer norms and biases."""
    width, hidden, grid = geometry["embed_dim"], geometry["hidden"], geometry["cpe_max_size"] // 16
    found: dict[str, tuple[int, ...]] = {
        "patch_generator.embedder.weight": (width, 3 * 16 * 16),
        "patch_generator.pos_embed": (1, grid * grid, width),
        "patch_generator.cls_token.token": (10, width),
    }
    layers = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
    }
    for block in range(geometry["depth"]):
        for norm in ("norm1", "norm2"):
            found |= {f"blocks.{block}.{norm}.{leaf}": (width,) for leaf in ("weight", "bias")}
        for layer, shape in layers.items():
            found[f"blocks.{block}.{layer}.weight"] = shape
            found[f"blocks.{block}.{layer}.bias"] = shape[:1]
    return found


def write(folder: Path, geometry: dict[str, int], dtype_name: str, layout: str) -> Path:
    """Write random weights as an official checkpoint: a folder with ``config.json``, or a hub pickle."""
    import torch
    from safetensors.torch import save_file

    dtype = getattr(torch, dtype_name)
    torch.manual_seed(0)
    prefix, other = ("base_model.", "") if layout == "pth.tar" else ("radio_model.model.", "radio_model.")
    state = {}
    for key, shape in shapes(geometry).items():
        # Small weights, so that activations do not overflow half precision.
        state[prefix + key] = (
            torch.ones(shape, dtype=dtype) if "norm" in key else torch.randn(shape).mul_(0.02).to(dtype)
        )
    state[f"{other}input_conditioner.norm_mean"] = torch.full((3, 1, 1), 0.45)
    state[f"{other}input_conditioner.norm_std"] = torch.full((3, 1, 1), 0.27)
    if layout == "pth.tar":
        path = folder / f"{dtype_name}.pth.tar"
        args = Namespace(**arguments(geometry))
        torch.save({"state_dict": state, "args": args, "arch": "vit_huge_patch16_224", "epoch": 1}, path)
        return path
    path = folder / dtype_name
    path.mkdir()
    config = {"args": arguments(geometry), "patch_size": 16, "max_resolution": 2048, "preferred_resolution": [512, 512]}
    (path / "config.json").write_text(json.dumps(config))
    state["radio_model.summary_idxs"] = torch.tensor([0, 1])
    save_file(state, path / "model.safetensors")
    return path


def weights_file(path: Path) -> Path:
    """The weight file."""
    return path / "model.safetensors" if path.is_dir() else path


# --- in a fresh process -----------------------------------------------------------------------------------------------


def child(path: Path, what: str, dtype_name: str | None) -> dict[str, Any]:
    """``read`` the bytes, or ``load`` the model and compute one output."""
    if what == "read":
        return read(weights_file(path))
    if what == "copy":
        return copy(weights_file(path), dtype_name)
    import torch

    from agglo.checkpoints import radio

    torch.set_num_threads(THREADS)
    images = torch.rand(1, 3, SIDE, SIDE)
    torch.nn.functional.linear(torch.rand(64, 64), torch.rand(64, 64))  # starts the thread pool, before timing
    before = _memory("VmRSS")
    _forget_peak()
    began = time.perf_counter()
    model = radio.from_checkpoint(radio.read(path), dtype=getattr(torch, dtype_name) if dtype_name else None)
    loaded = time.perf_counter()
    peak_loading = _memory("VmHWM")
    with torch.inference_mode():
        model(images)
        first = time.perf_counter()
        model(images)
        second = time.perf_counter()
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    return {
        "load_s": loaded - began,
        "to_first_output_s": first - began,
        "forward_alone_s": second - first,
        "weights_bytes": weights,
        "peak_memory_loading": (peak_loading - before) / weights,
        "peak_memory": (_memory("VmHWM") - before) / weights,
    }


def read(file: Path) -> dict[str, Any]:
    """Read all bytes into memory once."""
    began = time.perf_counter()
    content = file.read_bytes()
    return {"read_s": time.perf_counter() - began, "bytes": len(content)}


def copy(file: Path, dtype_name: str | None) -> dict[str, Any]:
    """Load all tensors into memory, in the dtype of the model."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(THREADS)
    dtype = getattr(torch, dtype_name) if dtype_name else None
    began = time.perf_counter()
    if file.suffix == ".tar":
        with torch.serialization.safe_globals([Namespace]):
            state = torch.load(file, mmap=True, weights_only=True)["state_dict"]
    else:
        state = load_file(file)
    kept = {key: tensor.to(dtype or tensor.dtype, copy=True) for key, tensor in state.items()}
    return {"copy_s": time.perf_counter() - began, "tensors": len(kept)}


def _memory(field: str) -> int:
    """Memory of this process in bytes: current ``VmRSS`` or peak ``VmHWM``, including touched pages of mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# --- interleaving -----------------------------------------------------------------------------------------------------


def prepare_cache(file: Path, state: str) -> None:
    """Load a file into the page cache, or evict it."""
    if state == "warm":
        with file.open("rb") as content:
            while content.read(1 << 24):
                pass
        return
    with file.open("rb") as content:
        os.fsync(content.fileno())
        os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def prepare_memory(size: int) -> None:
    """Write and free this much memory in a separate process.

    In a virtual machine the first write to a page waits for the host, several times longer than for the kernel, which
    would penalise the first measurement.
    """
    subprocess.run([sys.executable, "-c", f"b'x' * {size}"], check=True)


def fresh(path: Path, what: str, dtype_name: str | None) -> dict[str, Any]:
    """A child's answer."""
    command = [sys.executable, __file__, "--child", what, "--path", str(path)]
    command += ["--dtype", dtype_name] if dtype_name else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(path: Path, dtype_name: str | None, state: str, rounds: int) -> dict[str, Any]:
    """Medians of interleaved reading, copying and loading."""
    file, found = weights_file(path), []
    # Slightly more than the weights in float32.
    room = int(1.2 * file.stat().st_size * (1 if "32" in str(path) else 2))
    for _ in range(rounds):
        both: dict[str, Any] = {}
        for what in ("read", "copy", "load"):
            prepare_memory(room)
            prepare_cache(file, state)
            both |= fresh(path, what, dtype_name)
        both["ratio_to_read"] = both["to_first_output_s"] / both["read_s"]
        both["ratio_to_copy"] = both["to_first_output_s"] / both["copy_s"]
        both["loading_alone_to_read"] = (both["to_first_output_s"] - both["forward_alone_s"]) / both["read_s"]
        found.append(both)
    return {key: round(statistics.median(each[key] for each in found), 3) for key in found[0]} | {"rounds": rounds}


def _line(found: dict[str, Any]) -> str:
    return f"{found['to_first_output_s']} s, {found['ratio_to_read']} x reading, {found['ratio_to_copy']} x copying"


def run(tiny: bool = False, rounds: int = 3) -> dict[str, Any]:
    """All cases, warm and cold; ``tiny`` uses a toy model as a trial."""
    geometry = TOY if tiny else C_RADIO_V4_H
    room = shutil.disk_usage(tempfile.gettempdir()).free
    if room < 8e9 and not tiny:
        raise RuntimeError(f"{tempfile.gettempdir()} has {room / 1e9:.1f} GB free; 8 are needed: set TMPDIR")
    result: dict[str, Any] = {"threads": THREADS, "first_image_px": SIDE, "geometry": geometry}
    with tempfile.TemporaryDirectory(prefix="agglo-loading-") as folder:
        files: dict[tuple[str, str], Path] = {}
        for name, (stored, layout, dtype_name) in CASES.items():
            if (stored, layout) not in files:
                files[stored, layout] = write(Path(folder), geometry, stored, layout)
            path = files[stored, layout]
            result[name] = {state: measure(path, dtype_name, state, rounds) for state in ("warm", "cold")}
            warm, cold = result[name]["warm"], result[name]["cold"]
            print(f"{name}: warm {_line(warm)}; cold {_line(cold)}; memory {warm['peak_memory']} x", flush=True)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="trial run with a toy model; saves nothing")
    parser.add_argument("--child", choices=("read", "copy", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.path, given.child, given.dtype)))
    elif given.tiny:
        print(json.dumps(run(tiny=True, rounds=1), indent=2))
    else:
        import record

        record.write("loading", run())
