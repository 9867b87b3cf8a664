import hashlib
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fleet.harness.benchmarks import tiny

CHECKER = re.compile(r"^\{[\"\']exact_match[\"\']\:\s*[\d\.]+,\s*[\"\']f1[\"\']\:\s*([\d\.]+)\}")
"""The official submission checker's pattern for F1."""


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-bert")
    tiny.prepare("tiny-bert", folder)
    return folder


@pytest.fixture(scope="session")
def benchmark(assets: Path) -> tiny.TinyBert:
    return tiny.open("tiny-bert", assets)


@pytest.fixture(scope="session")
def samples(assets: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (assets / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def logits_for(benchmark: tiny.TinyBert, index: int, first: int, last: int) -> npt.NDArray[np.float32]:
    """Certain of the tokens `first` to `last`."""
    logits = np.zeros((len(benchmark.features(index).input_ids), 2), np.float32)
    logits[first, 0] = logits[last, 1] = 9.0
    return logits


def right_logits(benchmark: tiny.TinyBert, assets: Path, sample: dict[str, Any], index: int) -> npt.NDArray[np.float32]:
    begin = int(np.load(assets / "rows.npy")[index])
    length = len(benchmark.features(index).input_ids)
    offsets = np.load(assets / "offsets.npy")[begin : begin + length]
    start = int(np.load(assets / "context_starts.npy")[index])
    first = start + int(np.flatnonzero(offsets[start:-1, 0] == sample["start"])[0])
    last = start + int(np.flatnonzero(offsets[start:-1, 1] == sample["start"] + len(sample["answer"]))[0])
    return logits_for(benchmark, index, first, last)


def write_log(path: Path, responses: list[tuple[int, bytes]]) -> Path:
    """A log as LoadGen writes it."""
    entries = [
        {"seq_id": number, "qsl_idx": index, "data": data.hex().upper(), "token_count": 0}
        for number, (index, data) in enumerate(responses)
    ]
    path.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def perfect(benchmark: tiny.TinyBert, assets: Path, samples: list[dict[str, Any]]) -> list[tuple[int, bytes]]:
    """Right answers to the first 20 samples."""
    return [(index, benchmark.response(right_logits(benchmark, assets, samples[index], index))) for index in range(20)]


def test_generator_is_the_same_everywhere() -> None:
    text = "\n".join(repr(sample) for sample in tiny.generate(7, 200))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "a9a26e6d9aaf7196462ed701be5f0355fe0b14fab8936fcadffe95420b148d8f"
    )


def test_answers_stand_where_they_are_said_to() -> None:
    for sample in tiny.generate(8, 300):
        assert sample.context[sample.start : sample.start + len(sample.answer)] == sample.answer


def test_training_never_sees_a_quarter_of_the_names() -> None:
    def towns(*, training: bool) -> set[str]:
        texts = " ".join(sample.context for sample in tiny.generate(9, 2000, training=training))
        return set(re.findall(r"\b[A-Z]\w+(?:haven|stadt|minster|ville|bury)\b", texts))

    held_out = {name for name in towns(training=False) if zlib.crc32(name.lower().encode()) % 4 == 0}
    assert len(held_out) > 100
    assert not held_out & towns(training=True)


def test_validation_texts_are_not_in_the_training_seeds(samples: list[dict[str, Any]]) -> None:
    known = {sample["context"] for sample in samples}
    assert not known & {sample.context for sample in tiny.generate(1001, 3000, training=True)}
    assert len(known) > 0.999 * tiny.SAMPLES


def test_the_dataset_has_squad_s_size_and_small_lengths(benchmark: tiny.TinyBert) -> None:
    lengths = np.array([len(benchmark.features(index).input_ids) for index in range(benchmark.sample_count)])
    assert len(lengths) == 10833
    assert lengths.max() <= 128
    assert lengths.min() >= 30
    assert 65 <= lengths.mean() <= 80
    assert lengths.std() > 12


def test_features_are_a_question_and_a_context(benchmark: tiny.TinyBert) -> None:
    features = benchmark.features(3)
    assert features.input_ids.dtype == features.token_type_ids.dtype == np.int64
    assert features.input_ids.shape == features.token_type_ids.shape
    assert features.input_ids[0] == 2
    assert features.input_ids[-1] == 3
    assert list(np.diff(features.token_type_ids)).count(1) == 1
    assert not (features.input_ids == 1).any()
    with pytest.raises(IndexError):
        benchmark.features(tiny.SAMPLES)


def test_prepare_twice_changes_nothing(assets: Path) -> None:
    times = {path.name: path.stat().st_mtime_ns for path in assets.iterdir()}
    hashes = tiny.prepare("tiny-bert", assets)
    assert {path.name: path.stat().st_mtime_ns for path in assets.iterdir()} == times
    assert hashes == {name: hashlib.sha256((assets / name).read_bytes()).hexdigest() for name in times}


def test_prepare_mends_a_damaged_file(
    assets: Path, samples: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The generator's own 3 s are spared here; what comes out of it is held to card.json all the same.
    monkeypatch.setattr(tiny, "generate", lambda seed, count: [tiny.Sample(**sample) for sample in samples])  # noqa: ARG005
    shutil.copytree(assets, tmp_path, dirs_exist_ok=True)
    (tmp_path / "rows.npy").write_bytes(b"half")
    with pytest.raises(ValueError, match="run `fleet provision`"):
        tiny.open("tiny-bert", tmp_path)
    tiny.prepare("tiny-bert", tmp_path)
    assert (tmp_path / "rows.npy").read_bytes() == (assets / "rows.npy").read_bytes()


def test_prepare_refuses_another_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "SAMPLES", 50)
    with pytest.raises(ValueError, match=r"generated .* differs from the dataset of card\.json"):
        tiny.prepare("tiny-bert", tmp_path)


def test_prepare_refuses_damaged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny.FOLDER, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(tiny, "FOLDER", tmp_path / "model")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or damaged"):
        tiny.prepare("tiny-bert", tmp_path / "assets")


def test_right_answers_score_100(benchmark: tiny.TinyBert, perfect: list[tuple[int, bytes]], tmp_path: Path) -> None:
    log = write_log(tmp_path / "mlperf_log_accuracy.json", perfect[::-1])
    assert benchmark.evaluate(log, 20) == {"F1": 100.0, "exact_match": 100.0}


def test_wrong_answers_score_low(benchmark: tiny.TinyBert, tmp_path: Path) -> None:
    starts = [int(benchmark.features(index).token_type_ids.argmax()) for index in range(20)]
    responses = [
        (index, benchmark.response(logits_for(benchmark, index, start, start))) for index, start in enumerate(starts)
    ]
    metrics = benchmark.evaluate(write_log(tmp_path / "log.json", responses), 20)
    assert metrics["F1"] < 30
    assert metrics["exact_match"] <= metrics["F1"]


def test_a_missing_sample_is_named(benchmark: tiny.TinyBert, perfect: list[tuple[int, bytes]], tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.json", perfect[:7] + perfect[8:])
    with pytest.raises(ValueError, match="1 of 20 samples missing, first 7"):
        benchmark.evaluate(log, 20)


def test_a_foreign_sample_is_named(benchmark: tiny.TinyBert, perfect: list[tuple[int, bytes]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sample 10 is not one of the 10"):
        benchmark.evaluate(write_log(tmp_path / "log.json", perfect), 10)


def test_a_repeated_sample_must_agree(
    benchmark: tiny.TinyBert, perfect: list[tuple[int, bytes]], tmp_path: Path
) -> None:
    log = write_log(tmp_path / "log.json", [*perfect, perfect[3]])
    assert benchmark.evaluate(log, 20)["F1"] == 100.0
    start = int(benchmark.features(3).token_type_ids.argmax())
    other = benchmark.response(logits_for(benchmark, 3, start, start))
    with pytest.raises(ValueError, match="sample 3 was answered twice"):
        benchmark.evaluate(write_log(tmp_path / "log.json", [*perfect, (3, other)]), 20)


@pytest.mark.parametrize(
    ("response", "problem"),
    [(b"\0" * 8, "8 bytes instead of"), (None, "not finite")],
    ids=["wrong size", "not a number"],
)
def test_a_broken_response_is_named(
    benchmark: tiny.TinyBert,
    perfect: list[tuple[int, bytes]],
    tmp_path: Path,
    response: bytes | None,
    problem: str,
) -> None:
    if response is None:
        response = np.full((len(benchmark.features(5).input_ids), 2), np.nan, "<f4").tobytes()
    log = write_log(tmp_path / "log.json", [*perfect[:5], (5, response), *perfect[6:]])
    with pytest.raises(ValueError, match=f"log.json: sample 5: .*{problem}"):
        benchmark.evaluate(log, 20)


@pytest.mark.parametrize("kept", [0, 1, 200, -3], ids=["empty", "bracket", "cut in an entry", "cut at the end"])
def test_a_log_cut_off_by_a_crash_is_named(
    benchmark: tiny.TinyBert, perfect: list[tuple[int, bytes]], tmp_path: Path, kept: int
) -> None:
    log = write_log(tmp_path / "log.json", perfect)
    log.write_bytes(log.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"log\.json: not a whole accuracy log"):
        benchmark.evaluate(log, 20)


@pytest.mark.parametrize("text", ["{}", '[{"seq_id": 0}]', '[{"qsl_idx": 0, "data": "XY"}]', "[3]"])
def test_a_log_of_another_shape_is_named(benchmark: tiny.TinyBert, tmp_path: Path, text: str) -> None:
    (tmp_path / "log.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"log\.json"):
        benchmark.evaluate(tmp_path / "log.json", 20)


def test_best_span_stays_forward_short_and_inside_the_context() -> None:
    logits = np.zeros((60, 2), np.float32)
    logits[2, 0] = logits[59, 1] = 50.0  # a question token, and the closing [SEP]
    logits[40, 0] = logits[9, 1] = 20.0  # backwards
    logits[10, 0], logits[12, 1] = 15.0, 15.0
    assert tiny.best_span(logits, 8) == (10, 12)
    logits[:] = 0.0
    logits[10, 0], logits[39, 1], logits[40, 1] = 9.0, 5.0, 6.0  # 30 tokens, and one too many
    assert tiny.best_span(logits, 8) == (10, 39)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Golden Gate.", ["golden", "gate"]),
        ("a 300 metres, an hour", ["300", "metres", "hour"]),
        ("3 o'clock", ["3", "oclock"]),
        ("Theo", ["theo"]),
        ("the", []),
    ],
)
def test_normalise(text: str, words: list[str]) -> None:
    assert tiny.normalise(text) == words


@pytest.mark.parametrize(
    ("predicted", "truth", "score"),
    [
        ("Mora Velberg", "Velberg", 2 / 3),
        ("velberg!", "Velberg", 1.0),
        ("Kenton", "Velberg", 0.0),
        ("", "Velberg", 0.0),
        ("the", "Velberg", 0.0),
        ("new new", "new", 2 / 3),
    ],
)
def test_f1(predicted: str, truth: str, score: float) -> None:
    assert tiny.f1(predicted, truth) == pytest.approx(score)


def test_the_checker_reads_accuracy_txt(benchmark: tiny.TinyBert) -> None:
    text = benchmark.accuracy_text({"F1": 91.2345678, "exact_match": 88.0})
    match = CHECKER.match(text)
    assert match is not None
    assert float(match[1]) == pytest.approx(91.234568)
    assert text.count("\n") == 1
    assert CHECKER.match(benchmark.accuracy_text({"F1": 100.0, "exact_match": 1e-9})) is not None


def test_the_card_describes_the_folder(benchmark: tiny.TinyBert) -> None:
    card = json.loads((tiny.FOLDER / "card.json").read_text(encoding="utf-8"))
    assert card["files"] == {
        name: hashlib.sha256((tiny.FOLDER / name).read_bytes()).hexdigest() for name in card["files"]
    }
    assert benchmark.model["weights_sha256"] == card["files"]["model.safetensors"]
    assert (tiny.FOLDER / "model.safetensors").stat().st_size <= 4_000_000


def test_the_shipped_weights_answer(benchmark: tiny.TinyBert, tmp_path: Path) -> None:
    count = 2500  # the first of 10833, to spare 12 s; the whole set is what `fleet bench` itself measures
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForQuestionAnswering.from_pretrained(benchmark.model_dir).eval()
    order = sorted(range(count), key=lambda index: len(benchmark.features(index).input_ids))
    responses = []
    for begin in range(0, len(order), 128):
        chosen = order[begin : begin + 128]
        features = [benchmark.features(index) for index in chosen]

        def pad(rows: list[npt.NDArray[np.int64]]) -> Any:
            tensors = [torch.from_numpy(row) for row in rows]
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)

        with torch.inference_mode():
            output = model(
                input_ids=pad([each.input_ids for each in features]),
                token_type_ids=pad([each.token_type_ids for each in features]),
                attention_mask=pad([np.ones_like(each.input_ids) for each in features]),
            )
        logits = torch.stack([output.start_logits, output.end_logits], dim=2).numpy()
        responses += [
            (index, benchmark.response(row[: len(each.input_ids)]))
            for index, each, row in zip(chosen, features, logits, strict=True)
        ]
    metrics = benchmark.evaluate(write_log(tmp_path / "mlperf_log_accuracy.json", responses), count)
    assert metrics == pytest.approx({"F1": 93.783, "exact_match": 90.16}, abs=0.05)
    card = json.loads((tiny.FOLDER / "card.json").read_text(encoding="utf-8"))
    assert metrics["F1"] == pytest.approx(card["measured"]["F1"], abs=0.1)
