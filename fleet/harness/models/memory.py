"""Memory that does not suffice, a GPU's or the host's: how PyTorch says so, and what can be given back."""

import contextlib
import ctypes

import torch

from fleet.harness import batching


def is_short(error: BaseException) -> bool:
    """Whether the cause was want of memory; on a CPU there is no class for it, only the allocator's words."""
    return isinstance(error, MemoryError) or batching.memory_is_short(str(error))


def release(device: torch.device) -> None:
    """Let go of what is kept for later but not in use, so that a smaller batch finds room in one piece."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)
