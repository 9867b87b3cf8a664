"""NVIDIA GPUs as NVML sees them, for describe.py; the GPU telemetry during a run is telemetry.py's.

Every question to NVML may fail by itself: a virtual GPU has no power limit, a consumer card no ECC.
"""

import dataclasses
import importlib
import threading
from collections.abc import Callable
from typing import Any

from fleet.harness import probes
from fleet.harness.contract import Accelerator

_TIMEOUT_S = 30.0
"""Eight GPUs without persistence mode take several seconds to wake up; a broken driver never answers."""

_CAUSES = {
    # NVML's return codes that have one well-known cause, to what the owner of the host should read.
    4: "this user may not open /dev/nvidiactl",
    9: "the NVIDIA kernel module is not loaded, or no GPU is attached (in a container: none was passed in)",
    12: "there is no NVIDIA driver: libnvidia-ml.so.1 was not found",
    13: "the NVIDIA driver is older than nvidia-ml-py expects: update the driver",
    15: "a GPU has fallen off the bus: the host needs a reboot",
    18: "Driver/library version mismatch: the driver was updated, and its kernel module not reloaded since: reboot",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """What NVML answered."""

    found: tuple[Accelerator, ...] = ()
    driver_version: str = ""
    cuda_version: str = ""
    """The newest CUDA the driver can run, `12.8`."""
    errors: dict[str, str] = dataclasses.field(default_factory=dict)
    """Probe name to why it could not answer, GPU by GPU."""


def read(nvml: Any = None, *, timeout_s: float = _TIMEOUT_S) -> Gpus:
    """All GPUs that the driver shows this process.

    nvml: a module like pynvml; without one, the installed one. Raises ProbeError when NVML cannot be used at all or
    does not answer within `timeout_s` seconds of wall time.
    """
    outcome: list[Gpus | Exception] = []

    def ask() -> None:
        try:
            outcome.append(_read(nvml or importlib.import_module("pynvml")))
        except ImportError:
            outcome.append(probes.ProbeError("nvidia-ml-py is not installed"))
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to the thread that waits
            outcome.append(error)

    # NVML has no timeouts of its own, and a thread is all that can be left behind in a driver that hangs.
    thread = threading.Thread(target=ask, name="nvml", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise probes.ProbeError(f"NVML did not answer within {timeout_s:g} s")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _read(nvml: Any) -> Gpus:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise probes.ProbeError(_cause(error)) from error
    try:
        errors: dict[str, str] = {}
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                found.append(_gpu(nvml, index, handle))
                _note_mig(nvml, index, handle, errors)
            except nvml.NVMLError as error:
                errors[f"accelerators[{index}]"] = _cause(error)
        cuda = _optional(nvml, nvml.nvmlSystemGetCudaDriverVersion)
        return Gpus(
            found=tuple(found),
            driver_version=_text(_optional(nvml, nvml.nvmlSystemGetDriverVersion)),
            cuda_version=probes.cuda_version(cuda) if cuda else "",
            errors=errors,
        )
    except nvml.NVMLError as error:
        raise probes.ProbeError(_cause(error)) from error
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int, handle: Any) -> Accelerator:
    """One GPU. Raises NVMLError when it lacks what makes it one: name, UUID and memory."""

    def maybe(question: Callable[..., Any], *arguments: Any) -> Any:
        return _optional(nvml, question, handle, *arguments)

    pci = maybe(nvml.nvmlDeviceGetPciInfo)
    # What is enforced counts, not what the card could do: an owner or a platform may have capped it.
    milliwatts = maybe(nvml.nvmlDeviceGetEnforcedPowerLimit)
    ecc = maybe(nvml.nvmlDeviceGetEccMode)
    return Accelerator(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        pci_bus_id=_text(pci.busId) if pci else "",
        max_sm_clock_mhz=maybe(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        max_memory_clock_mhz=maybe(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_MEM),
        power_limit_w=None if milliwatts is None else milliwatts / 1000,
        # The current link is slower while the GPU idles, so the link's maximum is asked.
        pcie_generation=maybe(nvml.nvmlDeviceGetMaxPcieLinkGeneration),
        pcie_width=maybe(nvml.nvmlDeviceGetMaxPcieLinkWidth),
        ecc=None if ecc is None else bool(ecc[0]),
    )


def _note_mig(nvml: Any, index: int, handle: Any, errors: dict[str, str]) -> None:
    """Say that a GPU is split: its facts are the whole card's, and a process can use only one slice."""
    mode = _optional(nvml, nvml.nvmlDeviceGetMigMode, handle)
    if mode and mode[0]:
        errors[f"mig[{index}]"] = "MIG is on: the facts are those of the whole GPU, a process gets one slice of it"


def _optional(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None: not supported, not permitted and not in this driver all mean `unknown`."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None


def _text(value: Any) -> str:
    """NVML's texts were bytes until nvidia-ml-py 11.5."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def _cause(error: Any) -> str:
    """An NVMLError in words for the host's owner."""
    return _CAUSES.get(getattr(error, "value", -1), f"NVML: {error}")
