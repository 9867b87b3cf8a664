"""What fleet itself costs: start-up, check, and a whole bench beyond LoadGen's own time, on three lab hosts.

    sudo make bench            or: python benchmarks/overhead.py [--repeat 3]

Prints medians with minimum and maximum in seconds. The bench figure is the wall time of `fleet bench` on a converged
fleet, minus the longest time any host spent inside LoadGen's StartTest, read from the manifests. The lab's hosts share
the controller's cores: on a fleet of real machines, each imports torch on its own.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.lab import rootfs  # noqa: E402
from tests.lab.hosts import Lab  # noqa: E402

FLEET = [sys.executable, "-m", "fleet"]


def report(name: str, seconds: list[float], bound: float) -> None:
    """One line: median (min to max) against the bound the project set itself."""
    middle = statistics.median(seconds)
    print(f"{name:48} {middle:6.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), bound {bound:g} s", flush=True)


def timed(lab: Lab | None, arguments: list[str], cwd: Path, *, allowed: tuple[int, ...] = (0,)) -> float:
    """Wall seconds of a fleet command that must end with one of `allowed`; 5 is a bench with nothing to submit."""
    started = time.perf_counter()
    if lab is None:
        subprocess.run([*FLEET, *arguments], cwd=cwd, check=True, capture_output=True)
    else:
        done = lab.run([*FLEET, *arguments], cwd=cwd, timeout=900)
        if done.returncode not in allowed:
            raise SystemExit(f"fleet {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - started


def loadgen_seconds(session: Path) -> float:
    """The longest sum of one host's StartTest times: hosts run side by side, units of a host one after another."""
    per_host: dict[str, float] = defaultdict(float)
    for path in session.glob("collect/*/*/manifest.json"):
        per_host[path.parent.parent.name] += json.loads(path.read_text(encoding="utf-8"))["loadgen_s"]
    return max(per_host.values())


def campaign(backend: str, modes: str) -> str:
    """inventories/lab.yml with one scenario."""
    text = (ROOT / "inventories/lab.yml").read_text(encoding="utf-8")
    text = text.replace("[SingleStream, Offline]", f"[Offline]\n    modes: [{modes}]")
    if backend == "null":
        text = "\n".join(line for line in text.splitlines() if "backend_options" not in line)
    return text.replace("backend: pytorch", f'backend: "{backend}"')


def beyond_loadgen(lab: Lab, folder: Path, backend: str, modes: str, repeat: int) -> None:
    """Bench one scenario a few times on a converged fleet, and report what is not LoadGen."""
    (folder / "fleet.yml").write_text(campaign(backend, modes), encoding="utf-8")
    timed(lab, ["provision"], folder)
    extra = []
    for number in range(repeat):
        name = f"{backend}-{len(modes)}-{number}"
        wall = timed(lab, ["bench", "--quick", "--session", name], folder, allowed=(0, 5))
        extra.append(wall - loadgen_seconds(folder / "sessions" / name))
    report(f"fleet bench beyond LoadGen, {backend}, {modes}", extra, 15)


@click.command()
@click.option("--repeat", default=3, show_default=True)
def main(repeat: int) -> None:
    """Measure, and print."""
    wheels = rootfs.wheelhouse([ROOT / "requirements/harness.txt", ROOT / "requirements/backend-pytorch.txt"])
    with tempfile.TemporaryDirectory() as name, Lab(3, mounts={wheels: "/opt/wheelhouse"}) as lab:
        folder = Path(name)
        (folder / "fleet.yml").write_text(campaign("pytorch", "performance"), encoding="utf-8")
        report("fleet --help", [timed(None, ["--help"], folder) for _ in range(repeat + 2)], 0.3)
        timed(lab, ["provision"], folder)
        report("fleet check, 3 hosts", [timed(lab, ["check"], folder) for _ in range(repeat)], 6)
        report("fleet provision, 3 hosts, converged", [timed(lab, ["provision"], folder) for _ in range(repeat)], 15)
        beyond_loadgen(lab, folder, "pytorch", "performance", repeat)
        beyond_loadgen(lab, folder, "pytorch", "accuracy, performance", repeat)
        beyond_loadgen(lab, folder, "null", "accuracy, performance", repeat)


if __name__ == "__main__":
    main()
