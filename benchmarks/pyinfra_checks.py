"""What fleet looks at on a converged host, as a deploy for pyinfra: the peer of benchmarks/scale.py, which runs it."""

import json
from pathlib import Path

from pyinfra import host
from pyinfra.api import FactBase
from pyinfra.facts import server
from pyinfra.operations import files

WANTED = json.loads(Path("wanted.json").read_text(encoding="utf-8"))
WORK_DIR = WANTED["work_dir"]


class Words(FactBase):  # type: ignore[misc]  # pyinfra lives in an environment of its own
    """What a shell command prints."""

    def command(self, command: str) -> str:
        """The command itself."""
        return command

    def process(self, output: list[str]) -> str:
        """Its lines as one text."""
        return "\n".join(output)


def words(command: str, *, needed: bool = True) -> str:
    found = str(host.get_fact(Words, command=command) or "")
    if needed and not found:
        raise ValueError(f"{command} printed nothing")
    return found


# fleet inventory: who is it, and which Python has it?
host.get_fact(server.Hostname)
host.get_fact(server.Home)
words("cat /etc/machine-id")
words("df -Pk $HOME /tmp")
words("python3 -c 'import sys, venv, ensurepip; print(sys.version)'")
# The module fleet_preflight.
words("cat /proc/meminfo")
words(f"df -Pk {WORK_DIR}")
words(f"test -w {WORK_DIR} && echo writable")
words(f"cat {WORK_DIR}/venv/pyvenv.cfg")
words(f"cat {WORK_DIR}/assets/*/.complete")
words(f"flock --nonblock --shared {WORK_DIR}/supervisor.lock true && echo free || true", needed=False)
words("nvidia-smi --query-gpu=name,memory.total --format=csv,noheader,nounits 2>/dev/null || true", needed=False)
words("grep -s . /sys/class/power_supply/*/type /sys/class/power_supply/*/status || true", needed=False)
# The roles python_env, harness and assets, which find nothing to do.
files.link(path=f"{WORK_DIR}/venv", target=WANTED["venv"])
files.link(path=f"{WORK_DIR}/harness/current", target=WANTED["harness"])
files.file(path=f"{WORK_DIR}/assets/tiny-bert/.complete")
# The role describe.
json.loads(words(f"{WORK_DIR}/venv/bin/python {WORK_DIR}/harness/current describe"))
