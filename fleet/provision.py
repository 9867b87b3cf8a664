"""Make hosts ready: environment, harness, assets, description. Its read-only half, `check`, changes nothing."""

import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fleet import answers, content, handoff, look, planning, preflight
from fleet.campaign import BenchmarkEntry, Campaign
from fleet.errors import FleetError, PlayError
from fleet.handoff import Readiness, ReadinessFile
from fleet.harness.contract import INSTANCE_TYPE, SystemFacts
from fleet.inventory import files, ssh_config
from fleet.inventory.hosts import Instance, Reachability
from fleet.mlperf import rules
from fleet.plays import HostOutcome, PlayEvent, PlayRequest, Plays
from fleet.session import Session
from fleet.subset import EVERYTHING, Subset
from fleet.terms import HostState
from fleet.watch import Watch

PREFLIGHT, PREPARE, DESCRIBE = "Look at the host", "Prepare weights and data", "Describe the system"
RESCUED = "Note what this host cannot run"
"""Task names whose results are read; tests/ansible holds the roles to them."""
WEIGHTS = "weights"
"""Beside task names in an outcome's results: benchmark to the digest of the weights that were prepared."""


OnReady = Callable[[Readiness], None]
"""Told of each host once, as soon as it is final how it stands; called from several threads."""


def check(
    session: Session, campaign: Campaign, plays: Plays, watch: Watch, subset: Subset = EVERYTHING
) -> tuple[Readiness, ...]:
    """Whether each host could run the campaign; one answer per host, and nothing is changed anywhere."""
    watch.stage("check", "looking at every host")
    return _Stage(session, campaign, plays, watch, subset=subset, playbook="preflight").go()


def provision(
    session: Session,
    campaign: Campaign,
    plays: Plays,
    watch: Watch,
    *,
    subset: Subset = EVERYTHING,
    spared: Collection[str] = (),
    on_ready: OnReady = lambda _: None,
) -> tuple[Readiness, ...]:
    """Make each host ready and write readiness.json and facts/<host>.json; one answer per host.

    Hosts in `spared` are left as they were found earlier: this session's units run there.
    """
    watch.stage("provision", "Python environment, harness, assets, description")
    stage = _Stage(session, campaign, plays, watch, subset=subset, playbook="provision", spared=spared)
    return stage.go(on_ready)


class _Stage:
    """One look at every host, and a play for those that need one."""

    def __init__(
        self,
        session: Session,
        campaign: Campaign,
        plays: Plays,
        watch: Watch,
        *,
        subset: Subset,
        playbook: str,
        spared: Collection[str] = (),
    ) -> None:
        self._session, self._campaign, self._plays, self._watch = session, campaign, plays, watch
        self._playbook = playbook
        self._keeps = playbook == "provision"
        self._reachable = {item.host: item for item in files.reachability(session)}
        self._hosts = {host.name: host for host in files.hosts(session)}
        self._planner = planning.Planner(session, campaign, quick=False, ready={})
        self._given = variables(session, campaign, describe=self._keeps)
        self._earlier = {item.host: item for item in earlier(session)}
        self._left_out = {
            name: cause for name in self._reachable if (cause := subset.left_out(name) or self._hosts[name].finished)
        }
        self._spared = {name for name in spared if name in self._earlier and name not in self._left_out}
        self._found: dict[str, Readiness] = {}
        self._played: dict[str, HostOutcome] = {}
        self._lock = threading.Lock()
        self._on_ready: OnReady = lambda _: None

    def go(self, on_ready: OnReady = lambda _: None) -> tuple[Readiness, ...]:
        """Every host's answer, and each as soon as it is known."""
        self._on_ready = on_ready
        usable = []
        for name, item in self._reachable.items():
            if name in self._left_out:
                out = Readiness(host=name, state=HostState.LEFT_OUT, cause=self._left_out[name])
                # What is known of it stays known: only the answer of now says that nobody asked.
                self._settle(name, out, keep=name not in self._earlier)
            elif name in self._spared:
                self._settle(name, self._earlier[name])
            elif item.state is HostState.READY:
                usable.append(item)
            else:
                self._settle(name, self._readiness(item, None))
        rest = self._look(usable)
        if rest:
            self._play(rest)
        return tuple(self._found[name] for name in self._reachable)

    def _look(self, usable: list[Reachability]) -> list[str]:
        """Look at the hosts over the control channel; returns those that need a play."""
        given = self._given
        wanted = look.Wanted(
            python_env=given["python_env_digest"],
            harness=given.get("preflight_harness_digest"),
            assets={item["name"]: given["assets_digest"] for item in given["assets_benchmarks"]},
        )
        looked = []
        for item in usable:
            work_dir = files.work_dir(item, self._campaign)
            options = look.options({**self._campaign.role_variables, **given}, work_dir=work_dir)
            if options is not None:
                looked.append(look.Looked(host=self._hosts[item.host], python=item.python, options=options))
        found = look.look(looked, wanted, PREFLIGHT, lambda host: self._watch.host(host, PREFLIGHT), self._outcome)
        return [item.host for item in usable if item.host not in found]

    def _play(self, hosts: list[str]) -> None:
        request = PlayRequest(
            playbook=self._playbook,
            inventory=self._session.inventory / "hosts.yml",
            hosts=hosts,
            variables=self._given,
            folder=self._session.plays / self._playbook,
            ssh_arguments=ssh_config.ssh_arguments(),
        )
        self._played = {host: HostOutcome(host=host, state=HostState.READY) for host in hosts}
        try:
            outcomes = self._plays.run(request, self._event)
        except PlayError as error:
            if not any(item.state is HostState.READY for item in self._found.values()):
                raise
            # The others need not suffer for it.
            cause = error.message.strip().splitlines()[-1]
            outcomes = {
                host: HostOutcome(host=host, state=HostState.FAILED, cause=cause, hint=error.hint) for host in hosts
            }
        for host in hosts:
            if host not in self._found:
                self._outcome(outcomes[host])

    def _event(self, event: PlayEvent) -> None:
        """Follow a host through the play: the description is its last task, and then it need not wait for others."""
        if event.kind == "start" and not event.task.startswith("Validating arguments"):
            self._watch.host(event.host, event.task)
        outcome = self._played.get(event.host)
        if outcome is None:
            return
        if event.kind in {"ok", "changed"}:
            outcome.ok += 1
            outcome.changed += event.kind == "changed"
            outcome.results[event.task] = event.result
            if event.task == PREPARE:
                _note_weights(outcome, event.result)
        # It is skipped where the look at the host has brought a description already.
        if event.task == DESCRIBE and event.kind in {"ok", "changed", "skipped"} and self._keeps:
            self._outcome(outcome)

    def _outcome(self, outcome: HostOutcome) -> None:
        """A host has an outcome: that is final."""
        if (seen := self._played.get(outcome.host)) is not None:
            outcome.results.setdefault(WEIGHTS, {}).update(seen.results.get(WEIGHTS, {}))
        item = self._reachable[outcome.host]
        try:
            found = self._readiness(item, outcome)
        except (OSError, FleetError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever a host's words provoke, it ends no other host
            cause = answers.one_line(f"its answers cannot be used: {type(error).__name__}: {error}")
            found = self._readiness(item, HostOutcome(host=outcome.host, state=HostState.FAILED, cause=cause))
        self._settle(outcome.host, found)

    def _readiness(self, item: Reachability, outcome: HostOutcome | None) -> Readiness:
        host = self._hosts[item.host]
        return replace(
            _readiness(self._session, self._campaign, item, outcome, given=self._given, instance=host.instance),
            expected_s={entry.name: self._planner.expected_s(host, entry) for entry in self._campaign.benchmarks},
        )

    def _settle(self, name: str, found: Readiness, *, keep: bool = True) -> None:
        with self._lock:
            if not found.work_dir and name in self._earlier:
                # A host that is away keeps the place where its files lie: somebody will fetch them.
                found = replace(found, work_dir=self._earlier[name].work_dir)
            self._found[name] = found
            if keep:
                self._earlier[name] = found
            if self._keeps:
                # At once, not at the end: a controller that dies now has not provisioned for nothing.
                rows = tuple(self._earlier[name] for name in self._reachable if name in self._earlier)
                self._session.write(self._session.provision / "readiness.json", ReadinessFile(hosts=rows))
        self._watch.host(name, found.cause or "; ".join(["ready", *found.warnings]), ended=True)
        self._on_ready(found)


def earlier(session: Session) -> tuple[Readiness, ...]:
    """What an earlier provision left, if there was one."""
    return handoff.readiness(session) if (session.provision / "readiness.json").is_file() else ()


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


def _note_weights(outcome: HostOutcome, result: dict[str, Any]) -> None:
    """Keep what the harness said of the weights that it prepared."""
    try:
        told, command = json.loads(result["stdout"]), result["cmd"]
        name = str(command[command.index("prepare") + 2])
        outcome.results.setdefault(WEIGHTS, {})[name] = str(told["weights_sha256"])
    except (KeyError, TypeError, ValueError, IndexError, RecursionError):
        return


def _readiness(
    session: Session,
    campaign: Campaign,
    item: Reachability,
    outcome: HostOutcome | None,
    *,
    given: dict[str, Any],
    instance: Instance | None,
) -> Readiness:
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
        weights=_weights(looked, outcome.results.get(WEIGHTS, {})),
    )
    told = looked.get("description") or outcome.results.get(DESCRIBE, {}).get("stdout")
    if told is None:
        return found
    digests = {"fleet": given["harness_digest"], "environment": given["python_env_digest"]}
    if instance is not None and instance.type:
        digests[INSTANCE_TYPE] = instance.type
    return _keep_facts(session, found, str(told), digests, instance.id if instance else "")


def _weights(looked: dict[str, Any], prepared: dict[str, Any]) -> dict[str, str]:
    """Benchmark to the digest of its weights: those that lay there, and those that were prepared just now."""
    stamps = looked.get("stamps")
    there = stamps.get("weights") if isinstance(stamps, dict) else None
    found = {**(there if isinstance(there, dict) else {}), **prepared}
    return {str(name): str(digest) for name, digest in found.items() if digest}


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
    sizes = [gpu["memory_bytes"] for gpu in gpus if isinstance(gpu, dict) and isinstance(gpu.get("memory_bytes"), int)]
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


def _keep_facts(session: Session, found: Readiness, text: str, digests: dict[str, str], instance: str) -> Readiness:
    try:
        facts = TypeAdapter(SystemFacts).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        cause = f"its description cannot be read: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        return replace(found, state=HostState.FAILED, cause=cause, hint="fleet provision")
    session.write(session.provision / "facts" / f"{found.host}.json", facts)
    if instance:
        # Another may be the host later; a number stays one of the machine that it was measured on.
        session.write(handoff.facts_of(session, instance), facts)
    return replace(found, lock={**digests, **_measured(facts)}) if found.state is HostState.READY else found


def _measured(facts: SystemFacts) -> dict[str, str]:
    """What of a host's facts must not change under a number."""
    found = {f"wheel:{name}": version for name, version in facts.software.items() if name != "python"}
    found |= {"python": facts.software.get("python", ""), "driver": facts.driver_version, "cuda": facts.cuda_version}
    return {name: value for name, value in found.items() if value}
