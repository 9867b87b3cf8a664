"""The harness's own commands, called by Ansible and by the supervisor; each prints one JSON object on stdout.

describe                                 probes → SystemFacts
selftest                                 can this environment run LoadGen
fetch WORK NAME < sources.json           bring weights and data of a benchmark to this host
prepare WORK NAME MODULE DIGEST          make of them what is run
start WORK < queue.json                  take units and let a supervisor run them
supervise WORK SESSION                   (internal) run a session's units, one after another
run FOLDER                               (internal) one unit, in this process
pack WORK SESSION UNIT                   an archive of an ended unit
cancel WORK SESSION                      stop a session's units
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0 or what the command says."""
    parser = argparse.ArgumentParser(prog="fleet.harness", description="The on-host half of mlperf-fleet.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, names in {
        "describe": (),
        "selftest": (),
        "fetch": ("work", "name"),
        "prepare": ("work", "name", "module", "digest"),
        "start": ("work",),
        "supervise": ("work", "session"),
        "run": ("folder",),
        "pack": ("work", "session", "unit"),
        "cancel": ("work", "session"),
    }.items():
        command = verbs.add_parser(verb)
        for name in names:
            command.add_argument(name)
    given = parser.parse_args(arguments)
    return _VERBS[given.verb](given)


# Each verb imports its own module: `describe` and `pack` must not wait for numpy, LoadGen or torch.


def _work(given: argparse.Namespace) -> Path:
    return Path(given.work).expanduser()


def _describe(_: argparse.Namespace) -> int:
    from fleet.harness import contract, describe

    sys.stdout.write(contract.to_json(describe.describe()))
    return 0


def _run(given: argparse.Namespace) -> int:
    from fleet.harness import run

    code = run.main(Path(given.folder))
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is on disk. Taking the interpreter down beside LoadGen's and torch's threads now and then aborts.
    os._exit(code)


def _selftest(_: argparse.Namespace) -> int:
    from fleet.harness import loadgen

    return _say({"loadgen": loadgen.version()})


def _fetch(given: argparse.Namespace) -> int:
    from fleet.harness import fetch

    wanted = json.load(sys.stdin)
    return _say_changed(lambda: fetch.bring(_work(given), given.name, wanted))


def _prepare(given: argparse.Namespace) -> int:
    from fleet.harness import assets

    return _say_changed(lambda: assets.prepare(_work(given), given.name, given.module, given.digest))


def _say_changed(do: Callable[[], bool]) -> int:
    """What came of it; the cause, without a traceback, where the files or the network are to blame."""
    try:
        return _say({"changed": do()})
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _start(given: argparse.Namespace) -> int:
    from fleet.harness import supervise

    return _say(supervise.start(_work(given), json.load(sys.stdin)))


def _supervise(given: argparse.Namespace) -> int:
    from fleet.harness import supervise

    return supervise.supervise(_work(given), given.session)


def _pack(given: argparse.Namespace) -> int:
    from fleet.harness import supervise

    os.nice(19)  # The next unit may be measuring.
    return _say(supervise.pack(_work(given), given.session, given.unit))


def _cancel(given: argparse.Namespace) -> int:
    from fleet.harness import supervise

    return _say({"cancelled": supervise.cancel(_work(given), given.session)})


_VERBS = {
    "describe": _describe,
    "selftest": _selftest,
    "fetch": _fetch,
    "prepare": _prepare,
    "start": _start,
    "supervise": _supervise,
    "run": _run,
    "pack": _pack,
    "cancel": _cancel,
}


def _say(answer: object) -> int:
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
