"""Classes of a set of images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from agglo.sources.base import Source
from agglo.types import ConfigError


def class_names(source: Source, index: Sequence[int]) -> list[str]:
    """The class name of each image: ``label(index)`` of the source, a name or a position in its ``classes``.

    Raises:
        ConfigError: an image has no label, or one outside the source's classes.
    """
    label: Callable[[int], int | str | None] | None = getattr(source, "label", None)
    labels = [None if label is None else label(i) for i in index]
    missing = next((i for i, value in zip(index, labels, strict=True) if value is None), None)
    if missing is not None:
        raise ConfigError(
            f"{source.name(missing)} has no class: use a source with labels, such as {{kind: scenes}}, or a "
            "folder with one sub-folder per class"
        )
    warn_of_empty(source)
    classes: Sequence[str] = getattr(source, "classes", ())
    for i, value in zip(index, labels, strict=True):
        if not isinstance(value, str) and not 0 <= int(value or 0) < len(classes):
            raise ConfigError(
                f"{source.name(i)} has label {value}, but the source has {len(classes)} classes: labels are 0 to "
                f"{len(classes) - 1}; count them from 0 and remove images without a class"
            )
    return [value if isinstance(value, str) else classes[int(value or 0)] for value in labels]


def number_classes(train: Sequence[str], test: Sequence[str]) -> tuple[list[str], Tensor, Tensor]:
    """Number the classes that occur in ``train``, in alphabetical order.

    An image of ``test`` whose class has no image in ``train`` gets -1 and counts as wrong; a warning names the class.

    Returns:
        class names, numbers of ``train``, numbers of ``test``.
    """
    names = sorted(set(train))
    number = {name: i for i, name in enumerate(names)}
    absent = sorted(set(test) - number.keys())
    if absent:
        lost = sum(name not in number for name in test)
        shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        warnings.warn(
            f"{len(absent)} classes of the test images have no training image ({shown}): {lost} of {len(test)} "
            "test images count as wrong; add training images, or remove these classes from the test source",
            stacklevel=2,
        )
    return names, torch.tensor([number[name] for name in train]), torch.tensor([number.get(n, -1) for n in test])


_SHOWN = 3


def warn_of_empty(source: Source) -> None:
    """Warn of class folders without images: no prediction can be one of their classes."""
    folders: Callable[[], list[str]] | None = getattr(source, "empty_folders", None)
    empty = folders() if folders is not None else []
    if empty:
        shown = ", ".join(empty[:_SHOWN]) + (", ..." if len(empty) > _SHOWN else "")
        where = getattr(source, "root", type(source).__name__)
        warnings.warn(
            f"{len(empty)} class folder{'s' if len(empty) > 1 else ''} of {where} without an image ({shown}): left out "
            "of the classes; add images, or remove the folders",
            stacklevel=3,
        )
