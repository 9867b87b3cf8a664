"""gptj-99 and gptj-99.9: GPT-J-6B summarises the 13,368 validation articles of CNN/DailyMail 3.0.0.

`source/` holds cnn_eval.json, the checkpoint's files and NLTK's punkt_tab.zip. The articles are those that the MLPerf
reference's download_cnndm.py writes, for GPT-J or for Llama: both are the validation set in its own order, and only
GPT-J's has the words that ask for the summary. The checkpoint is Hugging Face's folder with safetensors or with torch's
shards, as MLCommons publishes it; `prepare` makes `model/` of it. Prompt, truncation and generation follow
language/gpt-j of mlcommons/inference at b66003e1.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from fleet.harness import convert
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
INSTRUCTION = "Summarize the following news article:"
PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
CONFIG: dict[str, Any] = {
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
"""The model's own; the checkpoint's config.json goes before it: MLCommons' has 50,401 tokens, one of them for padding
(vocab of get-ml-model-gptj/convert_gptj_ckpt.py, mlcommons/mlperf-automations at 20d3d94c)."""
_SIZES = ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size")
_ARTICLES, _CONFIG, _TOKENIZER = "cnn_eval.json", "config.json", "tokenizer.json"


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
        # GPT-2's tokens, with or without the 143 unused ones that fill them up to the model's 50,400, and [PAD].
        vocabularies=(50_400, 50_257, 50_401),
        config=read_config(assets / "source" / _CONFIG),
        model={
            "input_data_types": "int64",
            "weight_data_types": "fp32",
            "weight_transformations": "none",
            "retraining": "none",
            **weights_of(assets),
        },
        model_dir=assets / "model",
    )


def read_config(path: Path) -> dict[str, Any]:
    """CONFIG with what the checkpoint's own config.json in `path` says otherwise.

    Raises ValueError for a file that is not whole or of another model.
    """
    if not path.is_file():
        return dict(CONFIG)
    try:
        found: dict[str, Any] = CONFIG | json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a whole configuration, fetch it again: {error}") from error
    if found["model_type"] != "gptj" or not all(isinstance(found[size], int) for size in _SIZES):
        raise ValueError(f"{path}: not the configuration of a GPT-J: bring the checkpoint's own")
    return found


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of Hugging Face's GPTJForCausalLM."""
    width, words = config["n_embd"], config["vocab_size"]
    inner = config["n_inner"] or 4 * width
    found: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (words, width)}
    for layer in range(config["n_layer"]):
        prefix = f"transformer.h.{layer}"
        found |= {f"{prefix}.ln_1.weight": (width,), f"{prefix}.ln_1.bias": (width,)}
        found |= {f"{prefix}.attn.{part}_proj.weight": (width, width) for part in ("q", "k", "v", "out")}
        found |= {f"{prefix}.mlp.fc_in.weight": (inner, width), f"{prefix}.mlp.fc_in.bias": (inner,)}
        found |= {f"{prefix}.mlp.fc_out.weight": (width, inner), f"{prefix}.mlp.fc_out.bias": (width,)}
    found |= {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}
    return found | {"lm_head.weight": (words, width), "lm_head.bias": (words,)}


def _bring_model(assets: Path) -> list[Path]:
    """Make `model/` of the checkpoint in `source/`, if there is one; the files that hold its parameters."""
    source, model = assets / "source", assets / "model"
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; run `fleet provision`")
    model.mkdir(exist_ok=True)
    ready = sorted(source.glob("*.safetensors"))
    shards = [] if ready else convert.find_shards(source)
    config = read_config(source / _CONFIG)
    # Without torch there is no backend either that holds the model.
    if not shards or importlib.util.find_spec("torch"):
        convert.shards_to_safetensors(shards, model, shapes(config))
    pickles = {path.name for path in source.iterdir() if path.name.startswith("pytorch_model")}
    convert.link(source, model, pickles | {_ARTICLES, SPLITTER} | ({convert.INDEX} if shards else set()))
    if not (source / _TOKENIZER).is_file():
        _make_tokenizer(source, model / _TOKENIZER)
    return ready or shards


def _make_tokenizer(source: Path, target: Path) -> None:
    """tokenizer.json from vocab.json and merges.txt, as transformers makes a fast tokenizer of GPT-2's files.

    Of added_tokens.json it takes what the reference's tokenizer, EleutherAI's, has too: not the token for padding.
    """
    from tokenizers import AddedToken, ByteLevelBPETokenizer

    vocabulary, merges = source / "vocab.json", source / "merges.txt"
    target.unlink(missing_ok=True)
    if not (vocabulary.is_file() and merges.is_file()):
        return
    try:
        tokenizer = ByteLevelBPETokenizer.from_file(str(vocabulary), str(merges))
        told = json.loads((source / "added_tokens.json").read_text(encoding="utf-8"))
        added = sorted((int(number), str(text)) for text, number in told.items())
    except FileNotFoundError:
        added = []
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{vocabulary}, {merges.name}: not GPT-2's vocabulary, fetch it again: {error}") from error
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    size = tokenizer.get_vocab_size()
    for number, text in added:
        if number == size < CONFIG["vocab_size"]:
            tokenizer.add_tokens([AddedToken(text, normalized=False)])
            size += 1
    partial = target.with_name(f"{target.name}.partial")
    tokenizer.save(str(partial))
    partial.replace(target)


def prepare(name: str, assets: Path) -> dict[str, str]:
    """Make `model/` of the checkpoint and tokenise the articles into `assets`; nothing where that is done.

    Without a checkpoint the benchmark can be run on random weights. Returns file name to sha256. Raises ValueError,
    naming the file and the entry, for what is missing or damaged.
    """
    weights = _bring_model(assets)
    articles = assets / "source" / _ARTICLES

    def make() -> tuple[list[Summary], list[list[int]]]:
        tokenizer = read_tokenizer(task(name, assets))
        entries = read_articles(articles, SAMPLES, {"input": str, "output": str})
        # Llama's file has Llama's instruction and tokens.
        asked = [INSTRUCTION if "tok_input" in entry else entry.get("instruction") for entry in entries]
        if wrong := [number for number, text in enumerate(asked) if not isinstance(text, str)]:
            raise ValueError(f"{articles}: entry {wrong[0]}: 'instruction' is missing, or no text")
        prompts = [
            PROMPT.format(instruction=text, input=entry["input"]) for text, entry in zip(asked, entries, strict=True)
        ]
        encoded = list(encode(tokenizer, prompts, MAX_PROMPT))
        samples = [Summary(prompt, entry["output"]) for (prompt, _), entry in zip(encoded, entries, strict=True)]
        return samples, [ids for _, ids in encoded]

    tokenizer = assets / "model" / _TOKENIZER
    return prepare_once(assets, [articles, tokenizer, assets / "source" / SPLITTER], weights, make)


def open(name: str, assets: Path) -> Summaries:  # noqa: A001 - the protocol's name
    """The benchmark over what `prepare` left in `assets`; ValueError when that is not whole."""
    return Summaries(task(name, assets), assets, lambda: punkt(assets / "source" / SPLITTER))
