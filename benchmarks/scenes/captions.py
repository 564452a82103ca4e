"""Captions from the visible objects of a view."""

from __future__ import annotations

from collections.abc import Sequence


def article(phrase: str) -> str:
    """The phrase with ``a`` or ``an`` before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _join(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def relation(subject: Sequence[float], other: Sequence[float]) -> str:
    """Position of the subject relative to another object, both as camera-frame centres ``(x, y, z)`` in metres."""
    right, away = subject[0] - other[0], subject[2] - other[2]
    if abs(away) > 1.6 * abs(right):
        return "behind" if away > 0 else "in front of"
    if abs(right) > 1.6 * abs(away):
        return "to the right of" if right > 0 else "to the left of"
    return "next to"


def describe(seen: Sequence[tuple[str, str, Sequence[float]]], place: str) -> tuple[str, list[str]]:
    """Write a view's captions.

    Args:
        seen: ``(class, phrase, camera-frame centre)`` of the visible objects, the subject first.
        place: phrase of the background, e.g. ``on a tiled floor``.

    Returns:
        The full sentence, and all captions: the sentence, a short one, one with the look of the subject, and one that
        lists classes.
    """
    category, phrase, centre = seen[0]
    subject = article(phrase)
    if len(seen) == 1:
        full = f"{subject} {place}"
    else:
        named = [article(item[1]) for item in seen[1:]]
        where = relation(centre, seen[1][2]) if len(seen) == 2 else "with"
        full = f"{subject} {where} {_join(named)} {place}"
    listed = _join([article(item[0]) for item in seen])
    return full, [full, f"a photo of {article(category)}", f"a photo of {subject}", f"{listed} {place}"]
