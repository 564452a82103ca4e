"""Where a teacher's files are: a local folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from agglo.extras import require
from agglo.types import AssetError, ConfigError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What a checkpoint of transformers or timm keeps its weights in, best first; each may come as an index and shards."""

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Source:
    """The files of one checkpoint. All that come from the hub come from one commit: the first file settles which.

    Args:
        name: a folder, or ``OWNER/NAME`` on the hub (a prefix ``hf-hub:``, ``hf_hub:`` or ``local-dir:`` is understood,
            and ``@REVISION`` behind the name).
        where: whose key it is, for messages ("teachers.transformers").
        revision: branch, tag or commit; None for the default branch.
        known: names to offer when this one does not exist.
        gated: names whose licence must be accepted before anything can be fetched.

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
        if self.local:
            self._check_folder()
            return
        self.name, _, revision = self.name.partition("@")
        self.revision = revision or self.revision
        if not _NAME.fullmatch(self.name) or self.name.startswith("."):
            raise ConfigError(
                f"{where}: {name!r} is neither a folder that exists nor OWNER/NAME on the hub{self._nearest()}"
            )

    def _check_folder(self) -> None:
        if self.folder.is_file():
            raise ConfigError(f"{self.where}: {self.name} is a file: name the folder that holds it")
        if not self.folder.is_dir():
            raise ConfigError(f"{self.where}: there is no folder {self.name}")

    @property
    def label(self) -> str:
        """What to call it in a message."""
        return str(self.folder) if self.local else self.name

    def find(self, file: str) -> Path | None:
        """The local path of one file, fetched where it has to be; None where the checkpoint has no such file.

        Raises:
            ConfigError: no such repository or revision.
            AssetError: the repository is gated or the hub cannot be reached; says what to do.
        """
        if self.local:
            path = self.folder / file
            return path if path.is_file() else None
        hub = require("huggingface_hub", "teachers")
        errors = require("huggingface_hub.errors", "teachers")
        try:
            path = Path(hub.hf_hub_download(self.name, file, revision=self.revision))
        except errors.EntryNotFoundError as error:
            if isinstance(error, errors.LocalEntryNotFoundError):
                raise self.refusal(file, error) from error
            return None
        except Exception as error:  # refused, gone, or whatever a proxy, a firewall or a full disk makes of it
            raise self.refusal(file, error) from error
        self.folder = path.parents[len(PurePosixPath(file).parts) - 1]
        self.revision = self.folder.name  # a snapshot is named by its commit
        return path

    def need(self, file: str) -> Path:
        """As :meth:`find`, for a file that must be there.

        Raises:
            AssetError: it is not.
        """
        path = self.find(file)
        if path is None:
            raise AssetError(f"{self.where}: {self.label} holds no {file}. {self._advice((file,))}")
        return path

    def json(self, file: str) -> dict[str, Any]:
        """The content of a JSON file; empty where there is none.

        Raises:
            AssetError: it is not a JSON mapping.
        """
        path = self.find(file)
        if path is None:
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise AssetError(f"{path}: not JSON ({error}); fetch it again") from error
        if not isinstance(content, dict):
            raise AssetError(f"{path}: holds a {type(content).__name__}, not a mapping; fetch it again")
        return content

    def weights(self, files: Sequence[str] = WEIGHTS) -> Path:
        """The first of ``files`` that is there, or the index of its shards; everything is on this disk afterwards.

        Raises:
            AssetError: no weights, or a shard is missing.
        """
        for file in files:
            path = self.find(file)
            if path is not None:
                return path
            index = self.find(f"{file}.index.json")
            if index is None:
                continue
            shards = self.json(index.name).get("weight_map")
            if not isinstance(shards, dict) or not all(Path(str(shard)).name == shard for shard in shards.values()):
                raise AssetError(f"{index}: its weight_map does not name files beside it; fetch it again")
            for shard in sorted(set(shards.values())):
                self.need(shard)
            return index
        raise AssetError(f"{self.where}: {self.label} holds no weights. {self._advice(files)}")

    # --- what went wrong, and the next move ---------------------------------------------------------------------------

    def page(self) -> str:
        """The address of the repository's page, where a licence is accepted."""
        endpoint = require("huggingface_hub.constants", "teachers").ENDPOINT
        return f"{endpoint}/{self.name}"

    def refusal(self, file: str, error: Exception) -> AssetError | ConfigError:
        """What to tell of a file that the hub did not give, from what went wrong."""
        errors = require("huggingface_hub.errors", "teachers")
        # The order matters: a gated repository is also "not found", and both are failed requests.
        if isinstance(error, errors.GatedRepoError):
            return AssetError(
                f"{self.where}: {self.name} is gated. Accept its licence on {self.page()}, then set the environment "
                "variable HF_TOKEN to a token of that account (or run `hf auth login`)"
            )
        if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            return ConfigError(
                f"{self.where}: there is no repository {self.name!r} on the hub. If it is private, set the environment "
                f"variable HF_TOKEN (or run `hf auth login`){self._nearest()}"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return ConfigError(f"{self.where}: {self.name} has no revision {self.revision!r}; leave `revision:` out")
        if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | ConnectionError):
            return AssetError(self._unreachable(file))
        return AssetError(
            f"{self.where}: {file} of {self.name} cannot be fetched ({type(error).__name__}: {error}). "
            f"{self._advice((file,))}"
        )

    def _nearest(self) -> str:
        """The published names that come nearest, three at most: there are too many to list them all."""
        close = difflib.get_close_matches(self.name, self.known, n=3, cutoff=0.0)
        if not close:
            return ""
        if difflib.get_close_matches(self.name, close, n=1, cutoff=0.6):
            return f"; did you mean {close[0]!r}? (near it: {', '.join(close[1:])})"
        return f"; the nearest names that agglo knows: {', '.join(close)}"

    def _unreachable(self, file: str) -> str:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        close = difflib.get_close_matches(self.name, self.known, n=1, cutoff=0.6)
        typo = f" (did you mean {close[0]!r}?)" if close and self.name not in self.known else ""
        licence = ""
        if self.name in self.gated:
            licence = f" (it is gated: accept its licence on {self.page()} first, and set HF_TOKEN there)"
        return (
            f"{self.where}: {why}, and {file} of {self.name}{typo} is not in the local cache. "
            f"{self._advice((file,))}{licence}. "
            "`weights: random` builds the architecture without weights, where only its size or speed matters"
        )

    def _advice(self, files: Sequence[str]) -> str:
        if self.local:
            return f"Put {' or '.join(files)} into {self.folder}"
        return (
            f"Where there is a network, run `hf download {self.name} --local-dir FOLDER`, and name that folder: "
            "`model: FOLDER`"
        )
