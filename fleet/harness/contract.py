"""What controller and host say to each other: the run spec in, status and manifest out.

Standard library only, because both halves import it. Every file carries `schema`; readers refuse a newer one.
The controller validates what comes from a host with pydantic over these same classes.
"""

import contextlib
import dataclasses
import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Any

SCHEMA = 1
RANDOM_WEIGHTS = "random weights"
"""The label of a run without a checkpoint; never submitted."""
INSTANCE_TYPE = "instance_type"
"""What RunSpec.lock calls the EC2 instance type: the controller holds it, since only EC2 knows it for sure."""
SIMULATED = "simulated"
"""The label of the null backend, which computes nothing; never submitted."""


class Scenario(StrEnum):
    """LoadGen's scenarios, spelt as in LoadGen and in submission folders."""

    SINGLE_STREAM = "SingleStream"
    MULTI_STREAM = "MultiStream"
    SERVER = "Server"
    OFFLINE = "Offline"


class Mode(StrEnum):
    """What a unit measures; LoadGen's PerformanceOnly and AccuracyOnly."""

    PERFORMANCE = "performance"
    ACCURACY = "accuracy"


class Market(StrEnum):
    """How an instance was bought. A spot instance may be taken back, two minutes after it is told so."""

    NONE = ""
    """No EC2 instance."""
    ON_DEMAND = "on-demand"
    SPOT = "spot"
    UNKNOWN = "unknown"
    """An EC2 instance that fleet did not launch: it is asked itself."""


class UnitState(StrEnum):
    """Where a unit stands. The first three are on the way, the rest are ends."""

    PENDING = "pending"
    """Known to the controller, not yet on the host."""
    QUEUED = "queued"
    """On the host, waiting for its turn."""
    RUNNING = "running"
    DONE = "done"
    """LoadGen ended and the manifest is written; validity is a separate matter."""
    FAILED = "failed"
    TIMEOUT = "timeout"
    """Ran past its deadline and was stopped."""
    INTERRUPTED = "interrupted"
    """Cancelled, or its host was rebooted under it or taken back by EC2."""
    UNREACHABLE = "unreachable"
    """The controller lost the host; the unit may still run there."""
    NOT_READY = "not-ready"
    """Its host did not pass provision, so it was never started."""
    LEFT_OUT = "left-out"
    """Not asked for this time, by --limit or --exclude; it counts as missing all the same."""

    @property
    def ended(self) -> bool:
        """True when nothing more will happen to the unit by itself."""
        return self not in {UnitState.PENDING, UnitState.QUEUED, UnitState.RUNNING}


class Reason(StrEnum):
    """Why a unit ended otherwise than done and valid, for machines: what is done about it hangs on this."""

    NONE = ""
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    INTERRUPTED = "interrupted"
    """Its host was rebooted, something killed it, or EC2 takes its spot instance back."""
    CANCELLED = "cancelled"
    OUT_OF_MEMORY = "out-of-memory"
    INVALID_RESULT = "invalid-result"
    """LoadGen said INVALID."""
    CORRUPT_FILES = "corrupt-files"
    """What came home is not what the manifest names, or a log ends in the middle."""
    NO_SPACE = "no-space"
    MISSING_ASSET = "missing-asset"
    SUPERVISOR_DIED = "supervisor-died"
    HOST_KEY = "host-key"
    BUSY = "busy"
    """Something else holds the accelerator."""
    POWER = "power"
    """On battery, slept or throttled, and the campaign says stop."""
    LOCK_CHANGED = "lock-changed"
    """Code, packages, driver or weights are not those the unit was planned with."""
    OTHER = "other"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One unit to run: written by the controller, read by `python -m fleet.harness run`."""

    unit: str
    """`<host>.<benchmark>.<scenario>.<mode>`: unique in the session and the name of its folder on the host."""
    session: str
    host: str
    benchmark: str
    """Benchmark name, `tiny-bert`; picks the data file and the module in harness/benchmarks."""
    module: str
    """Module of harness/benchmarks that implements the benchmark, `tiny`."""
    loadgen_model: str
    """The model name LoadGen's embedded mlperf.conf knows, `bert`: a wrong one is silently accepted by LoadGen."""
    scenario: Scenario
    mode: Mode
    backend: str
    """Module of harness/backends."""
    backend_options: dict[str, Any]
    user_conf: str
    """The text of user.conf, LoadGen's grammar: `*.Scenario.key = value`."""
    sample_count: int
    """Samples in the QSL; the whole dataset unless `quick`."""
    performance_sample_count: int
    """Samples LoadGen may keep in memory for performance runs."""
    deadline_s: float
    """Wall seconds after which the supervisor stops the unit."""
    expected_s: float
    """Wall seconds the unit should take, for progress."""
    work_dir: str
    """The host's fleet folder, absolute or starting with ~: holds venv, assets/ and runs/."""
    round: str
    loadgen_version: str
    """The wheel the round needs: seeds are compiled in. The harness refuses another."""
    quick: bool
    """A short run that is not submittable."""
    labels: tuple[str, ...] = ()
    """What a reader must know beside any number: `demo model`, `random weights`, `simulated`."""
    latency_limit_ms: float | None = None
    """Server's limit on the 99th percentile, to tune under; None where the benchmark has none."""
    start: dict[str, float] = dataclasses.field(default_factory=dict)
    """LoadGen settings that an identical system came to: where tuning begins."""
    tune_only: bool = False
    """Find out what LoadGen must be told, write tuning.json, and run no test."""
    lock: dict[str, str] = dataclasses.field(default_factory=dict)
    """What must not change under a number, beside the campaign's part above: `fleet` (digest of the harness),
    `environment` (digest of the pinned packages), `python`, `wheel:<name>`, `driver`, `cuda`, `weights`, `instance_type`."""
    attempt: int = 1
    """Counts the times the unit was started; a further one starts over in a fresh folder."""
    conditions: dict[str, str] = dataclasses.field(default_factory=dict)
    """`battery`, `sleep`, `thermal` to `warn`, `stop` or `ignore`; `warn` where nothing is said."""
    instance: str = ""
    """The EC2 instance that it is started on; empty elsewhere."""
    market: Market = Market.NONE
    schema: int = SCHEMA


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UnitStatus:
    """A unit as the host sees it: `status.json`, rewritten by the supervisor about once a second."""

    unit: str
    state: UnitState
    cause: str = ""
    """Why it ended otherwise than done; one line for people."""
    reason: Reason = Reason.NONE
    """The same for machines."""
    conditions: dict[str, float] = dataclasses.field(default_factory=dict)
    """`battery`, `sleep`, `thermal` to the seconds that each was seen while the unit ran."""
    beat_uptime: float | None = None
    """Seconds since the host's boot at the last heartbeat: no set clock can shift it."""
    pid: int | None = None
    boot_id: str = ""
    started_at: float | None = None
    """Unix seconds by the host's clock, as are the other times."""
    heartbeat_at: float | None = None
    ended_at: float | None = None
    samples_done: int = 0
    expected_s: float = 0.0
    schema: int = SCHEMA


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorBeat:
    """`supervisor.json`: somebody on the host works on a session's queue, or waits for its turn to."""

    pid: int
    boot_id: str
    heartbeat_at: float
    beat_uptime: float | None = None
    """As in UnitStatus."""
    leaving: str = ""
    """Why this host is about to go away, as it was told; then nothing more is to be started on it."""
    schema: int = SCHEMA


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a unit's folder."""

    sha256: str
    size: int
    """Bytes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunManifest:
    """What a finished unit left behind: `manifest.json`, written last, by rename."""

    unit: str
    spec_sha256: str
    started_at: float
    finished_at: float
    loadgen_s: float
    """Wall seconds inside LoadGen's StartTest."""
    versions: dict[str, str]
    """python, fleet, mlcommons-loadgen and what the backend reports (torch, cuda, …)."""
    accuracy: dict[str, float]
    """Metric name to value for accuracy units, as in accuracy.txt; empty for performance units."""
    model: dict[str, str]
    """starting_weights_filename, weights_sha256, weight_data_types, input_data_types, weight_transformations, retraining."""
    labels: tuple[str, ...]
    peak_memory_bytes: int = 0
    """The most RAM that the unit's process held; 0 when nobody looked."""
    files: dict[str, FileEntry]
    """Path relative to the unit's folder, `/`-separated, to what it must be."""
    schema: int = SCHEMA


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One GPU as NVML sees it."""

    index: int
    name: str
    uuid: str
    memory_bytes: int
    pci_bus_id: str = ""
    max_sm_clock_mhz: int | None = None
    max_memory_clock_mhz: int | None = None
    power_limit_w: float | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    ecc: bool | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """One block device that holds data."""

    name: str
    bytes: int
    kind: str
    """`NVMe SSD`, `SSD`, `HDD` or `virtual`."""
    model: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NetworkInterface:
    """One network card; loopback and bridges are left out."""

    name: str
    speed_mbps: int | None
    driver: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SystemFacts:
    """What probes measured on a host; never what somebody believes. Unknown text is empty, unknown numbers None."""

    hostname: str
    machine_id: str
    boot_id: str
    os_name: str
    """PRETTY_NAME of os-release."""
    kernel: str
    architecture: str
    cpu_model: str
    cpu_sockets: int
    cpu_cores: int
    """Physical cores in all sockets."""
    cpu_threads: int
    """Logical processors this process may use."""
    cpu_max_mhz: float | None
    cpu_caches: dict[str, str]
    """`L1d`, `L1i`, `L2`, `L3` to lscpu's text."""
    memory_bytes: int
    memory_configuration: str
    """DIMM layout where it can be read without root, else empty."""
    disks: tuple[Disk, ...]
    network: tuple[NetworkInterface, ...]
    accelerators: tuple[Accelerator, ...]
    driver_version: str
    cuda_version: str
    virtualization: str
    """systemd-detect-virt's word, `none` on bare metal, empty when unknown."""
    on_battery: bool | None
    """None where there is no battery."""
    software: dict[str, str]
    """python and the harness's packages to versions."""
    probe_errors: dict[str, str]
    """Probe name to why it could not answer."""
    schema: int = SCHEMA

    @property
    def identity(self) -> str:
        """machine-id and GPU UUIDs: what makes a host itself, whatever it is called."""
        return ":".join([self.machine_id, *sorted(gpu.uuid for gpu in self.accelerators)])


def to_json(value: Any) -> str:
    """A contract value (or plain JSON data) as indented, key-sorted JSON text with a final newline."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return json.dumps(plain, indent=1, sort_keys=True) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a contract value (or plain JSON data) by rename, so that a reader never sees half a file."""
    text = to_json(value)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        # A full disk: what was begun would only fill it further. Ctrl-C: nobody would end it.
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def read_spec(path: Path) -> RunSpec:
    """The run spec in `path`.

    Raises ValueError when it was written by a newer fleet or lacks a field.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not a run spec of schema {SCHEMA}: run `fleet provision`")
    try:
        data["scenario"] = Scenario(data["scenario"])
        data["mode"] = Mode(data["mode"])
        data["market"] = Market(data.get("market", ""))
        data["labels"] = tuple(data["labels"])
        return RunSpec(**data)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error
