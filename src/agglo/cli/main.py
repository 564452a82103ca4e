"""The command line. Everything heavy is imported inside the commands, so that `agglo --help` answers at once."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from agglo.cli import cache as caching
from agglo.cli import catalogue
from agglo.cli import measure as evaluating
from agglo.types import AggloError, ConfigError

if TYPE_CHECKING:
    from agglo.model.model import Model

INTERRUPTED = 130
ALONE = frozenset({"cache", "embed", "eval", "export", "push", "report", "view"})
"""Commands that write, and do not share their work: of several processes each would write the same files."""
SHOWN = 448
"""Longer side, in pixels, of an image in the picture that `view` writes."""


class Commands(TyperGroup):
    """Turns what went wrong into one line and an exit code; ``AGGLO_TRACEBACK=1`` shows where it came from."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command: exit code 2 for errors that name a next move, 130 for Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if os.environ.get("AGGLO_TRACEBACK"):
                raise
            if _speaks():
                typer.echo("agglo: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # `agglo models | head`
            raise
        except (AggloError, OSError) as error:
            if os.environ.get("AGGLO_TRACEBACK"):
                raise
            if type(error).__name__ == "OtherRankError":  # the process that met it says so
                raise typer.Exit(2) from None
            what = str(error) if isinstance(error, AggloError) or not error.strerror else _os_error(error)
            typer.echo(f"agglo: {what}", err=True)
            raise typer.Exit(2) from None


def _speaks() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def _os_error(error: OSError) -> str:
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{what}: free some space, or write to another disk, and run the same command again" if full else what


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Agglomerative vision backbones: one student distilled from several teachers. "
    "Begin with: agglo train quickstart",
)

MODEL = typer.Option("agglo-lite", "--model", "-m", help="A released name, a saved model, or a run folder.")
OVERWRITE = typer.Option(False, "--overwrite", help="Replace the output if it exists.")


def main() -> None:
    """Entry point of the ``agglo`` command."""
    # The loader's threads share the cores with OpenMP's, which by default spin while they wait: ten-fold slower on two.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


def _version(show: bool) -> None:
    if show:
        import agglo

        typer.echo(f"agglo {agglo.__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options before the command."""
    del version
    if ctx.invoked_subcommand in ALONE and os.environ.get("WORLD_SIZE", "1") != "1":
        if not _speaks():
            raise typer.Exit(2)
        raise ConfigError(
            f"`agglo {ctx.invoked_subcommand}` writes with one process: start it without torchrun (WORLD_SIZE is set)"
        )


# --- training ---------------------------------------------------------------------------------------------------------


@app.command()
def train(
    recipe: str = typer.Argument(metavar="RECIPE", help="A recipe's name (see `agglo recipes`) or a YAML file."),
    overrides: list[str] | None = typer.Argument(
        None, metavar="[key.path=value]...", help="Changes, e.g. train.steps=1000."
    ),
    out: Path | None = typer.Option(None, "--out", "-o", help="Run folder; runs/<recipe> by default."),
    resume: bool = typer.Option(False, "--resume", help="Go on from the newest checkpoint in the run folder."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Throw away what the run folder holds."),
    smoke: bool = typer.Option(False, "--smoke", help="The recipe's pocket size: a few steps, to see that it runs."),
    show: bool = typer.Option(False, "--print", help="Print the resolved recipe and stop."),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1, mps; cuda, else cpu, by default."),
    report: bool = typer.Option(True, "--report/--no-report", help="Write report.html at the end."),
    evals: bool = typer.Option(True, "--evals/--no-evals", help="Run the recipe's evals at the end."),
) -> None:
    """Distil a student from its teachers; then measure it and write a report.

    On several GPUs: torchrun --nproc_per_node 8 -m agglo train RECIPE
    """
    from agglo.recipe import load

    resolved = load(recipe, overrides or [], smoke=smoke)
    if show:
        typer.echo(resolved.yaml(), nl=False)
        return
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    folder = out or Path("runs") / (resolved.name + ("-smoke" if smoke else ""))

    from agglo.dist import local_device

    device = evaluating.checked_device(local_device(device))

    from agglo.training.loop import distill

    distill(resolved, folder, resume=resume, overwrite=overwrite, device=device)
    if not _speaks():  # the model is saved, and one process measures it
        return
    if resolved.objective.kind == "upsample":
        typer.echo(
            f"\nNext, beside the teacher's keys in a recipe:\n  upsampler: {{kind: featsharp, weights: {folder}}}"
        )
        return
    with _saved(folder):
        if evals and resolved.evals:
            evaluating.measure_run(folder, device)
        if report:
            evaluating.write_report(folder)
    run = shlex.quote(str(folder))
    typer.echo(
        f'\nNext:\n  agglo search --photos "a cup of coffee" --model {run}\n'
        f"  agglo view YOUR_IMAGE.jpg -o view.png --model {run}\n"
        f"  agglo embed YOUR_FOLDER -o embeddings.parquet --model {run}"
    )


@contextlib.contextmanager
def _saved(folder: Path) -> Iterator[None]:
    """After training: whatever happens now, say that the model is safe and how to get the rest."""
    try:
        yield
    except (KeyboardInterrupt, AggloError, OSError):
        run = shlex.quote(str(folder))
        typer.echo(f"the model is saved in {folder / 'model'}; `agglo report {run}` does the rest", err=True)
        typer.echo(f"(`agglo eval {run}` only measures it)", err=True)
        raise


# --- using a model ----------------------------------------------------------------------------------------------------


@app.command()
def embed(
    folder: Path = typer.Argument(metavar="DIR", help="A folder of images (with its sub-folders), or one image."),
    out: Path = typer.Option(..., "--out", "-o", help="A .parquet or .npz file."),
    model: str = MODEL,
    size: int | None = typer.Option(
        None, help="Side of the square the model sees, in pixels; its preferred size by default."
    ),
    batch: int = typer.Option(32, help="Images at a time."),
    head: str | None = typer.Option(None, help="The text-aligned head to write; the first there is by default."),
    device: str | None = typer.Option(None, help="cpu, cuda, ...; cpu by default."),
    overwrite: bool = OVERWRITE,
) -> None:
    """Turn every image of a folder into vectors: path, summary, and the text-aligned embedding."""
    from agglo.cli.terminal import embed_with_bar
    from agglo.embedding import as_files, check_output

    target = check_output(out, overwrite=overwrite)
    if target.suffix == ".parquet":
        from agglo.extras import require

        require("pyarrow.parquet", "quickstart")  # now, not after an hour of encoding
    source = as_files(folder)
    loaded = _load(model, device, text=True)
    embeddings = embed_with_bar(source, loaded, model, size=size, batch=batch, head=head)
    embeddings.save(target, overwrite=overwrite)
    shapes = ", ".join(f"{name} {array.shape[1]}" for name, array in embeddings.columns().items())
    typer.echo(f"wrote {len(embeddings)} images to {target} ({shapes})")
    _name_skipped(embeddings.skipped)


@app.command()
def search(
    words: list[str] = typer.Argument(metavar="[DIR] TEXT", help="A folder of images, and what to look for."),
    photos: bool = typer.Option(False, "--photos", help="Search the photos that come with agglo; give only the text."),
    k: int = typer.Option(5, "-k", help="How many images to list."),
    model: str = MODEL,
    size: int | None = typer.Option(
        None, help="Side of the square the model sees, in pixels; its preferred size by default."
    ),
    device: str | None = typer.Option(None, help="cpu, cuda, ...; cpu by default."),
) -> None:
    """Rank images by a text: agglo search DIR "a cup of coffee"."""
    from agglo.cli.terminal import embed_with_bar
    from agglo.config import build
    from agglo.embedding import as_files
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
    loaded = _load(model, device, text=True)
    try:
        loaded.text_head()
    except TypeError as error:
        raise ConfigError(f"{model}: {error}") from None
    embeddings = embed_with_bar(source, loaded, model, size=size, batch=32, head=None)
    for hit in rank(embeddings, loaded, text, k):
        typer.echo(f"{hit.score:6.3f}  {hit.name}")
    _name_skipped(embeddings.skipped)


@app.command()
def view(
    images: list[Path] = typer.Argument(metavar="IMAGE...", help="Images; several share their colours."),
    out: Path | None = typer.Option(
        None, "--out", "-o", help="A .png or .jpg file; <first image>-view.png by default."
    ),
    model: str = MODEL,
    size: int | None = typer.Option(None, help="Longer side at which the model looks; at least 512 by default."),
    blocks: bool = typer.Option(False, "--blocks", help="Show each cell of the map as a block, not interpolated."),
    overwrite: bool = OVERWRITE,
) -> None:
    """Write each image beside the picture of its spatial features (three principal components as RGB)."""
    from agglo.embedding import check_output, look
    from agglo.report.picture import fitted, pca_basis, pca_picture, side_by_side, stacked

    name = out or Path(f"{images[0].stem}-view.png")
    target = check_output(name, overwrite=overwrite, endings=(".png", ".jpg", ".jpeg", ".webp"))
    if any(target.resolve() == image.expanduser().resolve() for image in images):
        raise ConfigError(f"{target} is one of the images: name another file with -o")
    loaded = _load(model)
    looks, skipped = look(images, loaded, size=size)
    basis = pca_basis([each.spatial for each in looks])
    rows = []
    for each in looks:
        image, cells = fitted(each.image, SHOWN), "{1} x {2} cells".format(*each.spatial.shape)
        seen = pca_picture(each.spatial, basis, (image.height, image.width), smooth=not blocks)
        rows.append(side_by_side([image, seen], [Path(each.name).name, f"{model}, {cells}"]))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        stacked(rows).save(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    typer.echo(f"wrote {target}")
    _name_skipped(skipped)


@app.command()
def export(
    model: str = typer.Argument(
        metavar="MODEL",
        help="A released name, a saved model, a run folder, an official file or folder, or owner/name on the hub.",
    ),
    kind: str = typer.Option(..., "--to", help="A layout: transformers, timm (see `agglo kinds exports`)."),
    out: Path = typer.Option(..., "--out", "-o", help="A folder."),
    dtype: str = typer.Option("float32", help="float32, bfloat16 or float16."),
) -> None:
    """Write a model as another library's checkpoint: the backbone, without heads."""
    from agglo.exports.base import export as write

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        folder = write(model, kind, out, dtype=dtype)
    for warning in said:
        typer.echo(f"note: {warning.message}", err=True)
    typer.echo(f"wrote {folder}")


def _load(model: str, device: str | None = None, *, text: bool = False) -> Model:
    from agglo.zoo.loading import load

    return load(model, heads="text" if text else None, device=evaluating.checked_device(device) or "cpu")


def _name_skipped(skipped: dict[str, str], most: int = 10) -> None:
    """Count and name the images that were passed over, on stderr."""
    if not skipped:
        return
    typer.echo(f"skipped {len(skipped)} image{'s' if len(skipped) > 1 else ''}:", err=True)
    for name, why in list(skipped.items())[:most]:
        typer.echo(f"  {why if why.startswith(name) else f'{name}: {why}'}", err=True)
    if len(skipped) > most:
        typer.echo(f"  and {len(skipped) - most} more", err=True)


app.command("eval")(evaluating.eval_command)
for command in (evaluating.report, evaluating.compare):
    app.command()(command)


# --- what there is ----------------------------------------------------------------------------------------------------

for command in (caching.cache, catalogue.models, catalogue.info, catalogue.push, catalogue.kinds, catalogue.recipes):
    app.command()(command)


if __name__ == "__main__":
    main()
