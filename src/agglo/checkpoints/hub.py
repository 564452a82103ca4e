"""Whole models on the Hugging Face hub: fetched with all their shards, and pushed with their card."""

from __future__ import annotations

from pathlib import Path, PurePath

from agglo.files import read_json
from agglo.model.artefact import CARD, CONFIG, WEIGHTS
from agglo.types import AssetError, ConfigError
from agglo.weights.reading import fetch

INDEX = f"{WEIGHTS}.index.json"


def fetch_model(repo: str, revision: str | None = None) -> Path:
    """Download a model's configuration and weights, in one file or in shards, or find them in the local cache.

    Args:
        repo: ``owner/name``.
        revision: branch, tag or commit.

    Returns:
        A local folder.

    Raises:
        AssetError: no network, no such repository, or no model in it; says which files to fetch by other means.
    """
    try:
        return fetch(repo, [CONFIG, WEIGHTS], revision)
    except AssetError as whole:
        # The client tries again and again where there is no network: nobody shall wait for that twice.
        if not (_lacks_a_file(whole) or cached(repo, INDEX, revision)):
            raise
        try:
            folder = fetch(repo, [CONFIG, INDEX], revision)
        except AssetError:
            raise whole from None  # of the two, the usual layout is the one to tell about
    weight_map = read_json(folder / INDEX).get("weight_map")
    shards = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    if not shards or not all(isinstance(name, str) and PurePath(name).name == name for name in shards):
        raise AssetError(f"{repo}: {INDEX} names no shards, or some outside its folder; fetch nothing from there")
    return fetch(repo, [CONFIG, INDEX, *shards], folder.name)


def push_folder(folder: Path, repo: str, *, private: bool = False, message: str = "Upload model") -> str:
    """Upload a model's folder; the repository is made if need be.

    Args:
        folder: with configuration, weights and card.
        repo: ``owner/name``.
        private: whether a new repository is private.
        message: of the commit.

    Returns:
        Where it can be looked at.

    Raises:
        ConfigError: a name that is none, or a folder without a model.
        AssetError: no network, or no right to write there.
    """
    if repo.count("/") != 1:
        raise ConfigError(f"{repo!r} is no repository: name it owner/name")
    missing = [name for name in (CONFIG, WEIGHTS, CARD) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder} is no complete model: {', '.join(missing)} missing; write it with Model.save")
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        pushed = hub.upload_folder(repo_id=repo, folder_path=str(folder), commit_message=message)
    except (OSError, ValueError, errors.HfHubHTTPError, errors.LocalTokenNotFoundError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AssetError(
            f"{repo} could not be written ({reason}): see `hf auth whoami`, `hf auth login`; "
            f"or upload the folder {folder} by hand"
        ) from error
    return str(pushed)


def cached(repo: str, file: str, revision: str | None = None) -> bool:
    """Whether a file of a repository is in the local cache."""
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(repo, file, revision=revision), str)
    except errors.HFValidationError:
        return False


def _lacks_a_file(error: AssetError) -> bool:
    """Whether a repository was reached and had no such file."""
    from huggingface_hub import errors

    cause = error.__cause__
    return isinstance(cause, errors.EntryNotFoundError) and not isinstance(cause, errors.LocalEntryNotFoundError)
