"""Scores of short answers to questions about images: VQAv2, TextVQA, GQA, POPE."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

BENCHMARKS = ("vqav2", "textvqa", "gqa", "pope")

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_NUMBERS["none"] = "0"
_ARTICLES = {"a", "an", "the"}
_FORMS = """
ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't shan't shouldn't
wasn't weren't won't wouldn't could've I've might've must've should've they've we've what've where've who've would've
you've he'd how'd it'd that'd there'd they'd what'd where'd who'd you'd how'll it'll that'll there'll they'll what'll
where'll who'll you'll I'm they're you're what're who're he's how's she's that's there's what's where's who's why's
ma'am o'clock y'all
"""
_CONTRACTIONS = {form.replace("'", "").lower(): form.lower() for form in _FORMS.split()}
"""Contractions without their apostrophe, and with it; those that are also words ("ill") are not included."""
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA = re.compile(r"(?<=\d),(?=\d)")


def normalise(text: str) -> str:
    """Normalise an answer as VQA does (Antol et al. 2015, arXiv:1505.00468).

    Lower case; digits for number words up to ten; no articles; no punctuation except periods before digits; apostrophes
    restored in unambiguous contractions: ``"The two dogs, isnt it?"`` is ``"2 dogs isn't it"``.
    """
    whole = text = " ".join(text.split())
    grouped = _COMMA.search(whole) is not None
    for mark in _PUNCTUATION:
        # Removed next to a space and in texts with grouped digits, else replaced by a space: as in VQA's own code.
        removed = grouped or f"{mark} " in whole or f" {mark}" in whole
        text = text.replace(mark, "" if removed else " ")
    words = _PERIOD.sub("", text).lower().split()
    return " ".join(_CONTRACTIONS.get(w, w) for w in (_NUMBERS.get(w, w) for w in words) if w not in _ARTICLES)


def consensus(answer: str, humans: Sequence[str]) -> float:
    """VQA accuracy: the leave-one-out mean of ``min(1, equal human answers / 3)``."""
    answer, given = normalise(answer), [normalise(human) for human in humans]
    if len(given) < 2:
        return float(answer in given)
    same = [one == answer for one in given]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def exact(answer: str, truth: str) -> float:
    """GQA: exact match, ignoring case and a final period."""
    one, other = (text.strip().rstrip(".").strip().lower() for text in (answer, truth))
    return float(one == other)


def polarity(answer: str) -> bool:
    """POPE: ``True`` (yes) unless the first sentence of an answer contains the word "no" or "not"."""
    words = answer.split(".")[0].replace(",", "").lower().split()
    return "no" not in words and "not" not in words


def binary(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """``accuracy``, ``precision``, ``recall``, ``f1`` and ``yes``, the share of yes, of (predicted, true) pairs."""
    hit = sum(predicted and true for predicted, true in pairs)
    predicted_yes, true_yes = sum(predicted for predicted, _ in pairs), sum(true for _, true in pairs)
    precision, recall = hit / predicted_yes if predicted_yes else 0.0, hit / true_yes if true_yes else 0.0
    return {
        "accuracy": sum(predicted == true for predicted, true in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hit else 0.0,
        "yes": predicted_yes / len(pairs),
    }


def score(answers: Sequence[str], truths: Sequence[Any], benchmark: str) -> tuple[dict[str, float], list[float]]:
    """Metrics, and the accuracy of each question.

    Args:
        answers: one per question.
        truths: per question a list of human answers (``vqav2``, ``textvqa``), the answer (``gqa``), or whether it is
            yes (``pope``).
        benchmark: one of :data:`BENCHMARKS`.
    """
    if benchmark == "pope":
        pairs = [(polarity(answer), bool(truth)) for answer, truth in zip(answers, truths, strict=True)]
        return binary(pairs), [float(predicted == true) for predicted, true in pairs]
    judge = exact if benchmark == "gqa" else consensus
    own = [judge(answer, truth) for answer, truth in zip(answers, truths, strict=True)]
    return {"accuracy": sum(own) / len(own)}, own
