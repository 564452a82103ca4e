"""Released models as data: location, licence, size and purpose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agglo.checkpoints.radio import Release
from agglo.model.artefact import WEIGHTS

ASSETS = Path(__file__).parent.parent / "assets"

OPEN_MODEL = "NVIDIA Open Model License"
"""Commercial use allowed."""
NON_COMMERCIAL = "NSCLv1, non-commercial"


@dataclass(frozen=True, slots=True)
class ReleasedModel:
    """A trained student that ships with the package.

    Args:
        name: for :func:`agglo.load`.
        licence: SPDX expression of the weights.
        params: parameters with heads, in millions; None until it is released.
        what_for: purpose, in one line.
        sha256: of ``model.safetensors``.
        config_sha256: of ``config.json``.
        folder: location of its files.
    """

    name: str
    licence: str
    params: float | None
    what_for: str
    sha256: str
    config_sha256: str
    folder: Path

    @property
    def bundled(self) -> bool:
        """Whether this installation contains its files."""
        return (self.folder / WEIGHTS).is_file()

    @property
    def megabytes(self) -> float | None:
        """Size of the weights on disk in MB, or None if they are not bundled."""
        return (self.folder / WEIGHTS).stat().st_size / 1e6 if self.bundled else None


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model of NVIDIA, downloaded from the Hugging Face hub at its first use.

    Args:
        name: NVIDIA's version name, for :func:`agglo.load`.
        licence: of the weights.
        params: of the trunk and its position table, without heads, in millions.
        what_for: purpose, in one line.
        repo: ``owner/name`` on the Hugging Face hub.
        file: the torch.hub pickle, if the repository has no safetensors; else None.
        pickle: file name of its torch.hub pickle, or None.
        copy_aligns: whether the code in its Hugging Face repository still resizes positions with ``align_corners``,
            unlike torch.hub's since July 2025.
        architecture: official name of the trunk.
        patch: side of a patch, or stride of the map, in pixels.
        teachers: those with heads.
        release: facts that the checkpoint lacks.
        registers: tokens beside the class tokens.
    """

    name: str
    licence: str
    params: float
    what_for: str
    repo: str
    file: str | None
    pickle: str | None
    copy_aligns: bool
    architecture: str
    patch: int
    teachers: tuple[str, ...]
    release: Release
    registers: int = 4

    @property
    def bundled(self) -> bool:
        """Always False: the licences do not allow it."""
        return False

    @property
    def megabytes(self) -> float:
        """Estimated size of the download in MB; see :data:`SIZES_ASSUME`."""
        half = any(mark in (self.pickle or "") for mark in ("half", "bf16"))
        return (2 if half else 4) * self.params


SIZES_ASSUME = (
    "Estimated downloads: trunk and position table, at 2 bytes per weight if the name of the torch.hub file contains "
    "half or bf16, else 4; without heads."
)
"""How :attr:`HubModel.megabytes` is computed."""

TEXT_ALIGNED = ("clip", "siglip", "siglip2-g")
"""Teachers of NVIDIA's releases with a text tower."""

_V2 = ("clip", "dino_v2", "sam")
_V25 = ("clip", "siglip", "dino_v2", "sam")
_V3 = ("clip", "siglip2-g", "dino_v2", "sam")
_V4 = ("siglip2-g", "dino_v3", "sam3")


def _hub(
    name: str, params: float, what_for: str, repo: str, architecture: str, teachers: tuple[str, ...], *,
    file: str | None = None, pickle: str | None = None, patch: int = 16, preferred: int = 768, largest: int = 2048,
    num_global: int = 4, num_windowed: int | None = None, copy_aligns: bool = False,
) -> HubModel:  # fmt: skip
    licence = OPEN_MODEL if name.startswith("c-radio") else NON_COMMERCIAL
    release = Release(preferred, largest, num_global, num_windowed, False, licence)
    registers = 7 if teachers is _V4 else 4
    return HubModel(
        name, licence, params, what_for, repo, file, pickle or file, copy_aligns, architecture, patch, teachers,
        release, registers,
    )  # fmt: skip


HUB: dict[str, HubModel] = {
    model.name: model
    for model in (
        _hub("c-radio_v4-h", 652, "NVIDIA's strongest: zero-shot, dense features, SAM3", "nvidia/C-RADIOv4-H",
             "vit_huge_patch16_224", _V4, preferred=512,
             pickle="c-radio_v4-h_half.pth.tar"),
        _hub("c-radio_v4-so400m", 431, "nearly as good as -h at two thirds of its cost", "nvidia/C-RADIOv4-SO400M",
             "vit_so400m_patch16_224", _V4, preferred=512,
             pickle="c-radio_v4-so400m_half.pth.tar"),
        _hub("c-radio_v3-b", 98, "C-RADIO on a small GPU or a CPU", "nvidia/C-RADIOv3-B",
             "vit_base_patch16_v2_224", _V3, preferred=512,
             pickle="c-radio_v3-b_half.pth.tar", copy_aligns=True),
        _hub("c-radio_v3-l", 320, "between -b and -h", "nvidia/C-RADIOv3-L",
             "vit_large_patch16_v2_224", _V3, preferred=512,
             pickle="c-radio-v3_l_half.pth.tar"),
        _hub("c-radio_v3-h", 652, "CLIP and SAM heads of the C-RADIOv3 set", "nvidia/C-RADIOv3-H",
             "vit_huge_patch16_224", _V3, preferred=512,
             pickle="c-radio_v3-h_half.pth.tar", copy_aligns=True),
        _hub("c-radio_v3-g", 1160, "the largest with a C-RADIO licence", "nvidia/C-RADIOv3-g",
             "vit_giant_patch16_224", _V3, preferred=512,
             pickle="c-radio_v3-g_half.pth.tar"),
        _hub("c-radio_v2-b", 98, "superseded by c-radio_v3-b", "nvidia/C-RADIOv2-B", "vit_base_patch16_224", _V25),
        _hub("c-radio_v2-l", 320, "superseded by c-radio_v3-l", "nvidia/C-RADIOv2-L", "vit_large_patch16_224", _V25),
        _hub("c-radio_v2-h", 652, "superseded by c-radio_v3-h", "nvidia/C-RADIOv2-H", "vit_huge_patch16_224", _V25),
        _hub("c-radio_v2-g", 1160, "superseded by c-radio_v3-g", "nvidia/C-RADIOv2-g",
             "vit_giant_patch16_224", _V25, num_global=8,
             pickle="c-radio_v2-g_half.pth.tar"),
        _hub("c-radio_v2-vlm-h", 652, "the vision tower of NVIDIA's vision-language models", "nvidia/C-RADIOv2-VLM-H",
             "vit_huge_patch16_224", _V25, num_global=8,
             pickle="c-radio_v2-vlm-h.pth.tar"),
        _hub("radio_v2.5-b", 98, "research; superseded by c-radio_v3-b", "nvidia/RADIO",
             "vit_base_patch16_224", _V25, file="radio-v2.5-b_half.pth.tar"),
        _hub("radio_v2.5-l", 320, "research; superseded by c-radio_v3-l", "nvidia/RADIO",
             "vit_large_patch16_224", _V25, file="radio-v2.5-l_half.pth.tar"),
        _hub("radio_v2.5-h", 652, "research; superseded by c-radio_v3-h", "nvidia/RADIO",
             "vit_huge_patch16_224", _V25, file="radio_v2.5-h.pth.tar"),
        _hub("radio_v2.5-h-norm", 652, "research; -h with normalised features", "nvidia/RADIO",
             "vit_huge_patch16_224", _V25, file="radio_v2.5-h-norm.pth.tar"),
        _hub("radio_v2.5-g", 1167, "research; DINOv2's trunk", "nvidia/RADIO", "dino_v2_g_student", _V25,
             file="radio_v2.5-g.pth.tar", patch=14, preferred=896, largest=1792, num_global=8),
        _hub("radio_v2.1", 652, "research; the model of the AM-RADIO paper", "nvidia/RADIO",
             "vit_huge_patch16_224", _V2, file="radio_v2.1_bf16.pth.tar", preferred=432, num_windowed=5),
        _hub("radio_v2", 652, "research; before v2.1", "nvidia/RADIO",
             "vit_huge_patch16_224", _V2, file="radio_v2.pth.tar", preferred=432, num_windowed=5),
        _hub("radio_v1", 638, "research; the first one", "nvidia/RADIO", "vit_huge_patch14_224", _V2,
             file="radio_v1.pth.tar", patch=14, preferred=378, largest=1050),
        _hub("e-radio_v2", 390, "research; convolutions and windows, for speed", "nvidia/RADIO", "eradio", _V2,
             file="eradio_v2.pth.tar", preferred=512),
    )
}  # fmt: skip
"""NVIDIA's releases by version name, including those that are on the Hugging Face hub only."""

RELEASED: dict[str, ReleasedModel] = {
    entry.name: entry
    for entry in (
        ReleasedModel(
            name="agglo-lite",
            licence="Apache-2.0",
            params=5.5,
            what_for="embeddings, text search and dense features on a laptop (Lite0 taught by Lite2, ConSE and HOG)",
            sha256="46a671b454c9f146f3273969fc16401328a996bd9b69c1d4d7ba99802e37e168",
            config_sha256="f124cc08ebb5ace822d231c0a1b729be4186ceef2dfa47fe9f98a0221067ca74",
            folder=ASSETS / "agglo-lite",
        ),
    )
}
"""Our own models by name."""
