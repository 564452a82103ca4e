"""The commands that list models, kinds and recipes."""

from __future__ import annotations

import typer

from agglo.types import ConfigError


def models() -> None:
    """List the released models."""
    from agglo.cli.terminal import console, models_table

    console().print(models_table())


def info(
    model: str = typer.Argument(metavar="MODEL", help="A released name, a folder, a file, or owner/name on the hub."),
    size: str | None = typer.Option(
        None, help="Input size for the cost, 512 or HxW (512x768); the preferred size by default."
    ),
    window: int | None = typer.Option(None, help="Side, in patches, of the attention windows of most blocks."),
) -> None:
    """Show a model's widths, tokens, heads, legal sizes, cost and licence."""
    from agglo.cli.terminal import console, info_table
    from agglo.zoo.info import describe

    console().print(info_table(describe(model, size=_sides(size), window=window)))


def _sides(text: str | None) -> int | tuple[int, int] | None:
    """``512`` or ``512x768`` (HxW) in pixels."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) <= 5 and int(side) > 0 for side in sides):
        raise ConfigError(f"--size {text}: give a side in pixels, 512, or HxW, 512x768")
    height, width = int(sides[0]), int(sides[-1])
    return height if len(sides) == 1 else (height, width)


def kinds(
    point: str | None = typer.Argument(None, metavar="[POINT]", help="An extension point, e.g. teachers."),
    kind: str | None = typer.Argument(
        None, metavar="[KIND]", help="One of its kinds; shows its keys, types and defaults."
    ),
) -> None:
    """List the extension points and their kinds; with a kind, its keys in a recipe."""
    from agglo.cli.terminal import console, kind_help, kind_table, kinds_table

    if point and kind:
        console().print(kind_table(point, kind))
        console().print("\n" + kind_help(point, kind), markup=False, highlight=False)
    else:
        console().print(kinds_table(point))


def recipes(name: str = typer.Argument(None, metavar="[NAME]", help="A recipe; shows its whole claim.")) -> None:
    """List the recipes and their claims."""
    from agglo.cli.terminal import console, recipe_table, recipes_table

    console().print(recipe_table(name) if name else recipes_table())
