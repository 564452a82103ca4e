"""Reading images ahead of their use, in threads. What is read, and in which order, does not depend on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from PIL import Image

from agglo.config import build
from agglo.sources.base import Source
from agglo.types import ConfigError


class ReadAhead:
    """``source.read``, while threads read the images that come next.

    Args:
        source: whose images; safe in several threads, as every source is.
        pool: the threads.
        depth: how many images ahead.
    """

    def __init__(self, source: Source, pool: ThreadPoolExecutor, depth: int) -> None:
        self._read: Callable[[int], Image.Image] = source.read
        self._count = len(source)
        self._pool = pool
        self._depth = depth
        self._waiting: dict[int, Future[Image.Image]] = {}

    def __call__(self, index: int) -> Image.Image:
        """The image; raises what reading it raised."""
        own = self._waiting.pop(index, None)
        window = range(index + 1, min(self._count, index + 1 + self._depth))
        for stale in [at for at in self._waiting if at not in window]:
            self._waiting.pop(stale).cancel()
        for at in window:
            if at not in self._waiting:
                self._waiting[at] = self._pool.submit(self._read, at)
        return self._read(index) if own is None else own.result()


class Opened(dict[str, Source]):
    """Sources by their options as JSON, each built when first asked for, and read ahead by ``workers`` threads."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        if workers < 0:
            raise ConfigError(f"workers is a number of threads, 0 for none beside the main one; got {workers}")
        self.workers = workers
        self._pool = ThreadPoolExecutor(workers, "agglo-read") if workers else None

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (isinstance(key, str) and key.startswith("{"))

    def __missing__(self, key: str) -> Source:
        options = json.loads(key)
        source = build("sources", options)
        if not isinstance(source, Source):
            raise ConfigError(f"{options} is no source of images")
        if self._pool is not None:
            # On the object, not in a wrapper: evals ask a source for much besides its images, by its class too.
            setattr(source, "read", ReadAhead(source, self._pool, 4 * self.workers))  # noqa: B010
        self[key] = source
        return source

    def close(self) -> None:
        """Let the threads go."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
