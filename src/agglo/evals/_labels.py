"""The classes of a set of images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from agglo.sources.base import Source
from agglo.types import ConfigError


def class_names(source: Source, index: Sequence[int]) -> list[str]:
    """The class of each image: what the source's ``label(index)`` says, a name or a position in its ``classes``.

    Raises:
        ConfigError: an image has no label, or a number that is none of the source's classes.
    """
    label: Callable[[int], int | str | None] | None = getattr(source, "label", None)
    labels = [None if label is None else label(i) for i in index]
    missing = next((i for i, value in zip(index, labels, strict=True) if value is None), None)
    if missing is not None:
        raise ConfigError(
            f"{source.name(missing)} has no class: use a source with labels, such as {{kind: scenes}}, or a "
            "folder with one sub-folder a class"
        )
    warn_of_empty(source)
    classes: Sequence[str] = getattr(source, "classes", ())
    for i, value in zip(index, labels, strict=True):
        if not isinstance(value, str) and not 0 <= int(value or 0) < len(classes):
            raise ConfigError(
                f"{source.name(i)} has label {value}, but the source names {len(classes)} classes: labels are 0 to "
                f"{len(classes) - 1}; count them from 0, and leave images without a class out of the folder"
            )
    return [value if isinstance(value, str) else classes[int(value or 0)] for value in labels]


def number_classes(train: Sequence[str], test: Sequence[str]) -> tuple[list[str], Tensor, Tensor]:
    """Classes by number: those that occur in ``train``, in the order of their names.

    An image of ``test`` whose class has no image in ``train`` gets -1, which no answer equals: it counts as wrong, and
    a warning names its class.

    Returns:
        the names, the numbers of ``train`` and of ``test``.
    """
    names = sorted(set(train))
    number = {name: i for i, name in enumerate(names)}
    absent = sorted(set(test) - number.keys())
    if absent:
        lost = sum(name not in number for name in test)
        shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        warnings.warn(
            f"{len(absent)} of the test images' classes have no image to learn from ({shown}): {lost} of {len(test)} "
            "test images count as wrong; add training images of them, or leave them out of the test source",
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
