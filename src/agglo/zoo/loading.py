"""Finding and loading trained models: released ones by name, folders and files of any supported layout."""

from __future__ import annotations

import contextlib
import difflib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from agglo.checkpoints import radio
from agglo.config import build, kinds, nearest
from agglo.files import read_json
from agglo.hub import fetch, fetch_model, push_folder
from agglo.model.artefact import CARD, CONFIG, EXPORTED, WEIGHTS
from agglo.model.model import Model
from agglo.types import AssetError, ConfigError
from agglo.weights.bundled import verify
from agglo.weights.reading import verify_sha256
from agglo.zoo.releases import HUB, RELEASED, HubModel, ReleasedModel

DEFAULT = "agglo-lite"
"""The default model of ``embed``, ``search`` and ``view``."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a model is, and which release.

    Args:
        path: a folder, or an official file.
        entry: its release, or None.
        copied: whether it behaves like the code in its repository, instead of torch.hub's.
    """

    path: Path
    entry: HubModel | None = None
    copied: bool = False

    @property
    def release(self) -> radio.Release | None:
        """Facts that its checkpoint lacks."""
        if self.entry is None:
            return None
        release = self.entry.release
        return replace(release, align_corners=True) if self.copied and self.entry.copy_aligns else release


def list_models() -> list[ReleasedModel | HubModel]:
    """The released models: bundled ones, then those of NVIDIA, newest first."""
    ours = sorted(RELEASED.values(), key=lambda model: (not model.bundled, model.name))
    return [*ours, *HUB.values()]


def load(
    name_or_path: str | Path = DEFAULT,
    *,
    heads: Iterable[str] | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
    compile: bool = False,
    window: int | None = None,
    align_corners: bool | None = None,
    neck: str | None = None,
    num_tokens: int | None = None,
    revision: str | None = None,
    sha256: str | None = None,
) -> Model:
    """Load a trained model for inference: in eval mode, its parameters without gradients.

    To fine-tune it, call ``model.requires_grad_(True)`` and ``model.train()``.

    Args:
        name_or_path: a released name (``"agglo-lite"``, ``"c-radio_v4-so400m"``; :func:`list_models`); a folder that
            :meth:`agglo.Model.save` wrote, or a run folder; a folder of a Hugging Face repository (C-RADIO,
            transformers' ``RadioModel``, timm); an official ``.pth.tar``; or ``"owner/name"`` on the Hugging Face hub.
        heads: teachers whose heads to load, ``"all"``, or ``"text"`` for those with a text tower. None: all heads
            of an agglo model; no heads of an official checkpoint, where they are large.
        dtype: of weights and arithmetic: float32, bfloat16 or float16; ``"auto"``: bfloat16 where the device computes
            it natively (:func:`fastest_dtype`), else float32. NumPy has no bfloat16: convert outputs by ``.float()``.
        device: target.
        compile: compile the student with ``torch.compile``; the first call at a new size is slow.
        window: side of the attention windows of most blocks, in patches (ViTDet); also an option of each call.
        align_corners: of the position table's resize. False in torch.hub's code since July 2025, and for models loaded
            by version name; True in the code of the repositories of C-RADIOv3-B and -H, and for models loaded by
            repository or from its folder.
        neck: ``decoder`` or ``encoder`` of a RADIO1D model.
        num_tokens: number of one-dimensional tokens that a RADIO1D model keeps.
        revision: branch, tag or commit on the hub.
        sha256: expected digest of the weights file, checked before reading.

    Raises:
        ConfigError: no such model, head or option.
        AssetError: files are missing, damaged or of another architecture.
    """
    device = _device(device)
    dtype = fastest_dtype(device) if dtype == "auto" else _dtype(dtype)
    options = {"window": window, "align_corners": align_corners, "neck": neck, "num_tokens": num_tokens}
    heads = _names(heads)
    found = find(name_or_path, revision)
    if sha256 is not None:
        _verify_sha256(found.path, sha256.lower())
    model = _read(found, heads, dtype, device, options).requires_grad_(False)
    if compile:
        # Per block: one graph for all blocks, and lists and intermediates use it too.
        for part in getattr(model.student, "blocks", None) or [model.student]:
            part.compile()
    return model


def locate(name_or_path: str | Path) -> Path:
    """The local folder or official file of a model, downloaded if needed; arguments and errors as :func:`load`."""
    return find(name_or_path).path


def is_ours(name_or_path: str | Path) -> bool:
    """Whether it is a folder of :meth:`Model.save`; arguments and errors as :func:`load`."""
    path = find(name_or_path).path
    return path.is_dir() and ("format" in read_json(path / CONFIG) or (path / EXPORTED).is_file())


def _read(
    found: Location,
    heads: Iterable[str] | None,
    dtype: torch.dtype,
    device: torch.device,
    options: dict[str, Any],
) -> Model:
    path = found.path
    config = read_json(path / CONFIG) if path.is_dir() else {}
    given = {key: value for key, value in options.items() if value is not None}
    if path.is_dir() and (path / EXPORTED).is_file():
        return _exported(path, heads, dtype, device, given)
    if "format" in config:
        return Model.load(path, heads=heads, student=given, dtype=dtype, device=device)
    checkpoint = radio.read(path)
    if path.is_file() or radio.is_official(config):
        return radio.from_checkpoint(
            checkpoint, heads=heads, release=found.release, dtype=dtype, device=device, **given
        )
    from agglo.checkpoints import timm, transformers

    if transformers.is_native(config):
        return _without_heads(heads, path) or transformers.from_native(checkpoint, dtype=dtype, device=device, **given)
    if timm.is_timm(config):
        return _without_heads(heads, path) or timm.from_timm(checkpoint, dtype=dtype, device=device, **given)
    raise ConfigError(
        f"{path / CONFIG} has an unknown layout; known are agglo's, NVIDIA's, transformers' RadioModel and timm's"
    )


def _exported(
    path: Path, heads: Iterable[str] | None, dtype: torch.dtype, device: torch.device, given: dict[str, Any]
) -> Model:
    """An exported graph with its runtime."""
    facts = read_json(path / EXPORTED)
    if facts.get("runtime") not in kinds("runtimes"):
        raise ConfigError(f"{path / EXPORTED}: no runtime {facts.get('runtime')!r}: upgrade agglo")
    if device.type != "cpu" or dtype != torch.float32:
        raise ConfigError(f"{path} is an exported graph: load it with device='cpu' and dtype='float32'")
    model = build("runtimes", {"kind": facts["runtime"]}, path, facts)
    model.step(given.pop("window", None))
    if given:
        raise ConfigError(f"{', '.join(given)}: {path} is an exported graph, load the model itself for other options")
    if heads not in (None, "all"):
        model.keep_heads(heads)
    return model


def _names(heads: Iterable[str] | None) -> str | list[str] | None:
    if heads is None or isinstance(heads, str):
        return heads
    names: list[Any] = list(heads) if isinstance(heads, Iterable) else [heads]
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"heads: must be None, 'all', 'text', or names of teachers (['siglip2-g']); got {heads!r}")
    return names


def _verify_sha256(path: Path, sha256: str) -> None:
    if path.is_dir() and not (path / WEIGHTS).is_file():
        raise ConfigError(
            f"{path} holds its weights in shards, without a single sha256: leave sha256 out, and compare each shard "
            f"with the repository's page (`sha256sum {path}/model-*.safetensors`)"
        )
    verify_sha256(path / WEIGHTS if path.is_dir() else path, sha256)


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype: must be auto, float32, bfloat16 or float16, got {dtype}")
    return found


def fastest_dtype(device: str | torch.device) -> torch.dtype:
    """The dtype of ``dtype="auto"``: bfloat16 where the device multiplies it natively, else float32.

    Native are CPUs with AMX or AVX512_BF16, and GPUs of compute capability 8.0 (Ampere) and later.
    """
    device = torch.device(device)
    native = False
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, name, bool)() for name in names)
    return torch.bfloat16 if native else torch.float32


def _device(device: str | torch.device) -> torch.device:
    available = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    available += ["mps"] if torch.backends.mps.is_available() else []
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or not any(name.startswith(str(found)) for name in available):
        raise ConfigError(f"device: {device!r} is not available; use {', '.join(available)}")
    return found


def _without_heads(heads: Iterable[str] | None, path: Path) -> None:
    if heads is not None and heads not in ("all", "text") and list(heads):
        raise ConfigError(f"{path} holds a backbone without heads; use NVIDIA's own repositories")


# --- location -------------------------------------------------------------------------------------------------------


def find(name_or_path: str | Path, revision: str | None = None) -> Location:
    """Locate a model, downloading it if needed; arguments and errors as :func:`load`."""
    text = str(name_or_path)
    if text in RELEASED:
        return Location(_verified(RELEASED[text]))
    path = Path(name_or_path).expanduser()
    if path.exists():
        found = _folder_or_file(path)
        if found.is_file():
            return Location(found, next((model for model in HUB.values() if model.pickle == found.name), None))
        return _copied(found, found.name)
    entry = HUB.get(text.lower())
    if entry is not None and entry.file is not None:
        return Location(fetch(entry.repo, [entry.file], revision) / entry.file, entry)
    if entry is not None:
        return Location(fetch_model(entry.repo, revision), entry)
    if text.count("/") == 1 and not path.parent.is_dir():
        return _copied(fetch_model(text, revision), text)
    raise ConfigError(f"no model {text!r}{_nearest(text, path)}")


def _copied(folder: Path, name: str) -> Location:
    """Location of a folder with ``config.json``: the release of its ``version``, or of the repository ``name``."""
    config = read_json(folder / CONFIG)
    if not radio.is_official(config):
        return Location(folder)
    entry = HUB.get(str(config.get("version", "")).lower())
    by_name = (m for m in HUB.values() if m.file is None and name.lower() in _repository(m))
    return Location(folder, entry or next(by_name, None), copied=True)


def _repository(model: HubModel) -> tuple[str, str]:
    """Repository name of a release, with and without owner."""
    repo = model.repo.lower()
    return repo, repo.rpartition("/")[2]


def _nearest(text: str, path: Path) -> str:
    """The nearest name, case-insensitive, including names of repositories."""
    known = {*RELEASED, *HUB, *_neighbours(path)}
    spelt = {_repository(model)[1]: model.name for model in HUB.values() if model.file is None}
    spelt |= {name.lower(): name for name in known}
    close = difflib.get_close_matches(text.lower(), spelt, n=1, cutoff=0.6)
    return nearest(spelt[close[0]] if close else text, known)


def _folder_or_file(path: Path) -> Path:
    if path.is_file():
        if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
            return path.parent
        if path.suffix in radio.PICKLES:
            return path
        raise ConfigError(
            f"{path} is a file: use the folder that holds {CONFIG} and {WEIGHTS} (perhaps {path.parent}), or an "
            "official .pth.tar"
        )
    if (path / EXPORTED).is_file():
        return path
    for folder in (path, path / "model"):
        if (folder / CONFIG).is_file() and any(folder.glob("model*.safetensors*")):
            return folder
    pickles = [entry for entry in path.iterdir() if entry.suffix in radio.PICKLES]
    if len(pickles) == 1:
        return pickles[0]
    if any((folder / "upsampler.json").is_file() for folder in (path, path / "model")):
        raise ConfigError(
            f"{path} holds a trained upsampler, not a model: use it with a teacher, "
            f"`upsampler: {{kind: featsharp, weights: {path}}}`"
        )
    if (path / "recipe.yaml").is_file():
        raise ConfigError(
            f"{path} is an unfinished run: resume it with `agglo train {path / 'recipe.yaml'} --out {path} --resume`"
        )
    if pickles:
        raise ConfigError(
            f"{path} holds {len(pickles)} checkpoints ({', '.join(sorted(p.name for p in pickles)[:10])}): use one"
        )
    raise ConfigError(f"{path} holds no model: needs {CONFIG} and {WEIGHTS}, or model/ with both")


def _neighbours(path: Path) -> list[str]:
    """Folders of models and runs beside a missing path."""
    beside: list[Path] = []
    with contextlib.suppress(OSError):
        beside = [p for p in path.parent.iterdir() if any((p / n).exists() for n in (CONFIG, "model", "recipe.yaml"))]
    return [str(path.parent / p.name) for p in sorted(beside)]


def _verified(entry: ReleasedModel) -> Path:
    if not entry.bundled:
        raise AssetError(
            f"{entry.name} is not bundled with this installation: reinstall agglo, or train a model with "
            "`agglo train quickstart` and use its run folder (--model runs/quickstart)"
        )
    for file, sha256 in ((WEIGHTS, entry.sha256), (CONFIG, entry.config_sha256)):
        verify(entry.folder / file, sha256 or "not recorded in agglo.zoo.releases", "reinstall agglo")
    return entry.folder


def push(model: Model | str | Path, repo: str, *, private: bool = False) -> str:
    """Upload weights, configuration and card to the Hugging Face hub, for loading as ``load(repo)``; return the URL.

    Args:
        model: an agglo model, its name, or its folder; of a saved folder only the card is changed: its usage code
            names the repository.
        repo: ``owner/name``; created if needed.
        private: whether a new repository is private.

    Raises:
        ConfigError: not a complete agglo model, or ``repo`` is not ``owner/name``.
        AssetError: no network, or no write access.
    """
    with tempfile.TemporaryDirectory() as temporary:
        saved = isinstance(model, Model)
        folder = model.save(Path(temporary) / repo.rpartition("/")[2]) if saved else locate(model)
        missing = [name for name in (CONFIG, WEIGHTS, CARD) if not (folder / name).is_file()]
        if missing:
            raise ConfigError(f"{folder}: {', '.join(missing)} missing; write the model with Model.save")
        # The temporary folder is gone when the user reads an error.
        manual = f"upload {'the folder that Model.save writes' if saved else f'the folder {folder}'} by hand"
        card = (folder / CARD).read_text(encoding="utf-8")
        named = card.replace(f'agglo.load("{folder.name}")', f'agglo.load("{repo}")')
        if saved:
            (folder / CARD).write_text(named, encoding="utf-8")
        elif named != card:  # the user's folder stays as it is
            whole, folder = folder, Path(temporary) / folder.name
            folder.mkdir()
            for file in whole.iterdir():
                (folder / file.name).symlink_to(file.resolve())
            (folder / CARD).unlink()
            (folder / CARD).write_text(named, encoding="utf-8")
        return push_folder(folder, repo, private=private, manual=manual)
