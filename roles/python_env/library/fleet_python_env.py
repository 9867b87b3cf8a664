#!/usr/bin/python
"""Ansible module: a virtual environment from pinned requirements, complete or not there at all.

It is made in a folder named by its fingerprint, and `venv` is a link that moves once everything is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: fleet_python_env
short_description: A virtual environment from pinned requirements
description:
  - Makes work_dir/venvs/<digest> with pip and points work_dir/venv at it; older environments are removed.
options:
  work_dir: {type: str, required: true, description: Folder that fleet keeps on the host.}
  python: {type: str, default: "", description: Interpreter to make the environment with.}
  requirements: {type: list, elements: str, required: true, description: Texts of pinned requirement files.}
  digest: {type: str, required: true, description: Fingerprint that names the environment.}
  index_url: {type: str, default: "", description: Package index instead of pip's configured one.}
  extra_index_url: {type: str, default: "", description: A further package index.}
  find_links: {type: str, default: "", description: Folder on the host or page with wheels.}
  no_index: {type: bool, default: false, description: Take nothing from any index.}
  torch_index_url: {type: str, default: "", description: Index for torch alone.}
author: [mlperf-fleet]
"""


FULL_BYTES = 16 << 20


class InstallError(Exception):
    """pip or venv failed; the message is its last word."""


def command(arguments: list[str], environment: dict[str, str]) -> None:
    """Run, or raise InstallError with the line that says why."""
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        said = [line for line in lines if "No space left" in line] or [
            # Of a failure of its own pip says no more than that in such a line, and the reason in the last one.
            line
            for line in lines
            if line.startswith("ERROR") and line != "ERROR: Exception:"
        ]
        raise InstallError((said or lines or [f"exit {done.returncode}"])[-1])


def in_want_of_space(said: str, folder: Path) -> str:
    """What is to be said of a failure: pip stumbles over a full disk in many ways, and names it in few."""
    free = shutil.disk_usage(folder).free
    if "No space left" in said or free >= FULL_BYTES:
        return said
    return f"No space left on device: {free >> 20} MiB free in {folder}; {said}"


def pip_options(params: dict) -> list[str]:
    """Options that point pip at the campaign's indexes."""
    options = []
    for name in ("index_url", "extra_index_url", "find_links"):
        if params[name]:
            options += ["--" + name.replace("_", "-"), params[name]]
    return options + (["--no-index"] if params["no_index"] else [])


def install(folder: Path, params: dict) -> None:
    """Make the environment in `folder`."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    environment.pop("PYTHONPATH", None)
    # pip unpacks gigabytes there, and /tmp is often a small tmpfs.
    scratch = folder.parent.parent / "tmp"
    scratch.mkdir(exist_ok=True)
    environment["TMPDIR"] = str(scratch)
    command([params["python"] or sys.executable, "-m", "venv", str(folder)], environment)
    # Bytecode is written by the first import of what is really used; compiling all of torch takes longer than unpacking it.
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--no-compile", "--no-cache-dir"]
    wanted = folder / "requirements.txt"
    wanted.write_text("\n".join(params["requirements"]) + "\n", encoding="utf-8")
    if params["torch_index_url"]:
        torch = [line for text in params["requirements"] for line in text.splitlines() if line.startswith("torch==")]
        command([*pip, "--no-deps", "--index-url", params["torch_index_url"], *torch], environment)
    command([*pip, *pip_options(params), "-r", str(wanted)], environment)


def main() -> None:
    """Module entry point."""
    text = {"type": "str", "default": ""}
    module = AnsibleModule(
        argument_spec={
            "work_dir": {"type": "str", "required": True},
            "python": text,
            "requirements": {"type": "list", "elements": "str", "required": True},
            "digest": {"type": "str", "required": True},
            "index_url": text,
            "extra_index_url": text,
            "find_links": text,
            "no_index": {"type": "bool", "default": False},
            "torch_index_url": text,
        },
        supports_check_mode=True,
    )
    params = module.params
    work_dir = Path(params["work_dir"]).expanduser()
    link, folder = work_dir / "venv", work_dir / "venvs" / params["digest"]
    if module.check_mode:
        module.exit_json(changed=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        install(folder, params)
        partial = work_dir / "venv.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(folder)
        partial.replace(link)
        for old in folder.parent.iterdir():
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
    except (InstallError, OSError) as error:
        # Before anything is removed that would make room.
        said = in_want_of_space(str(error), work_dir)
        shutil.rmtree(folder, ignore_errors=True)
        module.fail_json(msg=said)
    module.exit_json(changed=True)


if __name__ == "__main__":
    main()
