"""Which answer belongs to which question: LLaVA's own files, and files that must be refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from agglo.evals._questions import question_of
from agglo.evals.base import EvalContext
from agglo.evals.vlm import Vlm
from agglo.types import ConfigError
from support.models import Oracle

SHORT = "\nAnswer the question using a single word or phrase."
OCR = "\nReference OCR token: DAKOTA, What is it, 5"


def lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


# --- TextVQA ----------------------------------------------------------------------------------------------------------

TEXTVQA = [
    {"image_id": "aa", "question_id": 30, "question": "What is the brand?", "answers": ["nokia"] * 10},
    {"image_id": "aa", "question_id": 31, "question": "what is  it made of", "answers": ["steel"] * 10},
    {"image_id": "bb", "question_id": 32, "question": "What is the brand?", "answers": ["dakota"] * 10},
]
OWN = [
    {"question_id": "bb", "prompt": f"What is the brand?{OCR}{SHORT}", "text": "Dakota"},
    {"question_id": "aa", "prompt": f"What is it made of{OCR}", "text": "wood"},
    {"question_id": "aa", "prompt": f"What is the brand?{SHORT}", "text": "Nokia."},
]


def textvqa(folder: Path, answers: Iterable[Mapping[str, Any]], truth: list[dict[str, Any]] = TEXTVQA) -> Any:
    (folder / "truth.json").write_text(json.dumps({"data": truth}))
    given = lines(folder / "answers.jsonl", answers)
    context = EvalContext()
    found = Vlm(answers=given, truth=str(folder / "truth.json"), benchmark="textvqa").run(Oracle(), context)
    return found["accuracy"], context.records.images["accuracy"]


@pytest.mark.parametrize("around", ["{}", f"{{}}{SHORT}", f"{{}}{OCR}", f"{{}}{OCR}{SHORT}", f"{OCR}\n{{}}{SHORT}"])
def test_question_is_extracted_from_prompt(around: str) -> None:
    assert question_of(around.format("What is  the Brand?")) == "what is the brand?"


@pytest.mark.parametrize("end", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\r"])
def test_ocr_line_separators_do_not_split_lines(end: str) -> None:
    assert question_of(f"What is  the Brand?\r{OCR}{end}b, c{SHORT}") == "what is the brand?"


def test_llava_textvqa_answers_match_by_image_and_question(tmp_path: Path) -> None:
    """Two questions of one image: the last answer to an image is not the answer to all of its questions."""
    assert textvqa(tmp_path, OWN) == (pytest.approx(2 / 3), {"30": 1, "31": 0, "32": 1})
    by_id = [{"question_id": 32 - i, "text": entry["text"]} for i, entry in enumerate(OWN)]
    assert textvqa(tmp_path, by_id) == textvqa(tmp_path, OWN)
    assert textvqa(tmp_path, [*OWN, {"question_id": "cc", "prompt": "Who?", "text": "I"}]) == textvqa(tmp_path, OWN)


def test_equal_textvqa_questions_match_in_order(tmp_path: Path) -> None:
    twins = [TEXTVQA[0], {**TEXTVQA[0], "question_id": 33, "answers": ["ericsson"] * 10}]
    own = [{**OWN[2], "text": "nokia"}, {**OWN[2], "text": "ericsson"}]
    assert textvqa(tmp_path, own, twins)[0] == 1
    assert textvqa(tmp_path, own[::-1], twins)[0] == 0


def test_unmatched_textvqa_answers_raise(tmp_path: Path) -> None:
    silent = [{key: value for key, value in entry.items() if key != "prompt"} for entry in OWN]
    with pytest.raises(
        ConfigError, match=r"question_id bb, and no prompt.*question_id 30 and image_id aa: use answers"
    ):
        textvqa(tmp_path, silent)
    with pytest.raises(ConfigError, match=r"question_id 7; the ground truth .*question_id 30"):
        textvqa(tmp_path, [{"question_id": 7, "text": "x"}])
    with pytest.raises(ConfigError, match=r"1 of 3 questions of textvqa .* such as 31 \(aa: what is it made of\)"):
        textvqa(tmp_path, [OWN[0], OWN[2]])
    with pytest.raises(ConfigError, match=r"line 4 of the answers repeats 'what is the brand\?' of image aa"):
        textvqa(tmp_path, [*OWN, OWN[2]])
    with pytest.raises(ConfigError, match=r"line 2 of the answers repeats question_id 30"):
        textvqa(tmp_path, [{"question_id": 30, "text": "x"}] * 2)
    with pytest.raises(ConfigError, match="repeats question_id 30: it is damaged"):
        textvqa(tmp_path, OWN, [TEXTVQA[0], TEXTVQA[0]])


# --- POPE -------------------------------------------------------------------------------------------------------------

LABELS = {
    "adversarial": [("a.jpg", "Is there a dog in the image?", "yes"), ("a.jpg", "Is there a cat in the image?", "no")],
    "popular": [("a.jpg", "Is there a dog in the image?", "yes"), ("a.jpg", "Is there a car in the image?", "no")],
    "random": [("b.jpg", "Is there a cup in the image?", "yes"), ("a.jpg", "Is there a car in the image?", "no")],
}
GIVEN = {"adversarial": ["Yes", "Yes"], "popular": ["No", "No"], "random": ["Yes", "No"]}
ACCURACY = {"adversarial": 0.5, "popular": 0.5, "random": 1.0}


class Pope:
    """The published files, small: labels numbered from 1 in each file, questions and answers numbered over all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.truth = {}
        self.asked, self.answers = [], []
        for category, labels in LABELS.items():
            entries = [
                {"question_id": i, "image": image, "text": text, "label": label}
                for i, (image, text, label) in enumerate(labels, 1)
            ]
            self.truth[category] = lines(folder / f"coco_pope_{category}.json", entries)
            for (image, text, _), given in zip(labels, GIVEN[category], strict=True):
                common = {"question_id": len(self.asked), "category": category}
                self.asked.append({**common, "image": image, "text": text + SHORT})
                self.answers.append({"question_id": common["question_id"], "prompt": text + SHORT, "text": given})
        self.questions = lines(folder / "llava_pope_test.jsonl", self.asked)

    def run(self, category: str, answers: Iterable[Mapping[str, Any]], questions: str | None = None) -> float:
        given = lines(self.folder / "answers.jsonl", answers)
        made = Vlm(answers=given, truth=self.truth[category], benchmark="pope", questions=questions)
        return made.run(Oracle())["accuracy"]


@pytest.mark.parametrize("category", LABELS)
def test_llava_pope_answers_match_by_category(tmp_path: Path, category: str) -> None:
    """Popular and adversarial ask the same question of the same image, and were answered differently."""
    pope = Pope(tmp_path)
    assert pope.run(category, pope.answers, pope.questions) == ACCURACY[category]
    assert pope.run(category, pope.answers[::-1], pope.questions) == ACCURACY[category]
    with pytest.raises(
        ConfigError, match=r"6 question_ids \(0 to 5\) and the ground truth 2 \(1 to 2\): .*`questions`"
    ):
        pope.run(category, pope.answers)  # ids 1 and 2 are there: once scored without a word


def test_pope_answers_of_one_category(tmp_path: Path) -> None:
    pope = Pope(tmp_path)
    alone = [{"question_id": i, "text": text} for i, text in enumerate(GIVEN["adversarial"], 1)]
    assert pope.run("adversarial", alone) == 0.5
    listed = [{**answer, "image": asked["image"]} for answer, asked in zip(pope.answers, pope.asked, strict=True)]
    assert pope.run("random", listed[4:]) == 1  # numbers 4 and 5: matched by image and words
    assert pope.run("random", listed[:3:-1]) == 1
    for strangers in (listed, listed[2:4]):
        with pytest.raises(ConfigError, match="number"):
            pope.run("random", strangers)


def test_pope_answers_to_other_questions_raise(tmp_path: Path) -> None:
    pope = Pope(tmp_path)
    renumbered = [{**answer, "question_id": i} for i, answer in enumerate(pope.answers[2:4], 1)]
    assert pope.run("popular", renumbered) == 0.5
    with pytest.raises(
        ConfigError, match=r"line 2 of the answers is to 'is there a car in the image\?'.*question_id 2"
    ):
        pope.run("adversarial", renumbered)
    with pytest.raises(ConfigError, match=r"line 1 .*\(z.jpg\).*\(a.jpg\)"):
        pope.run("popular", [{**answer, "image": "z.jpg"} for answer in renumbered])
    with pytest.raises(ConfigError, match="line 3 of the answers repeats question_id 1"):
        pope.run("popular", [*renumbered, renumbered[0]])
    with pytest.raises(ConfigError, match="1 of 2 questions of pope have no answer, such as 2"):
        pope.run("popular", renumbered[:1])


def test_pope_question_file_must_fit(tmp_path: Path) -> None:
    pope = Pope(tmp_path)
    with pytest.raises(ConfigError, match=r"line 7 of the answers has question_id 9, not in"):
        pope.run("random", [*pope.answers, {"question_id": 9, "text": "Yes"}], pope.questions)
    with pytest.raises(ConfigError, match="line 7 of the answers repeats question_id 5"):
        pope.run("random", [*pope.answers, pope.answers[5]], pope.questions)
    with pytest.raises(ConfigError, match=r"1 of 2 questions of pope .* such as 1 \(b.jpg: is there a cup"):
        pope.run("random", pope.answers[:4] + pope.answers[5:], pope.questions)
    both = lines(
        tmp_path / "cut.json", [{"question_id": 1, "image": "a.jpg", "text": LABELS["popular"][0][1], "label": "yes"}]
    )
    pope.truth["cut"] = both
    with pytest.raises(ConfigError, match=r"those of adversarial and of popular in .*one whole label file"):
        pope.run("cut", pope.answers, pope.questions)
    pope.truth["other"] = lines(tmp_path / "other.json", [{"question_id": 1, "image": "q", "text": "?", "label": "no"}])
    with pytest.raises(ConfigError, match="those of no category in"):
        pope.run("other", pope.answers, pope.questions)
    pope.truth["bare"] = lines(tmp_path / "bare.json", [{"question_id": 1, "label": "no"}])
    with pytest.raises(ConfigError, match="has no image and text"):
        pope.run("bare", pope.answers, pope.questions)
    with pytest.raises(ConfigError, match="line 1: expected an object with question_id, image and text"):
        pope.run("random", pope.answers, lines(tmp_path / "bad.jsonl", [{"question_id": 1}]))
    with pytest.raises(ConfigError, match="line 7 repeats question_id 0"):
        pope.run("random", pope.answers, lines(tmp_path / "bad.jsonl", [*pope.asked, pope.asked[0]]))
    with pytest.raises(ConfigError, match="questions needs answers to pope"):
        Vlm(answers="a", truth="b", questions="c", benchmark="gqa")
