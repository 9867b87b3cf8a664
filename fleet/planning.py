"""What is to be done: every host by benchmark by scenario by mode, as specs that the harness understands."""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fleet import campaign as campaigns
from fleet import handoff
from fleet.campaign import BenchmarkEntry, Campaign
from fleet.handoff import Plan, Readiness
from fleet.harness.contract import RANDOM_WEIGHTS, SIMULATED, Market, Mode, RunSpec, Scenario
from fleet.inventory import files, static
from fleet.inventory.hosts import Host
from fleet.mlperf import expected, rules
from fleet.mlperf.rules import BenchmarkRule
from fleet.session import Session
from fleet.terms import HostKind

TUNING_S = 180.0
"""The most that a scenario's tuning may take."""
LOADING_S = 120.0
"""A unit's deadline leaves so long for its model to be loaded."""
BUILDING_S = {"tensorrt": 900.0}
"""And so long more with a backend that builds an engine on first use: killed in it, a unit would never get further."""


def plan(session: Session, campaign: Campaign, *, quick: bool) -> Plan:
    """Every unit of the campaign, in the order they will run, as if none had run before."""
    planner = Planner(session, campaign, quick=quick)
    return Plan(quick=quick, units=tuple(spec for host in files.hosts(session) for spec in planner.units(host)))


class Planner:
    """Makes specs from the campaign and from what earlier stages found out about each host."""

    def __init__(
        self, session: Session, campaign: Campaign, *, quick: bool, ready: Mapping[str, Readiness] | None = None
    ) -> None:
        """`ready` instead of what provision left: hosts about which nothing is known get specs without a lock."""
        self._session = session
        self._campaign = campaign
        self._quick = quick
        self._token = session.token
        self._tuned = handoff.tuned(session)
        if ready is not None:
            self._ready = dict(ready)

    def units(self, host: Host) -> list[RunSpec]:
        """Every unit of a host, in the order they will run."""
        return [
            self.spec(host, benchmark, scenario, mode)
            for benchmark in self._campaign.benchmarks
            for scenario, mode in itertools.product(benchmark.scenarios, benchmark.modes)
        ]

    def spec(self, host: Host, benchmark: BenchmarkEntry, scenario: Scenario, mode: Mode) -> RunSpec:
        """One unit."""
        rule, round_ = rules.load_benchmark(benchmark.name), rules.load_round(self._campaign.round)
        settings = self._settings(host, benchmark, scenario)
        seconds = self._seconds(rule, scenario, mode, settings)
        # A target that promises too much must not cut a unit short.
        slow = self._seconds(rule, scenario, mode, {key: settings[key] for key in settings if key == "min_duration"})
        ready = self._ready.get(host.name)
        return RunSpec(
            unit=f"{host.name}.{benchmark.name}.{scenario}.{mode}",
            session=self._token,
            host=host.name,
            benchmark=benchmark.name,
            module=rule.module,
            loadgen_model=rule.loadgen_model,
            scenario=scenario,
            mode=mode,
            backend=benchmark.backend,
            backend_options=_options(benchmark, ready),
            user_conf="".join(f"*.{scenario}.{key} = {value}\n" for key, value in sorted(settings.items())),
            sample_count=self._few(rule, rule.samples),
            performance_sample_count=self._few(rule, rule.performance_samples),
            deadline_s=self._deadline(max(seconds, slow), benchmark.backend),
            expected_s=seconds,
            work_dir=(ready.work_dir if ready else "") or self._campaign.work_dir,
            round=self._campaign.round,
            loadgen_version=round_.loadgen,
            quick=self._quick,
            labels=_labels(rule, benchmark),
            latency_limit_ms=settings.get("target_latency", rule.server_latency_ms)
            if scenario is Scenario.SERVER
            else None,
            start=self.start(host.name, benchmark.name, scenario),
            lock=_lock(benchmark, ready),
            conditions=self._campaign.run.conditions.model_dump(),
            instance=host.instance.id if host.instance else "",
            market=_market(host),
        )

    def tuning(self, host: Host, benchmark: BenchmarkEntry, scenario: Scenario) -> RunSpec:
        """A unit that only finds out what LoadGen must be told."""
        spec = self.spec(host, benchmark, scenario, Mode.PERFORMANCE)
        return replace(
            spec,
            unit=f"{host.name}.{benchmark.name}.{scenario}.tuning",
            session=f"{self._token}-tune",
            tune_only=True,
            expected_s=TUNING_S,
            deadline_s=self._deadline(TUNING_S, benchmark.backend),
        )

    def _deadline(self, seconds: float, backend: str) -> float:
        return seconds * self._campaign.run.deadline_factor + LOADING_S + BUILDING_S.get(backend, 0.0)

    def start(self, host: str, benchmark: str, scenario: Scenario) -> dict[str, float]:
        """What another host of the same kind of system came to; empty when none is known."""
        kind = self._kinds.get(host) if self._tuned else None
        for other, found in self._tuned.items():
            values = found.values.get(benchmark, {})
            if other != host and kind and self._kinds.get(other) == kind and scenario in values:
                return dict(values[scenario])
        return {}

    def expected_s(self, host: Host, benchmark: BenchmarkEntry) -> float:
        """Wall seconds of all the units of a benchmark on a host, before any is started."""
        rule = rules.load_benchmark(benchmark.name)
        return sum(
            self._seconds(rule, scenario, mode, self._settings(host, benchmark, scenario))
            for scenario, mode in itertools.product(benchmark.scenarios, benchmark.modes)
        )

    @functools.cached_property
    def _kinds(self) -> dict[str, tuple[str, ...]]:
        return handoff.system_kinds(self._session)

    @functools.cached_property
    def _ready(self) -> dict[str, Readiness]:
        return {item.host: item for item in handoff.readiness(self._session)}

    def _settings(self, host: Host, benchmark: BenchmarkEntry, scenario: Scenario) -> dict[str, Any]:
        """LoadGen's settings: what tuning found, under what the campaign gives."""
        tuned = self._tuned.get(host.name)
        if tuned is not None and tuned.instance_type != (host.instance.type if host.instance else ""):
            # Of an instance of another type, which was this host before.
            tuned = None
        found = tuned.values.get(benchmark.name, {}).get(scenario, {}) if tuned else {}
        given = campaigns.user_conf(static.entry(host, self._campaign), benchmark, scenario)
        quick = {"min_duration": round(self._campaign.run.quick_seconds * 1000)} if self._quick else {}
        return {**found, **given, **quick}

    def _seconds(self, rule: BenchmarkRule, scenario: Scenario, mode: Mode, settings: dict[str, Any]) -> float:
        duration = settings.get("min_duration", rules.load_round(self._campaign.round).min_duration_ms)
        return expected.seconds(
            rule, scenario, mode, settings, min_duration_ms=duration, samples=self._few(rule, rule.samples)
        )

    def _few(self, rule: BenchmarkRule, samples: int) -> int:
        return expected.few(rule, samples) if self._quick else samples


def _market(host: Host) -> Market:
    """Whether it may be taken back while units run."""
    if host.instance is not None and host.instance.market:
        return Market(host.instance.market)
    return Market.UNKNOWN if host.kind is HostKind.EC2 else Market.NONE


def _labels(rule: BenchmarkRule, benchmark: BenchmarkEntry) -> tuple[str, ...]:
    """What is known beforehand, so that a unit which fails says it too."""
    random = [RANDOM_WEIGHTS] if benchmark.backend_options.get("weights") == "random" else []
    simulated = [SIMULATED] if benchmark.backend == "null" else []
    return (*rule.labels, *random, *simulated)


def _lock(benchmark: BenchmarkEntry, ready: Readiness | None) -> dict[str, str]:
    """What must not change under the unit's number, as far as the host has said it."""
    if ready is None:
        return {}
    weights = ready.weights.get(benchmark.name, "")
    return {**ready.lock, **({"weights": weights} if weights else {})}


def _options(benchmark: BenchmarkEntry, ready: Readiness | None) -> dict[str, str | int | float | bool]:
    """The campaign's backend options, in the batches that fit into the host."""
    fits = ready.batches.get(benchmark.name) if ready else None
    return {**benchmark.backend_options, **({"batch_size": fits} if fits else {})}
