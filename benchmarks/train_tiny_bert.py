"""Train the demo model of the tiny-bert benchmark."""

import json
import math
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from transformers import BertConfig, BertForQuestionAnswering

from fleet.harness.benchmarks import tiny

import re


def vocabulary() -> list[str]:
    """Word pieces in a fixed order: what the generator can write, plus single characters for everything else."""
    data = tiny.patterns()
    names = data["names"]
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    texts = [text for values in data["lists"].values() for text in values]
    texts += [number["text"] for number in data["numbers"].values()]
    for frame in data["frames"]:
        texts += frame["sentences"] + [question["ask"] for question in frame["questions"]]
    words = re.findall(r"[a-z]+", re.sub(r"\{\w*\}", " ", " ".join([*texts, "he she"]).lower()))
    heads = [o + v + c for o in names["onsets"] for v in names["vowels"] for c in names["codas"]]
    tails = names["middles"] + [ending for endings in names["endings"].values() for ending in endings]
    pairs = [f"{number:02d}" for number in range(100)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,?!'", *characters, *(f"##{c}" for c in characters)]
    pieces += [*sorted(set(words)), *heads, *(f"##{tail}" for tail in tails), *pairs, *(f"##{pair}" for pair in pairs)]
    return list(dict.fromkeys(pieces))


def make_tokenizer() -> Tokenizer:
    vocab = {piece: number for number, piece in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return tokenizer
