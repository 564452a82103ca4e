"""Photographs shipped in the wheels of scikit-image and scikit-learn."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from agglo.decoding import decode
from agglo.extras import install_command
from agglo.sources.base import Source
from agglo.types import ConfigError, MissingExtraError
from agglo.weights.bundled import verify

_FOLDERS = {"skimage": ("data",), "sklearn": ("datasets", "images")}
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


@dataclass(frozen=True, slots=True)
class Photo:
    """One photograph.

    Args:
        name: the source names it ``photos/<name>``.
        file: file name in the package's image folder.
        sha256: of the file.
        licence: terms and origin, as stated by its package.
        query: a text query for it.
        heldout: excluded from training; near duplicates are in the same split.
        package: ``skimage`` or ``sklearn``.
    """

    name: str
    file: str
    sha256: str
    licence: str
    query: str
    heldout: bool
    package: str = "skimage"


_UNSTATED = "no licence or origin stated by scikit-image"
_MIDDLEBURY = "Middlebury 2014 stereo benchmark, Nesic et al.; no licence stated"
_BY = "CC BY 2.0, "
_TRAIN, _HELDOUT = False, True

# fmt: off
PHOTOS: tuple[Photo, ...] = (
    Photo("astronaut", "astronaut.png", "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
          "public domain, NASA Great Images", "an astronaut", _TRAIN),
    Photo("brick", "brick.png", "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
          "CC0, cc0textures.com Bricks25", "a brick wall", _HELDOUT),
    Photo("camera", "camera.png", "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
          "CC0, Lav Varshney", "a man with a camera", _HELDOUT),
    Photo("cell", "cell.png", "8d23a7fb81f7cc877cd09f330357fc7f595651306e84e17252f6e0a1b3f61515",
          "CC0, Paul Müller et al. 2018, doi:10.1364/OE.26.010729", "a round cell under a microscope", _TRAIN),
    Photo("chelsea", "chelsea.png", "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
          "CC0, Stefan van der Walt", "a cat", _HELDOUT),
    Photo("china", "china.jpg", "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
          _BY + "danielbuechele, flickr.com/photos/danielbuechele/6061409035", "a temple", _HELDOUT,
          "sklearn"),
    Photo("clock_motion", "clock_motion.png", "f029226b28b642e80113d86622e9b215ee067a0966feaf5e60604a1e05733955",
          "public domain, Stefan van der Walt", "a clock", _TRAIN),
    Photo("coffee", "coffee.png", "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
          "CC0, Rachel Michetti, Pikolo Espresso Bar", "a cup of coffee", _HELDOUT),
    Photo("coins", "coins.png", "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
          "no known copyright restrictions, Brooklyn Museum", "old coins", _HELDOUT),
    Photo("flower", "flower.jpg", "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
          _BY + "vultilion, flickr.com/photos/vultilion/6056698931", "a flower", _HELDOUT, "sklearn"),
    Photo("grass", "grass.png", "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
          "CC0, linolafett, deviantart.com Grass-01", "grass on the ground", _TRAIN),
    Photo("gravel", "gravel.png", "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
          "CC0, cc0textures.com Gravel04", "gravel, many small stones", _TRAIN),
    Photo("hubble_deep_field", "hubble_deep_field.jpg",
          "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
          "public domain, NASA, HubbleSite 2012-37", "stars and galaxies in the night sky", _TRAIN),
    Photo("ihc", "ihc.png", "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
          "no known copyright restrictions, CMMI", "stained tissue under a microscope", _TRAIN),
    Photo("microaneurysms", "microaneurysms.png", "a1e1be59aa447f8ce082f7fa809997ab369a2b137cb6c4202abc647c7ccf6456",
          "CC0, Andreas Maier, High-Resolution Fundus database", "blood vessels of an eye, close up", _TRAIN),
    Photo("moon", "moon.png", "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577",
          _UNSTATED, "the surface of the moon with craters", _TRAIN),
    Photo("motorcycle_left", "motorcycle_left.png", "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
          _MIDDLEBURY, "a motorcycle", _HELDOUT),
    Photo("motorcycle_right", "motorcycle_right.png",
          "5fc913ae870e42a4b662314bc904d1786bcad8e2f0b9b67dba5a229406357797",
          _MIDDLEBURY, "a motorcycle", _HELDOUT),
    Photo("page", "page.png", "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3",
          _UNSTATED, "a page of text", _HELDOUT),
    Photo("retina", "retina.jpg", "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
          "CC0, Mikael Häggström 2014, doi:10.15347/wjm/2014.008", "the retina of a human eye", _TRAIN),
    Photo("rocket", "rocket.jpg", "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
          "public domain, SpaceX, flickr.com/photos/spacexphotos/16511594820", "a rocket", _HELDOUT),
    Photo("text", "text.png", "bd84aa3a6e3c9887850d45d606c96b2e59433fbef50338570b63c319e668e6d1",
          "public domain, en.wikipedia.org Corner.png", "handwriting on squared paper", _TRAIN),
)
# fmt: on


class Photos(Source):
    """The photographs of :data:`PHOTOS`, read from the installed packages without importing them.

    Each file is checked against its sha256 on first use.

    Args:
        split: ``train``, ``heldout`` (not used to train in the bundled recipes; text search is evaluated on them) or
            ``all``.

    Raises:
        ConfigError: no such split.
        MissingExtraError: scikit-image or scikit-learn is not installed.
    """

    def __init__(self, *, split: str = "train") -> None:
        if split not in ("train", "heldout", "all"):
            raise ConfigError(f"source photos: no split {split!r}; choose from: train, heldout, all")
        self.photos = tuple(p for p in PHOTOS if split == "all" or p.heldout == (split == "heldout"))
        folders = {package: _folder(package) for package in sorted({p.package for p in self.photos})}
        self._paths = tuple(folders[p.package] / p.file for p in self.photos)

    def __len__(self) -> int:
        return len(self.photos)

    def name(self, index: int) -> str:
        return f"photos/{self.photos[index].name}"

    def query(self, index: int) -> str:
        """A text query for the photo; near duplicates share one."""
        return self.photos[index].query

    def read(self, index: int) -> Image.Image:
        """The photo, decoded.

        Raises:
            AssetError: the installed file is missing or differs.
        """
        photo, file = self.photos[index], self._paths[index]
        verify(file, photo.sha256, f"pip install --force-reinstall {_DISTRIBUTIONS[photo.package]}")
        return decode(file, self.name(index))


def _folder(package: str) -> Path:
    """The image folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"source photos needs {_DISTRIBUTIONS[package]}; install it with: {install_command('quickstart')}"
        )
    return Path(next(iter(spec.submodule_search_locations))).joinpath(*_FOLDERS[package])
