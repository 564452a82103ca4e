"""Tensors that stay in their file until somebody asks for them."""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from agglo.types import AssetError


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name; names cost nothing, a tensor is read when its values are looked at."""

    @abstractmethod
    def release(self) -> None:
        """Let go of the file pages read so far.

        Tensors handed out before stay valid and keep their own pages. A reader that copies calls this now and then, so
        that the copies and the whole file are never in memory together.
        """

    @abstractmethod
    def shareable(self, dtype: torch.dtype | None) -> bool:
        """Whether every tensor can be used where it lies in the file, floating-point ones as ``dtype`` (None: any)."""

    def read_ahead(self, names: Iterable[str]) -> None:
        """Ask the system to begin reading what holds these tensors, as far as that is nearly all that it holds.

        Files whose other tensors nobody wants, and systems that cannot be asked, are read as their values are.
        """


MOST = 0.8
"""The share of a file that has to be wanted before all of it is read ahead."""


class Mapped(LazyTensors):
    """The tensors of one memory-mapped file.

    The mapping is private: writing to a tensor changes the process's own copy of its pages, never the file.

    Args:
        names: the keys.
        open_file: maps the file and returns what gets a tensor by name; called again after :meth:`release`.
        opened: what ``open_file`` has returned already, if it was called.
        path: the file, to be read ahead; None where it cannot be.
    """

    def __init__(
        self,
        names: Iterable[str],
        open_file: Callable[[], Callable[[str], Tensor]],
        opened: Callable[[str], Tensor] | None = None,
        path: Path | None = None,
    ) -> None:
        self._path = path
        self._names = dict.fromkeys(names)
        self._open = open_file
        self._get = opened

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._names:
            raise KeyError(key)
        if self._get is None:
            self._get = self._open()
        return self._get(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def release(self) -> None:
        self._get = None

    def shareable(self, dtype: torch.dtype | None) -> bool:
        return dtype is None or all(t.dtype == dtype for t in self.values() if t.is_floating_point())

    def read_ahead(self, names: Iterable[str]) -> None:
        if self._path is None or not hasattr(os, "posix_fadvise"):
            return
        wanted = sum(self[name].nbytes for name in names)
        with contextlib.suppress(OSError), self._path.open("rb") as file:  # not every file system takes advice
            if wanted >= MOST * os.fstat(file.fileno()).st_size:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


class Joined(LazyTensors):
    """The tensors of several files as one mapping.

    Args:
        homes: key → the file's tensors that hold it.
    """

    def __init__(self, homes: Mapping[str, LazyTensors]) -> None:
        self._homes = dict(homes)
        self._files = list({id(home): home for home in self._homes.values()}.values())

    def __getitem__(self, key: str) -> Tensor:
        return self._homes[key][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def __contains__(self, key: object) -> bool:
        return key in self._homes

    def release(self) -> None:
        for file in self._files:
            file.release()

    def shareable(self, dtype: torch.dtype | None) -> bool:
        return all(file.shareable(dtype) for file in self._files)

    def read_ahead(self, names: Iterable[str]) -> None:
        names = list(names)
        for file in self._files:
            file.read_ahead([name for name in names if self._homes[name] is file])


class Renamed(LazyTensors):
    """A checkpoint's tensors under other names, still lazy.

    Args:
        tensors: the source.
        names: their name → our name, or None for a tensor that is left out. A mapping keeps the names it does not
            hold, so that what nobody thought of shows up as unexpected; a function answers for every name.
        transform: ``(our name, tensor) → tensor``, applied to each renamed tensor when it is read.
        derived: our name → what computes it from the source (a reparametrised weight, three matrices in one).

    Raises:
        AssetError: two tensors would get one name.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        names: Mapping[str, str | None] | Callable[[str], str | None],
        *,
        transform: Callable[[str, Tensor], Tensor] | None = None,
        derived: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] | None = None,
    ) -> None:
        self._source = tensors
        self._transform = transform
        self._derived = dict(derived or {})
        self._theirs: dict[str, str] = {}
        for theirs in tensors:
            ours = names(theirs) if callable(names) else names.get(theirs, theirs)
            if ours is None:
                continue
            if ours in self._theirs or ours in self._derived:
                other = self._theirs.get(ours, "a derived tensor")
                raise AssetError(f"{theirs} and {other} would both be called {ours}: leave one of them out")
            self._theirs[ours] = theirs

    def __getitem__(self, key: str) -> Tensor:
        if key in self._derived:
            return self._derived[key](self._source)
        tensor = self._source[self._theirs[key]]
        return tensor if self._transform is None else self._transform(key, tensor)

    def __iter__(self) -> Iterator[str]:
        yield from self._theirs
        yield from self._derived

    def __len__(self) -> int:
        return len(self._theirs) + len(self._derived)

    def __contains__(self, key: object) -> bool:
        return key in self._theirs or key in self._derived

    def release(self) -> None:
        if isinstance(self._source, LazyTensors):
            self._source.release()

    def shareable(self, dtype: torch.dtype | None) -> bool:
        # A computed tensor is new memory while the pages that it came from are still mapped, so these are copied.
        computes = self._transform is not None or bool(self._derived)
        return not computes and (not isinstance(self._source, LazyTensors) or self._source.shareable(dtype))

    def read_ahead(self, names: Iterable[str]) -> None:
        if isinstance(self._source, LazyTensors):
            self._source.read_ahead([self._theirs[name] for name in names if name in self._theirs])
