"""Scoring short answers to questions about images: VQAv2, TextVQA, GQA, POPE."""

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
"""Words written without their apostrophe, to what is meant; those that are words of their own ("ill") stay."""
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA = re.compile(r"(?<=\d),(?=\d)")


def normalise(text: str) -> str:
    """An answer as VQA compares them (Antol et al. 2015).

    Lower case; digits for number words up to ten; no articles; no punctuation but periods before digits; apostrophes
    put back where the contraction is no other word: ``"The two dogs, isnt it?"`` is ``"2 dogs isn't it"``.
    """
    whole = text = " ".join(text.split())
    grouped = _COMMA.search(whole) is not None
    for mark in _PUNCTUATION:
        # A mark that stands next to a blank somewhere, and any where digits are grouped, goes; else it leaves a blank.
        gone = grouped or f"{mark} " in whole or f" {mark}" in whole
        text = text.replace(mark, "" if gone else " ")
    words = _PERIOD.sub("", text).lower().split()
    return " ".join(_CONTRACTIONS.get(w, w) for w in (_NUMBERS.get(w, w) for w in words) if w not in _ARTICLES)


def consensus(answer: str, humans: Sequence[str]) -> float:
    """VQA accuracy: the mean, over leaving one person out, of ``min(1, others who say the same / 3)``."""
    answer, said = normalise(answer), [normalise(human) for human in humans]
    if len(said) < 2:
        return float(answer in said)
    same = [one == answer for one in said]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def exact(answer: str, truth: str) -> float:
    """GQA: the same text, whatever its case and final period."""
    one, other = (text.strip().rstrip(".").strip().lower() for text in (answer, truth))
    return float(one == other)


def polarity(answer: str) -> bool:
    """POPE: what an answer says, ``True`` for yes: no "no" and no "not" among the words of its first sentence."""
    words = answer.split(".")[0].replace(",", "").lower().split()
    return "no" not in words and "not" not in words


def binary(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """``accuracy``, ``precision``, ``recall``, ``f1`` and ``yes``, the share of yes, of (said, true) pairs."""
    hit = sum(said and true for said, true in pairs)
    said_yes, true_yes = sum(said for said, _ in pairs), sum(true for _, true in pairs)
    precision, recall = hit / said_yes if said_yes else 0.0, hit / true_yes if true_yes else 0.0
    return {
        "accuracy": sum(said == true for said, true in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hit else 0.0,
        "yes": said_yes / len(pairs),
    }


def score(answers: Sequence[str], truths: Sequence[Any], benchmark: str) -> tuple[dict[str, float], list[float]]:
    """Metrics, and each question's own accuracy.

    Args:
        answers: what was said to each question.
        truths: of the same questions: a list of people's answers (``vqav2``, ``textvqa``), the answer (``gqa``), or
            whether it is yes (``pope``).
        benchmark: one of :data:`BENCHMARKS`.
    """
    if benchmark == "pope":
        pairs = [(polarity(answer), bool(truth)) for answer, truth in zip(answers, truths, strict=True)]
        return binary(pairs), [float(said == true) for said, true in pairs]
    judge = exact if benchmark == "gqa" else consensus
    own = [judge(answer, truth) for answer, truth in zip(answers, truths, strict=True)]
    return {"accuracy": sum(own) / len(own)}, own
