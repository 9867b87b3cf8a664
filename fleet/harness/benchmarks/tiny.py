"""tiny-bert: a demo model that ships with fleet, with the dataset that it answers questions about.

The dataset is generated, never downloaded: `generate` writes little texts from the sentence patterns of
tiny_bert/frames.json, several facts about invented people, towns and firms, and asks for one of them. Other facts of
the same kind about other names stand beside it, so that the answer has to be read. benchmarks/train_tiny_bert.py
trained the model on texts of other seeds; a quarter of all names never occur there.
"""

import functools
import hashlib
import json
import random
import re
import string
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fleet.harness.interfaces import Features

FOLDER = Path(__file__).parent / "tiny_bert"
SAMPLES = 10_833
"""As many as BERT-99's QSL has."""
SEED = 20_260_401
"""Of the validation set; training seeds are small numbers."""
MAX_LENGTH = 128
"""Tokens of question, context and the three special ones together: the model's positions."""
MAX_ANSWER = 30
"""Tokens."""

_TEXTS = "samples.jsonl"
_ARRAYS = ("input_ids.npy", "rows.npy", "context_starts.npy", "offsets.npy")


@dataclass(frozen=True, slots=True)
class Sample:
    """One question over one text; the answer is `context[start : start + len(answer)]`."""

    question: str
    context: str
    answer: str
    start: int
    """Characters."""


@dataclass(frozen=True, slots=True)
class _Fact:
    frame: str
    values: dict[str, str]
    """Slot to the whole value, whatever the sentence calls it."""
    spans: dict[str, tuple[int, int]]
    """Slot to the characters of the text that name it; a pronoun names nothing."""


@functools.cache
def patterns() -> dict[str, Any]:
    """frames.json: parts of names, word lists, number ranges and sentence patterns with their questions."""
    data: dict[str, Any] = json.loads((FOLDER / "frames.json").read_text(encoding="utf-8"))
    return data


def _slots(pattern: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", pattern)


class _Author:
    """Writes one text after another.

    Draws with Random.random() alone: the only method whose sequence Python promises for ever.
    """

    def __init__(self, seed: int, *, training: bool) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a dataset, not a secret
        self._training = training
        self._pools: dict[str, list[str]] = {}
        self._pronouns: dict[str, str] = {}
        self._named: set[str] = set()

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _pick(self, items: Sequence[Any]) -> Any:
        return items[int(self._random.random() * len(items))]

    def _name(self, kind: str) -> str:
        parts = patterns()["names"]
        while True:
            name = "".join(self._pick(parts[part]) for part in ("onsets", "vowels", "codas"))
            if self._chance(0.2):
                name += self._pick(parts["middles"])
            name += self._pick(parts["endings"][kind])
            # Names that training must never see, so that the model cannot know them by heart.
            if not self._training or zlib.crc32(name.encode()) % 4:
                return name.capitalize()

    def _value(self, kind: str) -> str:
        data = patterns()
        if kind == "person":
            return f"{self._name('first')} {self._name('person')}"
        if kind in data["names"]["endings"]:
            return self._name(kind)
        if kind in data["lists"]:
            return str(self._pick(data["lists"][kind]))
        low, high, step = data["numbers"][kind]["range"]
        number = low + step * int(self._random.random() * ((high - low) // step + 1))
        return str(data["numbers"][kind]["text"]).format(number)

    def _pool(self, kind: str) -> list[str]:
        """The few values of a kind that one text is about, no two with one surname."""
        if kind not in self._pools:
            values: dict[str, str] = {}
            while len(values) < (4 if kind in {"person", "city"} else 3):
                value = self._value(kind)
                values.setdefault(value.split()[-1] if kind == "person" else value, value)
            self._pools[kind] = list(values.values())
        return self._pools[kind]

    def _call(self, kind: str, value: str) -> str:
        """What a person is called: the whole name at first, later often the surname."""
        known = value in self._named
        self._named.add(value)
        return value.split()[-1] if kind == "person" and known and self._chance(0.5) else value

    def _fact(self, pattern: str, frame: str, start: int, subject: str | None) -> tuple[str, _Fact]:
        """A sentence from `pattern` that stands at character `start`; with a subject, that one as a pronoun."""
        values: dict[str, str] = {} if subject is None else {"person": subject}
        for slot in _slots(pattern):
            kind = slot.rstrip("2")
            free = [value for value in self._pool(kind) if value not in values.values()]
            values.setdefault(slot, self._pick(free))
        text, spans = "", {}
        for piece in re.split(r"(\{\w+\})", pattern):
            slot = piece.strip("{}")
            if not piece.startswith("{"):
                text += piece
            elif slot == "person" and subject is not None:
                text += self._pronouns.setdefault(subject, self._pick(("He", "She")))
            else:
                mention = self._call(slot.rstrip("2"), values[slot])
                spans[slot] = (start + len(text), start + len(text) + len(mention))
                text += mention
        return text, _Fact(frame, values, spans)

    def _text(self) -> tuple[str, list[_Fact]]:
        frames = patterns()["frames"]
        self._pools, self._pronouns, self._named = {}, {}, set()
        themes = [self._pick(frames) for _ in range(2)]
        wanted = self._pick((3, 3, 4, 4, 4, 5, 5, 6, 6, 7))
        text, facts = "", list[_Fact]()
        subject: str | None = None
        keys = set[tuple[str, str]]()
        for _ in range(3 * wanted):
            frame = self._pick(themes) if self._chance(0.75) else self._pick(frames)
            pattern = self._pick(frame["sentences"])
            follows = subject is not None and pattern.startswith("{person}") and self._chance(0.5)
            sentence, fact = self._fact(pattern, frame["name"], len(text), subject if follows else None)
            key = (frame["name"], fact.values[_slots(frame["sentences"][0])[0]])
            # One thing is told once, or two sentences could contradict each other.
            if key in keys:
                continue
            keys.add(key)
            facts.append(fact)
            text += sentence + " "
            subject = fact.values["person"] if pattern.startswith("{person}") else None
            if len(facts) == wanted:
                break
        return text.rstrip(), facts

    def _questions(self, facts: list[_Fact]) -> Iterator[tuple[_Fact, dict[str, str]]]:
        """Every question that the text answers with one thing only."""
        frames = {frame["name"]: frame["questions"] for frame in patterns()["frames"]}
        for fact in facts:
            for question in frames[fact.frame]:
                answer, given = question["answer"], _slots(question["ask"])
                if answer not in fact.spans or not set(given) <= fact.values.keys():
                    continue
                same = [
                    other
                    for other in facts
                    if other.frame == fact.frame and all(other.values.get(slot) == fact.values[slot] for slot in given)
                ]
                if len(same) == 1:
                    yield fact, question

    def write(self) -> Sample:
        """The next sample."""
        while True:
            text, facts = self._text()
            questions = list(self._questions(facts))
            if not questions or len(text) > 400:  # noqa: PLR2004 - characters; more might not fit 128 tokens
                continue
            fact, question = self._pick(questions)
            asked = {slot: self._call(slot.rstrip("2"), fact.values[slot]) for slot in _slots(question["ask"])}
            start, end = fact.spans[question["answer"]]
            return Sample(question["ask"].format(**asked), text, text[start:end], start)


def generate(seed: int, count: int, *, training: bool = False) -> Iterator[Sample]:
    """`count` samples, the same ones for the same arguments on every Python and platform.

    With `training`, a quarter of all possible names is left out.
    """
    author = _Author(seed, training=training)
    for _ in range(count):
        yield author.write()


def tokenise(samples: Iterable[Sample], tokenizer: Path = FOLDER / "tokenizer.json") -> dict[str, npt.NDArray[Any]]:
    """File name to array, for N samples of T tokens in all.

    `input_ids.npy` uint16 [T], one sample after another; `rows.npy` int64 [N + 1], where each begins and ends;
    `context_starts.npy` uint16 [N], the first token of the context within its sample; `offsets.npy` uint16 [T, 2],
    the characters of question or context that a token stands for. Raises ValueError when a sample exceeds MAX_LENGTH.
    """
    from tokenizers import Tokenizer

    pairs = [(sample.question, sample.context) for sample in samples]
    encodings = Tokenizer.from_file(str(tokenizer)).encode_batch(pairs)
    lengths = np.array([len(encoding.ids) for encoding in encodings], dtype="<i8")
    if lengths.size and lengths.max() > MAX_LENGTH:
        raise ValueError(f"sample {int(lengths.argmax())} has {lengths.max()} tokens, the model reads {MAX_LENGTH}")
    return {
        "input_ids.npy": np.concatenate([np.array(encoding.ids, dtype="<u2") for encoding in encodings]),
        "rows.npy": np.concatenate([np.zeros(1, dtype="<i8"), lengths.cumsum()]),
        "context_starts.npy": np.array([encoding.type_ids.index(1) for encoding in encodings], dtype="<u2"),
        "offsets.npy": np.concatenate([np.array(encoding.offsets, dtype="<u2") for encoding in encodings]),
    }
