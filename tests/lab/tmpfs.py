"""File systems in memory, of a size that can be changed while they are in use: a full disk without writing one."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_PATIENCE = 5.0


def mount(path: Path, size_mb: int | None) -> None:
    """Mount an empty one; without a size it may take half of this machine's memory."""
    limit = [] if size_mb is None else ["-o", f"size={size_mb}m"]
    subprocess.run(["mount", "-t", "tmpfs", *limit, "tmpfs", str(path)], check=True, timeout=30)


def fill(path: Path, *, spare_kb: int = 0) -> None:
    """Make it no larger than what it holds, and ``spare_kb``: the next write beyond finds no space."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        found = os.statvfs(path)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        # The kernel refuses to make it smaller than it is, and somebody may just be writing; no size is no limit.
        if _resize(path, f"{max(4096, used + spare_kb * 1024)}"):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} grows faster than it can be filled")


def resize(path: Path, size_mb: int | None) -> None:
    """Give it this size again; ``None`` is half of the memory."""
    if not _resize(path, "50%" if size_mb is None else f"{size_mb}m"):
        raise OSError(f"{path} cannot be made {size_mb} MiB large")


def _resize(path: Path, size: str) -> bool:
    command = ["mount", "-o", f"remount,size={size}", str(path)]
    return not subprocess.run(command, capture_output=True, timeout=30, check=False).returncode
