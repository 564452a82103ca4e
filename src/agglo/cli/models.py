"""The commands that use a model: embed, search, view, export, push."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from agglo.cli.arguments import DEVICE, OVERWRITE, chosen_device
from agglo.types import ConfigError

if TYPE_CHECKING:
    from agglo.model.model import Model

MODEL = typer.Option("agglo-lite", "--model", "-m", help="A released name, a saved model, or a run folder.")
SIZE = typer.Option(None, help="Side of the square input, in pixels; the model's preferred size by default.")
DTYPE = typer.Option("float32", help="float32, bfloat16 or float16; auto: bfloat16 where it is native.")
SHOWN = 448
"""Longer side, in pixels, of an image in the picture that `view` writes."""


def embed(
    folder: Path = typer.Argument(metavar="DIR", help="A folder of images, with its sub-folders, or one image."),
    out: Path = typer.Option(..., "--out", "-o", help="A .parquet or .npz file."),
    model: str = MODEL,
    size: int | None = SIZE,
    batch: int = typer.Option(32, help="Batch size."),
    head: str | None = typer.Option(None, help="The text-aligned head to write; the first by default."),
    device: str | None = DEVICE,
    overwrite: bool = OVERWRITE,
    dtype: str = DTYPE,
) -> None:
    """Write the path, summary and text-aligned embedding of every image of a folder. Resumable."""
    from agglo.cli.terminal import encoding_bar
    from agglo.embedding import as_files, check_output, embed_file
    from agglo.embedding.encoding import unfinished

    target = check_output(out, overwrite=overwrite)
    if target.suffix == ".parquet":
        from agglo.extras import require

        require("pyarrow.parquet", "quickstart")  # before a model is loaded, which may take a download
    source = as_files(folder)
    loaded = _load(model, device, dtype, text=True)
    options = {"size": size, "batch": batch, "head": head, "name": model, "overwrite": overwrite}
    kept = unfinished(target)
    try:
        with encoding_bar(len(source)) as show:
            written = embed_file(source, target, loaded, progress=show, **options)
    except BaseException as error:
        if kept.is_file() and not isinstance(error, ConfigError):
            typer.echo(f"stopped; finished rows are kept in {kept}. The same command continues.", err=True)
        raise
    shapes = ", ".join(f"{name} {width}" for name, width in written.widths.items())
    typer.echo(f"wrote {written.images} images to {target} ({shapes})")
    print_skipped(written.skipped)


def search(
    words: list[str] = typer.Argument(metavar="[DIR] TEXT", help="A folder of images, and a text."),
    photos: bool = typer.Option(False, "--photos", help="Search the photos in the package; give only the text."),
    k: int = typer.Option(5, "-k", help="Number of images to list."),
    model: str = MODEL,
    size: int | None = SIZE,
    device: str | None = DEVICE,
    dtype: str = DTYPE,
) -> None:
    """Rank images by a text: agglo search DIR "a cup of coffee"."""
    from agglo.cli.terminal import encoding_bar
    from agglo.config import build
    from agglo.embedding import as_files
    from agglo.embedding import embed as encode
    from agglo.embedding import search as rank

    if not photos and len(words) < 2:
        raise ConfigError(
            'search needs a folder and a text: agglo search DIR "a cup of coffee", or --photos and a text'
        )
    text = " ".join(words if photos else words[1:])
    if not text.strip():
        raise ConfigError("the text to search for is empty")
    if k < 1:
        raise ConfigError(f"-k must be at least 1, got {k}")
    source = build("sources", {"kind": "photos", "split": "all"}) if photos else as_files(words[0])
    loaded = _load(model, device, dtype, text=True)
    try:
        loaded.text_head()
    except TypeError as error:
        raise ConfigError(f"{model}: {error}") from None
    with encoding_bar(len(source)) as show:
        embeddings = encode(source, loaded, size=size, progress=show)
    for hit in rank(embeddings, loaded, text, k):
        typer.echo(f"{hit.score:6.3f}  {hit.name}")
    print_skipped(embeddings.skipped)


def view(
    images: list[Path] = typer.Argument(metavar="IMAGE...", help="Images; several share one colour basis."),
    out: Path | None = typer.Option(
        None, "--out", "-o", help="A .png or .jpg file; <first image>-view.png by default."
    ),
    model: str = MODEL,
    size: int | None = typer.Option(None, help="Longer side of the input, in pixels; at least 512 by default."),
    blocks: bool = typer.Option(False, "--blocks", help="Draw each cell of the map as a block, not interpolated."),
    device: str | None = DEVICE,
    overwrite: bool = OVERWRITE,
    dtype: str = DTYPE,
) -> None:
    """Write each image beside its spatial features, three principal components as RGB."""
    from agglo.embedding import check_output, image_features
    from agglo.files import replacing
    from agglo.report.picture import fitted, pca_basis, pca_picture, side_by_side, stacked

    name = out or Path(f"{images[0].stem}-view.png")
    target = check_output(name, overwrite=overwrite, endings=(".png", ".jpg", ".jpeg", ".webp"))
    if any(target.resolve() == image.expanduser().resolve() for image in images):
        raise ConfigError(f"{target} is one of the images: name another file with -o")
    loaded = _load(model, device, dtype=dtype)
    looks, skipped = image_features(images, loaded, size=size)
    basis = pca_basis([each.spatial for each in looks])
    rows = []
    for each in looks:
        image, cells = fitted(each.image, SHOWN), "{1} x {2} cells".format(*each.spatial.shape)
        seen = pca_picture(each.spatial, basis, (image.height, image.width), smooth=not blocks)
        rows.append(side_by_side([image, seen], [Path(each.name).name, f"{model}, {cells}"]))
    with replacing(target) as partial:
        stacked(rows).save(partial)
    typer.echo(f"wrote {target}")
    print_skipped(skipped)


def export(
    model: str = typer.Argument(
        metavar="MODEL",
        help="A released name, a saved model, a run folder, an official file or folder, or owner/name on the hub.",
    ),
    kind: str = typer.Option(
        ..., "--to", help="The layout: onnx, openvino, transformers, timm (see `agglo kinds exports`)."
    ),
    out: Path = typer.Option(..., "--out", "-o", help="A folder."),
    dtype: str | None = typer.Option(None, help="transformers, timm: float32 (default), bfloat16 or float16."),
    heads: str | None = typer.Option(None, help="onnx, openvino: heads to include, a,b; all (default) or none."),
    window: int | None = typer.Option(None, help="onnx, openvino: side of the attention windows, in patches."),
) -> None:
    """Write a model for another library: a checkpoint of the backbone, or a graph with heads for any image size."""
    from agglo.exports.base import export as write

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = None if heads is None else [] if heads == "none" else heads.split(",")
        given = {
            key: value for key, value in (("dtype", dtype), ("heads", names), ("window", window)) if value is not None
        }
        folder = write(model, kind, out, **given)
    for warning in caught:
        typer.echo(f"note: {warning.message}", err=True)
    typer.echo(f"wrote {folder}")


def push(
    model: str = typer.Argument(metavar="MODEL", help="A run or a saved model."),
    repo: str = typer.Argument(metavar="OWNER/NAME", help="A repository on the Hugging Face hub; created if missing."),
    private: bool = typer.Option(False, "--private", help="Create the repository as private."),
) -> None:
    """Upload a trained model and its card to the Hugging Face hub."""
    from agglo.zoo.loading import push as upload

    typer.echo(upload(model, repo, private=private))


def _load(model: str, device: str | None = None, dtype: str = "float32", *, text: bool = False) -> Model:
    from agglo.zoo.loading import load

    return load(model, heads="text" if text else None, dtype=dtype, device=chosen_device(device))


def print_skipped(skipped: dict[str, str], most: int = 10) -> None:
    """Print the number of skipped images and the first of their names to stderr."""
    if not skipped:
        return
    typer.echo(f"skipped {len(skipped)} image{'s' if len(skipped) > 1 else ''}:", err=True)
    for name, why in list(skipped.items())[:most]:
        typer.echo(f"  {why if why.startswith(name) else f'{name}: {why}'}", err=True)
    if len(skipped) > most:
        typer.echo(f"  and {len(skipped) - most} more", err=True)
