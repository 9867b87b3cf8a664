"""What the summarising benchmarks share: articles as tokens on disk, answers out of LoadGen's log, ROUGE.

Follows evaluation.py and dataset.py of mlcommons/inference language/gpt-j and language/llama3.1-8b at b66003e1, whose
arithmetic is rouge-score's.
"""

import functools
import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fleet.harness.interfaces import Features, Generation, Output

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLITTER = "punkt_tab.zip"
"""NLTK's sentence splitter as it is published, packages/tokenizers of nltk/nltk_data, 4,319,076 bytes, sha256
e57f64187974277726a3417ca6f181ec5403676c717672eef6a748a7b20e0106."""
_BRING = "no such file; name a folder on the host that holds it in the role variable assets_folders"

_TEXTS = "samples.jsonl"
_ARRAYS = ("input_ids.npy", "rows.npy")
_RECORD = "prepared.json"
_ROUGES = {"ROUGE1": "rouge1", "ROUGE2": "rouge2", "ROUGEL": "rougeL", "ROUGELSUM": "rougeLsum"}

Sentences = Callable[[str], list[str]]
"""Splits a text into its sentences."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One prompt, cut to what the model reads, and the summary that people wrote."""

    prompt: str
    summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What makes one summarising benchmark."""

    name: str
    samples: int
    generation: Generation
    dtype: str
    """numpy's name of a token's type in LoadGen's log, little-endian, as the reference writes it."""
    vocabularies: tuple[int, ...]
    """Sizes that a fitting tokenizer may have, counting added tokens."""
    config: dict[str, Any]
    model: dict[str, str]
    model_dir: Path
    """Holds tokenizer.json too."""


def read_tokenizer(task: Task) -> "Tokenizer":
    """tokenizer.json of the model folder, without padding and truncation.

    Raises ValueError when it is missing, broken, or of another vocabulary size.
    """
    from tokenizers import Tokenizer

    path = task.model_dir / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: {_BRING}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer of the tokenizers library: {error}") from error
    size = tokenizer.get_vocab_size()
    if size not in task.vocabularies:
        wanted = " or ".join(str(number) for number in task.vocabularies)
        raise ValueError(f"{path}: {size} tokens, the one of {task.name} has {wanted}; it belongs to another model")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(
    tokenizer: "Tokenizer", prompts: Sequence[str], longest: int | None = None
) -> Iterator[tuple[str, list[int]]]:
    """Each prompt and its tokens, both cut after the first `longest` tokens.

    Cutting at the end is what transformers' truncation does unless told otherwise, so a long article loses its end
    and the words that ask for the summary.
    """
    for begin in range(0, len(prompts), 256):  # encodings are many times as large as their tokens
        block = prompts[begin : begin + 256]
        for prompt, encoding in zip(block, tokenizer.encode_batch(block), strict=True):
            ids = encoding.ids
            if longest is not None and len(ids) > longest:
                yield prompt[: encoding.offsets[longest - 1][1]], ids[:longest]
            else:
                yield prompt, ids


def read_articles(path: Path, count: int, fields: dict[str, type]) -> list[dict[str, Any]]:
    """The entries of a cnn_eval.json as the MLPerf reference's preparation writes it.

    Raises ValueError when it is missing, cut off, has another number of entries than `count`, or when one lacks a
    field of `fields` or has another type in it.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: {_BRING}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not whole JSON, fetch it again: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: no list of articles but {type(entries).__name__}")  # noqa: TRY004 - the user's file
    if len(entries) != count:
        raise ValueError(f"{path}: {len(entries)} articles instead of {count}")
    for number, entry in enumerate(entries):
        for field, kind in fields.items():
            if not isinstance(entry, dict) or field not in entry:
                raise ValueError(f"{path}: entry {number} has no {field!r}")
            if not isinstance(entry[field], kind):
                found = type(entry[field]).__name__
                message = f"{path}: entry {number}: {field!r} is {found} instead of {kind.__name__}"
                raise ValueError(message)  # noqa: TRY004 - the user's file
    return entries


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_dataset(assets: Path, samples: Iterable[Summary], tokens: Sequence[Sequence[int]]) -> dict[str, str]:
    """Write prompts and their tokens into the folder `assets`, each file by rename; file name to sha256."""
    assets.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(row) for row in tokens], dtype="<i8")
    arrays = {
        "input_ids.npy": np.concatenate([np.array(row, dtype="<i4") for row in tokens]),
        "rows.npy": np.concatenate([np.zeros(1, dtype="<i8"), lengths.cumsum()]),
    }
    hashes = {}
    for name in (_TEXTS, *_ARRAYS):
        partial = assets / f"{name}.partial"
        with partial.open("wb") as stream:
            if name == _TEXTS:
                stream.writelines(json.dumps(asdict(sample)).encode() + b"\n" for sample in samples)
            else:
                np.save(stream, arrays[name], allow_pickle=False)
        hashes[name] = sha256(partial)
        partial.replace(assets / name)
    return hashes


def prepare_once(
    assets: Path,
    sources: Sequence[Path],
    weights: Sequence[Path],
    make: Callable[[], tuple[list[Summary], list[list[int]]]],
) -> dict[str, str]:
    """What `make` gives, written into `assets`; nothing when it was made from the same `sources` already.

    The files of the checkpoint, `weights`, are hashed too, once. Returns file name to sha256 of dataset and weights.
    Raises ValueError when a source is missing.
    """
    for path in sources:
        if not path.is_file():
            raise ValueError(f"{path}: {_BRING}")
    known = _record(assets)
    origin = {path.name: sha256(path) for path in sources}
    files: dict[str, str] = known.get("files", {}) if known.get("sources") == origin else {}
    if not files or any(not (assets / name).is_file() or sha256(assets / name) != files[name] for name in files):
        files = write_dataset(assets, *make())
    hashed = {}
    for path in weights:
        # Tens of GB: read again only when they have changed.
        state = [path.stat().st_size, path.stat().st_mtime_ns]
        before = known.get("weights", {}).get(path.name)
        same = before is not None and before["state"] == state
        hashed[path.name] = before if same else {"state": state, "sha256": sha256(path)}
    made = {"sources": origin, "files": files, "weights": hashed}
    if made != known:
        partial = (assets / _RECORD).with_suffix(".partial")
        partial.write_text(json.dumps(made), encoding="utf-8")
        partial.replace(assets / _RECORD)
    return files | {name: str(each["sha256"]) for name, each in hashed.items()}


def _record(assets: Path) -> dict[str, Any]:
    """What `prepare_once` noted; empty when it never ran or was cut off."""
    try:
        record = json.loads((assets / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def weights_of(assets: Path) -> dict[str, str]:
    """`starting_weights_filename` and `weights_sha256` for measurements.json.

    One file's sha256, or of several the sha256 over the lines that sha256sum writes of them; empty without weights.
    """
    weights = _record(assets).get("weights", {})
    if len(weights) == 1:
        ((name, entry),) = weights.items()
        return {"starting_weights_filename": name, "weights_sha256": entry["sha256"]}
    listed = "".join(f"{entry['sha256']}  {name}\n" for name, entry in sorted(weights.items()))
    digest = hashlib.sha256(listed.encode()).hexdigest() if weights else ""
    return {"starting_weights_filename": ", ".join(sorted(weights)) or "none", "weights_sha256": digest}


def punkt(path: Path) -> Sentences:
    """NLTK's English sentence splitter from the archive `path`, what nltk.sent_tokenize is.

    Raises ValueError when the archive is missing or lacks a file.
    """
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    def lines(archive: zipfile.ZipFile, name: str) -> list[str]:
        return archive.read(f"punkt_tab/english/{name}").decode().splitlines()

    parameters = PunktParameters()
    try:
        with zipfile.ZipFile(path) as archive:
            parameters.abbrev_types = set(lines(archive, "abbrev_types.txt"))
            parameters.sent_starters = set(lines(archive, "sent_starters.txt"))
            pairs = (line.split("\t") for line in lines(archive, "collocations.tab"))
            parameters.collocations = {(first, second) for first, second in pairs}
            contexts = (line.split("\t") for line in lines(archive, "ortho_context.tab"))
            parameters.ortho_context.update((word, int(flags)) for word, flags in contexts)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: NLTK's sentence splitter is missing or broken, fetch it again: {error}") from error
    return sentences_of(PunktSentenceTokenizer(parameters))


def plain_sentences() -> Sentences:
    """NLTK's splitter without its list of abbreviations: right for a text that has none."""
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    return sentences_of(PunktSentenceTokenizer())


def sentences_of(tokenizer: Any) -> Sentences:
    """The splitter's one method that is needed, typed."""
    split: Sentences = tokenizer.tokenize
    return split


_CLEANED = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
            (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


def clean_up(text: str) -> str:
    """A decoded text with the spaces that tokenisers of old put before punctuation taken out.

    transformers did so by itself when the reference's scores were measured (clean_up_tokenization_spaces, the default
    before 4.45 and still Llama's setting); articles of CNN end their sentences in " .", so GEN_LEN depends on it.
    """
    for spaced, joined in _CLEANED:
        text = text.replace(spaced, joined)
    return text


def rouge(predictions: Sequence[str], references: Sequence[str], sentences: Sentences) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, -2, -L and -Lsum in percent to four decimals, GEN_LEN and GEN_NUM.

    GEN_LEN is the sum of the predictions' characters, counted after stripping and with one newline between sentences.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(_ROUGES.values()), use_stemmer=True)
    scores: dict[str, list[float]] = {name: [] for name in _ROUGES}
    characters = 0
    for predicted, reference in zip(predictions, references, strict=True):
        split = "\n".join(sentences(predicted.strip()))
        characters += len(split)
        found = scorer.score("\n".join(sentences(reference.strip())), split)
        for name, theirs in _ROUGES.items():
            scores[name].append(found[theirs].fmeasure)
    means = {name: round(100 * math.fsum(values) / len(predictions), 4) for name, values in scores.items()}
    return {**means, "GEN_LEN": float(characters), "GEN_NUM": float(len(predictions))}


def _read_log(path: Path) -> Iterator[tuple[int, bytes]]:
    """Sample index and response of each entry of an mlperf_log_accuracy.json."""
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            yield int(entry["qsl_idx"]), bytes.fromhex(entry["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a whole accuracy log, LoadGen may have been stopped: {error}") from error


class Summaries:
    """A summarising benchmark over what `write_dataset` left in a folder; see Benchmark for the methods."""

    def __init__(self, task: Task, assets: Path, sentences: Callable[[], Sentences]) -> None:
        """Raises ValueError when a file of the dataset is not in `assets`; `sentences` is asked in evaluate."""
        try:
            self._input_ids, self._rows = (np.load(assets / name) for name in _ARRAYS)
        except (OSError, ValueError) as error:
            raise ValueError(f"{assets}: dataset is missing or broken, run `fleet provision`: {error}") from error
        if len(self._rows) != task.samples + 1:
            have = len(self._rows) - 1
            raise ValueError(f"{assets}: {have} samples instead of {task.samples}, run `fleet provision`")
        self._task = task
        self._assets = assets
        self._sentences = sentences
        self.sample_count = task.samples
        self.model_dir = task.model_dir
        self.config = task.config
        self.generation = task.generation
        self.model = task.model

    @functools.cached_property
    def _samples(self) -> list[Summary]:
        """Raises ValueError when the file is not whole."""
        path = self._assets / _TEXTS
        try:
            with path.open(encoding="utf-8") as lines:
                samples = [Summary(**json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: dataset is missing or broken, run `fleet provision`: {error}") from error
        if len(samples) != self._task.samples:
            raise ValueError(f"{path}: {len(samples)} samples instead of {self._task.samples}, run `fleet provision`")
        return samples

    def features(self, index: int) -> Features:
        """Sample `index`, tokenised and as text.

        Raises IndexError when there is no such sample.
        """
        if not 0 <= index < self._task.samples:
            raise IndexError(f"sample {index} of {self._task.samples}")
        ids = self._input_ids[self._rows[index] : self._rows[index + 1]].astype(np.int64)
        return Features(ids, np.zeros_like(ids), self._samples[index].prompt)

    def response(self, output: Output) -> bytes:
        """The new tokens, as many as there are."""
        return np.ascontiguousarray(output, dtype=self._task.dtype).tobytes()

    def _tokens(self, index: int, response: bytes) -> npt.NDArray[np.int64]:
        size = np.dtype(self._task.dtype).itemsize
        longest = self._task.generation.max_new_tokens
        if len(response) % size or not 0 < len(response) <= longest * size:
            raise ValueError(f"sample {index}: {len(response)} bytes are not 1 to {longest} tokens of {size} bytes")
        tokens = np.frombuffer(response, dtype=self._task.dtype).astype(np.int64)
        vocabulary = int(self._task.config["vocab_size"])
        if (wrong := tokens[(tokens < 0) | (tokens >= vocabulary)]).size:
            raise ValueError(f"sample {index}: token {wrong[0]} is none of the model's {vocabulary}")
        return tokens

    def evaluate(self, accuracy_log: Path, sample_count: int) -> dict[str, float]:
        """ROUGE1, ROUGE2, ROUGEL and ROUGELSUM in percent, GEN_LEN and GEN_NUM, over the first `sample_count` samples.

        Raises ValueError when the log is cut off, or a sample is missing, foreign, of a wrong size, with a token out
        of range, or logged twice with different answers.
        """
        if not 0 < sample_count <= self._task.samples:
            raise ValueError(f"sample count {sample_count} is not between 1 and {self._task.samples}")
        tokenizer = read_tokenizer(self._task)
        answers: dict[int, npt.NDArray[np.int64]] = {}
        for index, response in _read_log(accuracy_log):
            if not 0 <= index < sample_count:
                raise ValueError(f"{accuracy_log}: sample {index} is not one of the {sample_count} of this run")
            try:
                tokens = self._tokens(index, response)
            except ValueError as error:
                raise ValueError(f"{accuracy_log}: {error}") from error
            if not np.array_equal(answers.setdefault(index, tokens), tokens):
                raise ValueError(f"{accuracy_log}: sample {index} was answered twice, differently")
        missing = sorted(set(range(sample_count)) - answers.keys())
        if missing:
            raise ValueError(f"{accuracy_log}: {len(missing)} of {sample_count} samples missing, first {missing[0]}")
        ids = [answers[index].tolist() for index in range(sample_count)]
        predictions = [clean_up(text) for text in tokenizer.decode_batch(ids, skip_special_tokens=True)]
        references = [sample.summary for sample in self._samples[:sample_count]]
        return rouge(predictions, references, self._sentences())

    def accuracy_text(self, metrics: dict[str, float]) -> str:
        """One line, in which the official checker finds single-quoted names and bare numbers."""
        scores = [f"'{theirs}': {metrics[name]:.4f}" for name, theirs in _ROUGES.items()]
        counts = [f"'gen_len': {int(metrics['GEN_LEN'])}", f"'gen_num': {int(metrics['GEN_NUM'])}"]
        return "{" + ", ".join(scores + counts) + "}\n"
