"""bert-99 and bert-99.9: BERT-large answering SQuAD v1.1's questions; the two differ by the accuracy asked of them.

`source/` holds dev-v1.1.json, vocab.txt and a checkpoint. `prepare` makes of them, beside it:

    input_ids.npy       int32 [T], one window after another, unpadded
    words.npy           int32 [T], the paragraph's word that a token comes from; -1 for question and special tokens
    starts.npy          bool [T], whether an answer may begin there
    rows.npy            int64 [N + 1], where each window begins and ends
    context_starts.npy  int32 [N], the first token of the paragraph within its window
    questions.npy       int32 [N], the question that a window belongs to
    examples.json       tokens of the vocabulary, words of the paragraphs, paragraph and answers of each question
    model/              config.json and model.safetensors, or links to what else the checkpoint has
    prepared.json       from which inputs, with which hashes
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fleet.harness import convert
from fleet.harness.benchmarks import squad
from fleet.harness.interfaces import Features

MAX_LENGTH = 384
"""Tokens of a window: question, part of the paragraph and the three special ones."""
STRIDE = 128
"""Tokens from one window over a paragraph to the next."""
MAX_QUESTION = 64
"""Tokens; the rest of a longer question is left out."""
BERT_LARGE: dict[str, Any] = {
    "architectures": ["BertForQuestionAnswering"],
    "model_type": "bert",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
"""What the published checkpoints are; a config.json in `source/` says otherwise."""

_DATASET, _VOCABULARY, _CONFIG = "dev-v1.1.json", "vocab.txt", "config.json"
_ARRAYS = ("input_ids.npy", "words.npy", "starts.npy", "rows.npy", "context_starts.npy", "questions.npy")
_EXAMPLES, _RECORD = "examples.json", "prepared.json"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_FORMAT = 2
"""Counts up when `prepare` writes something else from the same inputs."""
_TYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
"""safetensors' names of types to MLPerf's."""
_NO_WEIGHTS = {"file": "none, random weights", "sha256": "none", "type": "fp32"}
"""What the record says of a checkpoint that is not there."""

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "type_vocab_size",
    "vocab_size",
)

Arrays = dict[str, npt.NDArray[Any]]


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in `path`, BERT_LARGE where there is no such file.

    Raises ValueError for a file that is not whole, lacks a size or reads fewer tokens than a window has.
    """
    if not path.is_file():
        return dict(BERT_LARGE)
    try:
        found: dict[str, Any] = {"hidden_act": "gelu", "layer_norm_eps": 1e-12} | json.loads(path.read_text("utf-8"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a whole configuration, fetch it again: {error}") from error
    if missing := [key for key in _SIZES if not isinstance(found.get(key), int)]:
        raise ValueError(f"{path}: no {missing[0]}, not the configuration of a BERT: fetch it again")
    if found["max_position_embeddings"] < MAX_LENGTH:
        raise ValueError(f"{path}: a model of {found['max_position_embeddings']} positions, {MAX_LENGTH} are needed")
    return found


def read_vocabulary(path: Path, size: int) -> list[str]:
    """The tokens in `path`, one a line, by id.

    Raises ValueError unless they are `size` different ones, the special ones among them.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            tokens = [line.rstrip("\n") for line in lines]
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: run `fleet provision`") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text, fetch it again: {error}") from error
    if len(tokens) != size:
        raise ValueError(f"{path}: {len(tokens)} tokens, the model has {size}: bring the checkpoint's own vocab.txt")
    ids = {token: number for number, token in enumerate(tokens)}
    if absent := [token for token in _SPECIAL if token not in ids]:
        raise ValueError(f"{path}: no {absent[0]}, not BERT's vocabulary: bring the checkpoint's own vocab.txt")
    if repeated := [token for number, token in enumerate(tokens) if ids[token] != number]:
        raise ValueError(f"{path}: {repeated[0]!r} is there twice: bring the checkpoint's own vocab.txt")
    return tokens


def tokenise(dataset: squad.Dataset, vocabulary: list[str]) -> Arrays:
    """The arrays that `prepare` writes, by file name, for the dataset's N windows of T tokens in all.

    Each of a paragraph's words is split into word pieces by itself, as the reference does; the tokenizers library does
    so like its Python forerunner but for characters younger than Unicode 8 (2015) and U+2B820 to U+2B91F. Words with a
    capital sigma are put in lower case before: Python, and so the reference, knows its form at a word's end.
    """
    from tokenizers import BertWordPieceTokenizer

    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = BertWordPieceTokenizer(ids, lowercase=True)
    words = [[_lower_sigma(word) for word in paragraph] for paragraph in dataset.paragraphs]
    paragraphs = tokenizer.encode_batch(words, is_pretokenized=True, add_special_tokens=False)
    texts = [np.array(encoding.ids, dtype=np.int32) for encoding in paragraphs]
    places = [np.array(encoding.word_ids, dtype=np.int32) for encoding in paragraphs]
    asked = tokenizer.encode_batch(
        [_lower_sigma(question.text) for question in dataset.questions], add_special_tokens=False
    )

    separator = np.array([ids["[SEP]"]], dtype=np.int32)
    pieces: dict[str, list[npt.NDArray[Any]]] = {"input_ids.npy": [], "words.npy": [], "starts.npy": []}
    context_starts: list[int] = []
    numbers: list[int] = []
    for number, (question, encoding) in enumerate(zip(dataset.questions, asked, strict=True)):
        head = np.array([ids["[CLS]"], *encoding.ids[:MAX_QUESTION], ids["[SEP]"]], dtype=np.int32)
        text, place = texts[question.paragraph], places[question.paragraph]
        spans = squad.windows(len(text), MAX_LENGTH - len(head) - 1, STRIDE)
        owner = squad.owners(spans, len(text))
        for window, (start, length) in enumerate(spans):
            part = slice(start, start + length)
            pieces["input_ids.npy"] += [head, text[part], separator]
            pieces["words.npy"] += [np.full(len(head), -1, np.int32), place[part], np.full(1, -1, np.int32)]
            pieces["starts.npy"] += [np.zeros(len(head), bool), owner[part] == window, np.zeros(1, bool)]
            context_starts.append(len(head))
            numbers.append(number)
    lengths = np.array([len(array) for array in pieces["input_ids.npy"]], dtype=np.int64).reshape(-1, 3).sum(axis=1)
    return {name: np.concatenate(parts) for name, parts in pieces.items()} | {
        "rows.npy": np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]),
        "context_starts.npy": np.array(context_starts, dtype=np.int32),
        "questions.npy": np.array(numbers, dtype=np.int32),
    }


def _lower_sigma(text: str) -> str:
    return " ".join(word.lower() if "\u03a3" in word else word for word in text.split(" "))


class Bert:
    """The benchmark over what `prepare` left in a folder; see Benchmark for the methods."""

    generation = None

    def __init__(self, assets: Path) -> None:
        """Raises ValueError when a file of `prepare` is missing or broken."""
        try:
            loaded = [np.load(assets / name, allow_pickle=False) for name in _ARRAYS]
            self._checkpoint: dict[str, str] = json.loads((assets / _RECORD).read_text("utf-8"))["model"]["checkpoint"]
            self.config: dict[str, Any] = json.loads((assets / "model" / _CONFIG).read_text("utf-8"))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"{assets}: dataset is missing or broken, run `fleet provision`: {error}") from error
        self._input_ids, self._words, self._starts, self._rows, self._context_starts, self._questions = loaded
        self._assets = assets
        self.sample_count = len(self._rows) - 1
        self.model_dir = assets / "model"

    @property
    def model(self) -> dict[str, str]:
        """The five texts of measurements.json plus weights_sha256, of the checkpoint in `source/`."""
        return {
            "input_data_types": "int64",
            "weight_data_types": self._checkpoint["type"],
            "weight_transformations": "none",
            "retraining": "none",
            "starting_weights_filename": self._checkpoint["file"],
            "weights_sha256": self._checkpoint["sha256"],
        }

    def features(self, index: int) -> Features:
        """Sample `index`, tokenised: two int64 arrays of shape [length], at most MAX_LENGTH.

        Raises IndexError when there is no such sample.
        """
        if not 0 <= index < self.sample_count:
            raise IndexError(f"sample {index} of {self.sample_count}")
        input_ids = self._input_ids[self._tokens_of(index)].astype(np.int64)
        return Features(input_ids, (np.arange(len(input_ids)) >= self._context_starts[index]).astype(np.int64))

    def _tokens_of(self, index: int) -> slice:
        return slice(int(self._rows[index]), int(self._rows[index + 1]))

    def response(self, output: npt.NDArray[np.float32]) -> bytes:
        """Start and end logits [length, 2] as little-endian float32, unpadded."""
        return np.ascontiguousarray(output, dtype="<f4").tobytes()

    def evaluate(self, accuracy_log: Path, sample_count: int) -> dict[str, float]:
        """`F1` and `exact_match` in percent over the questions whose windows all are among the first `sample_count`.

        Raises ValueError when these are none, when the log is cut off, or when a sample is missing, foreign, of a wrong
        size, not finite, or logged twice with different answers.
        """
        if not 0 < sample_count <= self.sample_count:
            raise ValueError(f"sample count {sample_count} is not between 1 and {self.sample_count}")
        examples = self._examples()
        ends = np.bincount(self._questions, minlength=len(examples["questions"])).cumsum()
        scored = int(np.searchsorted(ends, sample_count, side="right"))
        if scored == 0:
            raise ValueError(f"{sample_count} samples do not cover one question: take {ends[0]} or more")
        try:
            answers = self._answers(accuracy_log, sample_count)
        except ValueError as error:
            raise ValueError(f"{accuracy_log}: {error}") from error
        predictions = []
        windows = [range(end - count, end) for end, count in zip(ends, np.diff(ends, prepend=0), strict=True)]
        for question, rows in zip(examples["questions"][:scored], windows, strict=False):
            best = max((answers[index] for index in rows), key=lambda answer: answer[2], default=None)
            if best is None or best[2] == -np.inf:
                predictions.append(squad.NO_ANSWER)
                continue
            first, last, _ = best
            words = examples["paragraphs"][question["paragraph"]][self._words[first] : self._words[last] + 1]
            tokens = [examples["tokens"][token] for token in self._input_ids[first : last + 1]]
            predictions.append(squad.answer_text(tokens, words))
        return squad.scores(predictions, [question["answers"] for question in examples["questions"][:scored]])

    def _examples(self) -> dict[str, Any]:
        path = self._assets / _EXAMPLES
        try:
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: dataset is missing or broken, run `fleet provision`: {error}") from error
        return found

    def _answers(self, accuracy_log: Path, sample_count: int) -> list[tuple[int, int, float]]:
        """For each of the first `sample_count` samples the first and last of all T tokens, and the score."""
        indices, logits = [], []
        for index, response in squad.read_log(accuracy_log):
            if not 0 <= index < sample_count:
                raise ValueError(f"sample {index} is not one of the {sample_count} of this run")
            indices.append(index)
            logits.append(self._logits(index, response))
        missing = sorted(set(range(sample_count)).difference(indices))
        if missing:
            raise ValueError(f"{len(missing)} of {sample_count} samples missing, first {missing[0]}")
        tokens = [self._tokens_of(index) for index in indices]
        context, starts = [self._words[part] >= 0 for part in tokens], [self._starts[part] for part in tokens]
        spans = squad.best_spans(logits, context, starts, MAX_LENGTH)
        answers: dict[int, tuple[int, int, float]] = {}
        for index, first, last, score in zip(indices, spans.first, spans.last, spans.score, strict=True):
            row = int(self._rows[index])
            answer = (row + int(first), row + int(last), float(score))
            # LoadGen may repeat samples to fill the last query; logits may then differ in the last bits, no more.
            if answers.setdefault(index, answer)[:2] != answer[:2]:
                raise ValueError(f"sample {index} was answered twice, differently")
        return [answers[index] for index in range(sample_count)]

    def _logits(self, index: int, response: bytes) -> npt.NDArray[np.float32]:
        length = int(self._rows[index + 1] - self._rows[index])
        if len(response) != 8 * length:
            raise ValueError(f"sample {index}: {len(response)} bytes instead of {8 * length}")
        logits = np.frombuffer(response, dtype="<f4").reshape(length, 2)
        if not np.isfinite(logits).all():
            raise ValueError(f"sample {index}: logits are not finite")
        return logits

    def accuracy_text(self, metrics: dict[str, float]) -> str:
        """One line, from whose start the official checker reads."""
        return f'{{"exact_match": {metrics["exact_match"]:.6f}, "f1": {metrics["F1"]:.6f}}}\n'


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: run `fleet provision`") from None


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> str:
    """By rename; the content's sha256."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
    return hashlib.sha256(content).hexdigest()


def _bring_dataset(assets: Path, config: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Write arrays and examples into `assets`, unless `known` says that they are there; what to say next time."""
    source = assets / "source"
    inputs = [_sha256(source / name) for name in (_DATASET, _VOCABULARY)]
    key = _digest(_FORMAT, MAX_LENGTH, STRIDE, MAX_QUESTION, config["vocab_size"], *inputs)
    if known.get("key") == key and _are_there(assets, known["files"]):
        return known
    vocabulary = read_vocabulary(source / _VOCABULARY, config["vocab_size"])
    dataset = squad.read(source / _DATASET)
    hashes = {}
    for name, array in tokenise(dataset, vocabulary).items():
        buffer = io.BytesIO()
        np.save(buffer, array.astype(array.dtype.newbyteorder("<")), allow_pickle=False)
        hashes[name] = _write(assets / name, buffer.getvalue())
    examples = {
        "tokens": vocabulary,
        "paragraphs": dataset.paragraphs,
        "questions": [{"paragraph": one.paragraph, "answers": one.answers} for one in dataset.questions],
    }
    hashes[_EXAMPLES] = _write(assets / _EXAMPLES, json.dumps(examples).encode())
    return {"key": key, "files": hashes}


def _are_there(assets: Path, files: dict[str, str]) -> bool:
    return all((assets / name).is_file() and _sha256(assets / name) == digest for name, digest in files.items())


def _bring_model(assets: Path, config: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Make `model/` of the checkpoint in `source/`, if there is one; as `_bring_dataset` otherwise."""
    source, folder = assets / "source", assets / "model"
    checkpoint, foreign = convert.find(source)
    converted = folder / convert.SAFETENSORS
    folder.mkdir(exist_ok=True)
    replaced = {checkpoint[0].name, converted.name} if foreign else set()
    convert.link(source, folder, {_DATASET, _CONFIG, *convert.PICKLES} | replaced)
    digests = {path.name: _sha256(path) for path in checkpoint}
    key = _digest(config, digests)
    if known.get("key") == key and _are_there(assets, known["files"]):
        return known
    hashes = {f"model/{_CONFIG}": _write(folder / _CONFIG, json.dumps(config, indent=2).encode() + b"\n")}
    if not checkpoint:
        converted.unlink(missing_ok=True)
        return {"key": key, "files": hashes, "checkpoint": _NO_WEIGHTS}
    if foreign:
        convert.to_safetensors(checkpoint[0], converted, config)
        hashes[f"model/{converted.name}"] = _sha256(converted)
    found = convert.headers([converted] if foreign else checkpoint)
    convert.check({name: shape for name, (_, shape) in found.items()}, config, checkpoint[0])
    kind, whole = found["qa_outputs.weight"][0], len(checkpoint) == 1
    return {
        "key": key,
        "files": hashes,
        "checkpoint": {
            "file": checkpoint[0].name if whole else convert.INDEX,
            "sha256": digests[checkpoint[0].name] if whole else _digest(digests),
            "type": _TYPES.get(kind, kind.lower()),
        },
    }


def prepare(name: str, assets: Path) -> dict[str, str]:  # noqa: ARG001 - the protocol's arguments
    """Tokenise `source/`'s dataset and make `model/` of its checkpoint, in `assets`; nothing where that is done.

    Without a checkpoint the benchmark can be run on random weights. Returns file name to sha256. Raises ValueError when
    dataset or vocabulary are missing, or any of the files is not what it should be.
    """
    try:
        known = json.loads((assets / _RECORD).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        known = {}
    config = read_config(assets / "source" / _CONFIG)
    dataset = _bring_dataset(assets, config, known.get("dataset", {}))
    model = _bring_model(assets, config, known.get("model", {}))
    if known != (record := {"dataset": dataset, "model": model}):
        _write(assets / _RECORD, json.dumps(record, indent=2).encode() + b"\n")
    return {**dataset["files"], **model["files"]}


def open(name: str, assets: Path) -> Bert:  # noqa: A001, ARG001 - the protocol's name and arguments
    """The benchmark over what `prepare` left in `assets`; ValueError when that is not whole."""
    return Bert(assets)
