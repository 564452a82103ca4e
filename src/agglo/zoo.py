"""Released models as data: which there are, where they lie, what they are good for, and how a damaged one is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agglo.bundled import verify
from agglo.config import nearest
from agglo.model import CONFIG, WEIGHTS, Model
from agglo.types import AssetError, ConfigError

ASSETS = Path(__file__).parent / "assets"
DEFAULT = "agglo-lite"
"""The model that ``embed``, ``search`` and ``view`` use unless told otherwise."""


@dataclass(frozen=True, slots=True)
class ReleasedModel:
    """A trained student that ships with the package.

    Args:
        name: what :func:`load` calls it.
        licence: SPDX expression of the weights.
        params: parameters with heads, in millions; None until it is released.
        what_for: one line for the person who chooses.
        sha256: of ``model.safetensors``; kept here, so that a damaged folder cannot vouch for itself.
        config_sha256: of ``config.json``.
        folder: where its files lie.
    """

    name: str
    licence: str
    params: float | None
    what_for: str
    sha256: str
    config_sha256: str
    folder: Path

    @property
    def bundled(self) -> bool:
        """Whether this installation holds its files."""
        return (self.folder / WEIGHTS).is_file()

    @property
    def megabytes(self) -> float | None:
        """Size of the weights on disk in MB, or None where they are not bundled."""
        return (self.folder / WEIGHTS).stat().st_size / 1e6 if self.bundled else None


RELEASED: dict[str, ReleasedModel] = {
    entry.name: entry
    for entry in (
        ReleasedModel(
            name="agglo-lite",
            licence="Apache-2.0",
            params=5.5,
            what_for="embeddings, text search and dense features on a laptop (Lite0 taught by Lite2, ConSE and HOG)",
            sha256="d4beae4a01d9ad57a9843c97234f86e537332a85015ac692d827b510bba9d6ff",
            config_sha256="456e180f4d1e0cb6a3b0db8271cc23fd523464df26b849fce050cdc777eb4fef",
            folder=ASSETS / "agglo-lite",
        ),
    )
}
"""Every released model by name."""


def list_models() -> list[ReleasedModel]:
    """The released models, bundled ones first."""
    return sorted(RELEASED.values(), key=lambda model: (not model.bundled, model.name))


def load(name_or_path: str | Path = DEFAULT) -> Model:
    """Load a trained model.

    Args:
        name_or_path: a released name (``"agglo-lite"``); a folder that :meth:`agglo.Model.save` wrote; or a run folder.

    Returns:
        The model in eval mode, float32, on the CPU.

    Raises:
        ConfigError: no such model; the message offers the nearest names.
        AssetError: a released model is not bundled here, or its weights are not what their sha256 says.
    """
    return Model.load(locate(name_or_path))


def locate(name_or_path: str | Path) -> Path:
    """The folder of a model, its weights verified where it is a released one. Arguments and errors as :func:`load`."""
    text = str(name_or_path)
    if text in RELEASED:
        return _verified(RELEASED[text])
    path = Path(name_or_path).expanduser()
    if path.is_file():
        raise ConfigError(
            f"{path} is a file: name the folder that holds {CONFIG} and {WEIGHTS} (perhaps {path.parent})"
        )
    if not path.is_dir():
        raise ConfigError(f"no model {text!r}{nearest(text, {*RELEASED, *_neighbours(path)})}")
    for folder in (path, path / "model"):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    if (path / "recipe.yaml").is_file():
        raise ConfigError(
            f"{path} is a run that is not finished: "
            f"go on with `agglo train {path / 'recipe.yaml'} --out {path} --resume`"
        )
    raise ConfigError(f"{path} holds no model: it needs {CONFIG} and {WEIGHTS}, or model/ with both")


def _neighbours(path: Path) -> list[str]:
    """Folders beside a missing one that hold a model or a run, as the user would write them."""
    try:
        beside = [p for p in path.parent.iterdir() if any((p / n).exists() for n in (CONFIG, "model", "recipe.yaml"))]
    except OSError:
        return []
    return [str(path.parent / p.name) for p in sorted(beside)]


def _verified(entry: ReleasedModel) -> Path:
    if not entry.bundled:
        raise AssetError(
            f"{entry.name} is not bundled with this installation: reinstall agglo, or train a model with "
            "`agglo train quickstart` and name its run folder (--model runs/quickstart)"
        )
    for file, sha256 in ((WEIGHTS, entry.sha256), (CONFIG, entry.config_sha256)):
        verify(entry.folder / file, sha256 or "not recorded in agglo.zoo", "reinstall agglo")
    return entry.folder
