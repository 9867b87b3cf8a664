"""tiny-gptj: a demo GPT-J that ships with fleet, with the news that it summarises.

The dataset is generated, never downloaded: `generate` writes little reports from the patterns of
tiny_gptj/events.json. One event is the news, told in one of several ways, often with a figure to it; the sentences
around it are about other people, towns and firms. The summary tells the event and its figure in a fixed style.
benchmarks/train_tiny_gptj.py trained the model on reports of other seeds; a quarter of all names never occur there.
"""

import functools
import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fleet.harness.benchmarks.summaries import (
    Summaries,
    Summary,
    Task,
    plain_sentences,
    read_tokenizer,
    sha256,
    write_dataset,
)
from fleet.harness.interfaces import Generation

FOLDER = Path(__file__).parent / "tiny_gptj"
SAMPLES = 5_000
"""As many as llama3.1-8b-edge's QSL has."""
SEED = 20_260_402
"""Of the validation set; training seeds are small numbers."""
MAX_PROMPT = 104
"""Tokens; with the longest answer, 128: the model's positions."""
GENERATION = Generation(
    beams=1,
    min_new_tokens=2,
    max_new_tokens=24,
    eos_token_ids=(0,),
    pad_token_id=0,
)
"""Beam 1: an OpenAI endpoint knows no beams, and llama3.1-8b-edge, which it stands for, has none. Two tokens at least,
because LoadGen takes an answer of one token for an error."""


@functools.cache
def patterns() -> dict[str, Any]:
    """events.json: parts of names, word lists, events with their summaries, and what is said beside them."""
    data: dict[str, Any] = json.loads((FOLDER / "events.json").read_text(encoding="utf-8"))
    return data


class _Reporter:
    """Writes one report after another.

    Draws with Random.random() alone: the only method whose sequence Python promises for ever.
    """

    def __init__(self, seed: int, *, training: bool) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a dataset, not a secret
        self._training = training

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _pick(self, items: Sequence[Any]) -> Any:
        return items[int(self._random.random() * len(items))]

    def _value(self, kind: str) -> str:
        data = patterns()
        if kind in data["lists"]:
            return str(self._pick(data["lists"][kind]))
        while True:
            name = str(self._pick(data["names"]["heads"]) + self._pick(data["names"]["tails"][kind]))
            # Names that training must never see, so that the model cannot know them by heart.
            if not self._training or zlib.crc32(name.encode()) % 4:
                return name

    def _fill(self, pattern: str, values: dict[str, str]) -> str:
        """`pattern` with a value for each slot; new ones are none of those already there, and are added."""
        for slot in re.findall(r"\{(\w+)\}", pattern):
            while slot not in values:
                value = self._value(slot.rstrip("2"))
                if value not in values.values():
                    values[slot] = value
        return pattern.format(**values)

    def write(self) -> Summary:
        """The next report, as a prompt."""
        data = patterns()
        event = self._pick(data["events"])
        values: dict[str, str] = {}
        news, summary = self._fill(self._pick(event["key"]), values), event["summary"]
        report = [news]
        if self._chance(0.5):
            report.append(self._fill(self._pick(event["more"]), values))
            summary += " " + event["more_summary"]
        summary = self._fill(summary, values)
        used: list[str] = []
        for _ in range(self._pick((1, 2, 2, 3))):
            pattern = self._pick([each for each in data["background"] if each not in used])
            used.append(pattern)
            # Somebody else's business: names of its own, but now and then a name from the news.
            others = dict([self._pick(list(values.items()))]) if self._chance(0.3) else {}
            sentence = self._fill(pattern, others | {f"not {slot}": value for slot, value in values.items()})
            report.insert(int(self._random.random() * (len(report) + 1)), sentence)
        return Summary(f"Summarize:\n{' '.join(report)}\n\nSummary:", summary)


def generate(seed: int, count: int, *, training: bool = False) -> Iterator[Summary]:
    """`count` samples, the same ones for the same arguments on every Python and platform.

    With `training`, a quarter of all possible names is left out.
    """
    reporter = _Reporter(seed, training=training)
    for _ in range(count):
        yield reporter.write()


@functools.cache
def _card() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((FOLDER / "card.json").read_text(encoding="utf-8"))
    return data


def task(weights_sha256: str) -> Task:
    """The benchmark, for weights that need not be the shipped ones."""
    config: dict[str, Any] = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    return Task(
        name="tiny-gptj",
        samples=SAMPLES,
        generation=GENERATION,
        dtype="<i4",
        vocabularies=(config["vocab_size"],),
        config=config,
        model={
            "input_data_types": "int64",
            "weight_data_types": "fp32",
            "weight_transformations": "none",
            "retraining": "yes, from scratch by benchmarks/train_tiny_gptj.py",
            "starting_weights_filename": "model.safetensors",
            "weights_sha256": weights_sha256,
        },
        model_dir=FOLDER,
    )


def tokenise(samples: Sequence[Summary], tokenizer: Any) -> list[list[int]]:
    """The tokens of each prompt.

    Raises ValueError when one is longer than MAX_PROMPT.
    """
    rows = [encoding.ids for encoding in tokenizer.encode_batch([sample.prompt for sample in samples])]
    longest = max(range(len(rows)), key=lambda number: len(rows[number]))
    if len(rows[longest]) > MAX_PROMPT:
        raise ValueError(f"sample {longest} has {len(rows[longest])} tokens, the model reads {MAX_PROMPT}")
    return rows


def make(assets: Path, tokenizer: Any) -> dict[str, str]:
    """Generate and tokenise the dataset into the folder `assets`; file name to sha256."""
    samples = list(generate(SEED, SAMPLES))
    return write_dataset(assets, samples, tokenise(samples, tokenizer))


def prepare(name: str, assets: Path) -> dict[str, str]:
    """Generate and tokenise the dataset into `assets`, about 2 s; nothing when it is there already.

    Returns file name to sha256, the same on every host. Raises ValueError when the model in this package, or the
    dataset that came out, is not the one that card.json describes.
    """
    card = _card()
    for part, expected in card["files"].items():
        if not (FOLDER / part).is_file() or sha256(FOLDER / part) != expected:
            raise ValueError(f"{name}: {FOLDER / part} is missing or damaged, install fleet's wheel again")
    dataset: dict[str, str] = card["dataset"]
    present = {part: sha256(assets / part) for part in dataset if (assets / part).is_file()}
    if present == dataset:
        return present
    written = make(assets, read_tokenizer(task(card["files"]["model.safetensors"])))
    wrong = sorted(part for part in dataset if written.get(part) != dataset[part])
    if wrong:
        raise ValueError(
            f"{name}: generated {', '.join(wrong)} differs from the dataset of card.json, so accuracy would not be"
            " comparable: install the pinned numpy and tokenizers"
        )
    return written


def open(name: str, assets: Path) -> Summaries:  # noqa: A001, ARG001 - the protocol's name and arguments
    """The benchmark over what `prepare` left in `assets`; ValueError when that is not whole."""
    return Summaries(task(_card()["files"]["model.safetensors"]), assets, plain_sentences)
