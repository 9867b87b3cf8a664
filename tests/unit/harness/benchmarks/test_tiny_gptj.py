import hashlib
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet.harness.benchmarks import tiny_gptj
from fleet.harness.benchmarks.summaries import Summaries, read_tokenizer
from tests.unit.harness.benchmarks.articles import write_log

COUNT = 250
"""The first samples of 5,000, which the model answers in about two seconds; the card has the whole set's score."""


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-gptj")
    tiny_gptj.prepare("tiny-gptj", folder)
    return folder


@pytest.fixture(scope="session")
def benchmark(assets: Path) -> Summaries:
    return tiny_gptj.open("tiny-gptj", assets)


def card() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((tiny_gptj.FOLDER / "card.json").read_text(encoding="utf-8"))
    return data


def generated(model: Any, benchmark: Summaries, beams: int = 1) -> list[tuple[int, bytes]]:
    """What transformers' own generate says to the first COUNT prompts, those of one length together."""
    torch = pytest.importorskip("torch")
    wanted = tiny_gptj.GENERATION
    lengths: dict[int, list[int]] = {}
    for index in range(COUNT):
        lengths.setdefault(len(benchmark.features(index).input_ids), []).append(index)
    responses = []
    for indices in lengths.values():
        ids = torch.from_numpy(np.stack([benchmark.features(index).input_ids for index in indices]))
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=beams,
            min_new_tokens=wanted.min_new_tokens,
            max_new_tokens=wanted.max_new_tokens,
            eos_token_id=list(wanted.eos_token_ids),
            pad_token_id=wanted.pad_token_id,
        )[:, ids.shape[1] :].numpy()
        responses += [(index, benchmark.response(row)) for index, row in zip(indices, made, strict=True)]
    return responses


def test_generator_is_the_same_everywhere() -> None:
    text = "\n".join(repr(sample) for sample in tiny_gptj.generate(7, 200))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "debff4a228f7c7cd63d039c0bb12db4fd36f8b860ee7c49a85627760a769c864"
    )


def test_a_summary_s_names_and_figures_stand_in_the_report() -> None:
    for sample in tiny_gptj.generate(8, 500):
        known = set(re.findall(r"\w+", sample.prompt))
        told = re.findall(r"\b(?:[A-Z][a-z]+|\d+)\b", sample.summary)
        assert {word for word in told if word not in {"A", "It", "The", "Some"}} <= known


def test_a_summary_is_of_the_news_alone() -> None:
    names = [
        (len(set(re.findall(r"[A-Z]\w{4,}", sample.prompt))), len(set(re.findall(r"[A-Z]\w{4,}", sample.summary))))
        for sample in tiny_gptj.generate(9, 500)
    ]
    assert np.mean([told < known for known, told in names]) > 0.95


def test_training_never_sees_a_quarter_of_the_names() -> None:
    def towns(*, training: bool) -> set[str]:
        texts = " ".join(sample.prompt for sample in tiny_gptj.generate(9, 3000, training=training))
        return set(re.findall(r"\b[A-Z]\w+(?:haven|stad|mouth|ville|burg)\b", texts))

    held_out = {name for name in towns(training=False) if zlib.crc32(name.encode()) % 4 == 0}
    assert len(held_out) > 30
    assert not held_out & towns(training=True)


def test_validation_reports_are_not_in_the_training_seeds(benchmark: Summaries) -> None:
    known = {benchmark.features(index).text for index in range(tiny_gptj.SAMPLES)}
    assert len(known) > 0.999 * tiny_gptj.SAMPLES
    assert not known & {sample.prompt for sample in tiny_gptj.generate(1001, 5000, training=True)}


def test_the_dataset_has_the_official_size_and_short_prompts(benchmark: Summaries) -> None:
    lengths = np.array([len(benchmark.features(index).input_ids) for index in range(benchmark.sample_count)])
    assert len(lengths) == 5000
    assert lengths.max() <= tiny_gptj.MAX_PROMPT
    assert 40 <= lengths.mean() <= 60
    assert tiny_gptj.MAX_PROMPT + tiny_gptj.GENERATION.max_new_tokens <= benchmark.config["n_positions"]


def test_every_summary_fits_and_has_tokens_enough_for_loadgen(assets: Path) -> None:
    tokenizer = read_tokenizer(tiny_gptj.task(""))
    lines = (assets / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    answers = tokenizer.encode_batch([f" {json.loads(line)['summary']}" for line in lines])
    lengths = [len(answer.ids) for answer in answers]
    assert min(lengths) >= 4
    assert max(lengths) < tiny_gptj.GENERATION.max_new_tokens  # the end token has room too


def test_prompts_are_their_tokens(benchmark: Summaries) -> None:
    tokenizer = read_tokenizer(tiny_gptj.task(""))
    features = benchmark.features(11)
    assert tokenizer.decode(features.input_ids.tolist()) == features.text
    assert features.text.endswith("\n\nSummary:")
    assert tokenizer.decode(tokenizer.encode("Ωmega ß 7%").ids) == "Ωmega ß 7%"


def test_prepare_twice_changes_nothing(assets: Path) -> None:
    times = {path.name: path.stat().st_mtime_ns for path in assets.iterdir()}
    hashes = tiny_gptj.prepare("tiny-gptj", assets)
    assert {path.name: path.stat().st_mtime_ns for path in assets.iterdir()} == times
    assert hashes == {name: hashlib.sha256((assets / name).read_bytes()).hexdigest() for name in times}


def test_prepare_mends_a_damaged_file(assets: Path, tmp_path: Path) -> None:
    shutil.copytree(assets, tmp_path, dirs_exist_ok=True)
    (tmp_path / "rows.npy").write_bytes(b"half")
    with pytest.raises(ValueError, match="run `fleet provision`"):
        tiny_gptj.open("tiny-gptj", tmp_path)
    tiny_gptj.prepare("tiny-gptj", tmp_path)
    assert (tmp_path / "rows.npy").read_bytes() == (assets / "rows.npy").read_bytes()


def test_prepare_refuses_another_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_gptj, "SEED", 5)
    with pytest.raises(ValueError, match=r"generated .* differs from the dataset of card\.json"):
        tiny_gptj.prepare("tiny-gptj", tmp_path)


@pytest.mark.parametrize("part", ["model.safetensors", "tokenizer.json"])
def test_prepare_refuses_a_damaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    shutil.copytree(tiny_gptj.FOLDER, tmp_path / "model")
    (tmp_path / "model" / part).write_bytes(b"")
    monkeypatch.setattr(tiny_gptj, "FOLDER", tmp_path / "model")
    with pytest.raises(ValueError, match=rf"{part} is missing or damaged"):
        tiny_gptj.prepare("tiny-gptj", tmp_path / "assets")


def test_the_card_describes_the_folder(benchmark: Summaries) -> None:
    assert card()["files"] == {
        name: hashlib.sha256((tiny_gptj.FOLDER / name).read_bytes()).hexdigest() for name in card()["files"]
    }
    assert benchmark.model["weights_sha256"] == card()["files"]["model.safetensors"]
    assert all(benchmark.model.values())
    assert sum(path.stat().st_size for path in tiny_gptj.FOLDER.iterdir()) <= 4_000_000


def test_the_weights_are_a_whole_gpt_j(benchmark: Summaries) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, found = transformers.GPTJForCausalLM.from_pretrained(benchmark.model_dir, output_loading_info=True)
    assert not any(found.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = torch.from_numpy(benchmark.features(0).input_ids)[None]
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    assert logits.shape == (1, ids.shape[1], benchmark.config["vocab_size"])
    answer = read_tokenizer(tiny_gptj.task("")).decode([int(logits[0, -1].argmax())])
    assert answer.startswith(" ")


@pytest.mark.parametrize("beams", [1, 4])
def test_the_shipped_weights_summarise(benchmark: Summaries, tmp_path: Path, beams: int) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.GPTJForCausalLM.from_pretrained(benchmark.model_dir).eval()
    log = write_log(tmp_path / "mlperf_log_accuracy.json", generated(model, benchmark, beams))
    metrics = benchmark.evaluate(log, COUNT)
    assert metrics["GEN_NUM"] == COUNT
    for name in ("ROUGE1", "ROUGE2", "ROUGEL", "ROUGELSUM"):
        assert metrics[name] == pytest.approx(card()["measured"][name], abs=2.0)
        assert metrics[name] > 90


def test_random_weights_summarise_nothing(benchmark: Summaries, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**benchmark.config)).eval()
    metrics = benchmark.evaluate(write_log(tmp_path / "log.json", generated(model, benchmark)), COUNT)
    assert metrics["ROUGE1"] < 10
    assert metrics["ROUGE2"] < 2
