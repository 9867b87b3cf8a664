"""What fleet itself costs: start-up, check, and a whole bench beyond LoadGen's own time, on three lab hosts.

    sudo make bench            or: python benchmarks/overhead.py [--backend pytorch] [--repeat 3]

Prints medians with minimum and maximum in seconds. The bench figure is the wall time of `fleet bench` on a converged
fleet, for one scenario with its accuracy and its performance unit, minus the longest time any host spent inside
LoadGen's StartTest, read from the manifests.
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


def timed(lab: Lab | None, arguments: list[str], cwd: Path) -> float:
    """Wall seconds of a fleet command that must succeed."""
    started = time.perf_counter()
    if lab is None:
        subprocess.run([*FLEET, *arguments], cwd=cwd, check=True, capture_output=True)
    else:
        done = lab.run([*FLEET, *arguments], cwd=cwd, timeout=900)
        if done.returncode:
            raise SystemExit(f"fleet {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - started


def loadgen_seconds(session: Path) -> float:
    """The longest sum of one host's StartTest times: hosts run side by side, units of a host one after another."""
    per_host: dict[str, float] = defaultdict(float)
    for path in session.glob("collect/*/*/manifest.json"):
        per_host[path.parent.parent.name] += json.loads(path.read_text(encoding="utf-8"))["loadgen_s"]
    return max(per_host.values())


@click.command()
@click.option("--backend", type=click.Choice(["null", "pytorch"]), default="pytorch", show_default=True)
@click.option("--repeat", default=3, show_default=True)
def main(backend: str, repeat: int) -> None:
    """Measure, and print."""
    wheels = rootfs.wheelhouse([ROOT / "requirements/harness.txt", ROOT / "requirements/backend-pytorch.txt"])
    with tempfile.TemporaryDirectory() as name, Lab(3, mounts={wheels: "/opt/wheelhouse"}) as lab:
        folder = Path(name)
        text = (ROOT / "inventories/lab.yml").read_text(encoding="utf-8")
        text = text.replace("backend: pytorch", f'backend: "{backend}"')
        (folder / "fleet.yml").write_text(text.replace("[SingleStream, Offline]", "[Offline]"), encoding="utf-8")
        report("fleet --help", [timed(None, ["--help"], folder) for _ in range(repeat + 2)], 0.3)
        timed(lab, ["provision"], folder)
        report("fleet check, 3 hosts", [timed(lab, ["check"], folder) for _ in range(repeat)], 6)
        report("fleet provision, 3 hosts, converged", [timed(lab, ["provision"], folder) for _ in range(repeat)], 15)
        extra = []
        for number in range(repeat):
            wall = timed(lab, ["bench", "--quick", "--session", f"bench-{number}"], folder)
            extra.append(wall - loadgen_seconds(folder / "sessions" / f"bench-{number}"))
        report(f"fleet bench beyond LoadGen, 3 hosts, {backend}", extra, 15)


if __name__ == "__main__":
    main()
