"""The folder that ``agglo segment`` writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from agglo.files import replacing, write_json
from agglo.segmentation.instances import Instances
from agglo.types import ConfigError

RESULTS = "results.json"


class ResultsFolder:
    """Masks and overlays, written image by image, and one file of COCO results.

    A context manager: the file is written at its end, also after Ctrl-C, with the images so far.

    Args:
        folder: created if needed.
        overwrite: whether earlier results, with their masks and overlays, may be replaced.

    Attributes:
        images: facts of the images so far: ``id``, ``file_name``, ``height``, ``width``.

    Raises:
        ConfigError: it holds results and ``overwrite`` is not set, or it is a file.
    """

    def __init__(self, folder: str | Path, *, overwrite: bool = False) -> None:
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is a file: name a folder with -o")
        if (self.folder / RESULTS).exists() and not overwrite:
            raise ConfigError(f"{self.folder / RESULTS} exists: use --overwrite, or another folder with -o")
        self._replaces = (self.folder / RESULTS).exists()
        self.images: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.categories: dict[str, int] = {}
        self._stems: set[str] = set()

    def __len__(self) -> int:
        """Number of instances."""
        return len(self.results)

    def __enter__(self) -> ResultsFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.images:
            self.write()

    def add(self, found: Instances, image: Image.Image, group: str = "") -> None:
        """Write the masks and the overlay of an image.

        Args:
            found: instances in it.
            image: the image.
            group: folder between ``masks`` or ``overlays`` and the image, for the frames of a video.
        """
        if self._replaces:
            for part in ("masks", "overlays"):
                shutil.rmtree(self.folder / part, ignore_errors=True)
            self._replaces = False
        number = len(self.images) + 1
        stem = str(Path(group) / Path(found.name).stem)
        stem = f"{stem}-{number}" if stem in self._stems else stem  # of two folders
        self._stems.add(stem)
        found.write_masks(self.folder / "masks" / stem)
        with replacing(self.folder / "overlays" / f"{stem}.png") as partial:
            found.overlay(image).save(partial, format="PNG")
        height, width = found.size
        self.images.append({"id": number, "file_name": found.name, "height": height, "width": width})
        self.results += found.coco(number, self.categories)

    def write(self) -> None:
        """Write ``results.json``, a list of COCO results, and ``images.json``."""
        categories = [{"id": number, "name": name} for name, number in self.categories.items()]
        write_json(self.folder / "images.json", {"images": self.images, "categories": categories})
        write_json(self.folder / RESULTS, self.results)
