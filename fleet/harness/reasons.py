"""From how a unit ended to the reason that says what is done about it."""

import errno
import re
from pathlib import Path

from fleet.harness.contract import Reason

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_MEMORY_NAMES = {"OutOfMemoryError", "ResourceExhaustedError"}
_MEMORY_WORDS = re.compile(
    # Engines say it in words of their own, mostly from C++: TensorFlow, ONNX Runtime, cuBLAS, TensorRT, the kernel.
    r"out of memory|OOM when allocating|failed to allocate memory|CUBLAS_STATUS_ALLOC_FAILED|bad_alloc"
    r"|cannot allocate memory",
    re.IGNORECASE,
)
_ASSET_WORDS = re.compile(r"is missing|missing or broken|missing or damaged|bring the|fetch it again")


class UnitError(ValueError):
    """A unit cannot be measured, for a reason that is known where it is raised."""

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason


def no_space(error: BaseException) -> bool:
    """Whether a disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in _NO_SPACE


def of(error: BaseException, assets: Path | None = None) -> Reason:
    """The reason behind an exception or one that it came from; `assets` is the folder of weights and data."""
    link: BaseException | None = error
    while link is not None:
        if (found := _of_one(link, assets)) is not Reason.OTHER:
            return found
        link = link.__cause__ or link.__context__
    return Reason.OTHER


def _of_one(error: BaseException, assets: Path | None) -> Reason:
    text = str(error)
    if isinstance(error, UnitError):
        return error.reason
    if no_space(error) or "No space left on device" in text:
        return Reason.NO_SPACE
    if isinstance(error, MemoryError) or type(error).__name__ in _MEMORY_NAMES or _MEMORY_WORDS.search(text):
        return Reason.OUT_OF_MEMORY
    lacks = isinstance(error, FileNotFoundError) and assets is not None and str(error.filename).startswith(str(assets))
    if lacks or (isinstance(error, ValueError) and _ASSET_WORDS.search(text)):
        return Reason.MISSING_ASSET
    return Reason.OTHER


def oom_kills(root: Path = Path("/")) -> int:
    """How often the kernel has killed for memory in this process's control group; 0 where it does not count.

    Without a readable group, in the whole machine.
    """
    for path in [*_groups(root), root / "proc/vmstat"]:
        try:
            text = path.read_text(encoding="ascii")
        except OSError:
            continue
        if match := re.search(r"^oom_kill (\d+)$", text, re.MULTILINE):
            return int(match[1])
    return 0


def _groups(root: Path) -> list[Path]:
    """Files that count kills in this process's own memory group, by version 2 and 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        below = path.lstrip("/")
        if "memory" in controllers.split(","):
            # In a container with a namespace of its own the group is at the top of what is mounted.
            found += [root / "sys/fs/cgroup/memory" / below / "memory.oom_control"]
            found += [root / "sys/fs/cgroup/memory/memory.oom_control"]
        elif number == "0" and not controllers:
            found += [root / "sys/fs/cgroup" / below / "memory.events", root / "sys/fs/cgroup/memory.events"]
    return found
