"""Files of answers and ground truth for question answering, and the matching of answers to questions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from agglo.types import ConfigError

_INSTRUCTION = "answer the question using a single word or phrase."
_HINT = "reference ocr token:"


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of an answer file: line number, ``question_id``, answer, and prompt and image if given."""

    line: int
    id: str
    text: str
    prompt: str | None = None
    image: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """One question: ``question_id``, ground truth, and image and question text if given."""

    id: str
    truth: Any
    image: str | None = None
    words: str | None = None


class Key(NamedTuple):
    """Identity of a question without a usable ``question_id``: its image, and its text from :func:`question_of`."""

    image: str
    words: str


# --- reading ----------------------------------------------------------------------------------------------------------


def read_answers(path: str | Path) -> list[Answer]:
    """Read JSON lines with ``question_id``, ``text`` or ``answer``, and optional ``prompt`` and ``image``.

    Raises:
        ConfigError: an unreadable file, or a line of another format; names the line.
    """
    found = []
    for number, entry in _lines(path):
        text = entry.get("text", entry.get("answer")) if isinstance(entry, dict) else None
        if text is None or "question_id" not in entry:
            raise ConfigError(f"{path}, line {number}: expected an object with question_id and text, got {entry!r}")
        prompt, image = _word(entry, "prompt"), _word(entry, "image")
        found.append(Answer(number, str(entry["question_id"]), str(text), prompt, image))
    if not found:
        raise ConfigError(f"{path} contains no answer")
    return found


def read_truth(path: str | Path, benchmark: str) -> list[Question]:
    """Read the questions of a benchmark's ground truth file, in its order.

    - ``vqav2``: ``{"annotations": [{"question_id", "answers": [{"answer"}, ...]}, ...]}``;
    - ``textvqa``: ``{"data": [{"question_id", "image_id", "question", "answers": [...]}, ...]}``;
    - ``gqa``: ``{question: {"answer"}, ...}``;
    - ``pope``: JSON lines with ``question_id``, ``image``, ``text`` and ``label``, yes or no.

    ``image_id``, ``question``, ``image`` and ``text`` may be absent: answers are then matched by ``question_id`` alone.

    Raises:
        ConfigError: an unreadable file, another format, or a repeated ``question_id``.
    """
    readers: Mapping[str, Callable[[], list[Question]]] = {
        "vqav2": lambda: [
            Question(str(entry["question_id"]), [str(human["answer"]) for human in entry["answers"]])
            for entry in _whole(path)["annotations"]
        ],
        "textvqa": lambda: [
            Question(
                str(entry["question_id"]), [str(human) for human in entry["answers"]], _word(entry, "image_id"),
                _word(entry, "question"),
            )
            for entry in _whole(path)["data"]
        ],
        "gqa": lambda: [Question(str(key), str(entry["answer"])) for key, entry in _whole(path).items()],
        "pope": lambda: [
            Question(str(entry["question_id"]), _yes(entry["label"]), _word(entry, "image"), _word(entry, "text"))
            for _, entry in _lines(path)
        ],
    }  # fmt: skip
    try:
        found = readers[benchmark]()
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not a ground truth file of {benchmark}: {error!r}; use the one that the benchmark publishes"
        ) from error
    if not found:
        raise ConfigError(f"{path} contains no question")
    repeated = _first_repeat([question.id for question in found])
    if repeated is not None:
        raise ConfigError(f"{path} repeats question_id {found[repeated].id}: it is damaged, download it again")
    return found


# --- pairing ----------------------------------------------------------------------------------------------------------


def question_of(prompt: str) -> str:
    """The question in a LLaVA prompt, lower case, without the line of OCR tokens and the instruction."""
    # Not splitlines(): the OCR line may contain other line separators (\x85, \u2028).
    lines = [" ".join(line.lower().split()) for line in prompt.split("\n")]
    return " ".join(line for line in lines if line and line != _INSTRUCTION and not line.startswith(_HINT))


def pair(
    answers: Sequence[Answer], questions: Sequence[Question], benchmark: str, question_file: str | None = None
) -> list[str]:
    """The answer to each question, in the order of the questions.

    Answers are matched by ``question_id``. LLaVA's answers to TextVQA have the image's id there and are matched by
    image and question text. So are answers to POPE if both files have these, or if ``question_file`` is given.

    Args:
        answers: from :func:`read_answers`.
        questions: from :func:`read_truth`.
        benchmark: of the questions.
        question_file: for ``pope``: the file of all questions that the model answered.

    Raises:
        ConfigError: questions without an answer, or with two; answers to POPE that match no question, or one with
            another text.
    """
    if benchmark == "pope":
        return _pair_pope(answers, questions, question_file)
    if benchmark == "textvqa" and _by_image(answers, questions):
        keyed = [(Key(answer.id, question_of(answer.prompt or "")), answer) for answer in answers]
        return _in_turn(keyed, questions, benchmark)
    return _by_id(answers, questions, benchmark)


def _by_image(answers: Sequence[Answer], questions: Sequence[Question]) -> bool:
    """Whether ``question_id`` of the answers is the image's id.

    Raises:
        ConfigError: it is neither the questions' nor the images'.
    """
    given = {answer.id for answer in answers}
    own, images = {question.id for question in questions}, {question.image for question in questions}
    prompted = all(answer.prompt is not None for answer in answers)
    described = all(question.image is not None and question.words is not None for question in questions)
    if own <= given or len(own & given) > len(images & given):
        return False
    if images & given and prompted and described:
        return True
    if not own & given:
        lacking = "" if prompted or not images & given else ", and no prompt to identify the question of the image"
        raise ConfigError(
            f"the answers to textvqa have question_id {answers[0].id}{lacking}; the ground truth has "
            f"question_id {questions[0].id} and image_id {questions[0].image}: use answers with the benchmark's "
            "question_id, or LLaVA's, with the image's id in question_id and the question in prompt"
        )
    return False


def _by_id(answers: Sequence[Answer], questions: Sequence[Question], benchmark: str) -> list[str]:
    repeated = _first_repeat([answer.id for answer in answers])
    if repeated is not None:
        raise ConfigError(
            f"line {answers[repeated].line} of the answers repeats question_id {answers[repeated].id}: use one answer "
            "per question"
        )
    given = {answer.id: answer.text for answer in answers}
    _all_answered([question.id for question in questions if question.id not in given], questions, benchmark)
    return [given[question.id] for question in questions]


def _in_turn(keyed: Sequence[tuple[Key, Answer]], questions: Sequence[Question], benchmark: str) -> list[str]:
    """Match by image and text. Equal questions get their answers in the order of both files."""
    waiting: dict[Key, list[Answer]] = defaultdict(list)
    for key, answer in keyed:
        waiting[key].append(answer)
    keys = [_key(question) for question in questions]
    count = _counts(keys)
    _all_answered(
        [f"{each.id} ({key.image}: {key.words})" for each, key in zip(questions, keys, strict=True)
         if len(waiting.get(key, ())) < count[key]],
        questions, benchmark,
    )  # fmt: skip
    for key in count:
        if len(waiting[key]) > count[key]:
            raise ConfigError(
                f"line {waiting[key][count[key]].line} of the answers repeats {key.words!r} of image {key.image}: "
                "use one answer per question"
            )
    turn = {key: iter(waiting[key]) for key in count}
    return [next(turn[key]).text for key in keys]


def _pair_pope(answers: Sequence[Answer], questions: Sequence[Question], question_file: str | None) -> list[str]:
    repeated = _first_repeat([answer.id for answer in answers])
    described = all(question.image is not None and question.words is not None for question in questions)
    if question_file is not None:
        if repeated is not None:
            return _by_id(answers, questions, "pope")  # raises, with the line
        if not described:
            raise ConfigError("the ground truth of pope has no image and text: use the published file")
        return _of_category(answers, questions, question_file)
    if described and all(answer.image is not None and answer.prompt is not None for answer in answers):
        keyed = [(Key(str(answer.image), question_of(str(answer.prompt))), answer) for answer in answers]
        if {key for key, _ in keyed} <= {_key(question) for question in questions}:
            return _in_turn(keyed, questions, "pope")
    own, ids = {question.id for question in questions}, {answer.id for answer in answers}
    if not ids <= own:
        raise ConfigError(
            f"the answers to pope have {len(ids)} question_ids ({_span(answers)}) and the ground truth "
            f"{len(own)} ({_span(questions)}): {_GIVE_QUESTIONS}"
        )
    found, given = _by_id(answers, questions, "pope"), {answer.id: answer for answer in answers}
    for question in questions:
        _same(given[question.id], question)
    return found


def _same(answer: Answer, question: Question) -> None:
    """Raise unless an answer matched by id has the image and text of its question, where both are given."""
    asked, prompt = question_of(question.words or ""), question_of(answer.prompt or "")
    other = question.words is not None and answer.prompt is not None and asked not in prompt
    if other or (None not in (question.image, answer.image) and question.image != answer.image):
        raise ConfigError(
            f"line {answer.line} of the answers is to {prompt!r} ({answer.image or 'no image'}), "
            f"and question_id {question.id} of the ground truth is {asked!r} "
            f"({question.image or 'no image'}): {_GIVE_QUESTIONS}"
        )


_GIVE_QUESTIONS = (
    "each label file of POPE numbers its own questions, LLaVA those of all categories; set `questions` to the question "
    "file (llava_pope_test.jsonl), or use the answers of one category, with its own question_ids"
)


def _of_category(answers: Sequence[Answer], questions: Sequence[Question], question_file: str) -> list[str]:
    """Match by image and text among the answers of the category that has the questions."""
    category: dict[str, str] = {}
    keys: dict[str, Key] = {}
    for number, entry in _lines(question_file):
        if not isinstance(entry, dict) or not {"question_id", "image", "text"} <= entry.keys():
            raise ConfigError(f"{question_file}, line {number}: expected an object with question_id, image and text")
        name = str(entry["question_id"])
        if name in keys:
            raise ConfigError(f"{question_file}, line {number} repeats question_id {name}")
        keys[name] = Key(str(entry["image"]), question_of(str(entry["text"])))
        category[name] = str(entry.get("category", ""))
    stray = next((answer for answer in answers if answer.id not in keys), None)
    if stray is not None:
        raise ConfigError(f"line {stray.line} of the answers has question_id {stray.id}, not in {question_file}")
    wanted = _counts([_key(question) for question in questions])
    held = {each: _counts([keys[i] for i, own in category.items() if own == each]) for each in category.values()}
    fits = [each for each, count in held.items() if all(count.get(key, 0) >= n for key, n in wanted.items())]
    fits = [each for each in fits if held[each] == wanted] or fits
    if len(fits) != 1:
        raise ConfigError(
            f"the questions of the ground truth are those of {' and of '.join(fits) or 'no category'} in "
            f"{question_file}: use one whole label file of POPE (coco_pope_random.json) of the same release"
        )
    order = {name: index for index, name in enumerate(keys)}
    mine = sorted((a for a in answers if category[a.id] == fits[0]), key=lambda answer: order[answer.id])
    return _in_turn([(keys[answer.id], answer) for answer in mine], questions, "pope")


def _key(question: Question) -> Key:
    return Key(str(question.image), question_of(str(question.words)))


def _counts(values: Sequence[Any]) -> dict[Any, int]:
    found: dict[Any, int] = defaultdict(int)
    for value in values:
        found[value] += 1
    return dict(found)


def _first_repeat(values: Sequence[Hashable]) -> int | None:
    """Index of the first value that occurred before."""
    seen: set[Hashable] = set()
    for index, value in enumerate(values):
        if value in seen:
            return index
        seen.add(value)
    return None


def _all_answered(missing: Sequence[str], questions: Sequence[Question], benchmark: str) -> None:
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(questions)} questions of {benchmark} have no answer, such as {missing[0]}: "
            "answer all of them, or reduce the ground truth to those answered"
        )


def _span(entries: Sequence[Answer] | Sequence[Question]) -> str:
    return f"{entries[0].id} to {entries[-1].id}"


# --- files ------------------------------------------------------------------------------------------------------------


def _word(entry: Mapping[str, Any], key: str) -> str | None:
    return None if entry.get(key) is None else str(entry[key])


def _yes(label: Any) -> bool:
    text = str(label).strip().lower()
    if text not in ("yes", "no"):
        raise TypeError(f"label {label!r} is neither yes nor no")
    return text == "yes"


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _whole(path: str | Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error


def _lines(path: str | Path) -> list[tuple[int, Any]]:
    found = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except ValueError as error:
                raise ConfigError(f"{path}, line {number} is not JSON: {error}") from error
    return found
