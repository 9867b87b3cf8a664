"""BERT on an NVIDIA GPU: our kernels against torch's own steps, and each precision against float32.

python -m pytest tests/gpu
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from fleet.harness.backends import pytorch
from fleet.harness.interfaces import Features
from fleet.harness.models import cublaslt, kernels

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
CONFIG = {
    "vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 1024,
    "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    "initializer_range": 0.05,
}  # fmt: skip


class Small:
    generation = None
    model_dir = Path("/nowhere")
    config = CONFIG
    sample_count = 40

    def features(self, index: int) -> Features:
        chance = np.random.default_rng(index)
        length = int(chance.integers(5, 384))
        ids = chance.integers(0, 1000, length, dtype=np.int64)
        return Features(ids, (np.arange(length) >= 5).astype(np.int64))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=CUDA).to(dtype)


@pytest.mark.parametrize("width", [1024, 768, 96])
def test_norm(width: int) -> None:
    rows, weight, bias = drawn(1000, width), drawn(width), drawn(width)
    factor = torch.full((), 40.0, device=CUDA)
    wanted = F.layer_norm(rows.float(), (width,), weight.float(), bias.float(), 1e-12)
    normed, eighth = kernels.norm(rows, weight, bias, 1e-12, factor)
    assert error(normed, wanted) < 4e-3
    assert error(eighth.float() / 40, wanted) < 0.04


def test_embedding() -> None:
    ids = tuple(torch.randint(0, 2, (777,), device=CUDA) for _ in range(3))
    tables, weight, bias = tuple(drawn(2, 256) for _ in range(3)), drawn(256), drawn(256)
    total = sum(F.embedding(rows, table.float()) for rows, table in zip(ids, tables, strict=True))
    wanted = F.layer_norm(total, (256,), weight.float(), bias.float(), 1e-12)
    factor = torch.full((), 30.0, device=CUDA)
    normed, eighth = kernels.embed(ids, tables, weight, bias, 1e-12, factor=factor)
    assert error(normed, wanted) < 4e-3
    assert error(eighth.float() / 30, wanted) < 0.04


@pytest.mark.parametrize(("heads", "size"), [(16, 64), (4, 32), (2, 48)])
@pytest.mark.parametrize("lengths", [[1], [5, 64, 65, 128, 129], [384, 300, 17], [512]])
def test_attention(heads: int, size: int, lengths: list[int]) -> None:
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=CUDA)
    packed = drawn(sum(lengths), 3 * heads * size)
    found = kernels.attend(packed, starts, heads, max(lengths), None)
    at = 0
    for length in lengths:
        parts = packed[at : at + length].float().view(length, 3, heads, size).permute(1, 2, 0, 3)
        wanted = F.scaled_dot_product_attention(*parts).transpose(0, 1).reshape(length, heads * size)
        assert error(found[at : at + length], wanted) < 0.01
        at += length
    factor = torch.full((), 50.0, device=CUDA)
    eighth = kernels.attend(packed, starts, heads, max(lengths), factor)
    assert error(eighth.float() / 50, found) < 0.04


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 192, 5000])
def test_products(rows: int, gelu: bool) -> None:
    given, weight, bias, added = drawn(rows, 256), drawn(512, 256), drawn(512), drawn(rows, 512)
    wanted = F.linear(given.float(), weight.float(), bias.float())
    wanted = F.gelu(wanted, approximate="tanh") if gelu else wanted
    product = cublaslt.Product(weight, bias, gelu=gelu)
    assert error(product(given), wanted) < 4e-3
    if not gelu:
        assert error(product(given, added.clone()), wanted + added.float()) < 4e-3
    ones = torch.ones((), device=CUDA)
    eighth = cublaslt.Product(
        weight.to(torch.float8_e4m3fn), bias, gelu=gelu, scales=(ones, ones), result_scale=ones / 4
    )(given.to(torch.float8_e4m3fn))
    assert eighth.dtype is torch.float8_e4m3fn
    assert error(eighth.float() * 4, wanted) < 0.08


def logits(**options: Any) -> np.ndarray[Any, Any]:
    backend = pytorch.open(Small(), {"weights": "random", "device": "cuda", **options})  # type: ignore[arg-type]
    samples = [Small().features(at) for at in range(40)]
    together = np.concatenate(list(backend.predict(samples)))
    alone = np.concatenate([output for sample in samples for output in backend.predict([sample])])
    assert np.linalg.norm(alone - together) / np.linalg.norm(together) < 0.05
    return together


def test_each_precision_is_near_float32() -> None:
    exact = logits(dtype="float32")
    for dtype, bound in {"float16": 0.01, "bfloat16": 0.05, "float8": 0.25}.items():
        far = float(np.linalg.norm(logits(dtype=dtype) - exact) / np.linalg.norm(exact))
        print(f"{dtype}: relative error of logits {far:.4f}")
        assert far < bound, dtype


def test_too_little_memory_lowers_the_batch() -> None:
    backend = pytorch.open(Small(), {"weights": "random", "device": "cuda:0", "dtype": "bfloat16"})  # type: ignore[arg-type]
    samples = [Small().features(at) for at in range(40)]
    wanted = list(backend.predict(samples))
    real, calls = backend._compute, []  # type: ignore[attr-defined]

    def short(chunk: Any) -> Any:
        calls.append(len(chunk))
        if len(chunk) > 10:
            torch.empty(1 << 50, dtype=torch.uint8, device=CUDA)
        return real(chunk)

    backend._compute = short  # type: ignore[attr-defined]
    found = list(backend.predict(samples))
    assert min(calls) <= 10 < max(calls)
    assert all(np.allclose(a, b, atol=0.05) for a, b in zip(found, wanted, strict=True))


def test_the_last_gpu_of_a_host_gives_the_same_as_the_first() -> None:
    last = f"cuda:{torch.cuda.device_count() - 1}"
    assert np.allclose(logits(dtype="bfloat16", device=last), logits(dtype="bfloat16", device="cuda:0"), atol=0.05)
    both = logits(dtype="bfloat16", workers=max(2, torch.cuda.device_count()) if last != "cuda:0" else 1)
    assert np.allclose(both, logits(dtype="bfloat16"), atol=0.05)
