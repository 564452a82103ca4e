"""The report of a run: one self-contained HTML file that tells what was trained, what it learned and what it sees."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from agglo.model.model import Model
    from agglo.report.page import Attempt
    from agglo.report.records import Records
    from agglo.report.visuals import Models

__all__ = ["write"]


def write(folder: str | Path, *, console: Console | None = None) -> Path:
    """Write ``report.html`` into a run folder.

    The page holds what the folder's files hold (``recipe.yaml``, ``versions.json``, ``metrics.jsonl``, ``evals.json``)
    and what its models show (``initial/``, ``model/``, and the recipe's teachers, rebuilt): PCA pictures of images that
    were not trained on, and text search over held-out photos. It loads nothing from anywhere, runs no script, and
    follows the reader's light or dark theme. What is missing is named in its place, with the command that makes it.

    Args:
        folder: a run folder of ``agglo train``, finished or not.
        console: told of what is being made.

    Returns:
        The path of the page; an older one is replaced.

    Raises:
        ConfigError: there is no such run folder.
    """
    from agglo.report import page, visuals
    from agglo.report.records import read

    folder, began = Path(folder), time.perf_counter()
    records = read(folder)

    def attempt(what: str, make: Callable[[], object]) -> Attempt:
        if console is not None:
            console.print(f"report: {what}", highlight=False)
        try:
            return page.Attempt(make())
        except Exception as error:  # noqa: BLE001 (a page without a picture beats no page; the page says why)
            return page.Attempt(None, f"{type(error).__name__}: {error}".rstrip("."))

    models = attempt("loading the student and its teachers", lambda: load_models(records)).of(visuals.Models)
    models = models or visuals.Models()
    images = visuals.gallery_images(records.recipe)
    gallery = attempt("painting spatial features", lambda: visuals.gallery(models, records.recipe, images))
    search = attempt("searching held-out photos by text", lambda: visuals.search(models, records.recipe))
    html = page.render(records, models.student, gallery, search)
    path = folder / "report.html"
    partial = path.with_suffix(".html.partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)
    if console is not None:
        size, seconds = path.stat().st_size / 1e6, time.perf_counter() - began
        console.print(f"report: {path} ({size:.1f} MB, {seconds:.0f} s)", highlight=False, soft_wrap=True)
    return path


def load_models(records: Records) -> Models:
    """The run's models, as many as can be had; what cannot is noted in ``records``."""
    from agglo.config import build
    from agglo.report.visuals import Models

    models = Models(_load(records, "model"), _load(records, "initial"))
    teachers = {}
    for name, entry in records.recipe.teachers.items() if records.recipe else ():
        if entry.spatial_weight == 0:  # nothing of it is painted, and a text-aligned one takes long to build
            continue
        try:
            # One by one, so that a teacher that is not installed here does not take the others with it.
            teachers[name] = build("teachers", entry.teacher, where=f"teachers.{name}").requires_grad_(False).eval()
        except Exception as error:  # noqa: BLE001 (a guest library may raise anything; the page says so)
            records.notes.append(f"teacher {name} is not shown ({error})")
    models.teachers = teachers
    return models


def _load(records: Records, name: str) -> Model | None:
    from agglo.model.model import Model
    from agglo.types import AggloError

    folder = records.folder / name
    if not folder.is_dir():
        return None
    try:
        return Model.load(folder)
    except (AggloError, OSError, RuntimeError, ValueError) as error:
        records.notes.append(f"{name}/ cannot be loaded ({error})")
        return None
