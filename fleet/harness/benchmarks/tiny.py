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
            name: str = "".join(self._pick(parts[part]) for part in ("onsets", "vowels", "codas"))
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
        return value.rsplit(maxsplit=1)[-1] if kind == "person" and known and self._chance(0.5) else value

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
            if not questions or len(text) > 350:  # noqa: PLR2004 - characters; more might not fit 128 tokens
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


def normalise(text: str) -> list[str]:
    """SQuAD v1.1's words of an answer: lower case, without punctuation and articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(predicted: str, truth: str) -> float:
    """SQuAD v1.1's F1 of one answer, 0 to 1: words in common."""
    left, right = normalise(predicted), normalise(truth)
    common = (Counter(left) & Counter(right)).total()
    return 2 * common / (len(left) + len(right)) if common else 0.0


@functools.cache
def _too_long() -> npt.NDArray[np.bool_]:
    """[MAX_LENGTH, MAX_LENGTH], true where a span from row to column is backwards or longer than MAX_ANSWER."""
    width = np.arange(MAX_LENGTH)[None, :] - np.arange(MAX_LENGTH)[:, None]
    return (width < 0) | (width >= MAX_ANSWER)


def best_span(logits: npt.NDArray[np.float32], context_start: int) -> tuple[int, int]:
    """First and last token of the likeliest answer in `logits` [length, 2], [SEP] at the end excluded."""
    inside = logits[context_start:-1]
    scores = inside[:, :1] + inside[None, :, 1]
    scores[_too_long()[: len(inside), : len(inside)]] = -np.inf
    first, last = divmod(int(scores.argmax()), len(inside))
    return context_start + first, context_start + last


def _read_log(path: Path) -> Iterator[tuple[int, bytes]]:
    """Sample index and response of each entry of an mlperf_log_accuracy.json."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        for entry in entries:
            yield int(entry["qsl_idx"]), bytes.fromhex(entry["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a whole accuracy log, LoadGen may have been stopped: {error}") from error


class TinyBert:
    """The benchmark over what `prepare` left in a folder; see Benchmark for the methods."""

    sample_count = SAMPLES
    model_dir = FOLDER
    generation = None

    def __init__(self, assets: Path) -> None:
        """Raises ValueError when a file of `prepare` is not in `assets`."""
        try:
            loaded = [np.load(assets / name) for name in _ARRAYS]
        except (OSError, ValueError) as error:
            raise ValueError(f"{assets}: dataset is missing or broken, run `fleet provision`: {error}") from error
        self._assets = assets
        self._input_ids, self._rows, self._context_starts, self._offsets = loaded
        if len(self._rows) != SAMPLES + 1:
            raise ValueError(f"{assets}: {len(self._rows) - 1} samples instead of {SAMPLES}, run `fleet provision`")

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        data: dict[str, Any] = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
        return data

    @property
    def model(self) -> dict[str, str]:
        """The five texts of measurements.json plus weights_sha256."""
        return {
            "input_data_types": "int64",
            "weight_data_types": "fp32",
            "weight_transformations": "none",
            "retraining": "yes, from scratch by benchmarks/train_tiny_bert.py",
            "starting_weights_filename": "model.safetensors",
            "weights_sha256": _card()["files"]["model.safetensors"],
        }

    def features(self, index: int) -> Features:
        """Sample `index`, tokenised: two int64 arrays of shape [length], 36 to 117.

        Raises IndexError when there is no such sample.
        """
        if not 0 <= index < SAMPLES:
            raise IndexError(f"sample {index} of {SAMPLES}")
        input_ids = self._input_ids[self._rows[index] : self._rows[index + 1]].astype(np.int64)
        types = (np.arange(len(input_ids)) >= self._context_starts[index]).astype(np.int64)
        return Features(input_ids, types)

    def response(self, output: npt.NDArray[np.float32]) -> bytes:
        """Start and end logits [length, 2] as little-endian float32: 600 bytes on average."""
        return np.ascontiguousarray(output, dtype="<f4").tobytes()

    def _answer(self, index: int, response: bytes, context: str) -> str:
        """The characters of `context` that a response points at."""
        first_row, end_row = self._rows[index], self._rows[index + 1]
        length = int(end_row - first_row)
        if len(response) != 8 * length:
            raise ValueError(f"sample {index}: {len(response)} bytes instead of {8 * length}")
        logits = np.frombuffer(response, dtype="<f4").reshape(length, 2)
        if not np.isfinite(logits).all():
            raise ValueError(f"sample {index}: logits are not finite")
        first, last = best_span(logits, int(self._context_starts[index]))
        return context[self._offsets[first_row + first, 0] : self._offsets[first_row + last, 1]]

    def _samples(self, count: int) -> list[dict[str, str]]:
        path = self._assets / _TEXTS
        try:
            with path.open(encoding="utf-8") as lines:
                return [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: dataset is missing or broken, run `fleet provision`: {error}") from error

    def evaluate(self, accuracy_log: Path, sample_count: int) -> dict[str, float]:
        """`F1` and `exact_match` in percent over the first `sample_count` samples.

        Raises ValueError when the log is cut off, or a sample is missing, foreign, of a wrong size, not finite, or
        logged twice with different answers.
        """
        if not 0 < sample_count <= SAMPLES:
            raise ValueError(f"sample count {sample_count} is not between 1 and {SAMPLES}")
        samples = self._samples(sample_count)
        answers: dict[int, str] = {}
        for index, response in _read_log(accuracy_log):
            if not 0 <= index < sample_count:
                raise ValueError(f"{accuracy_log}: sample {index} is not one of the {sample_count} of this run")
            try:
                answer = self._answer(index, response, samples[index]["context"])
            except ValueError as error:
                raise ValueError(f"{accuracy_log}: {error}") from error
            # LoadGen may repeat samples to fill the last query; logits may then differ in the last bits, no more.
            if answers.setdefault(index, answer) != answer:
                raise ValueError(f"{accuracy_log}: sample {index} was answered twice, differently")
        missing = sorted(set(range(sample_count)) - answers.keys())
        if missing:
            raise ValueError(f"{accuracy_log}: {len(missing)} of {sample_count} samples missing, first {missing[0]}")
        truths = [sample["answer"] for sample in samples]
        pairs = [(answers[index], truth) for index, truth in enumerate(truths)]
        exact = sum(normalise(answer) == normalise(truth) for answer, truth in pairs)
        overlap = sum(f1(answer, truth) for answer, truth in pairs)
        return {"F1": 100 * overlap / sample_count, "exact_match": 100 * exact / sample_count}

    def accuracy_text(self, metrics: dict[str, float]) -> str:
        """One line, from whose start the official checker reads."""
        return f'{{"exact_match": {metrics["exact_match"]:.6f}, "f1": {metrics["F1"]:.6f}}}\n'


@functools.cache
def _card() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((FOLDER / "card.json").read_text(encoding="utf-8"))
    return data


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_dataset(assets: Path, samples: Sequence[Sample]) -> dict[str, str]:
    """Write `samples` and their tokens into the folder `assets`, each file by rename; file name to sha256."""
    assets.mkdir(parents=True, exist_ok=True)
    arrays = tokenise(samples)
    hashes = {}
    for name in (_TEXTS, *_ARRAYS):
        partial = assets / f"{name}.partial"
        with partial.open("wb") as stream:
            if name == _TEXTS:
                stream.writelines(json.dumps(asdict(sample)).encode() + b"\n" for sample in samples)
            else:
                np.save(stream, arrays[name], allow_pickle=False)
        hashes[name] = _sha256(partial)
        partial.replace(assets / name)
    return hashes


def prepare(name: str, assets: Path) -> dict[str, str]:
    """Generate and tokenise the dataset into `assets`, about 4 s; nothing when it is there already.

    Returns file name to sha256, the same on every host. Raises ValueError when the model in this package, or the
    dataset that came out, is not the one that card.json describes.
    """
    card = _card()
    for part, expected in card["files"].items():
        if not (FOLDER / part).is_file() or _sha256(FOLDER / part) != expected:
            raise ValueError(f"{name}: {FOLDER / part} is missing or damaged, install fleet's wheel again")
    dataset: dict[str, str] = card["dataset"]
    present = {part: _sha256(assets / part) for part in dataset if (assets / part).is_file()}
    if present == dataset:
        return present
    written = write_dataset(assets, list(generate(SEED, SAMPLES)))
    wrong = sorted(part for part in dataset if written.get(part) != dataset[part])
    if wrong:
        raise ValueError(
            f"{name}: generated {', '.join(wrong)} differs from the dataset of card.json, so accuracy would not be"
            f" comparable: install the pinned numpy ({np.__version__} here) and tokenizers"
        )
    return written


def open(name: str, assets: Path) -> TinyBert:  # noqa: A001, ARG001 - the protocol's name and arguments
    """The benchmark over what `prepare` left in `assets`; ValueError when that is not whole."""
    return TinyBert(assets)
