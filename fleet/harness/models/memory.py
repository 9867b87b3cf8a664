"""Memory that does not suffice, a GPU's or the host's: how PyTorch says so, and what can be given back."""

import contextlib
import ctypes

import torch

from fleet.harness import batching

ONEDNN = "could not create a primitive"
"""What oneDNN says where it finds no room for a product's code. Of a product that it does not have it says the same, but
models.linear.int8_works finds that out before."""


def is_short(error: BaseException) -> bool:
    """Whether the cause was want of memory; on a CPU there is no class for it, only the allocator's and oneDNN's words."""
    said = str(error)
    return isinstance(error, MemoryError) or batching.memory_is_short(said) or ONEDNN in said


def release(device: torch.device) -> None:
    """Let go of what is kept for later but not in use, so that a smaller batch finds room in one piece."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)
