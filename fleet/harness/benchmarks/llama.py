"""llama3.1-8b and llama3.1-8b-edge: Llama-3.1-8B-Instruct summarises CNN/DailyMail, 13,368 or 5,000 articles.

The source folder holds the articles as the MLPerf reference publishes them (cnn_eval.json, for edge
sample_cnn_eval_5000.json), the model folder's files (tokenizer.json, *.safetensors) and NLTK's punkt_tab.zip. Prompt
and generation follow language/llama3.1-8b of mlcommons/inference at b66003e1.
"""

from pathlib import Path
from typing import Any

from fleet.harness.benchmarks.summaries import (
    SPLITTER,
    Summaries,
    Summary,
    Task,
    encode,
    prepare_once,
    punkt,
    read_articles,
    read_tokenizer,
    weights_of,
)
from fleet.harness.interfaces import Generation

ARTICLES = {"llama3.1-8b": ("cnn_eval.json", 13_368), "llama3.1-8b-edge": ("sample_cnn_eval_5000.json", 5_000)}
"""Benchmark to its file of articles and their number."""
PROMPT = (
    "Summarize the following news article in 128 tokens. Please output the summary only, without any other text."
    "\n\nArticle:\n{input}\n\nSummary:"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128_000,
    "eos_token_id": [128_001, 128_008, 128_009],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14_336,
    "max_position_embeddings": 131_072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128_256,
}


def _articles(name: str) -> tuple[str, int]:
    if name not in ARTICLES:
        raise ValueError(f"{name}: no benchmark of this module; there are {', '.join(ARTICLES)}")
    return ARTICLES[name]


def task(name: str, assets: Path) -> Task:
    """The benchmark over the files in `assets`.

    Raises ValueError when it is none of ARTICLES.
    """
    return Task(
        name=name,
        samples=_articles(name)[1],
        generation=Generation(
            beams=1,
            min_new_tokens=1,
            max_new_tokens=128,
            eos_token_ids=(128_001, 128_008, 128_009),
            pad_token_id=128_009,
        ),
        dtype="<i4",
        vocabularies=(128_256,),
        config=CONFIG,
        model={
            "input_data_types": "int32",
            "weight_data_types": "bf16",
            "weight_transformations": "none",
            "retraining": "none",
            **weights_of(assets),
        },
        model_dir=assets / "source",
    )


def prepare(name: str, assets: Path) -> dict[str, str]:
    """Bring articles and tokens into `assets`; nothing when that was done already.

    The tokens are those of the file where it has them (`tok_input`, as the published ones do), else the prompt's.
    Returns file name to sha256. Raises ValueError, naming the file and the entry, for what is missing or damaged.
    """
    file, count = _articles(name)
    source = assets / "source"

    def make() -> tuple[list[Summary], list[list[int]]]:
        tokenizer = read_tokenizer(task(name, assets))
        entries = read_articles(source / file, count, {"input": str, "output": str})
        samples = [Summary(PROMPT.format(input=entry["input"]), entry["output"]) for entry in entries]
        if all("tok_input" in entry for entry in entries):
            return samples, [_given(source / file, number, entry["tok_input"]) for number, entry in enumerate(entries)]
        return samples, [ids for _, ids in encode(tokenizer, [sample.prompt for sample in samples])]

    weights = sorted(source.glob("*.safetensors"))
    return prepare_once(assets, [source / file, source / "tokenizer.json", source / SPLITTER], weights, make)


def _given(path: Path, number: int, tokens: Any) -> list[int]:
    vocabulary = CONFIG["vocab_size"]
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(f"{path}: entry {number}: 'tok_input' is no list of tokens")
    for token in tokens:
        if not isinstance(token, int) or not 0 <= token < vocabulary:
            raise ValueError(
                f"{path}: entry {number}: 'tok_input' has {token!r}, none of the model's {vocabulary} tokens"
            )
    return tokens


def open(name: str, assets: Path) -> Summaries:  # noqa: A001 - the protocol's name
    """The benchmark over what `prepare` left in `assets`; ValueError when that is not whole."""
    return Summaries(task(name, assets), assets, lambda: punkt(assets / "source" / SPLITTER))
