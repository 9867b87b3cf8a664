"""Small files of the formats that the summarising benchmarks read."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing


def byte_tokenizer(size: int, end: int, *, begin: int | None = None) -> Tokenizer:
    """One token a byte, and unused ones up to `size`; `end` is special, and so is `begin`, which opens every text."""
    alphabet = sorted(ByteLevel.alphabet())
    names = [*alphabet, *(f"unused{number}" for number in range(len(alphabet), size))]
    tokenizer = Tokenizer(BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    special = [end] if begin is None else [end, begin]
    tokenizer.add_special_tokens([AddedToken(names[number], special=True) for number in special])
    if begin is not None:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{names[begin]} $A", special_tokens=[(names[begin], begin)]
        )
    return tokenizer


def splitter_archive(path: Path, *, leave_out: str = "", collocations: str = "") -> None:
    """A punkt_tab.zip with a handful of abbreviations."""
    files = {
        "abbrev_types.txt": "dr\nmr\nst\np.m",
        "sent_starters.txt": "so\nbut",
        "collocations.tab": collocations or "st\tlouis\nmr\tx",
        "ortho_context.tab": "monday\t4\nhale\t4\nlouis\t4\nwhy\t2\nso\t46",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            if name != leave_out:
                archive.writestr(f"punkt_tab/english/{name}", text)


def write_articles(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """As the reference's preparation writes them."""
    path.write_text(json.dumps(entries, indent=4, ensure_ascii=False), encoding="utf-8")


def write_log(path: Path, responses: Sequence[tuple[int, bytes]]) -> Path:
    """A log as LoadGen writes it."""
    entries = [
        {"seq_id": number, "qsl_idx": index, "data": data.hex().upper(), "token_count": 0}
        for number, (index, data) in enumerate(responses)
    ]
    path.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n", encoding="utf-8")
    return path
