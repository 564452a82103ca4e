"""HTML that is escaped unless it says otherwise: every string becomes text, only :class:`Markup` stays markup."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable

from PIL import Image

VOID = frozenset({"br", "img", "meta"})
MINUS = "\N{MINUS SIGN}"


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def text(child: Child) -> Markup:
    """A child as markup: strings are escaped, None vanishes, lists are joined."""
    if child is None:
        return Markup("")
    if isinstance(child, Markup):
        return child
    if isinstance(child, str | int | float):
        return Markup(html.escape(str(child), quote=True))
    return Markup("".join(text(part) for part in child))


def tag(name: str, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """An element. ``class_`` is ``class``, other underscores become hyphens; None and False attributes vanish."""
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{html.escape(str(value), quote=True)}"')
    opening = f"<{' '.join(parts)}>"
    return Markup(opening if name in VOID else f"{opening}{text(children)}</{name}>")


def picture(image: Image.Image, alt: str, *, quality: int = 82, **attributes: str | int | None) -> Markup:
    """An image inside the page, as WebP in a data URI.

    Args:
        image: any mode that converts to RGB.
        alt: what it shows, for those who do not see it.
        quality: WebP's, 0..100.
        attributes: of the ``img`` element.
    """
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=quality, method=4)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return tag(
        "img", src=f"data:image/webp;base64,{data}", alt=alt, width=image.width, height=image.height, **attributes
    )


def number(value: float, digits: int = 3) -> str:
    """A measured number for people: ``digits`` decimals below 10, fewer above, a true minus sign."""
    if value != value:
        return "n/a"
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else f"{MINUS}∞"
    size = abs(value)
    shown = (
        f"{size:,.0f}"
        if size >= 1000
        else f"{size:.{max(0, digits - (2 if size >= 100 else 1 if size >= 10 else 0))}f}"
    )
    zero = not any(char in "123456789" for char in shown)
    return shown if value >= 0 or zero else MINUS + shown


def signed(value: float, digits: int = 3) -> str:
    """:func:`number` with its sign always shown."""
    shown = number(value, digits)
    return shown if shown.startswith(MINUS) or not any(char in "123456789" for char in shown) else f"+{shown}"
