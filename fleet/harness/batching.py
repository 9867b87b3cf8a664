"""What backends share that compute padded batches: the arrays of a batch, and what follows when memory is short."""

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fleet.harness.interfaces import Features, Options


def padded(
    samples: Sequence[Features],
    *,
    vocabulary: int,
    longest: int,
    rows: int = 0,
    length: int = 0,
    dtype: npt.DTypeLike = np.int64,
) -> npt.NDArray[np.signedinteger]:
    """input_ids, attention_mask and token_type_ids of `samples`, [3, rows, length], zeros where there is no token.

    As many rows as samples and as long as the longest of them, or `rows` and `length` where those are more. Raises
    ValueError for a sample of more than `longest` tokens and for ids that are none of `vocabulary`: a GPU would say
    nothing or something else.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    if max(lengths) > longest:
        raise ValueError(f"a sample of {max(lengths)} tokens, the model has {longest} positions")
    made = np.zeros((3, max(rows, len(samples)), max(length, *lengths)), dtype)
    ids, mask, types = made
    for row, (sample, count) in enumerate(zip(samples, lengths, strict=True)):
        ids[row, :count], mask[row, :count] = sample.input_ids, 1
        types[row, :count] = sample.token_type_ids
    if ids.min() < 0 or ids.max() >= vocabulary:
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise ValueError(f"token {wrong} is none of the model's {vocabulary}: vocabulary and weights do not match")
    return made


def memory_is_short(message: str) -> bool:
    """Whether an engine's message means that memory did not suffice: those that share no class say it by words alone."""
    said = message.lower()
    return "alloc" in said or "out of memory" in said or "outofmemory" in said


def halved(count: int, place: str, longest: int, cause: BaseException | None = None) -> int:
    """Half of `count` samples that did not fit into the memory of `place`; it is said on stdout.

    Raises ValueError, from `cause`, when it was one sample, of at most `longest` tokens.
    """
    if count == 1:
        raise ValueError(f"out of memory on {place} with one sample of {longest} tokens") from cause
    sys.stdout.write(f"out of memory with {count} samples at once: going on with {count // 2}\n")
    return count // 2


def whole(options: Options, name: str, default: int) -> int:
    """Option `name`, a whole number from 0 on; ValueError for anything else."""
    found = options.get(name, default)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ValueError(f"{name} {found!r}: a whole number")
    return found
