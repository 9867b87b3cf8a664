"""The command `fleet`: verbs in the order of use, each loaded when it is called."""

import importlib
import signal
import sys
from typing import Any

import click

from fleet import __version__
from fleet.errors import ExitCode, FleetError, Interrupted

VERBS = {
    "init": "Write a commented fleet.yml to start from.",
    "bench": "Do the whole job: all the stages below, in order.",
    "attach": "Go on with a session whose controller is gone.",
    "up": "Launch the campaign's EC2 instances, under a lease; --dry-run says what they can cost.",
    "inventory": "Stage 1: reach every host; write a plain Ansible inventory.",
    "check": "See whether each host could run the campaign; changes nothing.",
    "provision": "Stage 2: make hosts ready; a second time changes nothing.",
    "tune": "Find each host's targets by short probes, before a run.",
    "run": "Stage 3: run LoadGen on every host that is ready.",
    "status": "Who works on a session and where its units stand, from its folder alone.",
    "cancel": "Stop a session's units, of all hosts or of some.",
    "collect": "Stage 4: bring files home and verify them.",
    "results": "Stage 5: read LoadGen's logs into one table.",
    "submission": "Stage 6: build the submission; `submission check` says what would fail.",
    "report": "Stage 7: write the report, one HTML file.",
    "extend": "Let the session's EC2 instances live longer.",
    "down": "End the session's EC2 instances, and wait until they are gone.",
    "reap": "Find what outlived its lease in your AWS account, in all regions; --yes ends it.",
    "sessions": "List sessions, the newest first.",
    "schema": "Print the JSON Schema of fleet.yml, for your editor.",
}
"""Verb to help line. Kept here, so that `fleet --help` imports no stage."""


class Verbs(click.Group):
    """A group whose commands are imported when called: the whole of Ansible and pandas is behind some of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use, not of the alphabet."""
        del ctx
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command, from its module."""
        if cmd_name not in VERBS:
            return super().get_command(ctx, cmd_name)
        command: click.Command = importlib.import_module(f"fleet.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs, without importing them."""
        del ctx
        with formatter.section("Verbs, in the order of use"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fleet")
def cli() -> None:
    """MLPerf Inference on many machines with one command.

    \b
    fleet init                  write fleet.yml, then edit it
    fleet bench --quick         try everything in minutes (not submittable)
    fleet bench                 measure; ends with a submission and a report

    Data goes to stdout, everything else to stderr; --json makes the data JSON.
    Exit codes: 0 all done and valid, 1 error, 2 usage or configuration, 3 hosts or units are missing,
    4 a cloud instance may still be running, 5 INVALID results or findings, 130 interrupted.
    """  # noqa: D301 - click wants the character, not its name


def main() -> None:
    """Entry point: every error that is somebody's and not ours becomes a message and an exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = cli.main(standalone_mode=False)
    except FleetError as error:
        _say(f"fleet: {error.message}")
        if error.hint:
            _say(f"next:  {error.hint}")
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = ExitCode.USAGE if error.exit_code else ExitCode.OK
    except (KeyboardInterrupt, click.Abort) as error:
        # Click makes an Abort of it.
        cause = error.__cause__ if isinstance(error, click.Abort) else error
        if isinstance(cause, Interrupted):
            _say(f"fleet: interrupted; {cause.message}")
            _say(f"next:  {cause.hint}")
        else:
            _say("fleet: interrupted")
        code = ExitCode.INTERRUPTED
    except OSError as error:
        _say(f"fleet: {error.strerror or error}: {error.filename or 'the controller'}")
        _say("next:  look at permissions and free space there")
        code = ExitCode.ERROR
    sys.exit(int(code) if isinstance(code, int) else 0)


def _interrupt(number: int, frame: Any) -> None:
    del number, frame
    raise KeyboardInterrupt


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
