"""What a lab host's processes see instead of hardware and of the past: its clock, its /sys, an old work folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Mapping, Sequence

    class Exec(Protocol):
        """Runs a command on the host as root; LabHost.exec."""

        def __call__(
            self,
            args: Sequence[str],
            *,
            check: bool,
            input: str,  # noqa: A002 - as in subprocess.run
        ) -> subprocess.CompletedProcess[str]: ...


_CLOCK = Path(__file__).with_name("clock.c")
_SHIFT, _LIBRARY, _ENVIRONMENT = "/etc/clock-shift", "/usr/local/lib/clock.so", "/etc/environment"
_SYS = "/run/sys"


def shift_clock(sh: Callable[[str], str], seconds: float) -> None:
    """See LabHost."""
    # By way of PAM, so that sshd itself, whose sandbox opens no files, is left alone. The libfaketime that Debian has
    # would do the same, were it not that under it Python cannot sleep while the time since boot is kept true.
    sh(
        f"printf '%d\\n' {round(seconds)} >{_SHIFT}.new; mv {_SHIFT}.new {_SHIFT}; "
        f"[ -e {_LIBRARY} ] || tcc -shared -nostdlib -o {_LIBRARY} -x c - <<'END'\n{_CLOCK.read_text()}\nEND\n"
        f"echo LD_PRELOAD={_LIBRARY} >{_ENVIRONMENT}"
    )


def right_clock(sh: Callable[[str], str]) -> None:
    """See LabHost. The library stays, for what still runs with it."""
    sh(f": >{_ENVIRONMENT}; rm -f {_SHIFT}")


def show(sh: Callable[[str], str], values: Mapping[str, str]) -> None:
    """See LabHost. An overlay over the whole of /sys: nothing can be made inside sysfs itself."""
    layers = f"lowerdir=/sys,upperdir={_SYS}/upper,workdir={_SYS}/work"
    make = f"mkdir -p {_SYS}/upper {_SYS}/work; mount -t overlay -o {layers} overlay /sys"
    script = [f"[ -d {_SYS} ] || {{ {make}; }}"]
    for name, value in values.items():
        path = shlex.quote(f"/sys/{name}")
        # Written beside and moved over: whoever reads it finds the one value or the other.
        script.append(
            f"mkdir -p $(dirname {path}); printf '%s\\n' {shlex.quote(value)} >/sys/.new; mv /sys/.new {path}"
        )
    sh("\n".join(script))


def show_nothing(sh: Callable[[str], str]) -> None:
    """See LabHost."""
    sh(f"if [ -d {_SYS} ]; then umount -l /sys; rm -rf {_SYS}; fi")


def battery(*, discharging: bool) -> dict[str, str]:
    """A laptop's power supplies, for LabHost.show."""
    base = "class/power_supply"
    return {
        f"{base}/AC/type": "Mains",
        f"{base}/AC/online": str(int(not discharging)),
        f"{base}/BAT0/type": "Battery",
        f"{base}/BAT0/scope": "System",
        f"{base}/BAT0/present": "1",
        f"{base}/BAT0/capacity": "71",
        f"{base}/BAT0/status": "Discharging" if discharging else "Charging",
    }


def heat(*, celsius: float, throttled: int = 0) -> dict[str, str]:
    """A processor's temperature, that slows down from 95 degrees on and did so this often; for LabHost.show."""
    zone, core = "class/thermal/thermal_zone0", "devices/system/cpu/cpu0/thermal_throttle"
    return {
        f"{zone}/type": "x86_pkg_temp",
        f"{zone}/temp": str(round(celsius * 1000)),
        f"{zone}/trip_point_0_type": "passive",
        f"{zone}/trip_point_0_temp": "95000",
        f"{core}/core_throttle_count": str(throttled),
        f"{core}/core_throttle_total_time_ms": str(100 * throttled),
        f"{core}/package_throttle_count": str(throttled),
        f"{core}/package_throttle_total_time_ms": str(100 * throttled),
    }


_LITTER = """\
import json, os, pwd, sys
folder, count, user = json.load(sys.stdin)
owner = pwd.getpwnam(user)
os.setgid(owner.pw_gid)
os.setuid(owner.pw_uid)
def touch(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as stream:
        stream.write("stale\\n")
    os.utime(path, (1e9, 1e9))
places = ("tmp/old-{0}.tar.gz", "tmp/old-{0}.partial", "harness/stale{1}/file{0}", "runs/old-{1}/unit-{2}/log-{0}.txt")
for number in range(count):
    touch(os.path.join(folder, places[number % len(places)].format(number, number // 1000, number // 100)))
"""


def litter(execute: Exec, folder: str, files: int, user: str) -> None:
    """See LabHost."""
    execute(["/usr/bin/python3", "-c", _LITTER], check=True, input=json.dumps([folder, files, user]))
