"""Mappings of tensors that are read from their files on access."""

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
    """Tensors by name, each read when it is accessed."""

    @abstractmethod
    def release(self) -> None:
        """Release the file pages read so far; tensors returned before stay valid and keep their own pages.

        A reader that copies calls this regularly, so that copies and file are never in memory together.
        """

    @abstractmethod
    def shareable(self, dtype: torch.dtype | None) -> bool:
        """Whether every tensor can be used in the mapped file, floating-point ones as ``dtype`` (None: any)."""

    def read_ahead(self, names: Iterable[str]) -> None:
        """Ask the system to prefetch each file of which these tensors are at least :data:`PREFETCH_SHARE`."""


PREFETCH_SHARE = 0.8
"""Share of a file that must be requested before all of it is prefetched."""


class Mapped(LazyTensors):
    """The tensors of one memory-mapped file.

    The mapping is private: writing to a tensor changes the process's own copy of its pages, never the file.

    Args:
        names: the keys.
        open_file: maps the file and returns a function from name to tensor; called again after :meth:`release`.
        opened: the result of an earlier call of ``open_file``.
        path: the file, for prefetching; None to disable it.
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
        with contextlib.suppress(OSError), self._path.open("rb") as file:  # not every file system supports it
            if wanted >= PREFETCH_SHARE * os.fstat(file.fileno()).st_size:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


class Joined(LazyTensors):
    """The tensors of several files as one mapping.

    Args:
        homes: key → tensors of the file that contains it.
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
        names: old name → new name, or None to drop the tensor. A mapping keeps names that it lacks, so that they are
            reported as unexpected; a function decides about every name.
        transform: ``(new name, tensor) → tensor``, applied to each renamed tensor when it is read.
        derived: new name → function that computes it from the source (a reparametrised weight, a fused matrix).

    Raises:
        AssetError: two tensors get the same name.
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
        self._old: dict[str, str] = {}
        for old in tensors:
            new = names(old) if callable(names) else names.get(old, old)
            if new is None:
                continue
            if new in self._old or new in self._derived:
                raise AssetError(f"{old} and {self._old.get(new, 'a derived tensor')} are both renamed to {new}")
            self._old[new] = old

    def __getitem__(self, key: str) -> Tensor:
        if key in self._derived:
            return self._derived[key](self._source)
        tensor = self._source[self._old[key]]
        return tensor if self._transform is None else self._transform(key, tensor)

    def __iter__(self) -> Iterator[str]:
        yield from self._old
        yield from self._derived

    def __len__(self) -> int:
        return len(self._old) + len(self._derived)

    def __contains__(self, key: object) -> bool:
        return key in self._old or key in self._derived

    def release(self) -> None:
        if isinstance(self._source, LazyTensors):
            self._source.release()

    def shareable(self, dtype: torch.dtype | None) -> bool:
        # Computed tensors are new memory while their source pages are still mapped, so the others are copied too.
        computes = self._transform is not None or bool(self._derived)
        return not computes and (not isinstance(self._source, LazyTensors) or self._source.shareable(dtype))

    def read_ahead(self, names: Iterable[str]) -> None:
        if isinstance(self._source, LazyTensors):
            self._source.read_ahead([self._old[name] for name in names if name in self._old])
