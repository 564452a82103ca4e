"""The Hugging Face hub: downloads, cache lookups and uploads. No other module imports ``huggingface_hub``.

``HF_HUB_OFFLINE``, ``HF_HOME``, ``HF_TOKEN`` and a login have their usual meaning.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from agglo.types import AssetError, ConfigError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

FORMATS = (WEIGHTS, "pytorch_model.bin")
"""Weight files of transformers and timm, in order of preference; each may be an index and shards instead."""

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class DownloadError(AssetError):
    """A file could not be downloaded.

    Args:
        reason: ``gated``, ``repository``, ``revision``, ``file`` (not in the repository), ``unreachable`` or ``other``.
        message: the cause, and what to do.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def download(repo: str, file: str, revision: str | None = None, **options: Any) -> tuple[Path, Path]:
    """Download a file, or find it in the local cache.

    Args:
        repo: ``owner/name``.
        file: path inside the repository.
        revision: branch, tag or commit; None for the default branch.
        options: of ``huggingface_hub.hf_hub_download``.

    Returns:
        Local paths of the file and of its snapshot folder, which is named after the commit.

    Raises:
        DownloadError: with the client's error as its cause.
    """
    import huggingface_hub

    try:
        path = Path(huggingface_hub.hf_hub_download(repo, file, revision=revision, **options))
    except Exception as error:  # a refusal, or anything a proxy, a firewall or a full disk causes
        raise DownloadError(*_diagnosis(error, repo, file, revision)) from error
    return path, path.parents[len(PurePosixPath(file).parts) - 1]


def _diagnosis(error: Exception, repo: str, file: str, revision: str | None) -> tuple[str, str]:
    """Reason and message of a failed download."""
    from huggingface_hub import constants, errors

    # The order matters: a gated repository is also "not found", and both are failed requests.
    if isinstance(error, errors.GatedRepoError):
        return "gated", (
            f"the repository is gated: accept its licence on {_page(repo)}, then set the environment variable HF_TOKEN "
            "to a token of that account (or run `hf auth login`)"
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return "repository", (
            "no such repository on the hub. If it is private, set the environment variable HF_TOKEN "
            "(or run `hf auth login`)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "revision", f"no revision {revision!r}"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | ConnectionError):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return "unreachable", f"{why} and {file} is not in the local cache"
    if isinstance(error, errors.EntryNotFoundError):
        return "file", f"no file {file}"
    first = (str(error).strip() or "no message").splitlines()[0]
    return "other", f"{file} cannot be downloaded ({type(error).__name__}: {first[:200]})"


def _page(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def fetch(repo: str, files: Sequence[str], revision: str | None = None) -> Path:
    """Download files of one commit, or find them in the local cache; return the snapshot folder.

    Raises:
        ValueError: ``files`` is empty.
        DownloadError: names the files and how to provide them by other means.
    """
    if not files:
        raise ValueError(f"{repo}: name at least one file to download")
    folder = Path()
    for file in files:
        try:
            _, folder = download(repo, file, revision)
        except DownloadError as error:
            at = f" at {revision}" if revision else ""
            target = repo.rpartition("/")[2]
            place = target if len(files) > 1 else f"{target}/{files[0]}"
            raise DownloadError(
                error.reason,
                f"{repo} on the Hugging Face hub{at}: {error}. Or download {', '.join(files)} on another machine "
                f"(`hf download {repo} {' '.join(files)} --local-dir {target}`), copy the folder to this one, and load "
                f'it by its path: agglo.load("path/to/{place}")',
            ) from error
        revision = folder.name
    return folder


def fetch_model(repo: str, revision: str | None = None) -> Path:
    """Download ``config.json`` and the weights, in one file or in shards; return the snapshot folder.

    Raises:
        AssetError: as :func:`fetch`; or the index of the shards is invalid.
    """
    try:
        return fetch(repo, [CONFIG, WEIGHTS], revision)
    except DownloadError as whole:
        # Without a network the client retries for half a minute per file: do not wait for that twice.
        if whole.reason != "file" and not cached(repo, INDEX, revision):
            raise
        try:
            folder = fetch(repo, [CONFIG, INDEX], revision)
        except DownloadError:
            raise whole from None
    shards = weight_map(read_json(folder / INDEX), folder / INDEX)
    return fetch(repo, [CONFIG, INDEX, *sorted(set(shards.values()))], folder.name)


def cache_folder() -> str:
    """Where the client keeps downloaded files."""
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def cached(repo: str, file: str, revision: str | None = None) -> bool:
    """Whether a file of a repository is in the local cache."""
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(repo, file, revision=revision), str)
    except errors.HFValidationError:
        return False


def push_folder(folder: Path, repo: str, *, private: bool = False, manual: str = "") -> str:
    """Upload a folder as one commit and return its URL; the repository is created if needed.

    Args:
        folder: the folder.
        repo: ``owner/name``.
        private: whether a new repository is private.
        manual: what to do without network, in errors; by default to upload the folder by hand.

    Raises:
        ConfigError: ``repo`` is not ``owner/name``.
        AssetError: no network, or no write access.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    if repo.count("/") != 1:
        raise ConfigError(f"{repo!r} is not the name of a repository; use owner/name")
    manual = manual or f"upload the folder {folder} by hand"
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Upload model"))
    except Exception as error:  # a refusal, or anything a proxy, a firewall or a missing network causes
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise AssetError(f"{repo} cannot be written (HF_HUB_OFFLINE is set): unset it, or {manual}") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AssetError(
            f"{repo} cannot be written ({reason}): check `hf auth whoami`, run `hf auth login`, or {manual}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        AssetError: the file is not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AssetError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise AssetError(f"{path}: expected a JSON object, got {type(content).__name__}; download it again")
    return content


def weight_map(content: Mapping[str, Any], index: Path) -> dict[str, str]:
    """Tensor name to shard file, from the content of an index of shards.

    Raises:
        AssetError: the mapping is missing, or names files outside the folder of the index.
    """
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise AssetError(f"{index}: no weight_map of tensor names to files; download it again")
    if outside := sorted({name for name in shards.values() if PurePath(name).name != name or "\\" in name}):
        raise AssetError(
            f"{index}: weight_map names files outside its folder ({', '.join(outside[:10])}); download it again from a "
            "trusted source"
        )
    return shards


class ModelFiles:
    """The files of one model: a local folder, or a repository of the hub at the commit of the first file.

    Args:
        name: a folder, or ``OWNER/NAME`` on the hub, optionally with a prefix ``hf-hub:``, ``hf_hub:`` or
            ``local-dir:`` and a suffix ``@REVISION``.
        where: recipe key, for messages (``teachers.transformers``).
        revision: branch, tag or commit; None for the default branch.
        known: names to suggest when this one does not exist.
        gated: names whose licence must be accepted before a download.

    Raises:
        ConfigError: neither a folder nor the form of a name on the hub.
    """

    def __init__(
        self, name: str, where: str, revision: str | None = None, known: Iterable[str] = (), gated: Iterable[str] = ()
    ) -> None:
        self.where, self.known, self.gated = where, tuple(known), frozenset(gated)
        scheme, colon, rest = name.partition(":")
        scheme = scheme.replace("_", "-").lower()
        self.name = rest if colon and scheme in ("hf-hub", "local-dir") else name
        self.folder = Path(self.name).expanduser()
        self.local = scheme == "local-dir" or (scheme != "hf-hub" and self.folder.exists())
        self.revision = revision
        self._unreachable = ""  # message of the first download that failed for lack of a network
        if self.local:
            if self.folder.is_file():
                raise ConfigError(f"{where}: {self.name} is a file; name its folder ({self.folder.parent})")
            if not self.folder.is_dir():
                raise ConfigError(f"{where}: no folder {self.name}")
            return
        self.name, _, revision = self.name.partition("@")
        self.revision = revision or self.revision
        if not _NAME.fullmatch(self.name) or self.name.startswith("."):
            raise ConfigError(
                f"{where}: {name!r} is neither a folder that exists nor OWNER/NAME on the hub{self._nearest()}"
            )

    @property
    def label(self) -> str:
        """Folder or repository name, for messages."""
        return str(self.folder) if self.local else self.name

    def find(self, file: str) -> Path | None:
        """The local path of a file, downloaded if needed; None if the file does not exist or cannot be reached.

        Raises:
            ConfigError: no such repository or revision.
            AssetError: the repository is gated, or the download failed.
        """
        if self.local:
            path = self.folder / file
            return path if path.is_file() else None
        options = {"local_files_only": True} if self._unreachable else {}  # the client retries for half a minute
        try:
            path, self.folder = download(self.name, file, self.revision, **options)
        except DownloadError as error:
            if error.reason not in ("file", "unreachable"):
                raise self._refusal(error, file) from error
            if error.reason == "unreachable":
                self._unreachable = self._unreachable or str(error)
            return None
        self.revision = self.folder.name
        return path

    def need(self, file: str) -> Path:
        """As :meth:`find`, for a required file.

        Raises:
            AssetError: it is missing or cannot be reached.
        """
        path = self.find(file)
        if path is None:
            raise self.missing(file)
        return path

    def json(self, file: str) -> dict[str, Any]:
        """The content of a JSON file, empty if there is none; errors as :meth:`find` and :func:`read_json`."""
        path = self.find(file)
        return {} if path is None else read_json(path)

    def weights(self, files: Sequence[str] = FORMATS) -> Path:
        """The first of ``files`` that exists, or the index of its shards, which are then local too.

        Raises:
            AssetError: no weights, or a missing shard.
        """
        for file in files:
            path = self.find(file)
            if path is not None:
                return path
            index = self.find(f"{file}.index.json")
            if index is not None:
                for shard in sorted(set(weight_map(read_json(index), index).values())):
                    self.need(shard)
                return index
        raise self.missing(*files, what="weights")

    def missing(self, *files: str, what: str = "", note: str = "") -> AssetError:
        """The error for ``files`` of which none was found: what is missing, why, and what to do."""
        if not self._unreachable:
            return AssetError(f"{self.where}: {self.label} holds no {what or files[0]}{note}. {self.advice(files)}")
        close = difflib.get_close_matches(self.name, self.known, n=1, cutoff=0.6)
        typo = f" (did you mean {close[0]!r}?)" if close and self.name not in self.known else ""
        licence = ""
        if self.name in self.gated:
            licence = f" It is gated: accept its licence on {_page(self.name)} first, and set HF_TOKEN there."
        return AssetError(f"{self.where}: {self.name}{typo}: {self._unreachable}.{licence} {self.advice(files)}")

    def advice(self, files: Sequence[str]) -> str:
        """How the user can provide ``files``."""
        if self.local:
            return f"Put {' or '.join(files)} into {self.folder}"
        random = "; or use `weights: random` if only size and speed matter" if self._unreachable else ""
        return (
            f"On a machine with a network, run `hf download {self.name} --local-dir FOLDER`, then use `model: FOLDER`"
            f"{random}"
        )

    def refusal(self, file: str, error: Exception) -> AssetError | ConfigError:
        """The error to raise for a failed download of ``file`` by another library."""
        return self._refusal(DownloadError(*_diagnosis(error, self.name, file, self.revision)), file)

    def _refusal(self, error: DownloadError, file: str) -> AssetError | ConfigError:
        message = f"{self.where}: {self.name}: {error}"
        if error.reason == "repository":
            return ConfigError(f"{message}{self._nearest()}")
        if error.reason == "revision":
            return ConfigError(f"{message}; leave `revision:` out for the default branch")
        return AssetError(message if error.reason == "gated" else f"{message}. {self.advice((file,))}")

    def _nearest(self) -> str:
        """At most three suggestions: the list of all known names is too long."""
        close = difflib.get_close_matches(self.name, self.known, n=3, cutoff=0.0)
        if not close:
            return ""
        if difflib.get_close_matches(self.name, close, n=1, cutoff=0.6):
            return f"; did you mean {close[0]!r}? (also: {', '.join(close[1:])})"
        return f"; the nearest known names: {', '.join(close)}"
