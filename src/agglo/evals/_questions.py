"""Files of answers and of what is true, and which answer belongs to which question."""

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
    """One line of a file of answers: its number, its ``question_id``, what was said, and to which prompt."""

    line: int
    id: str
    text: str
    prompt: str | None = None
    image: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """One question: its ``question_id``, what is true of it, and where the file tells them its image and its words."""

    id: str
    truth: Any
    image: str | None = None
    words: str | None = None


class Key(NamedTuple):
    """What a question is known by where numbers do not tell: its image, and its words as :func:`asked` has them."""

    image: str
    words: str


# --- reading ----------------------------------------------------------------------------------------------------------


def read_answers(path: str | Path) -> list[Answer]:
    """JSON lines with ``question_id`` and ``text`` or ``answer``, and with ``prompt`` and ``image`` where there are.

    Raises:
        ConfigError: no such file, or a line of another form; names the line.
    """
    found = []
    for number, entry in _lines(path):
        text = entry.get("text", entry.get("answer")) if isinstance(entry, dict) else None
        if text is None or "question_id" not in entry:
            raise ConfigError(f"{path}, line {number}: one object with question_id and text is needed, got {entry!r}")
        prompt, image = _word(entry, "prompt"), _word(entry, "image")
        found.append(Answer(number, str(entry["question_id"]), str(text), prompt, image))
    if not found:
        raise ConfigError(f"{path} holds no answer")
    return found


def read_truth(path: str | Path, benchmark: str) -> list[Question]:
    """The questions of a benchmark's own file of true answers, in its order.

    - ``vqav2``: ``{"annotations": [{"question_id", "answers": [{"answer"}, ...]}, ...]}``;
    - ``textvqa``: ``{"data": [{"question_id", "image_id", "question", "answers": [...]}, ...]}``;
    - ``gqa``: ``{question: {"answer"}, ...}``;
    - ``pope``: JSON lines with ``question_id``, ``image``, ``text`` and ``label``, yes or no.

    ``image_id``, ``question``, ``image`` and ``text`` may be absent: then ``question_id`` alone says what is answered.

    Raises:
        ConfigError: no such file, one of another form, or two questions of one ``question_id``.
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
            f"{path} is no file of true answers of {benchmark}: {error!r}; give the one that the benchmark publishes"
        ) from error
    if not found:
        raise ConfigError(f"{path} holds no question")
    twice = _twice([question.id for question in found])
    if twice is not None:
        raise ConfigError(f"{path} holds two questions of question_id {found[twice].id}: it is damaged, get it again")
    return found


# --- pairing ----------------------------------------------------------------------------------------------------------


def asked(prompt: str) -> str:
    """The question in a prompt of LLaVA's, lower case: without its line of OCR tokens and its instruction."""
    # Not splitlines(): what a picture says in the OCR line may hold any of its other ends of lines (\x85, \u2028).
    lines = [" ".join(line.lower().split()) for line in prompt.split("\n")]
    return " ".join(line for line in lines if line and line != _INSTRUCTION and not line.startswith(_HINT))


def pair(
    answers: Sequence[Answer], questions: Sequence[Question], benchmark: str, asked_in: str | None = None
) -> list[str]:
    """What was answered to each question, in their order.

    By ``question_id``. LLaVA's answers to TextVQA have the image's number there: they go by image and words. So do
    those to POPE where both files say them, or where ``asked_in`` does.

    Args:
        answers: from :func:`read_answers`.
        questions: from :func:`read_truth`.
        benchmark: whose they are.
        asked_in: of ``pope``: the file of all questions that were put to the model.

    Raises:
        ConfigError: questions without an answer; two answers to one; answers of POPE that belong to no question, or
            to one of other words.
    """
    if benchmark == "pope":
        return _pair_pope(answers, questions, asked_in)
    if benchmark == "textvqa" and _by_image(answers, questions):
        keyed = [(Key(answer.id, asked(answer.prompt or "")), answer) for answer in answers]
        return _in_turn(keyed, questions, benchmark)
    return _by_id(answers, questions, benchmark)


def _by_image(answers: Sequence[Answer], questions: Sequence[Question]) -> bool:
    """Whether ``question_id`` of the answers is the image's: decided by what is there.

    Raises:
        ConfigError: it is neither the questions' nor their images'.
    """
    said = {answer.id for answer in answers}
    own, images = {question.id for question in questions}, {question.image for question in questions}
    prompted = all(answer.prompt is not None for answer in answers)
    described = all(question.image is not None and question.words is not None for question in questions)
    if own <= said or len(own & said) > len(images & said):
        return False
    if images & said and prompted and described:
        return True
    if not own & said:
        lacking = (
            "" if prompted or not images & said else ", and no prompt, which says which question of the image it is"
        )
        raise ConfigError(
            f"the answers to textvqa have question_id {answers[0].id}{lacking}; the file of true answers has "
            f"question_id {questions[0].id} and image_id {questions[0].image}: give answers with the benchmark's own "
            "question_id, or LLaVA's, with the image's in question_id and the question in prompt"
        )
    return False


def _by_id(answers: Sequence[Answer], questions: Sequence[Question], benchmark: str) -> list[str]:
    twice = _twice([answer.id for answer in answers])
    if twice is not None:
        raise ConfigError(
            f"line {answers[twice].line} of the answers is the second one to question_id {answers[twice].id}: give one "
            "answer to each question"
        )
    said = {answer.id: answer.text for answer in answers}
    _all_answered([question.id for question in questions if question.id not in said], questions, benchmark)
    return [said[question.id] for question in questions]


def _in_turn(keyed: Sequence[tuple[Key, Answer]], questions: Sequence[Question], benchmark: str) -> list[str]:
    """By image and words. Questions that are the same word for word get their answers in the order of both files."""
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
                f"line {waiting[key][count[key]].line} of the answers is the second one to {key.words!r} of image "
                f"{key.image}: give one answer to each question"
            )
    turn = {key: iter(waiting[key]) for key in count}
    return [next(turn[key]).text for key in keys]


def _pair_pope(answers: Sequence[Answer], questions: Sequence[Question], asked_in: str | None) -> list[str]:
    twice = _twice([answer.id for answer in answers])
    described = all(question.image is not None and question.words is not None for question in questions)
    if asked_in is not None:
        if twice is not None:
            return _by_id(answers, questions, "pope")  # says which line
        if not described:
            raise ConfigError("the file of true answers of pope has no image and text: get the one that is published")
        return _of_category(answers, questions, asked_in)
    if described and all(answer.image is not None and answer.prompt is not None for answer in answers):
        keyed = [(Key(str(answer.image), asked(str(answer.prompt))), answer) for answer in answers]
        if {key for key, _ in keyed} <= {_key(question) for question in questions}:
            return _in_turn(keyed, questions, "pope")
    own, said = {question.id for question in questions}, {answer.id for answer in answers}
    if not said <= own:
        raise ConfigError(
            f"the answers to pope have {len(said)} question_ids ({_span(answers)}) and the file of true answers "
            f"{len(own)} ({_span(questions)}): {_GIVE_QUESTIONS}"
        )
    found, given = _by_id(answers, questions, "pope"), {answer.id: answer for answer in answers}
    for question in questions:
        _same(given[question.id], question)
    return found


def _same(answer: Answer, question: Question) -> None:
    """Check an answer that was found by its number: where both files say image or words, they must be the same."""
    other = (
        question.words is not None and answer.prompt is not None and asked(question.words) not in asked(answer.prompt)
    )
    if other or (None not in (question.image, answer.image) and question.image != answer.image):
        raise ConfigError(
            f"line {answer.line} of the answers is to {asked(answer.prompt or '')!r} ({answer.image or 'no image'}), "
            f"and question_id {question.id} of the file of true answers is {asked(question.words or '')!r} "
            f"({question.image or 'no image'}): {_GIVE_QUESTIONS}"
        )


_GIVE_QUESTIONS = (
    "each label file of POPE numbers its own questions, LLaVA those of all categories; name the file that was asked "
    "(llava_pope_test.jsonl) as `questions`, or give the answers of one category alone, by its own question_ids"
)


def _of_category(answers: Sequence[Answer], questions: Sequence[Question], asked_in: str) -> list[str]:
    """By image and words, among the answers of the one category that asks the questions."""
    category: dict[str, str] = {}
    keys: dict[str, Key] = {}
    for number, entry in _lines(asked_in):
        if not isinstance(entry, dict) or not {"question_id", "image", "text"} <= entry.keys():
            raise ConfigError(f"{asked_in}, line {number}: one object with question_id, image and text is needed")
        name = str(entry["question_id"])
        if name in keys:
            raise ConfigError(f"{asked_in}, line {number} is the second question of question_id {name}")
        keys[name] = Key(str(entry["image"]), asked(str(entry["text"])))
        category[name] = str(entry.get("category", ""))
    stray = next((answer for answer in answers if answer.id not in keys), None)
    if stray is not None:
        raise ConfigError(f"line {stray.line} of the answers has question_id {stray.id}, which {asked_in} does not ask")
    wanted = _counts([_key(question) for question in questions])
    held = {each: _counts([keys[i] for i, own in category.items() if own == each]) for each in category.values()}
    fits = [each for each, count in held.items() if all(count.get(key, 0) >= n for key, n in wanted.items())]
    fits = [each for each in fits if held[each] == wanted] or fits
    if len(fits) != 1:
        raise ConfigError(
            f"the questions of the file of true answers are those of {' and of '.join(fits) or 'no category'} in "
            f"{asked_in}: give one whole label file of POPE (coco_pope_random.json), of the release that was asked"
        )
    place = {name: index for index, name in enumerate(keys)}
    mine = sorted((a for a in answers if category[a.id] == fits[0]), key=lambda answer: place[answer.id])
    return _in_turn([(keys[answer.id], answer) for answer in mine], questions, "pope")


def _key(question: Question) -> Key:
    return Key(str(question.image), asked(str(question.words)))


def _counts(values: Sequence[Any]) -> dict[Any, int]:
    found: dict[Any, int] = defaultdict(int)
    for value in values:
        found[value] += 1
    return dict(found)


def _twice(values: Sequence[Hashable]) -> int | None:
    """Where a value comes for the second time."""
    seen: set[Hashable] = set()
    for index, value in enumerate(values):
        if value in seen:
            return index
        seen.add(value)
    return None


def _all_answered(missing: Sequence[str], questions: Sequence[Question], benchmark: str) -> None:
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(questions)} questions of {benchmark} have no answer, {missing[0]} among them: "
            "answer all of them, or cut the file of true answers to those that were asked"
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
        raise ConfigError(f"{path} is no JSON: {error}") from error


def _lines(path: str | Path) -> list[tuple[int, Any]]:
    found = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except ValueError as error:
                raise ConfigError(f"{path}, line {number} is no JSON: {error}") from error
    return found
