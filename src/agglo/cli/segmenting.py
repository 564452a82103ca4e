"""The command ``agglo segment``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from agglo.cli.arguments import DEVICE, OVERWRITE, chosen_device
from agglo.types import ConfigError

if TYPE_CHECKING:
    from agglo.segmentation.prompts import Prompts
    from agglo.segmentation.run import Segmenter
    from agglo.segmentation.writing import ResultsFolder


def segment(
    images: list[Path] = typer.Argument(metavar="IMAGE|DIR|VIDEO...", help="Images, folders of them, or videos."),
    text: list[str] = typer.Option(
        [], "--text", "-t", help="A concept, such as shoe; repeat it or separate by commas."
    ),
    box: list[str] = typer.Option([], "--box", help="x0,y0,x1,y1 in pixels: an example; with ,0 of what it is not."),
    points: list[str] = typer.Option([], "--points", help="x,y,1 inside the object, or x,y,0 outside; may repeat."),
    out: Path = typer.Option(Path("segments"), "--out", "-o", help="A folder for masks, overlays and results.json."),
    video: bool = typer.Option(
        False, "--video", help="Follow objects: each folder holds the frames of a video. Set for video files."
    ),
    method: str = typer.Option("sam3", help="sam3; or dense: from the text-aligned map alone, one mask per text."),
    model: str | None = typer.Option(
        None, "--model", "-m", help="A model with a sam3 head, by default c-radio_v4-so400m; for dense agglo-lite."
    ),
    decoder: str = typer.Option("facebook/sam3", help="A SAM 3 checkpoint: a folder, or a name on the hub."),
    window: int | None = typer.Option(None, help="Side of the attention windows in patches, e.g. 8; 0 for none."),
    background: str = typer.Option("background", help="Texts that compete in dense and are not written."),
    slide: int | None = typer.Option(None, help="Of dense: encode the image in windows of this side in pixels."),
    outliers: float | None = typer.Option(
        None, help="Of dense: replace tokens this many deviations too large, e.g. 5."
    ),
    threshold: float | None = typer.Option(None, help="Leave out lower scores; 0.5 by default, 0 for dense."),
    device: str | None = DEVICE,
    overwrite: bool = OVERWRITE,
) -> None:
    """Segment what texts, boxes or points describe: masks, COCO results and overlay pictures."""
    from agglo.segmentation.frames import VIDEO_ENDINGS
    from agglo.segmentation.prompts import Prompts, parse
    from agglo.segmentation.run import segmenter
    from agglo.segmentation.writing import ResultsFolder

    texts = [part.strip() for each in text for part in each.split(",")]
    prompts = Prompts.of(texts, [parse(each, "box") for each in box], [parse(each, "points") for each in points])
    clips = [path for path in images if path.suffix.lower() in VIDEO_ENDINGS]
    if clips and len(clips) < len(images) and not video:
        raise ConfigError(f"{clips[0]} is a video and others are not: segment them by separate commands")
    with ResultsFolder(out, overwrite=overwrite) as folder:
        if video or clips:
            if method != "sam3" or prompts.boxes:
                raise ConfigError("videos take --text or --points, with method sam3")
            if threshold is not None:
                raise ConfigError("--threshold: SAM 3 has its own thresholds for videos; leave it out")
            options = {"model": model, "decoder": decoder, "window": window, "device": chosen_device(device)}
            _follow(images, prompts, folder, options)
        else:
            competing = [part.strip() for part in background.split(",") if part.strip()]
            run = segmenter(
                prompts, method=method, model=model, decoder=decoder, window=window, background=competing,
                slide=slide, outliers=outliers, threshold=threshold, device=chosen_device(device),
            )  # fmt: skip
            _segment(images, prompts, folder, run)
    typer.echo(f"wrote {len(folder)} instances to {out} (masks/, overlays/, results.json)")


def _segment(paths: Sequence[Path], prompts: Prompts, folder: ResultsFolder, run: Segmenter) -> None:
    """Segment single images; unreadable ones are skipped and listed."""
    from agglo.cli.models import print_skipped
    from agglo.cli.terminal import status
    from agglo.embedding import as_files
    from agglo.types import ImageError

    sources = [as_files(path) for path in paths]
    skipped: dict[str, str] = {}
    total, done = sum(len(source) for source in sources), 0
    with status("segmenting") as report:
        for source in sources:
            for index in range(len(source)):
                done += 1
                report(f"image {done}/{total}")
                try:
                    image = source.read(index)
                except ImageError as error:
                    skipped[error.name] = error.why
                    continue
                found = run(image, prompts, source.name(index))
                folder.add(found, image)
                typer.echo(f"{source.name(index)}: {_counts(found.labels) or 'nothing found'}")
    print_skipped(skipped)
    if not folder.images:
        raise ConfigError("none of the images can be read")


def _follow(paths: Sequence[Path], prompts: Prompts, folder: ResultsFolder, options: dict[str, Any]) -> None:
    """Follow objects through videos; all are opened before the first is segmented."""
    from agglo.cli.terminal import status
    from agglo.segmentation.frames import as_frames
    from agglo.segmentation.video import segment_video

    videos = [as_frames(path) for path in paths]
    with status("segmenting") as report:
        for frames, path in zip(videos, paths, strict=True):
            shown = frames.reopen()  # results come later than frames are read
            show = lambda index, count, path=path: report(f"{path.name}: frame {index}/{count}")  # noqa: E731
            found = segment_video(frames, prompts.texts, points=prompts.points, progress=show, **options)
            for index, each in enumerate(found):
                folder.add(each, shown.read(index), group=path.stem)
                typer.echo(f"{each.name}: {', '.join(each.titles) or 'nothing found'}")


def _counts(labels: tuple[str, ...]) -> str:
    return ", ".join(f"{labels.count(label)} {label}" for label in dict.fromkeys(labels))
