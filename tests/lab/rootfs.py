"""The base root file system of the lab's hosts: Debian, built once with debootstrap and cached outside the tree."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from tests.lab import cgroups
from tests.lab.commands import readable_files

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

RELEASE = "bookworm"
PACKAGES = ("openssh-server", "python3", "python3-venv", "sudo", "procps", "iproute2", "ca-certificates", "tcc")
PYTHON = (3, 11)  # of RELEASE: wheels for the hosts are chosen by it
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_RECIPE = 1  # raise it when _polish changes, so that older caches are not used
_BUILD_SECONDS = 900

# program -> Debian package that brings it
_PROGRAMS = {
    "debootstrap": "debootstrap",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "mount": "mount",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}


def missing() -> str:
    """Why the lab cannot run here, or an empty text if it can."""
    if sys.platform != "linux":
        return "the lab needs Linux namespaces"
    if os.geteuid() != 0:
        return "the lab needs root: it makes network namespaces and mounts"
    packages = {package for program, package in _PROGRAMS.items() if not shutil.which(program)}
    if not KEYRING.exists():
        packages.add("debian-archive-keyring")
    if packages:
        return f"the lab needs: apt-get install {' '.join(sorted(packages))}"
    return cgroups.missing()


def cache_dir() -> Path:
    """Where the lab keeps what is dear to build, and the records of the labs that are up."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    path = Path(home) / "mlperf-fleet"
    path.mkdir(parents=True, exist_ok=True)
    return path


def base() -> Path:
    """The root file system, built if it is not in the cache yet (about a minute)."""
    key = "\n".join([RELEASE, platform.machine(), str(_RECIPE), *PACKAGES])
    return _built_once(f"lab-rootfs-{_digest([key.encode()])}", _debootstrap)


def wheelhouse(requirements: Iterable[Path]) -> Path:
    """A directory with the wheels that these requirement files ask for, as the hosts' Python needs them."""
    files = sorted(requirements)

    def download(target: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(target)]
        if sys.version_info[:2] != PYTHON:
            command += ["--only-binary=:all:", "--python-version", ".".join(map(str, PYTHON))]
        # pip judges markers by the Python it runs in; the hosts' may be another.
        lines = [line for file in files for line in _for_hosts(file.read_text(encoding="utf-8"))]
        (target / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        command += ["--requirement", str(target / "requirements.txt")]
        _checked(command, "pip download", _BUILD_SECONDS)

    digest = _digest([str(PYTHON).encode(), platform.machine().encode(), *(file.read_bytes() for file in files)])
    return _built_once(f"wheelhouse-{digest}", download)


def _for_hosts(text: str) -> Iterator[str]:
    """The requirements of a pinned file that hold for the hosts' Python, without their markers."""
    version = ".".join(map(str, PYTHON))
    environment = {"python_version": version, "python_full_version": f"{version}.0"}
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate(environment):
                yield f"{wanted.name}{wanted.specifier}"


def _digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time; the kernel lets go when the holder dies."""
    with (cache_dir() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _built_once(name: str, build: _Builder) -> Path:
    target = cache_dir() / name
    if target.is_dir():
        return target
    with locked(name):
        if target.is_dir():
            return target
        # Only the holder of the lock builds, so whatever lies here is what an interrupted build left.
        for abandoned in cache_dir().glob(f"{name}.partial-*"):
            shutil.rmtree(abandoned)
        partial = Path(tempfile.mkdtemp(prefix=f"{name}.partial-", dir=cache_dir()))
        partial.chmod(0o755)
        try:
            with readable_files():
                build(partial)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _debootstrap(target: Path) -> None:
    # Namespaces of its own: what debootstrap mounts and starts goes away with it even if it is killed.
    command = ["unshare", "--mount", "--pid", "--mount-proc", "--kill-child", "--fork"]
    command += ["debootstrap", "--variant=minbase", f"--keyring={KEYRING}", f"--include={','.join(PACKAGES)}"]
    command += [RELEASE, str(target), *_mirror()]
    _checked(command, "debootstrap", _BUILD_SECONDS)
    _polish(target)


def _mirror() -> list[str]:
    """The machine's own mirror of RELEASE; empty where it has none, then debootstrap takes its default."""
    if chosen := os.environ.get("LAB_DEBIAN_MIRROR"):
        return [chosen]
    wanted = "$(RELEASE) $(COMPONENT) $(SITE)"
    command = ["apt-get", "indextargets", "--format", wanted, "Created-By: Packages"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except FileNotFoundError:
        return []
    for line in found.splitlines():
        release, component, site = line.split(maxsplit=2)
        if release == RELEASE and component == "main":
            return [site]
    return []


def _polish(root: Path) -> None:
    """Remove what belongs to one machine, this one or a host: every host gets its own."""
    for key in (root / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    for path in ("etc/resolv.conf", "etc/hostname", "etc/machine-id", "var/lib/dbus/machine-id"):
        (root / path).unlink(missing_ok=True)
    (root / "etc/resolv.conf").touch()
    shutil.rmtree(root / "var/cache/apt", ignore_errors=True)
    shutil.rmtree(root / "var/lib/apt/lists", ignore_errors=True)
    (root / "etc/motd").write_text("")


def _checked(command: list[str], what: str, timeout: float) -> None:
    # It must not outlive this process: the next one would build while it still writes.
    command = ["setpriv", "--pdeathsig=KILL", *command]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise RuntimeError(f"{what} failed with status {done.returncode}:\n{tail}")


if TYPE_CHECKING:
    from collections.abc import Callable

    _Builder = Callable[[Path], None]
