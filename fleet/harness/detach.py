"""A supervisor that outlives who started it: by the user's service manager where one will last, else by setsid."""

import os
import pwd
import subprocess
import uuid
from pathlib import Path

from fleet.harness import processes

_LINGER = Path("/var/lib/systemd/linger")
_TIMEOUT_S = 10.0


def supervisor(work: Path, session: Path) -> None:
    """Start a supervisor for the session in `session`, with its words in supervisor.log there.

    Raises OSError when it cannot be started.
    """
    command = [processes.python(), processes.entry(), "supervise", str(work), session.name]
    log = session / "supervisor.log"
    if _lasting_manager() and _by_manager(command, log):
        return
    with log.open("ab") as stream:
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True, close_fds=True, cwd="/",
        )  # fmt: skip


def _lasting_manager() -> bool:
    """Whether a service manager answers for this user and stays when the last login ends: without linger it goes."""
    try:
        if not (_LINGER / pwd.getpwuid(os.getuid()).pw_name).exists():
            return False
        # `degraded`, where any service of the user has failed, is as good; the exit status tells them apart, we do not.
        told = subprocess.run(
            ["systemctl", "--user", "is-system-running"],
            capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=_environment(),
        )  # fmt: skip
    except (OSError, KeyError, subprocess.SubprocessError):
        return False
    return told.stdout.strip() in {"running", "degraded"}


def _environment() -> dict[str, str]:
    """With the manager's address, which a non-interactive login may lack."""
    return {"XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}", **os.environ}


def _by_manager(command: list[str], log: Path) -> bool:
    environment = _environment()
    options = {
        "WorkingDirectory": "/",
        "StandardOutput": f"append:{log}",
        "StandardError": f"append:{log}",
        "KillMode": "control-group",
        # A unit that the kernel ends for memory is that unit's end alone.
        "OOMPolicy": "continue",
    }
    asked = ["systemd-run", "--user", "--quiet", "--collect", f"--unit=mlperf-fleet-{uuid.uuid4().hex[:12]}"]
    asked += [f"--property={name}={value}" for name, value in options.items()]
    # A plain child has our environment, so has the service. By name: values may be secrets, and ps shows arguments.
    asked += [f"--setenv={name}" for name in environment]
    try:
        done = subprocess.run(
            [*asked, "--", *command], capture_output=True, timeout=_TIMEOUT_S, check=False, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0
