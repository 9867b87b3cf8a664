"""What many hosts cost the controller: converged provision beside pyinfra and bare ssh in the same run, and polling.

    python benchmarks/scale.py [--repeat 3] [--hosts 8 --hosts 24 --hosts 48]

Needs root, as the lab does, and installs pyinfra into a virtual environment of its own in the lab's cache. Medians, with
minimum and maximum; CPU is user and system time of the command and of every process it started; memory is the largest
sum of their proportional set sizes, from a run of its own. The hosts share the controller's cores: wall times are of
this lab, and more hosts take longer here than they would on machines of their own.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.lab import converged, rootfs  # noqa: E402
from tests.lab.cgroups import Cgroup  # noqa: E402
from tests.lab.hosts import Lab  # noqa: E402
from tests.lab.outing import FLEET, Fleet  # noqa: E402

PYINFRA = "3.10.0"
WATCHED_S = 40.0
"""Seconds over which polling is measured; shorter than a minute, after which hosts are asked less often."""
TICKS = os.sysconf("SC_CLK_TCK")
FRESH = ("provision", "--session")


@dataclass(frozen=True)
class Cost:
    """One command's cost to the controller."""

    wall: float
    cpu: float
    """User and system seconds."""
    memory: float = 0.0
    """MiB; 0 where it was not looked at."""


def cpu_seconds(pid: int) -> float:
    """What a process that runs has used, with children of its own that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS


def cpu_of_all(group: Cgroup) -> float:
    """The same for everything that runs at the controller's place."""
    total = 0.0
    for pid in group.pids():
        with suppress(OSError):
            total += cpu_seconds(pid)
    return total


def memory(group: Cgroup) -> float:
    """MiB of everything at the controller's place."""
    sizes: dict[str, int] = {}
    for pid in group.pids():
        with suppress(OSError, IndexError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
            # A child that has yet to exec still runs in its parent's memory, which counts once: same place, same size.
            place = text.partition("\n")[0]
            sizes[place] = max(sizes.get(place, 0), int(text.partition("\nPss:")[2].split()[0]))
    return sum(sizes.values()) / 1024


def cost(lab: Lab, command: Sequence[str | Path], cwd: Path, *, weighed: bool = False) -> Cost:
    """Run a command at the controller's place; what it leaves running counts too, and is ended."""
    group = Cgroup(f"{lab.name}/controller")
    before, begun, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as said:
        process = lab.popen(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        while weighed and process.poll() is None:
            peak = max(peak, memory(group))
            time.sleep(0.05)
        code = process.wait()
        wall = time.perf_counter() - begun
        said.seek(0)
        if code:
            raise SystemExit(f"{' '.join(map(str, command))} ended with {code}:\n{said.read()[-4000:]}")
    after, left = resource.getrusage(resource.RUSAGE_CHILDREN), cpu_of_all(group)
    group.kill()
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Cost(wall, used + left, peak)


def pyinfra() -> Path:
    """The program, installed on first use."""
    venv = rootfs.cache_dir() / f"pyinfra-{PYINFRA}"
    if not (venv / "bin" / "pyinfra").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        subprocess.run([str(venv / "bin" / "pip"), "install", "--quiet", f"pyinfra=={PYINFRA}"], check=True)
    return venv / "bin" / "pyinfra"


def write_peer(lab: Lab, folder: Path) -> None:
    """What pyinfra is given: an inventory, and what its deploy compares hosts with."""
    work_dir, data = f"/{converged.WORK_DIR}", {
        "ssh_user": lab.user,
        "ssh_key": str(lab.ssh_dir / "id_ed25519"),
        "ssh_config_file": str(lab.ssh_config),
        "ssh_known_hosts_file": str(lab.ssh_dir / "known_hosts"),
        "ssh_strict_host_key_checking": "yes",
    }  # fmt: skip
    links = {name: lab["h01"].sh(f"readlink {work_dir}/{path}").strip() for name, path in LINKS.items()}
    (folder / "wanted.json").write_text(json.dumps({"work_dir": work_dir, **links}), encoding="utf-8")
    (folder / "inventory.py").write_text(f"hosts = {[(name, data) for name in lab.hosts]!r}\n", encoding="utf-8")


LINKS = {"venv": "venv", "harness": "harness/current"}


def commands(lab: Lab) -> dict[str, Callable[[], list[str | Path]]]:
    """What is compared. fleet's is the whole verb: start-up, fleet inventory, looking at each host, readiness.json."""
    together = (
        "for host in $1; do ssh -F $2 -o BatchMode=yes $host true || echo $host >>failed & done; wait; [ ! -e failed ]"
    )
    return {
        "ssh host true, all at once": lambda: ["sh", "-c", together, "sh", " ".join(lab.hosts), lab.ssh_config],
        "fleet provision": lambda: [*FLEET, "provision", "--json"],
        "pyinfra": lambda: [pyinfra(), "-y", "inventory.py", ROOT / "benchmarks" / "pyinfra_checks.py"],
    }


def compare(lab: Lab, folder: Path, repeat: int) -> dict[str, list[Cost]]:
    """Each command `repeat` times, in turn, so that what else the machine does falls on all of them."""
    # Weighed first: what a command reads lies in memory from then on, for all of them alike.
    costs = {name: [cost(lab, command(), folder, weighed=True)] for name, command in commands(lab).items()}
    for _ in range(repeat):
        for name, command in commands(lab).items():
            costs[name].append(cost(lab, command(), folder))
    if list(folder.glob("sessions/*/plays")):
        raise SystemExit("a host was not converged: fleet provision has started Ansible")
    return costs


def spread(values: Sequence[float], digits: int) -> str:
    """Median (minimum to maximum)."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def show(costs: dict[str, list[Cost]], hosts: int) -> dict[str, tuple[float, float]]:
    """Print a table; medians of wall seconds and of CPU seconds per host, by command."""
    floor = statistics.median(item.wall for item in next(iter(costs.values()))[1:])
    medians = {}
    print(f"\n{hosts} hosts; load {os.getloadavg()[0]:.1f}")
    print(f"  {'':28} {'wall, s':24} {'times ssh':>9}  {'CPU s a host':26} {'MiB a host':>10}")
    for name, all_of in costs.items():
        weighed, *timed = all_of
        walls, cpus = [item.wall for item in timed], [item.cpu / hosts for item in timed]
        medians[name] = statistics.median(walls), statistics.median(cpus)
        print(
            f"  {name:28} {spread(walls, 2):24} {medians[name][0] / floor:9.1f}  {spread(cpus, 3):26}"
            f" {weighed.memory / hosts:10.1f}",
            flush=True,
        )
    return medians


def polling(lab: Lab, folder: Path, hosts: int) -> float:
    """Share of one core that `fleet run` takes while every host runs a unit."""
    entry = converged.null(latency_ms=200)
    entry[0]["user_conf"] = {"SingleStream": {"target_latency": 200}}
    fleet = Fleet(lab, folder, hosts=converged.entry(hosts), benchmarks=entry, run={"quick_seconds": 60 + 4 * hosts})
    cost(lab, [*FLEET, *FRESH, "polled"], folder)
    process = fleet.start("run", "--quick", "--session", "polled", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    units = folder / "sessions" / "polled" / "run" / "units"
    try:
        while sum('"running"' in path.read_text(encoding="utf-8") for path in units.glob("*.json")) < hosts:
            if process.poll() is not None:
                raise SystemExit(f"fleet run ended with {process.returncode} before every host ran a unit")
            time.sleep(0.5)
        group = Cgroup(f"{lab.name}/controller")
        before, begun = cpu_of_all(group), time.perf_counter()
        threading.Event().wait(WATCHED_S)
        share = (cpu_of_all(group) - before) / (time.perf_counter() - begun)
        if any('"running"' not in path.read_text(encoding="utf-8") for path in units.glob("*.json")):
            raise SystemExit("a unit ended while polling was measured")
    finally:
        process.terminate()
        process.wait(timeout=60)
    return share


def verdict(text: str, value: float, bound: float) -> None:
    """A bound of the project, and whether it was held."""
    print(f"  {text:64} {value:6.3f}, bound {bound:.3f}: {'held' if value <= bound else 'NOT HELD'}", flush=True)


@click.command()
@click.option("--repeat", default=3, show_default=True)
@click.option("--hosts", default=[8, 24, 48], multiple=True, show_default=True)
def main(repeat: int, hosts: tuple[int, ...]) -> None:
    """Measure, and print."""
    wheels = rootfs.wheelhouse([ROOT / "requirements/harness.txt"])
    medians: dict[int, dict[str, tuple[float, float]]] = {}
    share = 0.0
    with tempfile.TemporaryDirectory() as name:
        layer = converged.layer(wheels, Path(name), converged.null())
        for count in hosts:
            folder = Path(name) / str(count)
            folder.mkdir()
            with Lab(count, mounts={wheels: converged.WHEELHOUSE}, extra_layers=[layer]) as lab:
                Fleet(lab, folder, hosts=converged.entry(count), benchmarks=converged.null())
                write_peer(lab, folder)
                medians[count] = show(compare(lab, folder, repeat), count)
                if count == max(hosts):
                    share = polling(lab, folder, count)
    few, many = min(hosts), max(hosts)
    (wall, cpu), (peer, _) = medians[few]["fleet provision"], medians[few]["pyinfra"]
    more = medians[many]["fleet provision"][1]
    print("\nBounds")
    verdict(f"fleet provision, {few} converged hosts, wall over pyinfra's", wall / peer, 1.0)
    verdict(f"controller CPU s a host, {few} hosts", cpu, 0.30)
    if many > few:
        verdict(f"controller CPU a host, {many} hosts over {few}", more / cpu, 1.2)
        further = (more * many - cpu * few) / (many - few)
        print(f"  {'controller CPU s of each further host':64} {further:6.3f}")
    verdict(f"polling {many} hosts, share of one core", share, 0.05)


if __name__ == "__main__":
    main()
