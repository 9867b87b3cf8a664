"""SQuAD v1.1: its file, the windows a model reads a long text in, the answers behind logits, F1 and exact match.

Windows and answers are those of mlcommons/inference language/bert (create_squad_data.py, accuracy-squad.py) at
b66003e1, whose word splitting is BERT's own (tokenization.py of google-research/bert); scores are those of the official
evaluate-v1.1.py.
"""

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

VERSION = "1.1"
MAX_ANSWER = 30
"""Tokens."""
N_BEST = 20
"""Starts and ends that are looked at, the likeliest ones."""
PADDING_LOGIT = -10_000.0
"""Of the positions behind a window's last token: what the reference scores them with where a log leaves them out."""
NO_ANSWER = "empty"
"""The reference's text for a question none of whose likeliest starts and ends make an answer."""

_CHUNK = 512
"""Windows scored at once: some 2 MiB each for starts, ends and their order."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Question:
    """One question, the paragraph that answers it, and every answer that people gave."""

    identifier: str
    text: str
    paragraph: int
    """Index in Dataset.paragraphs."""
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dataset:
    """A SQuAD v1.1 file, in its order."""

    paragraphs: list[list[str]]
    """The words between white space of each paragraph."""
    questions: list[Question]


class _Reader:
    """Fields of a SQuAD file, with errors that say where in it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def fail(self, what: str) -> ValueError:
        return ValueError(f"{self._path}: {what}")

    def field(self, holder: Any, key: str, kind: type[_T], where: str) -> _T:
        value = holder.get(key) if isinstance(holder, dict) else None
        if not isinstance(value, kind):
            raise self.fail(f"{where} has no {key!r}: fetch the file again")
        return value

    def question(self, entry: Any, paragraph: int, where: str) -> Question:
        identifier = self.field(entry, "id", str, where)
        where = f"{where} ({identifier})"
        if "is_impossible" in entry:
            raise self.fail(f"{where} has 'is_impossible': this is SQuAD v2.0, fetch dev-v1.1.json")
        text = self.field(entry, "question", str, where)
        answers = self.field(entry, "answers", list, where)
        if not answers:
            raise self.fail(f"{where} has no answer: fetch the file again")
        texts = (self.field(answer, "text", str, f"{where} answer {n}") for n, answer in enumerate(answers, 1))
        return Question(identifier, text, paragraph, tuple(texts))


def read(path: Path) -> Dataset:
    """The dataset in `path`.

    Raises ValueError, naming article, paragraph and question counted from 1, for a file that is cut off, of another
    version, or lacks a field.
    """
    reader = _Reader(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: run `fleet provision`") from None
    except ValueError as error:
        raise reader.fail(f"not a whole JSON file, fetch it again: {error}") from error
    version = reader.field(data, "version", str, "the dataset")
    if version.removeprefix("v") != VERSION:
        raise reader.fail(f"SQuAD version {version!r}, this benchmark is defined on {VERSION}: fetch dev-v1.1.json")
    paragraphs: list[list[str]] = []
    questions: dict[str, Question] = {}
    for article, entry in enumerate(reader.field(data, "data", list, "the dataset"), 1):
        for number, paragraph in enumerate(reader.field(entry, "paragraphs", list, f"article {article}"), 1):
            where = f"article {article} paragraph {number}"
            paragraphs.append(words(reader.field(paragraph, "context", str, where)))
            for count, qa in enumerate(reader.field(paragraph, "qas", list, where), 1):
                question = reader.question(qa, len(paragraphs) - 1, f"{where} question {count}")
                if questions.setdefault(question.identifier, question) is not question:
                    raise reader.fail(f"{where} question {count}: id {question.identifier} is there twice")
    if not questions:
        raise reader.fail("no questions: fetch the file again")
    return Dataset(paragraphs, list(questions.values()))


def read_log(path: Path) -> Iterator[tuple[int, bytes]]:
    """Sample index and response of each entry of an mlperf_log_accuracy.json.

    Raises ValueError when the log is cut off or is none.
    """
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            yield int(entry["qsl_idx"]), bytes.fromhex(entry["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"not a whole accuracy log, LoadGen may have been stopped: {error}") from error


def words(text: str) -> list[str]:
    """`text` between white space, of which only these five count; answers are cut out of words so split."""
    return re.findall(r"[^ \t\r\n\u202f]+", text)


def windows(tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """First token and length of each window of at most `room` over a text of `tokens`, until one reaches its end."""
    spans: list[tuple[int, int]] = []
    start = 0
    while start < tokens:
        length = min(tokens - start, room)
        spans.append((start, length))
        if start + length == tokens:
            break
        start += min(length, stride)
    return spans


def owners(spans: Sequence[tuple[int, int]], tokens: int) -> npt.NDArray[np.int64]:
    """[tokens], the window that sees most around each token: only there may an answer begin with it.

    A window's score is the smaller of its tokens before and behind, plus 0.01 times its length; the first of equals.
    """
    position = np.arange(tokens)
    scores = np.full((len(spans), tokens), -np.inf)
    for row, (start, length) in enumerate(spans):
        inside = position[start : start + length]
        scores[row, inside] = np.minimum(inside - start, start + length - 1 - inside) + 0.01 * length
    return scores.argmax(axis=0) if spans else position


@dataclass(frozen=True, slots=True)
class Spans:
    """The best answer of each of N windows: first and last token int64 [N], score float64 [N], -inf without one."""

    first: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]
    score: npt.NDArray[np.float64]


def best_spans(
    logits: Sequence[npt.NDArray[np.float32]],
    context: Sequence[npt.NDArray[np.bool_]],
    starts: Sequence[npt.NDArray[np.bool_]],
    length: int,
) -> Spans:
    """The best answer in each window: start and end among the N_BEST likeliest, MAX_ANSWER tokens at the most.

    Per window of L tokens, at most `length`: `logits` [L, 2]; `context` [L], where an answer may end; `starts` [L],
    where one may begin. Of equal scores the likelier start wins, then the likelier end, then the earlier token.
    """
    chunks = [
        _best_of_chunk(logits[row : row + _CHUNK], context[row : row + _CHUNK], starts[row : row + _CHUNK], length)
        for row in range(0, len(logits), _CHUNK)
    ]
    first, last, score = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return Spans(first, last, score)


def _best_of_chunk(
    logits: Sequence[npt.NDArray[np.float32]],
    context: Sequence[npt.NDArray[np.bool_]],
    starts: Sequence[npt.NDArray[np.bool_]],
    length: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    count = len(logits)
    # Widened to double before they are added, as the reference does: sums of singles would make other ties.
    values = np.full((2, count, length), PADDING_LOGIT)
    may_be = np.zeros((2, count, length), dtype=bool)
    for row, window in enumerate(logits):
        values[:, row, : len(window)] = window.T
        may_be[0, row, : len(window)] = starts[row]
        may_be[1, row, : len(window)] = context[row]
    order = np.argsort(-values, axis=2, kind="stable")[:, :, :N_BEST]
    value, allowed = np.take_along_axis(values, order, axis=2), np.take_along_axis(may_be, order, axis=2)
    behind = order[1][:, None, :] - order[0][:, :, None]
    valid = allowed[0][:, :, None] & allowed[1][:, None, :] & (behind >= 0) & (behind < MAX_ANSWER)
    scores = np.where(valid, value[0][:, :, None] + value[1][:, None, :], -np.inf).reshape(count, -1)
    best = scores.argmax(axis=1)
    start_rank, end_rank = np.divmod(best, order.shape[2])
    rows = np.arange(count)
    return order[0][rows, start_rank], order[1][rows, end_rank], scores[rows, best]


def answer_text(tokens: Sequence[str], original: Sequence[str]) -> str:
    """The answer as it stands in the text, from its word pieces and the whole words they come from."""
    joined = " ".join(tokens).replace(" ##", "").replace("##", "")
    return original_text(" ".join(joined.split()), " ".join(original))


def original_text(predicted: str, original: str) -> str:
    """The part of `original` that `predicted`, lower-case and split at punctuation, was made from.

    All of `original` where the two cannot be laid beside each other character by character: accents that became
    characters of their own, [UNK], another lower case.
    """
    split = " ".join(basic_tokens(original))
    start = split.find(predicted)
    places = [place for place, character in enumerate(split) if character != " "]
    original_places = [place for place, character in enumerate(original) if character != " "]
    if start < 0 or len(places) != len(original_places):
        return original
    aligned = dict(zip(places, original_places, strict=True))
    first, last = aligned.get(start), aligned.get(start + len(predicted) - 1)
    return original if first is None or last is None else original[first : last + 1]


def basic_tokens(text: str) -> list[str]:
    """BERT's split before word pieces: lower case without accents, punctuation and Chinese characters apart.

    Python's Unicode tables and lower case, on purpose: the reference's alignment knows no other, and the tokenizers
    library differs from it in a final sigma.
    """
    cleaned = "".join(_cleaned(character) for character in text)
    split: list[str] = []
    for word in cleaned.split():
        plain = unicodedata.normalize("NFD", word.lower())
        kept = (character for character in plain if unicodedata.category(character) != "Mn")
        split.append("".join(f" {character} " if _is_punctuation(character) else character for character in kept))
    return " ".join(split).split()


def _cleaned(character: str) -> str:
    code = ord(character)
    if character in " \t\n\r":
        return " "
    category = unicodedata.category(character)
    if code in {0, 0xFFFD} or category in {"Cc", "Cf"}:
        return ""
    if category == "Zs":
        return " "
    return f" {character} " if any(first <= code <= last for first, last in _CHINESE) else character


def _is_punctuation(character: str) -> bool:
    # string.punctuation is ASCII's, with symbols such as $ that Unicode has elsewhere.
    return character in string.punctuation or unicodedata.category(character).startswith("P")


_CHINESE = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)
"""First and last code of the blocks of CJK ideographs."""


def normalise(text: str) -> list[str]:
    """The words of an answer that are compared: lower case, without punctuation and articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(predicted: str, truth: str) -> float:
    """F1 of one answer, 0 to 1: words in common; 0 where neither has a word left."""
    left, right = normalise(predicted), normalise(truth)
    common = (Counter(left) & Counter(right)).total()
    return 2 * common / (len(left) + len(right)) if common else 0.0


def scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """`F1` and `exact_match` in percent: of each prediction the best over the answers that people gave.

    Raises ValueError when there are no predictions, or not one for each question.
    """
    if not predictions:
        raise ValueError("no answers to score")
    exact = overlap = 0.0
    for predicted, truths in zip(predictions, answers, strict=True):
        exact += any(normalise(predicted) == normalise(truth) for truth in truths)
        overlap += max(f1(predicted, truth) for truth in truths)
    return {"F1": 100 * overlap / len(predictions), "exact_match": 100 * exact / len(predictions)}
