"""HTML elements: every string is escaped, except :class:`Markup`."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable

from PIL import Image

VOID = frozenset({"br", "img", "meta"})


class Markup(str):
    """A string of HTML, not escaped again."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def text(child: Child) -> Markup:
    """Convert a child to markup: strings are escaped, None is dropped, lists are joined."""
    if child is None:
        return Markup("")
    if isinstance(child, Markup):
        return child
    if isinstance(child, str | int | float):
        return Markup(html.escape(str(child), quote=True))
    return Markup("".join(text(part) for part in child))


def tag(name: str, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """An element. ``class_`` is ``class``, other underscores become hyphens; None and False attributes are dropped."""
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{html.escape(str(value), quote=True)}"')
    opening = f"<{' '.join(parts)}>"
    return Markup(opening if name in VOID else f"{opening}{text(children)}</{name}>")


def picture(image: Image.Image, alt: str, *, quality: int = 82, **attributes: str | int | None) -> Markup:
    """An image embedded as WebP in a data URI.

    Args:
        image: any mode that converts to RGB.
        alt: alternative text.
        quality: of WebP, 0 to 100.
        attributes: of the ``img`` element.
    """
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=quality, method=4)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return tag(
        "img", src=f"data:image/webp;base64,{data}", alt=alt, width=image.width, height=image.height, **attributes
    )
