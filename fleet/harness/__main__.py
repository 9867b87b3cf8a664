"""The harness's own commands, called by Ansible and by the supervisor; each prints one JSON object on stdout.

    describe                                 probes → SystemFacts
    selftest                                 can this environment run LoadGen
    prepare WORK NAME MODULE DIGEST          weights and data of a benchmark
    start WORK < queue.json                  take units and let a supervisor run them
    supervise WORK SESSION                   (internal) run a session's units, one after another
    run FOLDER                               (internal) one unit, in this process
    pack WORK SESSION UNIT…                  one archive of finished units
    cancel WORK SESSION                      stop a session's units
"""

import argparse
import json
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0 or what the command says."""
    parser = argparse.ArgumentParser(prog="fleet.harness", description="The on-host half of mlperf-fleet.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, names in {
        "describe": (),
        "selftest": (),
        "prepare": ("work", "name", "module", "digest"),
        "start": ("work",),
        "supervise": ("work", "session"),
        "run": ("folder",),
        "pack": ("work", "session"),
        "cancel": ("work", "session"),
    }.items():
        command = verbs.add_parser(verb)
        for name in names:
            command.add_argument(name)
        if verb == "pack":
            command.add_argument("units", nargs="+")
    given = parser.parse_args(arguments)
    work = Path(getattr(given, "work", "")).expanduser()
    # Each verb imports its own module: `describe` and `pack` must not wait for numpy, LoadGen or torch.
    if given.verb == "describe":
        from fleet.harness import contract, describe

        sys.stdout.write(contract.to_json(describe.describe()))
        return 0
    if given.verb == "run":
        from fleet.harness import run

        return run.main(Path(given.folder))
    if given.verb == "selftest":
        from fleet.harness import loadgen

        return _say({"loadgen": loadgen.version()})
    if given.verb == "prepare":
        from fleet.harness import assets

        return _say({"changed": assets.prepare(work, given.name, given.module, given.digest)})
    from fleet.harness import supervise

    if given.verb == "start":
        return _say(supervise.start(work, json.load(sys.stdin)))
    if given.verb == "supervise":
        return supervise.supervise(work, given.session)
    if given.verb == "pack":
        return _say({"archive": str(supervise.pack(work, given.session, given.units))})
    return _say({"cancelled": supervise.cancel(work, given.session)})


def _say(answer: object) -> int:
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
