"""The harness's own commands, called by Ansible and by the supervisor; all but `send` print one JSON object.

describe                                 probes → SystemFacts
selftest                                 can this environment run LoadGen
fetch WORK NAME < sources.json           bring weights and data of a benchmark to this host
prepare WORK NAME MODULE DIGEST          make of them what is run
start WORK < queue.json                  take units and let a supervisor run them
supervise WORK SESSION                   (internal) run a session's units, one after another
guard PID                                (internal) end what supervisor PID leaves behind
run FOLDER                               (internal) one unit, in this process
pack WORK SESSION UNIT                   size and sha256 of an ended unit's archive
send WORK SESSION UNIT OFFSET            the archive itself on stdout, without its first OFFSET bytes
push WORK SESSION UNIT < told.json       the archive into a bucket; the address there is a secret, hence stdin
home WORK SESSION UNIT…                  units that the controller has: they may be deleted some day
cancel WORK SESSION [UNIT…]              end units, or all of a session; their states
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
        "guard": ("pid",),
        "run": ("folder",),
        "pack": ("work", "session", "unit"),
        "send": ("work", "session", "unit", "offset"),
        "push": ("work", "session", "unit"),
        "home": ("work", "session", "units"),
        "cancel": ("work", "session", "units"),
    }.items():
        command = verbs.add_parser(verb)
        for name in names:
            command.add_argument(name, nargs="*" if name == "units" else None)
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
    from fleet.harness import processes

    # Before anything that takes its time.
    processes.end_with_supervisor()
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
    return _say_done(lambda: {"changed": fetch.bring(_work(given), given.name, wanted)})


def _prepare(given: argparse.Namespace) -> int:
    from fleet.harness import assets

    def prepare() -> dict[str, Any]:
        changed = assets.prepare(_work(given), given.name, given.module, given.digest)
        stamp = assets.read_stamp(_work(given) / "assets" / given.name / ".complete")
        return {"changed": changed, "weights_sha256": stamp.get("weights", "")}

    return _say_done(prepare)


def _say_done(do: Callable[[], dict[str, Any]]) -> int:
    """What came of it; the cause, without a traceback, where the files or the network are to blame."""
    try:
        return _say(do())
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _start(given: argparse.Namespace) -> int:
    from fleet.harness import unit_queue

    return _say(unit_queue.start(_work(given), json.load(sys.stdin)))


def _supervise(given: argparse.Namespace) -> int:
    from fleet.harness import supervise

    return supervise.supervise(_work(given), given.session)


def _pack(given: argparse.Namespace) -> int:
    from fleet.harness import packing

    os.nice(19)  # The next unit may be measuring.
    return _say(packing.pack(_work(given), given.session, given.unit))


def _send(given: argparse.Namespace) -> int:
    from fleet.harness import packing

    os.nice(19)
    packing.send(_work(given), given.session, given.unit, int(given.offset), sys.stdout.buffer)
    return 0


def _push(given: argparse.Namespace) -> int:
    from fleet.harness import push

    os.nice(19)
    told = json.load(sys.stdin)
    return _say_done(lambda: push.push(_work(given), given.session, given.unit, told))


def _home(given: argparse.Namespace) -> int:
    from fleet.harness import unit_queue

    return _say({"home": unit_queue.home(_work(given), given.session, given.units)})


def _cancel(given: argparse.Namespace) -> int:
    from fleet.harness import unit_queue

    return _say(unit_queue.cancel(_work(given), given.session, given.units))


def _guard(given: argparse.Namespace) -> int:
    from fleet.harness import processes

    processes.guard(int(given.pid))
    return 0


_VERBS = {
    "describe": _describe,
    "selftest": _selftest,
    "fetch": _fetch,
    "prepare": _prepare,
    "start": _start,
    "supervise": _supervise,
    "guard": _guard,
    "run": _run,
    "pack": _pack,
    "send": _send,
    "push": _push,
    "home": _home,
    "cancel": _cancel,
}


def _say(answer: object) -> int:
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
