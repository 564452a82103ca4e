"""The contract of a runtime: an exported folder with the interface of a model."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from agglo.model.artefact import EXPORT_FORMAT, EXPORTED
from agglo.model.heads import HeadConfig
from agglo.model.inputs import ImageLike, prepare_list
from agglo.model.model import Model
from agglo.preprocess import Conditioner
from agglo.students.base import Student
from agglo.types import AssetError, ConfigError, Features, FeatureSpec, Output
from agglo.weights.bundled import verify


class Runtime(Model, ABC):
    """An exported model: called as a :class:`agglo.Model`, computed by another library on the CPU, without gradients.

    A kind implements :meth:`_open` and :meth:`_run`. Intermediate features, the student alone and saving need the
    original model.

    Args:
        folder: written by an export of the room ``exports``.
        facts: its ``export.json``.
        threads: threads of the library; None for PyTorch's number.

    Raises:
        ConfigError: the folder was written by another version.
        AssetError: a file is missing or changed.
        MissingExtraError: the library is not installed.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], /, *, threads: int | None = None) -> None:
        nn.Module.__init__(self)
        if facts.get("format") != EXPORT_FORMAT:
            raise ConfigError(
                f"{folder / EXPORTED} has format {facts.get('format')!r}, not {EXPORT_FORMAT}: export the model again, "
                "or use the agglo version that wrote it"
            )
        for file, sha256 in facts["files"].items():
            if not (folder / file).is_file():
                raise AssetError(f"{folder / file} is missing: export the model again")
            verify(folder / file, sha256, "export the model again")
        config = facts["config"]
        self.folder, self.facts = folder, dict(facts)
        self.threads = torch.get_num_threads() if threads is None else threads
        self.student_config = dict(config["student"])
        self.student: Student = _Placeholder(FeatureSpec(**facts["spec"]), facts["window"])
        self.conditioner = Conditioner(tuple(facts["mean"]), tuple(facts["std"]))
        self.spec = FeatureSpec(**facts["spec"])
        self.head_configs = {name: HeadConfig(**config["heads"][name]) for name in facts["heads"]}
        self.heads = nn.ModuleDict({name: nn.Identity() for name in facts["heads"]})  # pyright: ignore[reportAttributeAccessIssue]
        self.tokens, self.summary_slots = tuple(config["tokens"]), list(config["summary_slots"])
        self.normalizers, self.provenance = dict(config["normalizers"]), dict(config["provenance"])
        self.preferred_size = config["preferred_size"]
        self.feature_normalizer = self.intermediate_normalizer = None
        self._towers, self._warned = {}, set()
        self._session = self._open(folder)
        # Results are identified by their weights: a hash of the files stands for them.
        digest = bytes.fromhex("".join(facts["files"].values()))
        self.register_buffer("files_sha256", torch.tensor(list(digest), dtype=torch.uint8))
        self.eval()

    @abstractmethod
    def _open(self, folder: Path) -> Any:
        """The library's own object that computes the graph."""

    @abstractmethod
    def _run(self, session: Any, images: Tensor) -> Mapping[str, Tensor]:
        """The graph's outputs by name for float32 RGB ``(B, 3, H, W)`` in [0, 1] of a legal size."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        heads: Iterable[str] | None = None,
        resize: bool = True,
        window: int | None = None,
    ) -> Output | list[Output]:
        """Encode images; see :meth:`agglo.Model.forward`. In lists, images of one size share a batch.

        The graph computes all exported heads; ``heads`` selects those that are returned.

        Raises:
            ConfigError: a size outside the exported range, or a window other than the exported one.
        """
        names = self._chosen(heads)
        if isinstance(images, list | tuple):
            return self._list(prepare_list(images, self._input_rules(window), resize=resize), names)
        if isinstance(images, Tensor) and images.ndim == 5:
            return self._clips(images, names, resize, window)
        return self._output(self.prepare(images, resize=resize, window=window), names)  # pyright: ignore[reportArgumentType]

    def _list(self, batches: Sequence[Tensor], names: list[str]) -> list[Output]:
        shapes: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(batches):
            shapes.setdefault(tuple(image.shape[-2:]), []).append(index)
        found: dict[int, Output] = {}
        for members in shapes.values():
            out = self._output(torch.cat([batches[member] for member in members]), names)
            for row, member in enumerate(members):
                one = {n: f.map(lambda t, row=row: t[row : row + 1]) for n, f in [("", out), *out.heads.items()]}
                backbone = one.pop("")
                found[member] = Output(backbone.summary, backbone.spatial, one)
        return [found[index] for index in range(len(batches))]

    def _clips(self, clips: Tensor, heads: list[str], resize: bool, window: int | None) -> Output:
        out = self._output(self.prepare(clips.flatten(0, 1), resize=resize, window=window), heads)
        shape = clips.shape[:2]
        per_clip = {name: f.map(lambda t: t.unflatten(0, shape)) for name, f in [("", out), *out.heads.items()]}
        backbone = per_clip.pop("")
        return Output(backbone.summary, backbone.spatial, per_clip)

    def _output(self, images: Tensor, names: list[str]) -> Output:
        longest = self.facts["input"]["maximum"]
        if longest is not None and max(images.shape[-2:]) > longest:
            raise ConfigError(
                f"images of {images.shape[-2]}x{images.shape[-1]} pixels exceed the {longest} pixels that "
                f"{self.folder} was exported for: resize them, or export the model for larger ones"
            )
        found = self._run(self._session, images.contiguous())
        heads = {n: Features(found.get(f"heads.{n}.summary"), found.get(f"heads.{n}.spatial")) for n in names}
        return Output(found.get("summary"), found.get("spatial"), heads)

    def latency(self, images: Tensor, repeats: int = 3) -> float:
        """Median seconds of one call for a batch of a legal size, after a first call that is not counted."""
        self._run(self._session, images)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            self._run(self._session, images)
            seconds.append(time.perf_counter() - start)
        return sorted(seconds)[repeats // 2]

    def keep_heads(self, heads: Iterable[str]) -> None:
        """Return these heads only; the graph still computes all.

        Raises:
            KeyError: no such head.
        """
        heads = [n for n, c in self.head_configs.items() if c.text is not None] if heads == "text" else heads
        super().keep_heads(heads)

    def step(self, window: int | None = None) -> int:
        """Sides must be a multiple of this many pixels.

        Raises:
            ConfigError: ``window`` is not the exported one.
        """
        if window is not None and window != self.facts["window"]:
            raise ConfigError(
                f"window={window}: {self.folder} was exported with window={self.facts['window']}; export the model "
                f"again with --window {window}"
            )
        return self.facts["input"]["multiple"]

    def _windowed(self, window: int | None) -> dict[str, int]:
        self.step(window)
        return {}

    def encode(
        self,
        images: Tensor,
        *,
        window: int | None = None,
        blocks: Collection[int] = (),
        into: dict[int, Features] | None = None,
    ) -> NoReturn:
        """Not available in a graph."""
        self._refuse("encode")

    def decode(self, features: Features, heads: Iterable[str] | None = None) -> NoReturn:
        """Not available in a graph."""
        self._refuse("decode")

    def intermediates(self, *args: Any, **options: Any) -> NoReturn:
        """Not available in a graph."""
        self._refuse("intermediates")

    def take_conditioner(self) -> NoReturn:
        """Not available in a graph."""
        self._refuse("take_conditioner")

    def save(self, *args: Any, **options: Any) -> NoReturn:
        """Not available in a graph."""
        self._refuse("save")

    def config(self) -> dict[str, Any]:
        """The configuration of the model that was exported."""
        return dict(self.facts["config"])

    def _refuse(self, method: str) -> NoReturn:
        raise TypeError(f"{method}: {self.folder} is an exported graph, from images to features: load the model itself")


class _Placeholder(Student):
    """Stands for the student inside a graph: its specification and its window."""

    def __init__(self, spec: FeatureSpec, window: int) -> None:
        super().__init__()
        self.spec, self.window, self.windows = spec, window, bool(window)
        self.marker = nn.Parameter(torch.empty(0), requires_grad=False)  # device and dtype of inputs

    def forward(self, images: Tensor) -> NoReturn:
        raise TypeError("the student of an exported model is a part of its graph: call the model")

    def settings(self) -> dict[str, object]:
        return {"window": self.window}
