"""The folder that ``agglo segment`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from agglo.files import replacing, write_json
from agglo.segmentation.instances import Instances
from agglo.types import ConfigError

RESULTS = "results.json"


class ResultsFolder:
    """Masks and overlays, written image by image, and one file of COCO results.

    Args:
        folder: created if needed.
        overwrite: whether an earlier ``results.json`` may be replaced.

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
        self.images: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.categories: dict[str, int] = {}
        self._stems: set[str] = set()

    def add(self, found: Instances, image: Image.Image) -> None:
        """Write the masks and the overlay of an image."""
        number = len(self.images) + 1
        stem = Path(found.name).stem
        stem = f"{stem}-{number}" if stem in self._stems else stem  # of two folders
        self._stems.add(stem)
        found.write_masks(self.folder / "masks" / stem)
        with replacing(self.folder / "overlays" / f"{stem}.png") as partial:
            found.overlay(image).save(partial, format="PNG")
        height, width = found.size
        self.images.append({"id": number, "file_name": found.name, "height": height, "width": width})
        self.results += found.coco(number, self.categories)

    def write(self) -> int:
        """Write ``results.json``, a list of COCO results, and ``images.json``; the number of instances."""
        categories = [{"id": number, "name": name} for name, number in self.categories.items()]
        write_json(self.folder / "images.json", {"images": self.images, "categories": categories})
        write_json(self.folder / RESULTS, self.results)
        return len(self.results)
