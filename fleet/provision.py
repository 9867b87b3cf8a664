"""Make hosts ready: environment, harness, assets, description. Its read-only half, `check`, changes nothing."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fleet import content, look, planning, preflight
from fleet.campaign import BenchmarkEntry, Campaign
from fleet.handoff import Readiness, ReadinessFile
from fleet.harness.contract import SystemFacts
from fleet.inventory import files, ssh_config
from fleet.inventory.hosts import Host, Reachability
from fleet.mlperf import rules
from fleet.plays import HostOutcome, PlayEvent, PlayRequest, Plays
from fleet.session import Session
from fleet.terms import HostState
from fleet.watch import Watch

PREFLIGHT, DESCRIBE, RESCUED = "Look at the host", "Describe the system", "Note what this host cannot run"
"""Task names whose results are read; tests/ansible holds the roles to them."""


def check(session: Session, campaign: Campaign, plays: Plays, watch: Watch) -> tuple[Readiness, ...]:
    """Whether each host could run the campaign; one answer per host, and nothing is changed anywhere."""
    watch.stage("check", "looking at every host")
    return _play(session, campaign, plays, watch, playbook="preflight")


def provision(session: Session, campaign: Campaign, plays: Plays, watch: Watch) -> tuple[Readiness, ...]:
    """Make each host ready and write readiness.json and facts/<host>.json; one answer per host."""
    watch.stage("provision", "Python environment, harness, assets, description")
    found = _play(session, campaign, plays, watch, playbook="provision")
    session.write(session.provision / "readiness.json", ReadinessFile(hosts=found))
    return found


def _play(session: Session, campaign: Campaign, plays: Plays, watch: Watch, *, playbook: str) -> tuple[Readiness, ...]:
    reachable = files.reachability(session)
    usable = [item for item in reachable if item.state is HostState.READY]
    hosts = {host.name: host for host in files.hosts(session)}
    given = variables(session, campaign, describe=playbook == "provision")
    outcomes = _look(campaign, usable, hosts, given, watch)
    if rest := [item.host for item in usable if item.host not in outcomes]:
        request = PlayRequest(
            playbook=playbook,
            inventory=session.inventory / "hosts.yml",
            hosts=rest,
            variables=given,
            folder=session.plays / playbook,
            ssh_arguments=ssh_config.ssh_arguments(),
        )
        outcomes.update(plays.run(request, lambda event: _tell(watch, event)))
    planner = planning.Planner(session, campaign, quick=False)
    found = tuple(
        replace(
            _readiness(session, campaign, item, outcomes.get(item.host)),
            expected_s={entry.name: planner.expected_s(hosts[item.host], entry) for entry in campaign.benchmarks},
        )
        for item in reachable
    )
    for item in found:
        watch.host(item.host, item.cause or "ready", ended=True)
    return found


def _look(
    campaign: Campaign, usable: list[Reachability], hosts: dict[str, Host], given: dict[str, Any], watch: Watch
) -> dict[str, HostOutcome]:
    """Outcomes of the hosts that need no play."""
    wanted = look.Wanted(
        python_env=given["python_env_digest"],
        harness=given.get("preflight_harness_digest"),
        assets={item["name"]: given["assets_digest"] for item in given["assets_benchmarks"]},
    )
    looked = []
    for item in usable:
        options = look.options({**campaign.role_variables, **given}, work_dir=files.work_dir(item, campaign))
        if options is not None:
            looked.append(look.Looked(host=hosts[item.host], python=item.python, options=options))
    return look.look(looked, wanted, PREFLIGHT, lambda host: watch.host(host, PREFLIGHT))


def _tell(watch: Watch, event: PlayEvent) -> None:
    if event.kind == "start" and not event.task.startswith("Validating arguments"):
        watch.host(event.host, event.task)


def variables(session: Session, campaign: Campaign, *, describe: bool) -> dict[str, Any]:
    """Extra variables of preflight.yml and provision.yml; `describe` where a description is wanted."""
    listed = [rules.load_benchmark(entry.name) for entry in campaign.benchmarks]
    texts = requirement_texts(entry.backend for entry in campaign.benchmarks)
    own = sorted(item for item in campaign.role_variables.items() if item[0].startswith("python_env_"))
    environment = _digest(json.dumps([texts, own], default=str).encode())
    archive, harness = harness_archive(session.provision)
    return {
        "preflight_needs": {
            entry.name: preflight.minima(rule, entry) for entry, rule in zip(campaign.benchmarks, listed, strict=True)
        },
        # Only what the campaign says itself: role variables and defaults are the role's business.
        "preflight_conditions": campaign.run.conditions.model_dump(exclude_unset=True),
        "preflight_python_env_digest": environment,
        # Not for `check`, which wants no description: a host is asked for it once.
        **({"preflight_harness_digest": harness} if describe else {}),
        "python_env_requirements": texts,
        "python_env_digest": environment,
        "harness_archive": str(archive.resolve()),
        "harness_digest": harness,
        "assets_benchmarks": [_assets(entry) for entry in campaign.benchmarks],
        "assets_digest": harness,
    }


def _assets(entry: BenchmarkEntry) -> dict[str, Any]:
    """What the assets role must know about a benchmark."""
    rule = rules.load_benchmark(entry.name)
    whole = preflight.needs_weights(entry)
    wanted = {name: source for name, source in rule.sources.items() if whole or not source.weights}
    sources = [{"file": name, **source.model_dump(mode="json", exclude={"weights"})} for name, source in wanted.items()]
    return {"name": rule.name, "module": rule.module, "sources": sources}


def requirement_texts(backends: Iterable[str]) -> list[str]:
    """Pinned requirements for the harness and each backend that has any."""
    names = ["harness", *sorted({f"backend-{backend}" for backend in backends})]
    paths = [content.requirements(name) for name in names]
    return [path.read_text(encoding="utf-8") for path in paths if path.is_file()]


def harness_archive(folder: Path) -> tuple[Path, str]:
    """The on-host half as a tar.gz in `folder`, the same bytes for the same code, and its fingerprint."""
    package = Path(__file__).resolve().parent
    sources = [package / "__init__.py", *sorted((package / "harness").rglob("*"))]
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        _add(archive, "__main__.py", b"import sys\n\nfrom fleet.harness.__main__ import main\n\nsys.exit(main())\n")
        for path in sources:
            if path.is_file() and "__pycache__" not in path.parts:
                _add(archive, path.relative_to(package.parent).as_posix(), path.read_bytes())
    digest = _digest(raw.getvalue())
    path = folder / f"harness-{digest}.tar.gz"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(gzip.compress(raw.getvalue(), compresslevel=6, mtime=0))
        partial.replace(path)
    return path, digest


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o644
    archive.addfile(entry, io.BytesIO(data))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _readiness(session: Session, campaign: Campaign, item: Reachability, outcome: HostOutcome | None) -> Readiness:
    found = Readiness(host=item.host, state=item.state, cause=item.cause, hint=item.hint)
    if outcome is None:
        return found
    looked = outcome.results.get(PREFLIGHT, {})
    cannot, warnings = looked.get("cannot"), looked.get("host_warnings")
    cannot = dict(cannot) if isinstance(cannot, dict) else {}
    if failed := _without_assets(outcome):
        cannot |= failed
        if outcome.state is HostState.READY and cannot.keys() >= {entry.name for entry in campaign.benchmarks}:
            causes = "; ".join(f"{name}: {cause}" for name, cause in failed.items())
            outcome = replace(outcome, state=HostState.FAILED, cause=causes)
    found = replace(
        found,
        state=outcome.state,
        cause=outcome.cause,
        hint=_hint(outcome, item.host),
        changed=outcome.changed,
        work_dir=str(looked.get("work_dir", "")),
        cannot={str(name): str(reason) for name, reason in cannot.items()},
        batches=_batches(campaign, looked),
        warnings=tuple(str(text) for text in (warnings if isinstance(warnings, list) else [])),
    )
    told = looked.get("description") or outcome.results.get(DESCRIBE, {}).get("stdout")
    return found if told is None else _keep_facts(session, found, str(told))


def _without_assets(outcome: HostOutcome) -> dict[str, str]:
    """The benchmarks whose weights or data could not be brought to the host, and why."""
    facts = outcome.results.get(RESCUED, {}).get("ansible_facts", {})
    told = facts.get("assets_failed") if isinstance(facts, dict) else None
    return {str(name): _last_line(str(said)) for name, said in told.items()} if isinstance(told, dict) else {}


def _last_line(text: str) -> str:
    return next(
        (line.strip()[:500] for line in reversed(text.splitlines()) if line.strip()), "failed, and does not say why"
    )


def _batches(campaign: Campaign, told: dict[str, Any]) -> dict[str, int]:
    """The benchmarks that would not get the batch they want on this host, and the one that fits."""
    memory, gpus = told.get("memory_bytes"), told.get("gpus")
    if not isinstance(memory, int) or not isinstance(gpus, list):
        return {}
    sizes = [int(gpu["memory_bytes"]) for gpu in gpus if isinstance(gpu, dict) and "memory_bytes" in gpu]
    found = {}
    for entry in campaign.benchmarks:
        rule = rules.load_benchmark(entry.name)
        fits = preflight.batch(rule, entry, memory_bytes=memory, gpus=sizes)
        wanted = int(entry.backend_options.get("batch_size", rule.needs.batch))
        if fits is not None and 0 < fits < wanted:
            found[entry.name] = fits
    return found


def _hint(outcome: HostOutcome, host: str) -> str:
    if outcome.state is HostState.READY:
        return ""
    if outcome.hint:
        return outcome.hint
    if "No space left" in outcome.cause:
        return f"free space on {host}, then: fleet provision"
    return "fleet provision" if outcome.state is HostState.FAILED else f"fix {host} as said, then: fleet check"


def _keep_facts(session: Session, found: Readiness, text: str) -> Readiness:
    try:
        facts = TypeAdapter(SystemFacts).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        cause = f"its description cannot be read: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        return replace(found, state=HostState.FAILED, cause=cause, hint="fleet provision")
    session.write(session.provision / "facts" / f"{found.host}.json", facts)
    return found
