"""Out of RAM on a CPU, for real: a process that may take no more address space than it has, and a little."""

import contextlib
import io
import multiprocessing
import resource
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet.harness.interfaces import Features, Generation

torch = pytest.importorskip("torch")

from fleet.harness.backends import pytorch  # noqa: E402 - not before torch is known to be there

MIB = 2**20
VOCABULARY = 97
LONG = 20_000
"""Tokens of a single BERT sample: 5 MiB for each array of them."""
BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 256, "max_position_embeddings": LONG, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
}  # fmt: skip
GPTJ = {
    "model_type": "gptj", "vocab_size": VOCABULARY, "n_positions": 512, "n_embd": 256, "n_layer": 4, "n_head": 4,
    "rotary_dim": 16, "n_inner": None, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
}  # fmt: skip
GENERATION = Generation(beams=2, min_new_tokens=2, max_new_tokens=4, eos_token_ids=(0,), pad_token_id=0)


class Drawn:
    """As much of a benchmark as a backend with random weights needs."""

    sample_count = 0
    model_dir = Path("/nowhere")

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.generation = GENERATION if "model_type" in config else None


def samples(lengths: Sequence[int]) -> list[Features]:
    chance = np.random.default_rng(5)
    return [Features(chance.integers(1, VOCABULARY, each), np.zeros(each, dtype=np.int64)) for each in lengths]


def answers(
    config: dict[str, Any], options: dict[str, Any], lengths: Sequence[int], room: int | None
) -> tuple[list[Any], str]:
    """Outputs and what was printed, with at most `room` bytes of address space beyond what the opened model has."""
    backend = pytorch.open(Drawn(config), {"device": "cpu", "threads": 1, "weights": "random", **options})  # type: ignore[arg-type]
    list(backend.predict(samples([9])))  # what is loaded at the first use is not what is short
    if room is not None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, resource.RLIM_INFINITY))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        return [np.array(output) for output in backend.predict(samples(lengths))], printed.getvalue()


def limited(*arguments: Any) -> tuple[list[Any], str]:
    """`answers` in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(answers, *arguments).result()


def test_bert_goes_on_with_smaller_batches() -> None:
    given = (BERT, {"tokens": 20_000}, [200] * 100)  # 5 MiB for each [tokens, hidden], 20 in the middle of a layer
    expected, _ = answers(*given, None)
    found, printed = limited(*given, 40 * MIB)
    assert "out of memory with 20000 tokens at once: going on with 10000" in printed
    assert max(float(np.abs(one - other).max()) for one, other in zip(found, expected, strict=True)) < 1e-5


def test_bert_says_when_not_even_one_sample_fits() -> None:
    with pytest.raises(ValueError, match=f"out of memory on cpu with a single sample of {LONG} tokens"):
        limited(BERT, {}, [LONG], 8 * MIB)


def test_gptj_goes_on_with_smaller_batches() -> None:
    given = (GPTJ, {"batch_size": 32}, [200, 150, 180, 130] * 8)  # 1.7 MiB of cache a slot
    expected, _ = answers(*given, None)
    found, printed = limited(*given, 32 * MIB)
    assert "out of memory with 32 samples at once: going on with 16" in printed
    assert [list(one) for one in found] == [list(other) for other in expected]


def test_gptj_says_when_not_even_one_prompt_fits() -> None:
    cause = "out of memory with one prompt of 500 tokens and 2 beams; take a host with more memory, a smaller dtype"
    with pytest.raises(ValueError, match=cause):
        limited(GPTJ, {}, [500] * 2, 2 * MIB)
