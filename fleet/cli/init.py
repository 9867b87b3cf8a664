"""fleet init."""

import os
import pwd
import re
import socket
from importlib import resources
from pathlib import Path

import click

from fleet.cli import output
from fleet.errors import CampaignError, ExitCode


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), default=Path("fleet.yml"))
@click.option("--local", is_flag=True, help="A campaign for this machine alone.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def command(file: Path, local: bool, force: bool) -> ExitCode:
    """Write a commented campaign to start from (default: fleet.yml). Edit it, then: fleet check."""
    if file.exists() and not force:
        raise CampaignError(f"{file} exists already", hint=f"edit it, or: fleet init --force {file}")
    name = "local" if local else "example"
    text = resources.files("fleet.cli").joinpath("templates", f"{name}.yml").read_text(encoding="utf-8")
    text = text.replace("THIS_HOST", socket.gethostname().split(".")[0] or "this-machine")
    text = re.sub('( *)user: "YOUR_USER"', lambda found: found[1] + _user_line(), text)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
    output.say(f"wrote {file}")
    output.say(f"next:  {'fleet bench --quick' if local else f'edit {file}, then: fleet check'}")
    return ExitCode.OK


def _user_line() -> str:
    """Who logs in on the hosts: the user here, and nobody in particular where that is root, since no host needs it."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = "me"
    if name == "root":
        return "# user: me               # who logs in there; without it, whom ssh says"
    return f'user: "{name}"'
