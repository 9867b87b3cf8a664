#!/usr/bin/python
"""Ansible module: everything preflight wants to know about a host, in one task that changes nothing.

One fat module, because a task costs a second on a busy host and this one runs before every stage. Called with its
options as JSON it is a plain script that needs no Ansible: so fleet asks a host over a connection of its own.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

DOCUMENTATION = """
module: fleet_preflight
short_description: See whether a host can run what the campaign asks
description:
  - Reads memory, disk, power source and what fleet installed earlier; changes nothing.
options:
  work_dir: {type: str, required: true, description: Folder that fleet keeps on the host.}
  needs:
    type: dict
    required: true
    description:
      - Benchmark name to disk_gib, memory_gib, model_gib, gpu_memory_gib and device (cpu, gpu or any), and for some
        backends driver, the oldest NVIDIA driver's major version, and module, the Python module that must load.
  spare_gib: {type: float, default: 0.25, description: Free GiB that must remain on a converged host.}
  on_battery: {type: str, default: warn, choices: [warn, stop, ignore], description: A laptop on battery.}
  conditions:
    type: dict
    default: {}
    description: battery, sleep and thermal to warn, stop or ignore; battery goes before on_battery.
  python_env_digest: {type: str, default: "", description: Fingerprint of the environment that is wanted.}
  harness_digest: {type: str, default: "", description: Fingerprint of the harness that is to describe the host.}
author: [mlperf-fleet]
"""

GIB = 2**30
CONDITIONS = {
    "battery": "on battery: {}plug the charger in",
    "sleep": "it has slept for {:.0f} min since its boot, and a unit would end there: turn suspend off",
    "thermal": "it slows down for its heat: let it cool",
}


def meminfo() -> dict[str, int]:
    """Bytes by /proc/meminfo's names."""
    found = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) * 1024
    return found


def gpus() -> list[dict[str, object]]:
    """Name, memory and driver of each NVIDIA GPU, as nvidia-smi says; none where it is not there or does not answer."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in told.splitlines():
        name, mib, driver = ([part.strip() for part in line.rsplit(",", 2)] + ["", ""])[:3]
        if mib.isdecimal():
            found.append({"name": name, "memory_bytes": int(mib) * 2**20, "driver": driver})
    return found


def shortage(need: dict, memory: int, cards: list, free: int | None) -> str:
    """Why a benchmark cannot run here, or nothing; `free` is None where what it needs on disk is there already."""
    if free is not None and free < float(need["disk_gib"]) * GIB:
        return f"{free / GIB:.2f} GiB free, {float(need['disk_gib']):g} GiB needed: free some space there"
    ram, model, card = (float(need.get(key, 0.0)) for key in ("memory_gib", "model_gib", "gpu_memory_gib"))
    if need.get("device") == "gpu" and not cards:
        return "no NVIDIA GPU answers here (nvidia-smi), and its backend needs one"
    if cards and (older := too_old(str(cards[0].get("driver", "")), int(need.get("driver", 0)))):
        return older
    if cards and need.get("device") != "cpu":
        smallest = min(cards, key=lambda found: found["memory_bytes"])
        if smallest["memory_bytes"] < card * GIB:
            return f"{smallest['name']} has {smallest['memory_bytes'] / GIB:.1f} GiB, {card:g} GiB needed"
    else:
        ram += model
    return f"{memory / GIB:.1f} GiB memory, {ram:g} GiB needed" if memory < ram * GIB else ""


def too_old(driver: str, wanted: int) -> str:
    """Why a driver such as `535.54.03` will not do where major version `wanted` is the oldest, or nothing."""
    major = driver.partition(".")[0]
    if not major.isdecimal() or int(major) >= wanted:
        return ""
    return f"the NVIDIA driver is {driver}, its backend needs {wanted} or newer: update the driver"


def missing(work_dir: Path, module: str) -> str:
    """Why a Python module does not load in the environment in use, or nothing."""
    command = [str(work_dir / "venv" / "bin" / "python"), "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"its package {module} cannot be tried: {error}"
    said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit {done.returncode}"]
    return f"its package {module} does not load here: {said[-1]}" if done.returncode else ""


def free_bytes(path: Path) -> int:
    """Bytes an ordinary user may still write where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def environment(work_dir: Path) -> str:
    """Name of the environment in use; nothing when its Python is gone or is another than this one."""
    try:
        config = (work_dir / "venv" / "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return ""
    whole = (work_dir / "venv" / "bin" / "python").exists() and f"version = {platform.python_version()}" in config
    return link_name(work_dir / "venv") if whole else ""


def busy(work_dir: Path) -> str:
    """The unit that runs here right now, by its folder; nothing when the host is free."""
    try:
        with (work_dir / "supervisor.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        try:
            return json.loads((work_dir / "supervisor.lock").read_text(encoding="utf-8"))["folder"]
        except (OSError, ValueError, KeyError, TypeError):
            return "a unit"
    except OSError:
        pass
    return ""


def link_name(path: Path) -> str:
    """The last part of a link's target, or nothing."""
    return path.readlink().name if path.is_symlink() and path.exists() else ""


def stamps(work_dir: Path) -> dict[str, object]:
    """What provision finished here earlier."""
    assets, weights = {}, {}
    for path in sorted(work_dir.glob("assets/*/.complete")):
        found = stamp(path.read_text(encoding="utf-8").strip())
        assets[path.parent.name] = found["digest"]
        if found.get("weights"):
            weights[path.parent.name] = found["weights"]
    return {
        "python_env": environment(work_dir),
        "harness": link_name(work_dir / "harness" / "current"),
        "assets": assets,
        "weights": weights,
    }


def stamp(text: str) -> dict[str, str]:
    """`digest` and, from JSON, `weights` of a `.complete`; older harnesses wrote the digest alone."""
    try:
        found = json.loads(text)
    except ValueError:
        return {"digest": text}
    return {"digest": text} if not isinstance(found, dict) else {"digest": "", **found}


def peek(path: Path) -> str:
    """A file's text, empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def on_battery(root: Path = Path("/")) -> bool:
    """Whether the machine runs on a battery of its own, as fleet.harness.probes has it; that is not here yet."""
    keys = ("type", "scope", "online", "status")
    folders = sorted((root / "sys/class/power_supply").glob("*"))
    supplies = [{key: peek(folder / key) for key in keys} for folder in folders]
    # A mouse's battery is a power supply too, with scope Device.
    system = [supply for supply in supplies if supply["scope"] != "Device"]
    batteries = [supply for supply in system if supply["type"] == "Battery"]
    mains = [supply for supply in system if supply["type"] in {"Mains", "USB"}]
    if not batteries or any(supply["online"] == "1" for supply in mains):
        return False
    return any(supply["status"] == "Discharging" for supply in batteries) or any(
        supply["type"] == "Mains" for supply in mains
    )


def throttle_count(root: Path = Path("/")) -> int:
    """How often the processors have slowed down for heat since the boot."""
    texts = map(peek, (root / "sys/devices/system/cpu").glob("cpu*/thermal_throttle/*_throttle_count"))
    return sum(int(text) for text in texts if text.isdecimal())


def is_hot(before: int, cards: list, root: Path = Path("/")) -> bool:
    """Whether processors have slowed down for heat since they had done so `before` times, or a GPU does now."""
    if throttle_count(root) > before:
        return True
    if not cards:
        return False
    wanted = "clocks_throttle_reasons.hw_thermal_slowdown,clocks_throttle_reasons.sw_thermal_slowdown"
    command = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    return any(word.strip() == "Active" for word in told.replace("\n", ",").split(","))


def conditions(before: int, cards: list, root: Path = Path("/")) -> dict[str, str]:
    """What would slow a run down or end it, in words, by its name: battery, sleep, thermal."""
    found = {}
    if on_battery(root):
        found["battery"] = CONDITIONS["battery"].format("results will be slower, ")
    # Suspended time counts in one of these clocks only.
    slept = time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    if slept > 60:  # noqa: PLR2004 - less was a clock, or a test of somebody's
        found["sleep"] = CONDITIONS["sleep"].format(slept / 60)
    if is_hot(before, cards, root):
        found["thermal"] = CONDITIONS["thermal"]
    return found


def description(work_dir: Path) -> str:
    """The harness's own description of the host, as JSON text; nothing when it cannot say."""
    command = [str(work_dir / "venv" / "bin" / "python"), str(work_dir / "harness" / "current"), "describe"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def writable(path: Path) -> bool:
    """Whether this user may make `path` or write in it."""
    while not path.exists():
        path = path.parent
    return os.access(path, os.W_OK | os.X_OK)


def converged(params: dict, done: dict[str, object]) -> bool:
    """Whether the environment that is wanted is there."""
    return bool(params["python_env_digest"]) and done["python_env"] == params["python_env_digest"]


def problems(work_dir: Path, free: int, params: dict, done: dict[str, object]) -> list[str]:
    """What stands in the way on this host, whatever the benchmark."""
    found = []
    if not writable(work_dir):
        found.append(f"{work_dir} cannot be written by {os.environ.get('USER') or os.getuid()}")
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        version = ".".join(platform.python_version_tuple()[:2])
        found.append(f"Python has no venv module (Debian, Ubuntu: sudo apt-get install python{version}-venv)")
    if free < params["spare_gib"] * GIB:
        wanted = f"{params['spare_gib']:g} GiB"
        found.append(f"{free / GIB:.2f} GiB free for {work_dir}, {wanted} needed: free some space there")
    if not converged(params, done) and (running := busy(work_dir)):
        found.append(f"{running} is still running here, and its environment would be replaced: wait for it")
    return found


def look(params: dict) -> dict[str, object]:
    """The module's answer; `msg` says what stands in the way, and is empty where nothing does."""
    throttled = throttle_count()
    work_dir = Path(params["work_dir"]).expanduser()
    memory = meminfo()
    free = free_bytes(work_dir)
    done = stamps(work_dir)
    cards = gpus()
    there = set(done["assets"]) if converged(params, done) else set()
    answers = {
        name: shortage(need, memory["MemTotal"], cards, None if name in there else free)
        for name, need in params["needs"].items()
    }
    # Where the environment is not there yet, installing it will say what it lacks.
    if converged(params, done):
        for name, need in params["needs"].items():
            answers[name] = answers[name] or (missing(work_dir, need["module"]) if need.get("module") else "")
    cannot = {name: reason for name, reason in answers.items() if reason}
    policy = {"battery": params["on_battery"], **(params.get("conditions") or {})}
    seen = conditions(throttled, cards)
    warnings = [text for name, text in seen.items() if policy.get(name, "warn") == "warn"]
    found = problems(work_dir, free, params, done)
    found += [text for name, text in seen.items() if policy.get(name, "warn") == "stop"]
    if cannot and len(cannot) == len(params["needs"]):
        found.extend(f"{name}: {reason}" for name, reason in cannot.items())
    facts = {
        "work_dir": str(work_dir),
        "free_bytes": free,
        "memory_bytes": memory["MemTotal"],
        "gpus": cards,
        "python": platform.python_version(),
        "cannot": cannot,
        "host_warnings": warnings,
        "stamps": done,
    }
    wanted = (params["python_env_digest"], params["harness_digest"])
    if params["harness_digest"] and (done["python_env"], done["harness"]) == wanted:
        # On a host that is ready already this is the only task, and a task costs more than what it does.
        facts["description"] = description(work_dir)
    return {**facts, "msg": "; ".join(found), "fleet_not_ready": bool(found)}


def main() -> None:
    """Module entry point."""
    from ansible.module_utils.basic import AnsibleModule

    module = AnsibleModule(
        argument_spec={
            "work_dir": {"type": "str", "required": True},
            "needs": {"type": "dict", "required": True},
            "spare_gib": {"type": "float", "default": 0.25},
            "on_battery": {"type": "str", "default": "warn", "choices": ["warn", "stop", "ignore"]},
            "conditions": {"type": "dict", "default": {}},
            "python_env_digest": {"type": "str", "default": ""},
            "harness_digest": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    facts = look(module.params)
    if facts["msg"]:
        module.fail_json(**facts)
    module.exit_json(changed=False, **facts)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.stdout.write(json.dumps(look(json.loads(sys.argv[1]))))
    else:
        main()
