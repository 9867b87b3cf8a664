"""The user's ssh configuration, by asking ssh itself, so that Match, Include and ProxyJump work as they do by hand.

FLEET_SSH_CONFIG names another file than ~/.ssh/config; it reaches `ssh -G`, paramiko and Ansible alike.
"""

import fnmatch
import os
import pwd
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import paramiko

from fleet.errors import FleetError
from fleet.inventory.hosts import Host


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What `ssh -G` answers for one host."""

    hostname: str
    port: int
    user: str
    identity_files: tuple[str, ...]
    known_hosts: tuple[str, ...]
    host_key_alias: str
    proxy_command: str
    """Empty for a direct connection; ProxyJump arrives here as `ssh -W`."""
    connect_timeout: float
    identities_only: bool = False
    """Whether keys of an agent are left out."""


def config_file() -> Path:
    """The ssh config in force."""
    return Path(os.environ.get("FLEET_SSH_CONFIG") or home() / ".ssh" / "config")


def home() -> Path:
    """The user's home as ssh sees it: it asks the password database, not $HOME."""
    return Path(pwd.getpwuid(os.getuid()).pw_dir)


def _expanded(name: str) -> str:
    return str(home() / name[2:]) if name.startswith("~/") else name


def ssh_arguments() -> list[str]:
    """Arguments that make ssh read that config; none when it is ssh's own default."""
    return ["-F", os.environ["FLEET_SSH_CONFIG"]] if os.environ.get("FLEET_SSH_CONFIG") else []


def trust(host: Host) -> list[str]:
    """Options that make ssh accept the host key that was made for an instance and no other; none for other hosts."""
    given = host.instance
    return trust_in(given.known_hosts, given.key_alias) if given is not None and given.known_hosts else []


def trust_in(known_hosts: str, alias: str) -> list[str]:
    """Options that make ssh accept the host key that `known_hosts`, a path, has for `alias`, and no other."""
    options = {
        "UserKnownHostsFile": _word(known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlias": alias,
        "StrictHostKeyChecking": "yes",
        # Neither asked of DNS, nor learnt from the host: the key is known.
        "VerifyHostKeyDNS": "no",
        "UpdateHostKeys": "no",
        "IdentitiesOnly": "yes",
    }
    return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]


def _word(path: str) -> str:
    """A path as one word of ssh's configuration, in which % begins a token."""
    escaped = path.replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def resolve(host: Host) -> Target:
    """Ask `ssh -G` how it would connect to `host`.

    Raises FleetError when there is no ssh client or it refuses the configuration.
    """
    command = ["ssh", *ssh_arguments(), *trust(host), "-G"]
    command += ["-l", host.user] if host.user else []
    command += ["-p", str(host.port)] if host.port else []
    try:
        done = subprocess.run([*command, "--", host.address], capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError as error:
        raise FleetError("no ssh client on this machine", hint="install openssh-client") from error
    except subprocess.TimeoutExpired as error:
        raise FleetError(f"{host.name}: `ssh -G` did not answer in 10 s", hint=f"ssh -G {host.address}") from error
    if done.returncode:
        raise FleetError(f"{host.name}: {done.stderr.strip() or 'ssh -G failed'}", hint=f"ssh -G {host.address}")
    return parse(done.stdout, host)


def parse(text: str, host: Host) -> Target:
    """`ssh -G` output as a Target."""
    values: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        values.setdefault(key.lower(), []).append(value)

    def first(key: str, default: str = "") -> str:
        value = values.get(key, [default])[0]
        return "" if value.lower() == "none" else value

    jump = first("proxyjump")
    hostname, port = first("hostname", host.address), int(first("port", "22"))
    proxy = first("proxycommand").replace("%h", hostname).replace("%p", str(port)).replace("%r", first("user"))
    if jump:
        # The last hop of a chain is asked for; ssh walks the ones before it, and checks their host keys.
        *before, last = jump.split(",")
        through = ["-J", ",".join(before)] if before else []
        # As a URI, because only there may a port follow the name.
        last = last if last.startswith("ssh://") else f"ssh://{last}"
        proxy = shlex.join(
            ["ssh", *ssh_arguments(), "-o", "BatchMode=yes", *through, "-W", f"[{hostname}]:{port}", last]
        )
    timeout = first("connecttimeout")
    named = [*values.get("userknownhostsfile", []), *values.get("globalknownhostsfile", [])]
    known = [_expanded(name) for line in named for name in line.split()]
    alias = first("hostkeyalias")
    if host.instance is not None and host.instance.known_hosts:
        # As they are: ssh prints the paths of several files in one line, quotes none, and makes an alias lower case.
        known, alias = [host.instance.known_hosts], host.instance.key_alias
    files = (host.identity_file,) if host.identity_file else tuple(values.get("identityfile", []))
    return Target(
        hostname=hostname,
        port=port,
        user=first("user"),
        identity_files=tuple(_expanded(name) for name in files),
        known_hosts=tuple(known),
        host_key_alias=alias,
        proxy_command=proxy,
        connect_timeout=float(timeout) if timeout.isdigit() and int(timeout) else 10.0,
        identities_only=first("identitiesonly") == "yes",
    )


def aliases(pattern: str) -> list[str]:
    """Host aliases of the ssh config, its Include files too, that match `pattern` and hold no wildcard."""
    names: dict[str, None] = {}
    for path in _files(config_file(), depth=0):
        config = paramiko.SSHConfig()
        with path.open(encoding="utf-8", errors="replace") as stream:
            try:
                config.parse(line for line in stream if not line.strip().lower().startswith(("match", "include")))
            except paramiko.ssh_exception.ConfigParseError as error:
                raise FleetError(f"{path}: {error}", hint=f"edit {path}") from error
        for name in sorted(config.get_hostnames()):
            if not set(name) & set("*?!") and fnmatch.fnmatch(name, pattern):
                names[name] = None
    return list(names)


def _files(path: Path, *, depth: int) -> Iterator[Path]:
    """The config file and what it includes; OpenSSH stops at 16 levels, and so does this."""
    if not path.is_file() or depth > 16:  # noqa: PLR2004 - OpenSSH's own bound
        return
    yield path
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if include := re.fullmatch(r"\s*include(?:\s*=\s*|\s+)(.+)", line, flags=re.IGNORECASE):
            for name in shlex.split(include[1], comments=True):
                inside = Path(_expanded(name))
                inside = inside if inside.is_absolute() else home() / ".ssh" / inside
                for found in sorted(inside.parent.glob(inside.name)):
                    yield from _files(found, depth=depth + 1)
