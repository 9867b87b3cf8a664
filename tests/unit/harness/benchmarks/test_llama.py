from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet.harness.benchmarks import llama
from fleet.harness.benchmarks.summaries import Summaries
from tests.unit.harness.benchmarks.articles import byte_tokenizer, splitter_archive, write_articles, write_log

BEGIN, END = 128_000, 128_009
LONG = "It rained. " * 400
ENTRIES: list[dict[str, Any]] = [
    {"instruction": {"llama": "…"}, "input": "A dog bit a man.", "output": "Dog bites man . Man hurt ."},
    {"instruction": {"llama": "…"}, "input": LONG, "output": "It rained ."},
]


@pytest.fixture(scope="module")
def tokenizer_text() -> str:
    return byte_tokenizer(128_256, END, begin=BEGIN).to_str()


@pytest.fixture
def assets(tmp_path: Path, tokenizer_text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(llama, "ARTICLES", {name: (file, 2) for name, (file, _) in llama.ARTICLES.items()})
    source = tmp_path / "source"
    source.mkdir()
    for file, _ in llama.ARTICLES.values():
        write_articles(source / file, ENTRIES)
    (source / "tokenizer.json").write_text(tokenizer_text, encoding="utf-8")
    splitter_archive(source / "punkt_tab.zip")
    return tmp_path


@pytest.fixture
def benchmark(assets: Path) -> Summaries:
    llama.prepare("llama3.1-8b", assets)
    return llama.open("llama3.1-8b", assets)


def test_the_datasets_have_the_rules_sizes() -> None:
    assert llama.ARTICLES == {
        "llama3.1-8b": ("cnn_eval.json", 13368),
        "llama3.1-8b-edge": ("sample_cnn_eval_5000.json", 5000),
    }


def test_prompts_have_the_reference_s_words_and_are_never_cut(benchmark: Summaries) -> None:
    assert benchmark.features(0).text == (
        "Summarize the following news article in 128 tokens. Please output the summary only, without any other "
        "text.\n\nArticle:\nA dog bit a man.\n\nSummary:"
    )
    assert benchmark.features(1).text.endswith("It rained. \n\nSummary:")


def test_tokens_are_transformers_own_with_the_text_s_beginning(benchmark: Summaries) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(benchmark.model_dir / "tokenizer.json"))
    for index in range(2):
        features = benchmark.features(index)
        assert features.input_ids.tolist() == theirs.encode(features.text)
        assert features.input_ids[0] == BEGIN
    assert len(benchmark.features(1).input_ids) > 4000


def test_tokens_in_the_file_win(assets: Path) -> None:
    given = [{**entry, "tok_input": [BEGIN, 40 + number, 7]} for number, entry in enumerate(ENTRIES)]
    write_articles(assets / "source" / "sample_cnn_eval_5000.json", given)
    llama.prepare("llama3.1-8b-edge", assets)
    benchmark = llama.open("llama3.1-8b-edge", assets)
    assert benchmark.features(1).input_ids.tolist() == [BEGIN, 41, 7]
    assert benchmark.features(1).text.startswith("Summarize the following")


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [([], "no list of tokens"), ("12", "no list of tokens"), ([1, 128_256], "has 128256"), ([1, "2"], "has '2'")],
)
def test_bad_tokens_in_the_file_are_named(assets: Path, tokens: Any, problem: str) -> None:
    given = [{**ENTRIES[0], "tok_input": [1]}, {**ENTRIES[1], "tok_input": tokens}]
    write_articles(assets / "source" / "cnn_eval.json", given)
    with pytest.raises(ValueError, match=rf"cnn_eval\.json: entry 1: 'tok_input' .*{problem}"):
        llama.prepare("llama3.1-8b", assets)


def test_a_missing_field_is_named(assets: Path) -> None:
    write_articles(assets / "source" / "cnn_eval.json", [ENTRIES[0], {"input": "a"}])
    with pytest.raises(ValueError, match=r"cnn_eval\.json: entry 1 has no 'output'"):
        llama.prepare("llama3.1-8b", assets)


def test_gpt_j_s_tokenizer_is_named(assets: Path) -> None:
    byte_tokenizer(50_257, 50_256).save(str(assets / "source" / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"50257 tokens, the one of llama3\.1-8b has 128256"):
        llama.prepare("llama3.1-8b", assets)


def test_another_name_lists_what_there_is(assets: Path) -> None:
    with pytest.raises(ValueError, match=r"llama3: .*there are llama3\.1-8b, llama3\.1-8b-edge"):
        llama.prepare("llama3", assets)


def test_generation_is_greedy_and_ends_at_each_of_llama_s_ends(benchmark: Summaries) -> None:
    wanted = benchmark.generation
    assert (wanted.beams, wanted.min_new_tokens, wanted.max_new_tokens) == (1, 1, 128)
    assert wanted.eos_token_ids == (128001, 128008, 128009)


def test_responses_are_int32_and_sentences_count_for_lsum(benchmark: Summaries, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(128_256, END)
    texts = ["Man hurt. Dog bites man.", "It rained."]
    responses = [
        (at, benchmark.response(np.array([*tokenizer.encode(text).ids, END]))) for at, text in enumerate(texts)
    ]
    assert len(responses[1][1]) == 4 * (len(texts[1]) + 1)
    metrics = benchmark.evaluate(write_log(tmp_path / "log.json", responses), 2)
    assert metrics["ROUGE1"] == metrics["ROUGELSUM"] == 100.0  # the order of sentences does not matter to it
    assert metrics["ROUGEL"] < 100.0
    assert metrics["GEN_LEN"] == sum(len(text) for text in texts)


def test_the_configuration_is_one_that_transformers_knows() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**llama.CONFIG)
    wide = config.hidden_size * config.intermediate_size * 3 * config.num_hidden_layers
    attention = config.num_hidden_layers * config.hidden_size * (2 * config.hidden_size + 2 * 8 * config.head_dim)
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    assert wide + attention + norms + 2 * config.vocab_size * config.hidden_size == 8_030_261_248
