"""fleet.yml: what to measure, on which hosts, and who submits. Strict: an unknown key is an error that says where.

Reading a campaign touches no host; hosts are expanded here (ranges, files), and reached elsewhere.
"""

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet, NodeSetException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fleet import content
from fleet.cloud_settings import REGION, CloudSettings, InstanceEntry, ResultsBucket, Strict
from fleet.errors import CampaignError
from fleet.mlperf import rules
from fleet.terms import Availability, Category, Division, HostKind, Mode, Reason, Scenario

HOST_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
"""Names become file names on both sides, so nothing else is let in."""
HOST_NAME_LIMIT = 120
"""Characters: a unit's file name holds the host's, the benchmark's, the scenario's and the mode's."""
RANGE_LIMIT = 10_000
"""Hosts in one range: a slip of the finger must not fill the memory."""


BackendName = Literal["null", "pytorch", "onnxruntime", "tensorflow", "tensorrt", "openai"]


class LoadgenSettings(Strict):
    """user.conf for one scenario, with LoadGen's own key names; what is left out is measured before the run."""

    target_qps: float | None = Field(None, gt=0, description="samples/s (Offline) or queries/s (Server) to aim at")
    target_latency: float | None = Field(None, gt=0, description="expected (SingleStream, MultiStream) or limit, ms")
    target_latency_percentile: float | None = Field(None, gt=0, lt=100)
    samples_per_query: int | None = Field(None, gt=0)
    min_duration: int | None = Field(None, gt=0, description="ms; shorter than the round's minimum cannot be submitted")
    max_duration: int | None = Field(None, ge=0, description="ms")
    min_query_count: int | None = Field(None, gt=0)
    max_query_count: int | None = Field(None, ge=0)
    coalesce_queries: int | None = Field(None, ge=0, le=1)


def _known_benchmark(name: str) -> str:
    known = rules.benchmark_names()
    if name not in known:
        raise ValueError(f"unknown benchmark {name!r}{_nearest(name, known)}; known: {', '.join(known)}")
    return name


def _known_round(name: str) -> str:
    known = rules.round_names()
    if name not in known:
        raise ValueError(f"unknown round {name!r}; known: {', '.join(known)}")
    return name


class BenchmarkEntry(Strict):
    """One benchmark with the backend and scenarios to run it in."""

    name: Annotated[str, AfterValidator(_known_benchmark)]
    # In YAML a bare null is no text; who writes `backend: null` means the backend of that name.
    backend: Annotated[BackendName, BeforeValidator(lambda value: value or "null")] = "pytorch"
    backend_options: dict[str, str | int | float | bool] = Field({})
    scenarios: tuple[Scenario, ...] = Field((Scenario.SINGLE_STREAM, Scenario.OFFLINE), min_length=1)
    modes: tuple[Mode, ...] = Field((Mode.ACCURACY, Mode.PERFORMANCE), min_length=1)
    user_conf: dict[Scenario, LoadgenSettings] = Field({})

    @field_validator("scenarios", "modes")
    @classmethod
    def _once(cls, listed: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [name for name in listed if listed.count(name) > 1]:
            raise ValueError(f"{twice[0]} is listed twice")
        return listed


class RetryPolicy(Strict):
    """How often a unit that ended for a reason is started again, and after what."""

    times: int = Field(0, ge=0, le=20)
    after_s: float = Field(0.0, ge=0, description="seconds to wait before")


class Conditions(Strict):
    """What is done about a host that runs on battery, slept, or throttled for heat, before and while it measures."""

    battery: Literal["warn", "stop", "ignore"] = "warn"
    sleep: Literal["warn", "stop", "ignore"] = "warn"
    thermal: Literal["warn", "stop", "ignore"] = "warn"


NEVER_AGAIN = {
    Reason.CANCELLED: "fleet bench starts it when you want it after all",
    Reason.HOST_KEY: "a host that shows another key than yours is not asked any more",
}
"""Reasons for which no unit is started again in the same run, and why."""


class RunSettings(Strict):
    """How long units may take, when a host counts as lost, and what is tried again."""

    deadline_factor: float = Field(3.0, ge=1, description="a unit is stopped after its expected time times this")
    lost_after_s: float = Field(25.0, ge=5, description="seconds without an answer after which a host counts as lost")
    retry: dict[Reason, RetryPolicy] = Field({}, description="by reason, over fleet's own policies")
    conditions: Conditions = Conditions()
    quick_seconds: float = Field(5.0, ge=1, description="length of a performance unit with --quick")

    @field_validator("retry")
    @classmethod
    def _may_pass(cls, given: dict[Reason, RetryPolicy]) -> dict[Reason, RetryPolicy]:
        if never := sorted(given.keys() & NEVER_AGAIN.keys()):
            raise ValueError(f"{never[0]} is never tried again: {NEVER_AGAIN[never[0]]}")
        return given


class HostEntry(Strict):
    """Hosts of one kind: a name or range, a file of names, aliases from your ssh config, or instances by their tags."""

    name: str | None = Field(None, description="gpu01.lab, or a range: gpu[01-16].lab")
    file: str | None = Field(None, description="a text file with one name or range per line")
    ssh_config: str | None = Field(None, description="a pattern over the Host aliases in your ssh config: lab-*")
    ec2_tag: dict[Annotated[str, Field(min_length=1, max_length=128)], str] | None = Field(
        None, min_length=1, description="running EC2 instances with all of these tags, launched by somebody else"
    )
    region: str | None = Field(None, pattern=REGION, description="of ec2_tag; cloud.regions or your AWS region if none")
    kind: HostKind
    connection: Literal["ssh", "local"] = "ssh"
    address: str | None = Field(
        None, description="where to connect when the name does not resolve; of ec2_tag: public, private or id"
    )
    user: str | None = None
    port: int | None = Field(None, gt=0, lt=65536)
    identity_file: str | None = Field(None, description="path of the private key; the key itself stays with ssh")
    python: str | None = Field(None, description="path of Python 3.11 or newer on the host")
    notes: dict[str, str] = Field({})
    user_conf: dict[str, dict[Scenario, LoadgenSettings]] = Field({}, description="per benchmark, over the campaign's")
    usd_per_hour: float | None = Field(None, ge=0, description="what the host costs, for dollars in the report")

    @model_validator(mode="after")
    def _one_source(self) -> "HostEntry":
        given = [key for key in ("name", "file", "ssh_config", "ec2_tag") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError("give exactly one of name, file, ssh_config and ec2_tag")
        if self.region and not self.ec2_tag:
            raise ValueError("region: only with ec2_tag")
        if self.ec2_tag and (self.kind is not HostKind.EC2 or self.connection != "ssh"):
            raise ValueError("ec2_tag: such hosts are of kind ec2, over ssh")
        if self.ec2_tag and self.address not in {None, "public", "private", "id"}:
            raise ValueError("address: of instances by ec2_tag it is public, private or id")
        return self


class Campaign(Strict):
    """The whole of fleet.yml."""

    version: Literal[1] = Field(1, alias="schema")
    submitter: str = Field(
        min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="a folder's name: no spaces"
    )
    division: Division = Division.OPEN
    category: Category = Category.EDGE
    availability: Availability = Availability.AVAILABLE
    round: Annotated[str, AfterValidator(_known_round)] = "v6.1"
    work_dir: str = Field("~/.mlperf-fleet", pattern=r"^(~/|/)[A-Za-z0-9._/-]+$", description="fleet's folder on hosts")
    benchmarks: tuple[BenchmarkEntry, ...] = Field(min_length=1)
    hosts: tuple[HostEntry, ...] = ()
    cloud: CloudSettings | None = Field(None, description="EC2 instances to launch for this campaign")
    notes: dict[str, str] = Field({}, description="system notes for every host; a host's own win")
    run: RunSettings = RunSettings.model_validate({})
    role_variables: dict[str, Any] = Field({}, description="variables of the roles, see docs/roles.md")

    @model_validator(mode="after")
    def _somewhere(self) -> "Campaign":
        if not self.hosts and self.cloud is None:
            raise ValueError("hosts: missing; name some, or instances under `cloud:`")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "Campaign":
        names = [entry.name for entry in self.benchmarks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"benchmark {twice[0]} is listed twice")
        for name, value in self.role_variables.items():
            if re.search(r"://[^/]*@", str(value)):
                raise ValueError(f"role_variables: {name} holds a password; put it into pip.conf on the hosts instead")
            if name not in content.role_variables():
                known = sorted(content.role_variables())
                raise ValueError(f"role_variables: no role knows {name!r}{_nearest(name, known)}")
        for entry in self.benchmarks:
            rule = rules.load_benchmark(entry.name)
            if self.division not in rule.divisions:
                raise ValueError(f"{entry.name} cannot be run in the {self.division} division")
            if entry.backend not in rule.backends:
                raise ValueError(f"{entry.name} does not run on {entry.backend}; it runs on {', '.join(rule.backends)}")
        for host in self.hosts:
            if unknown := sorted(set(host.user_conf) - set(names)):
                raise ValueError(f"hosts: user_conf names {unknown[0]!r}, which is not under benchmarks")
        return self


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def load(path: Path) -> Campaign:
    """Read and validate a campaign file.

    Raises CampaignError naming the file, the key and the fix.
    """
    return load_text(read_text(path), str(path))


def read_text(path: Path) -> str:
    """The campaign file's text.

    Raises CampaignError when there is none.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CampaignError(f"{path}: no such file", hint="fleet init") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CampaignError(f"{path}: cannot be read ({error})") from error


def load_text(text: str, source: str) -> Campaign:
    """Validate a campaign's text; `source` is the file name for messages.

    Raises CampaignError naming every wrong key at once.
    """
    try:
        data = yaml.load(text, Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader that also refuses repeated keys
    except (yaml.YAMLError, TypeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise CampaignError(f"{where}: {getattr(error, 'problem', None) or error}", hint=f"edit {source}") from error
    if not isinstance(data, dict):
        raise CampaignError(f"{source}: not a campaign, the file must be a mapping", hint="fleet init")
    try:
        return Campaign.model_validate(data)
    except ValidationError as error:
        lines = [_say(item) for item in error.errors()]
        raise CampaignError(f"{source}: " + f"\n{source}: ".join(lines), hint=f"edit {source}") from error


class _UniqueKeys(yaml.SafeLoader):
    """YAML's last-one-wins on repeated keys silently drops half of a campaign."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _say(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "campaign"
    if item["type"] == "extra_forbidden":
        known = sorted({name for model in _models() for name in _keys(model)})
        return f"{where}: unknown key{_nearest(str(item['loc'][-1]), known)}"
    if item["type"] == "missing":
        return f"{where}: missing"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}"


def _models() -> tuple[type[BaseModel], ...]:
    return (
        Campaign,
        BenchmarkEntry,
        HostEntry,
        RunSettings,
        LoadgenSettings,
        CloudSettings,
        InstanceEntry,
        ResultsBucket,
    )


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def expand(text: str, *, source: str) -> list[str]:
    """Host names of a range such as `gpu[01-16].lab`, in order, zero padding kept.

    Raises CampaignError for a malformed range.
    """
    # Counted before they are made: a slip of the finger names a billion hosts.
    wide = math.prod(
        int(high) - int(low) + 1 for low, high in re.findall(r"(\d+)-(\d+)", text) if int(low) <= int(high)
    )
    if wide > RANGE_LIMIT:
        raise CampaignError(f"{source}: host range {text!r}: more than {RANGE_LIMIT} hosts", hint=f"edit {source}")
    try:
        nodes = NodeSet(text, resolver=RESOLVER_NOGROUP)
    except NodeSetException as error:
        raise CampaignError(f"{source}: host range {text!r}: {error}", hint=f"edit {source}") from error
    return list(nodes) or [text]


def schema() -> dict[str, Any]:
    """JSON Schema of fleet.yml, for editors."""
    return Campaign.model_json_schema(by_alias=True)


def user_conf(host: HostEntry | None, benchmark: BenchmarkEntry, scenario: Scenario) -> dict[str, Any]:
    """LoadGen settings for one unit: the campaign's, with those of the host's entry over them, where it has one."""
    common = benchmark.user_conf.get(scenario, LoadgenSettings.model_validate({}))
    of_host = host.user_conf.get(benchmark.name, {}) if host else {}
    own = of_host.get(scenario, LoadgenSettings.model_validate({}))
    return {**common.model_dump(exclude_none=True), **own.model_dump(exclude_none=True)}
