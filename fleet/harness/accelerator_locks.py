"""One unit at a time on an accelerator, on the whole machine: whoever started it, from whatever folder.

A lock is a socket bound to a name in the kernel's abstract space. Any user can take it, it needs no file, and it is
free again when the last process that holds it is gone. Network namespaces have name spaces of their own: a container
with a network of its own is not seen.
"""

import contextlib
import errno
import re
import socket
import subprocess
from pathlib import Path

from fleet.harness.contract import RunSpec

CPU = "cpu"
_PREFIX = "mlperf-fleet/"


def names(spec: RunSpec, root: Path = Path("/")) -> list[str]:
    """What the unit computes on: UUIDs of all NVIDIA GPUs, or `cpu` where there are none or it does not want them."""
    device = str(spec.backend_options.get("device", ""))
    if device.lower().startswith(CPU) or spec.backend == "null":
        return [CPU]
    return gpus(root) or [CPU]


def gpus(root: Path = Path("/")) -> list[str]:
    """UUIDs of the machine's NVIDIA GPUs; none where there is no driver or nobody answers."""
    texts = []
    for path in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        with contextlib.suppress(OSError):
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    if not texts and (root / "dev/nvidiactl").exists():
        # A container may be given the devices without the driver's folder.
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
            texts.append(told.stdout)
    return sorted({uuid for text in texts for uuid in re.findall(r"GPU-[0-9a-f-]{36}", text)})


Lock = socket.socket


class BusyError(Exception):
    """Somebody else computes there; the text names the accelerator."""


def take(wanted: list[str]) -> list[Lock]:
    """Locks on all of `wanted`, or none and BusyError; hand their file numbers to the unit, and close them when it ended."""
    held: list[Lock] = []
    for name in wanted:
        lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        held.append(lock)
        try:
            lock.bind(f"\0{_PREFIX}{name}")
        except OSError as error:
            release(held)
            if error.errno != errno.EADDRINUSE:
                raise
            raise BusyError(name) from error
    return held


def release(held: list[Lock]) -> None:
    """Give locks back; a process that inherited one still holds it."""
    for lock in held:
        lock.close()
