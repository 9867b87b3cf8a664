"""What makes one host's disk its own: names, users, keys, written into its upper layer before it first boots."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

_UID = 1000

_SSHD_CONFIG = """\
HostKey /etc/ssh/ssh_host_ed25519_key
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM yes
UseDNS no
PrintMotd no
PrintLastLog no
AcceptEnv LANG LC_*
# A controller may come with all its connections at once, and they all come from one address.
MaxStartups 500
MaxSessions 500
Subsystem sftp /usr/lib/openssh/sftp-server
"""


def write(
    upper: Path, base: Path, *, hostname: str, hosts: dict[str, str], user: str, host_key: Path, public_key: str
) -> None:
    """Fill an empty upper layer. ``hosts`` maps every host of the lab to its address."""
    for directory in ("etc/ssh", "home", "root"):
        (upper / directory).mkdir(parents=True)
    (upper / "root").chmod(0o700)
    (upper / "etc/hostname").write_text(f"{hostname}\n")
    (upper / "etc/machine-id").write_text(f"{secrets.token_hex(16)}\n")
    lines = ["127.0.0.1 localhost", *(f"{address} {host}" for host, address in hosts.items())]
    (upper / "etc/hosts").write_text("\n".join(lines) + "\n")

    _append(upper, base, "etc/passwd", f"{user}:x:{_UID}:{_UID}::/home/{user}:/bin/bash")
    _append(upper, base, "etc/group", f"{user}:x:{_UID}:")
    # "*" is no password but not locked either: sshd refuses a locked ("!") account even with a key.
    _append(upper, base, "etc/shadow", f"{user}:*:19000:0:99999:7:::")
    os.chown(upper / "etc/shadow", 0, (base / "etc/shadow").stat().st_gid)
    (upper / "etc/shadow").chmod(0o640)
    shutil.copytree(base / "etc/skel", upper / "home" / user)
    _authorize(upper / "root", public_key, 0)
    _authorize(upper / "home" / user, public_key, _UID)

    (upper / "etc/ssh/sshd_config").write_text(_SSHD_CONFIG)
    shutil.copy(host_key, upper / "etc/ssh/ssh_host_ed25519_key")
    shutil.copy(host_key.with_suffix(".pub"), upper / "etc/ssh/ssh_host_ed25519_key.pub")


def _append(upper: Path, base: Path, path: str, line: str) -> None:
    (upper / path).write_text(f"{(base / path).read_text()}{line}\n")


def _authorize(home: Path, public_key: str, uid: int) -> None:
    ssh = home / ".ssh"
    ssh.mkdir(mode=0o700)
    (ssh / "authorized_keys").write_text(public_key)
    for path in (home, *home.rglob("*")):
        os.chown(path, uid, uid)


def smaller_meminfo(total_mb: int) -> str:
    """This machine's /proc/meminfo, as a machine with less memory would show it."""
    shown = {"MemTotal": total_mb, "MemFree": total_mb // 2, "MemAvailable": total_mb // 2}
    shown |= {"SwapTotal": 0, "SwapFree": 0}
    lines = []
    for line in Path("/proc/meminfo").read_text().splitlines():
        field = line.split(":")[0]
        lines.append(f"{field + ':':<16}{shown[field] * 1024:>8} kB" if field in shown else line)
    return "\n".join(lines) + "\n"
