"""What is to be done: every host by benchmark by scenario by mode, as specs that the harness understands."""

import itertools
from collections.abc import Mapping
from dataclasses import replace

from fleet import campaign as campaigns
from fleet import handoff
from fleet.campaign import BenchmarkEntry, Campaign
from fleet.handoff import Plan, Readiness
from fleet.harness.contract import Mode, RunSpec, Scenario
from fleet.inventory import files
from fleet.inventory.hosts import Host
from fleet.mlperf import rules
from fleet.session import Session

QUICK_ACCURACY_SAMPLES = 10833
"""--quick still evaluates the whole set of a benchmark up to this size: an F1 over fewer says little."""
TUNING_S = 180.0
"""The most that a scenario's tuning may take."""
LOADING_S = 120.0
"""A unit's deadline leaves so long for its model to be loaded."""
BUILDING_S = {"tensorrt": 900.0}
"""And so long more with a backend that builds an engine on first use: killed in it, a unit would never get further."""


def plan(session: Session, campaign: Campaign, *, quick: bool) -> Plan:
    """Every unit of the campaign, in the order they will run."""
    planner = Planner(session, campaign, quick=quick)
    units = [
        planner.spec(host, benchmark, scenario, mode)
        for host in files.hosts(session)
        for benchmark in campaign.benchmarks
        for scenario, mode in itertools.product(benchmark.scenarios, benchmark.modes)
    ]
    return Plan(quick=quick, units=tuple(units))


class Planner:
    """Makes specs from the campaign and from what earlier stages found out about each host."""

    def __init__(self, session: Session, campaign: Campaign, *, quick: bool) -> None:
        self._campaign = campaign
        self._quick = quick
        self._token = session.token
        self._ready = {item.host: item for item in handoff.readiness(session)}
        self._tuned = handoff.tuned(session)
        self._kinds = handoff.system_kinds(session)

    def spec(self, host: Host, benchmark: BenchmarkEntry, scenario: Scenario, mode: Mode) -> RunSpec:
        """One unit."""
        rule, round_ = rules.load_benchmark(benchmark.name), rules.load_round(self._campaign.round)
        given = campaigns.user_conf(self._campaign.hosts[host.entry], benchmark, scenario)
        settings = {**self._own_values(host.name, benchmark.name, scenario), **given}
        if self._quick:
            settings["min_duration"] = round(self._campaign.run.quick_seconds * 1000)
        seconds = rule.run_seconds
        if mode is Mode.PERFORMANCE:
            # Offline's one query is sized 1.1 times the duration, at a rate 1.2 times the measured one.
            seconds = 60 + 1.4 * settings.get("min_duration", round_.min_duration_ms) / 1000
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
            sample_count=self._few(rule.samples),
            performance_sample_count=self._few(rule.performance_samples),
            deadline_s=self._deadline(seconds, benchmark.backend),
            expected_s=seconds,
            work_dir=(ready.work_dir if ready else "") or self._campaign.work_dir,
            round=self._campaign.round,
            loadgen_version=round_.loadgen,
            quick=self._quick,
            labels=rule.labels,
            latency_limit_ms=settings.get("target_latency", rule.server_latency_ms)
            if scenario is Scenario.SERVER
            else None,
            start=self.start(host.name, benchmark.name, scenario),
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
        kind = self._kinds.get(host)
        for other, values in self._tuned.items():
            if other != host and kind and self._kinds.get(other) == kind and scenario in values.get(benchmark, {}):
                return dict(values[benchmark][scenario])
        return {}

    def _own_values(self, host: str, benchmark: str, scenario: Scenario) -> Mapping[str, float]:
        return self._tuned.get(host, {}).get(benchmark, {}).get(scenario, {})

    def _few(self, samples: int) -> int:
        return min(samples, QUICK_ACCURACY_SAMPLES) if self._quick else samples


def _options(benchmark: BenchmarkEntry, ready: Readiness | None) -> dict[str, str | int | float | bool]:
    """The campaign's backend options, in the batches that fit into the host."""
    fits = ready.batches.get(benchmark.name) if ready else None
    return {**benchmark.backend_options, **({"batch_size": fits} if fits else {})}
