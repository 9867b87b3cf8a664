"""BERT's steps between matrix products on NVIDIA GPUs, each one Triton kernel: embedding, norm, attention.

All take and give 16-bit floats; norm and attention also give float8 where they are told the factor that the next product
wants its rows multiplied with, so that no pass over memory only quantises. tests/gpu holds them to torch's own steps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634
_LONG = 300
"""From this longest sample on larger blocks attend faster (measured on an H200, samples of 90 to 384 tokens)."""


@triton.jit
def _store_normed(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0917
    value, weight, bias, result, eighth, factor, at, columns, eps, width: tl.constexpr, eight: tl.constexpr  # noqa: ANN001
):  # fmt: skip
    there = columns < width
    mean = tl.sum(value, 0) / width
    centred = tl.where(there, value - mean, 0.0)
    spread = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    normed = centred * spread * tl.load(weight + columns, mask=there, other=0.0).to(tl.float32)
    normed += tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(result + at, normed.to(result.dtype.element_ty), mask=there)
    if eight:
        scaled = tl.clamp(normed * tl.load(factor), -448.0, 448.0)
        tl.store(eighth + at, scaled.to(eighth.dtype.element_ty), mask=there)


@triton.jit
def _norm(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0917
    given, weight, bias, result, eighth, factor, eps,  # noqa: ANN001
    width: tl.constexpr, padded: tl.constexpr, eight: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, padded)
    there = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    value = tl.load(given + at, mask=there, other=0.0).to(tl.float32)
    _store_normed(value, weight, bias, result, eighth, factor, at, columns, eps, width, eight)


@triton.jit
def _embed(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0917
    ids, types, positions, words, type_words, position_words, weight, bias, result, eighth, factor, eps,  # noqa: ANN001
    width: tl.constexpr, padded: tl.constexpr, eight: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, padded)
    there = columns < width
    # In 64 bits: a large vocabulary times the width is more than 32 bits can count.
    word = tl.load(ids + row).to(tl.int64) * width + columns
    kind = tl.load(types + row).to(tl.int64) * width + columns
    position = tl.load(positions + row).to(tl.int64) * width + columns
    value = tl.load(words + word, mask=there, other=0.0).to(tl.float32)
    value += tl.load(type_words + kind, mask=there, other=0.0).to(tl.float32)
    value += tl.load(position_words + position, mask=there, other=0.0).to(tl.float32)
    at = row * width + columns
    _store_normed(value, weight, bias, result, eighth, factor, at, columns, eps, width, eight)


@triton.jit
def _step(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0917
    query, place, left, softmax_scale, best, total, found,  # noqa: ANN001
    width: tl.constexpr, size: tl.constexpr, padded: tl.constexpr, keys_at_once: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, padded)
    others = tl.arange(0, keys_at_once)
    offsets = others[:, None] * (3 * width) + columns[None, :]
    if masked or size < padded:
        inside = (others < left)[:, None] & (columns < size)[None, :]
        key = tl.load(place + offsets, mask=inside, other=0.0)
        value = tl.load(place + width + offsets, mask=inside, other=0.0)
    else:
        key = tl.load(place + offsets)
        value = tl.load(place + width + offsets)
    scores = tl.dot(query, tl.trans(key)) * softmax_scale
    if masked:
        scores += tl.where(others < left, 0.0, -1e30)[None, :]
    # Softmax as it goes along: what was found so far shrinks when a larger score turns up.
    new = tl.maximum(best, tl.max(scores, 1))
    chances = tl.exp2(scores - new[:, None])
    shrunk = tl.exp2(best - new)
    total = total * shrunk + tl.sum(chances, 1)
    return new, total, tl.dot(chances.to(value.dtype), value, found * shrunk[:, None])


@triton.jit
def _attend(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0917
    packed, starts, result, softmax_scale, factor,  # noqa: ANN001
    heads: tl.constexpr, size: tl.constexpr, padded: tl.constexpr, rows_at_once: tl.constexpr,
    keys_at_once: tl.constexpr, eight: tl.constexpr,
):  # fmt: skip
    block, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(starts + sample)
    length = tl.load(starts + sample + 1) - first
    if block * rows_at_once >= length:
        return
    width = heads * size
    columns = tl.arange(0, padded)
    inside = (columns < size)[None, :]
    rows = block * rows_at_once + tl.arange(0, rows_at_once)
    place = packed + (first + rows).to(tl.int64)[:, None] * (3 * width) + head * size + columns[None, :]
    query = tl.load(place, mask=(rows[:, None] < length) & inside, other=0.0)
    best = tl.full([rows_at_once], -1e30, dtype=tl.float32)
    total = tl.zeros([rows_at_once], dtype=tl.float32)
    found = tl.zeros([rows_at_once, padded], dtype=tl.float32)
    key_place = packed + first.to(tl.int64) * (3 * width) + width + head * size
    whole = length // keys_at_once * keys_at_once
    for at in range(0, whole, keys_at_once):
        best, total, found = _step(
            query, key_place + at * (3 * width), keys_at_once, softmax_scale, best, total, found,
            width, size, padded, keys_at_once, masked=False,
        )  # fmt: skip
    if whole < length:
        best, total, found = _step(
            query, key_place + whole * (3 * width), length - whole, softmax_scale, best, total, found,
            width, size, padded, keys_at_once, masked=True,
        )  # fmt: skip
    found = found / total[:, None]
    if eight:
        found = tl.clamp(found * tl.load(factor), -448.0, 448.0)
    out = result + (first + rows).to(tl.int64)[:, None] * width + head * size + columns[None, :]
    tl.store(out, found.to(result.dtype.element_ty), mask=(rows[:, None] < length) & inside)


def embed(
    ids: tuple[Tensor, Tensor, Tensor], tables: tuple[Tensor, Tensor, Tensor], weight: Tensor, bias: Tensor,
    eps: float, *, factor: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The norm of words, types and positions added up: [tokens, width] from ids [tokens] and tables [entries, width].

    And the same times `factor` in float8 where there is one.
    """
    width = tables[0].shape[1]
    result = torch.empty(len(ids[0]), width, dtype=tables[0].dtype, device=tables[0].device)
    eighth = result if factor is None else torch.empty_like(result, dtype=torch.float8_e4m3fn)
    _embed[(len(result),)](
        *ids, *tables, weight, bias, result, eighth, factor, eps, width, triton.next_power_of_2(width),
        factor is not None, num_warps=2,
    )  # fmt: skip
    return result, eighth


def norm(rows: Tensor, weight: Tensor, bias: Tensor, eps: float, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm of `rows` [tokens, width], and the same times `factor` in float8 where there is one."""
    width = rows.shape[1]
    result = torch.empty_like(rows)
    eighth = result if factor is None else torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    _norm[(len(rows),)](
        rows, weight, bias, result, eighth, factor, eps, width, triton.next_power_of_2(width), factor is not None,
        num_warps=2,
    )  # fmt: skip
    return result, eighth


def attend(packed: Tensor, starts: Tensor, heads: int, longest: int, factor: Tensor | None) -> Tensor:
    """Context [tokens, width] within each sample, of query, key and value side by side in `packed` [tokens, 3 x width].

    `starts` int32 [samples + 1] are each sample's first token, and the end; `longest` is at least the longest sample.
    Times `factor` in float8 where there is one.
    """
    width = packed.shape[1] // 3
    size = width // heads
    dtype = packed.dtype if factor is None else torch.float8_e4m3fn
    result = torch.empty(len(packed), width, dtype=dtype, device=packed.device)
    rows_at_once, stages = (128, 3) if longest >= _LONG and len(starts) > 2 else (64, 3)  # noqa: PLR2004 - a sample alone
    _attend[(triton.cdiv(longest, rows_at_once), heads, len(starts) - 1)](
        packed, starts, result, size**-0.5 * _LOG2_E, factor, heads, size, max(16, triton.next_power_of_2(size)),
        rows_at_once, rows_at_once, factor is not None, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return result
