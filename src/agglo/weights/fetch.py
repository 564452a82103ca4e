"""Files of a repository on the Hugging Face hub, through its own client and cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from agglo.types import AssetError


def fetch(repo: str, files: Sequence[str], revision: str | None = None) -> Path:
    """Download the files of a repository, or find them in the local cache.

    All files come from one commit: the first one settles which. ``HF_HUB_OFFLINE``, ``HF_HOME`` and a login mean what
    they mean to every program that uses ``huggingface_hub``.

    Args:
        repo: ``"owner/name"``.
        files: paths inside the repository, at least one.
        revision: branch, tag or commit; None: the default branch.

    Returns:
        The local folder that holds the files under the same relative paths.

    Raises:
        ValueError: no file is asked for.
        AssetError: no network, no such repository or file, or no right to it; says which files to fetch by other means
            and where to put them.
    """
    if not files:
        raise ValueError(f"{repo}: name at least one file to fetch")
    import huggingface_hub as hub
    from huggingface_hub import errors

    # Errors of the HTTP client itself are no OSError in every version; the hub's module of errors imports their base.
    network = getattr(errors, "HTTPError", OSError)
    folder = Path()
    for file in files:
        try:
            local = Path(hub.hf_hub_download(repo, file, revision=revision))
        except (OSError, errors.EntryNotFoundError, errors.HFValidationError, network) as error:
            raise AssetError(_advice(repo, files, revision, _reason(file, error))) from error
        folder = local.parents[len(PurePosixPath(file).parts) - 1]
        revision = folder.name  # a snapshot is named by its commit
    return folder


def _reason(file: str, error: BaseException) -> str:
    """Why a download failed, in the user's terms."""
    from huggingface_hub import constants, errors

    # The order matters: a gated repository is also "not found", and both are failed requests.
    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated: accept its licence on its page, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return "there is no such repository, or it is private and you are not logged in (`hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        how = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return f"{how} and {file} is not in the local cache"
    if isinstance(error, errors.EntryNotFoundError):
        return f"it holds no file {file}"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{file} could not be downloaded ({first[:200]})"


def _advice(repo: str, files: Sequence[str], revision: str | None, reason: str) -> str:
    names = ", ".join(files)
    at = f" at {revision}" if revision else ""
    folder = repo.rpartition("/")[2]
    place = folder if len(files) > 1 else f"{folder}/{files[0]}"
    return (
        f"{repo} on the Hugging Face hub{at}: {reason}. Or fetch {names} from there on another machine "
        f"(`hf download {repo} {' '.join(files)} --local-dir {folder}`), put the folder anywhere on this one, and name "
        f'it: agglo.load("path/to/{place}")'
    )
