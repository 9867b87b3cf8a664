"""gptj-99 and gptj-99.9: GPT-J-6B summarises the 13,368 validation articles of CNN/DailyMail 3.0.0.

The source folder holds cnn_eval.json as the MLPerf reference's download_cnndm.py writes it, the model folder's files
(tokenizer.json, *.safetensors) and NLTK's punkt_tab.zip. Prompt, truncation and generation follow language/gpt-j of
mlcommons/inference at b66003e1.
"""

from pathlib import Path

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

SAMPLES = 13_368
MAX_PROMPT = 1919
"""Tokens of a prompt, so that 128 new ones fit 2048 positions, and one to spare."""
END = 50_256
"""<|endoftext|>, which GPT-J also pads with."""
PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
CONFIG = {
    "architectures": ["GPTJForCausalLM"],
    "model_type": "gptj",
    "activation_function": "gelu_new",
    "attn_pdrop": 0.0,
    "bos_token_id": END,
    "embd_pdrop": 0.0,
    "eos_token_id": END,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "vocab_size": 50_400,
}


def task(name: str, assets: Path) -> Task:
    """The benchmark over the files in `assets`."""
    return Task(
        name=name,
        samples=SAMPLES,
        generation=Generation(
            beams=4,
            min_new_tokens=30,
            max_new_tokens=128,
            eos_token_ids=(END,),
            pad_token_id=END,
            early_stopping=True,
        ),
        dtype="<i8",
        # GPT-2's tokens, with or without the 143 unused ones that fill them up to the model's 50,400.
        vocabularies=(50_400, 50_257),
        config=CONFIG,
        model={
            "input_data_types": "int64",
            "weight_data_types": "fp32",
            "weight_transformations": "none",
            "retraining": "none",
            **weights_of(assets),
        },
        model_dir=assets / "source",
    )


def prepare(name: str, assets: Path) -> dict[str, str]:
    """Tokenise the articles into `assets`; nothing when that was done already.

    Returns file name to sha256. Raises ValueError, naming the file and the entry, for what is missing or damaged.
    """
    source = assets / "source"
    articles = source / "cnn_eval.json"

    def make() -> tuple[list[Summary], list[list[int]]]:
        tokenizer = read_tokenizer(task(name, assets))
        entries = read_articles(articles, SAMPLES, {"instruction": str, "input": str, "output": str})
        prompts = [PROMPT.format(instruction=entry["instruction"], input=entry["input"]) for entry in entries]
        encoded = list(encode(tokenizer, prompts, MAX_PROMPT))
        samples = [Summary(prompt, entry["output"]) for (prompt, _), entry in zip(encoded, entries, strict=True)]
        return samples, [ids for _, ids in encoded]

    return prepare_once(assets, [articles, source / "tokenizer.json", source / SPLITTER], make)


def open(name: str, assets: Path) -> Summaries:  # noqa: A001 - the protocol's name
    """The benchmark over what `prepare` left in `assets`; ValueError when that is not whole."""
    return Summaries(task(name, assets), assets, lambda: punkt(assets / "source" / SPLITTER))
