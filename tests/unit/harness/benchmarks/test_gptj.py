import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet.harness.benchmarks import gptj
from fleet.harness.benchmarks.summaries import Summaries
from fleet.mlperf.rules import load_benchmark
from tests.unit.harness.benchmarks.articles import byte_tokenizer, splitter_archive, write_articles, write_log

ASK = "Summarize the following news article:"
LONG = "Snow fell on Łódź and on São Paulo. " * 80
ENTRIES = [
    {"instruction": ASK, "input": "A dog bit a man.", "output": "Dog bites man ."},
    {"instruction": ASK, "input": LONG, "output": "Snow {fell} ."},
    {"instruction": ASK, "input": "{braces} and\nlines", "output": "Braces ."},
]


@pytest.fixture(scope="module")
def tokenizer_text() -> str:
    return byte_tokenizer(50_257, gptj.END).to_str()


@pytest.fixture
def assets(tmp_path: Path, tokenizer_text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gptj, "SAMPLES", len(ENTRIES))
    source = tmp_path / "source"
    source.mkdir()
    write_articles(source / "cnn_eval.json", ENTRIES)
    (source / "tokenizer.json").write_text(tokenizer_text, encoding="utf-8")
    splitter_archive(source / "punkt_tab.zip")
    return tmp_path


@pytest.fixture
def benchmark(assets: Path) -> Summaries:
    gptj.prepare("gptj-99", assets)
    return gptj.open("gptj-99", assets)


def test_prompts_have_the_reference_s_words(benchmark: Summaries) -> None:
    assert benchmark.features(0).text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSummarize the following news "
        "article:\n\n### Input:\nA dog bit a man.\n\n### Response:"
    )
    assert "\n\n### Input:\n{braces} and\nlines\n\n### Response:" in benchmark.features(2).text


def test_truncation_is_transformers_own(benchmark: Summaries) -> None:
    # What the reference does: tokenizer(prompt, truncation=True, max_length=1919), special tokens and all.
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(benchmark.model_dir / "tokenizer.json"))
    for index, entry in enumerate(ENTRIES):
        prompt = gptj.PROMPT.format(instruction=entry["instruction"], input=entry["input"])
        expected = theirs(prompt, truncation=True, max_length=1919)["input_ids"]
        assert benchmark.features(index).input_ids.tolist() == expected


def test_a_long_article_loses_its_end_and_the_request(benchmark: Summaries) -> None:
    features = benchmark.features(1)
    assert len(features.input_ids) == 1919
    assert features.text.startswith("Below is an instruction")
    assert not features.text.endswith("### Response:")
    # One token a byte here, so the text that is kept has as many bytes, but for a letter cut in two.
    assert 0 <= len(features.text.encode()) - 1919 <= 1


def test_generation_is_the_reference_s(benchmark: Summaries) -> None:
    wanted = benchmark.generation
    assert (wanted.beams, wanted.min_new_tokens, wanted.max_new_tokens, wanted.early_stopping) == (4, 30, 128, True)
    assert wanted.eos_token_ids == (50256,)
    assert wanted.pad_token_id == 50256


def test_the_configuration_is_gpt_j_6b_s() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPTJConfig(**gptj.CONFIG)
    defaults = transformers.GPTJConfig()  # its defaults are those of the 6B model
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "rotary_dim", "activation_function"):
        assert getattr(theirs, name) == getattr(defaults, name)


def test_responses_are_int64_and_score_by_nltk_s_sentences(benchmark: Summaries, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(50_257, gptj.END)
    texts = [" Dog bites man .", " Snow {fell} .", " Braces ."]
    responses = [
        (at, benchmark.response(np.array([*tokenizer.encode(text).ids, gptj.END]))) for at, text in enumerate(texts)
    ]
    assert len(responses[0][1]) == 8 * (len(texts[0]) + 1)
    metrics = benchmark.evaluate(write_log(tmp_path / "log.json", responses), 3)
    assert metrics["ROUGE1"] == metrics["ROUGELSUM"] == 100.0
    assert metrics["GEN_LEN"] == len("Dog bites man.") + len("Snow {fell}.") + len("Braces.")
    assert metrics["GEN_NUM"] == 3


def test_prepare_twice_changes_nothing_and_a_new_article_everything(assets: Path) -> None:
    first = gptj.prepare("gptj-99", assets)
    times = {path.name: path.stat().st_mtime_ns for path in assets.iterdir() if path.is_file()}
    assert gptj.prepare("gptj-99", assets) == first
    assert {path.name: path.stat().st_mtime_ns for path in assets.iterdir() if path.is_file()} == times
    write_articles(assets / "source" / "cnn_eval.json", [{**ENTRIES[0], "input": "A man bit a dog."}, *ENTRIES[1:]])
    assert gptj.prepare("gptj-99", assets) != first
    assert "A man bit a dog." in gptj.open("gptj-99", assets).features(0).text


def test_prepare_mends_a_damaged_file(assets: Path) -> None:
    hashes = gptj.prepare("gptj-99", assets)
    (assets / "rows.npy").write_bytes(b"half")
    assert gptj.prepare("gptj-99", assets) == hashes
    gptj.open("gptj-99", assets)


@pytest.mark.parametrize("name", ["gptj-99", "gptj-99.9"])
def test_the_rules_name_this_module_and_its_files(name: str) -> None:
    rule = load_benchmark(name)
    assert (rule.module, set(rule.sources)) == ("gptj", {"cnn_eval", "punkt_tab.zip", "tokenizer", "checkpoint"})
    assert [name for name, source in rule.sources.items() if source.weights] == ["checkpoint"]


@pytest.mark.parametrize("name", ["cnn_eval.json", "tokenizer.json", "punkt_tab.zip"])
def test_what_is_missing_is_named(assets: Path, name: str) -> None:
    (assets / "source" / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: no such file; name a folder"):
        gptj.prepare("gptj-99", assets)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"output": None}, "entry 1 has no 'output'"),
        ({"instruction": {"llama": "x"}}, "entry 1: 'instruction' is missing, or no text"),
        ({"instruction": None}, "entry 1: 'instruction' is missing, or no text"),
    ],
    ids=["missing", "no text", "no instruction"],
)
def test_a_bad_article_is_named(assets: Path, change: dict[str, Any], problem: str) -> None:
    bad = {key: value for key, value in (ENTRIES[1] | change).items() if value is not None}
    write_articles(assets / "source" / "cnn_eval.json", [ENTRIES[0], bad, ENTRIES[2]])
    with pytest.raises(ValueError, match=problem):
        gptj.prepare("gptj-99", assets)


def test_llama_s_file_of_the_same_articles_makes_the_same_samples(assets: Path) -> None:
    # What MLCommons publishes: download_cnndm.py of language/llama3.1-8b writes the whole template as instruction.
    first = gptj.prepare("gptj-99", assets)
    theirs = [{**entry, "instruction": {"llama": "Summarize {input}"}, "tok_input": [1, 2]} for entry in ENTRIES]
    write_articles(assets / "source" / "cnn_eval.json", theirs)
    assert gptj.prepare("gptj-99", assets) == first


def test_a_truncated_download_is_named(assets: Path) -> None:
    path = assets / "source" / "cnn_eval.json"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"cnn_eval\.json: not whole JSON"):
        gptj.prepare("gptj-99", assets)


def test_another_model_s_tokenizer_is_named(assets: Path) -> None:
    byte_tokenizer(1000, 999).save(str(assets / "source" / "tokenizer.json"))
    with pytest.raises(ValueError, match="1000 tokens, the one of gptj-99 has 50400 or 50257"):
        gptj.prepare("gptj-99", assets)


def test_an_unprepared_benchmark_is_named(assets: Path) -> None:
    with pytest.raises(ValueError, match="run `fleet provision`"):
        gptj.open("gptj-99", assets)


def test_the_model_is_known_by_its_weights(assets: Path) -> None:
    assert gptj.task("gptj-99", assets).model["starting_weights_filename"] == "none"
    (assets / "source" / "model.safetensors").write_bytes(b"weights")
    gptj.prepare("gptj-99", assets)
    model = gptj.open("gptj-99", assets).model
    assert model["starting_weights_filename"] == "model.safetensors"
    assert len(model["weights_sha256"]) == 64
    assert all(model.values())
    assert json.dumps(model)
