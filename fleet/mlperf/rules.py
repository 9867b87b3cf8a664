"""The rules as data: one YAML file per round and per benchmark, and the types that read them."""

from collections.abc import Mapping
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from fleet.errors import CampaignError
from fleet.terms import Category, Division, Scenario


class _Rule(BaseModel):
    """Frozen, and a key nobody knows is a mistake in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SystemKeys(_Rule):
    """What systems/<system>.json must say."""

    required: tuple[str, ...]
    may_be_empty: frozenset[str]
    """Those of `required` that may be empty text."""


class Round(_Rule):
    """What a submission round demands of every benchmark."""

    name: str
    """`v6.1`, as the official checker's --version spells it."""
    loadgen: str
    """The mlcommons-loadgen wheel that carries the round's seeds."""
    layout: Literal["v6"]
    """Which directory layout of `fleet.submission.layout` the round takes."""
    min_duration_ms: PositiveInt
    """The least min_duration LoadGen may be configured with."""
    seeds: Mapping[str, int]
    """qsl_rng_seed, sample_index_rng_seed, schedule_rng_seed."""
    accuracy_log_bytes: PositiveInt
    """The most mlperf_log_accuracy.json may have once truncated."""
    benchmarks: tuple[str, ...]
    """The official names; a custom one needs an entry in model_mapping.json."""
    measurements: tuple[str, ...]
    """Keys of measurements.json, none of them empty."""
    system_keys: SystemKeys


class Precision(_Rule):
    """Memory that one running unit takes, GiB: on the accelerator where the backend has one, else in RAM."""

    model_gib: PositiveFloat
    """Weights and the runtime around them."""
    sample_gib: PositiveFloat
    """Activations and caches of each sample of a batch."""


class Needs(_Rule):
    """What one running unit of a benchmark takes from its host; `fleet.preflight` turns it into an answer per host."""

    disk_gib: PositiveFloat
    """Environment, assets and logs together."""
    weights_gib: NonNegativeFloat = 0.0
    """What of `disk_gib` the checkpoint takes, where a run can do without one."""
    memory_gib: PositiveFloat
    """RAM beside the model: interpreter, dataset, LoadGen."""
    precisions: Mapping[str, Precision] = Field(min_length=1)
    """By the backend option `dtype`; the first is the default."""
    batch: PositiveInt = 32
    """Samples that a backend takes at once unless it is told otherwise."""
    gpu_memory_gib: NonNegativeFloat = 0.0
    """The published minimum of accelerator memory; 0 where a CPU is enough."""


class Source(_Rule):
    """What the assets role brings to a host; the key it stands under is a file's name where it has a `url`."""

    url: str = ""
    """Where one file is published."""
    uri: str = ""
    """A `.uri` of MLCommons' downloader instead: what it names is checked by the `.md5` beside it."""
    files: tuple[str, ...] = ()
    """Patterns of the names to take from what `uri` lists."""
    unless: tuple[str, ...] = ()
    """Not fetched where the host's own folder (role variable `assets_folders`) has a file that matches one of these
    patterns: by default `files`, or the file itself."""
    sha256: str = ""
    md5: str = ""
    """Where the publisher names no better one; where neither is known, what came is recorded, not verified."""
    max_gib: PositiveFloat = 2.0
    """The most that all its files may have."""
    weights: bool = False
    """Not needed for a run on random weights, nor where another program holds the model."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.url) == bool(self.uri) or bool(self.uri) != bool(self.files):
            raise ValueError("a source has a url, or a uri with files")
        return self


class BenchmarkRule(_Rule):
    """One benchmark that fleet can run, and which official one it stands for."""

    name: str
    module: str
    """Module of `fleet.harness.benchmarks`."""
    loadgen_model: str
    """The name in LoadGen's embedded mlperf.conf; a wrong one is silently accepted by LoadGen."""
    official: str
    """The checker's benchmark name; where it differs from `name`, model_mapping.json maps to it."""
    labels: tuple[str, ...] = ()
    """What a reader must know beside any number of this benchmark."""
    samples: PositiveInt
    """The whole dataset: what an accuracy run must cover."""
    performance_samples: PositiveInt
    """The least performance_sample_count the checker takes."""
    metrics: tuple[str, ...] = Field(min_length=1)
    """The accuracy metrics' names in the rules, `F1`; accuracy.txt must have each."""
    backends: tuple[str, ...] = Field(min_length=1)
    """Modules of `fleet.harness.backends` that can run it."""
    sources: Mapping[str, Source] = {}
    """File name to where it comes from; empty for a benchmark that ships with fleet."""
    task: str
    divisions: tuple[Division, ...] = Field(min_length=1)
    scenarios: Mapping[Category, tuple[Scenario, ...]]
    """Scenarios the checker lists for the official benchmark, per category."""
    whole_set: frozenset[Scenario]
    """Scenarios whose performance runs ask for every sample at least once, however long that takes: LoadGen's least
    number of queries in Offline, and equal issue in all of them for models that generate."""
    run_seconds: PositiveFloat
    """Wall seconds an accuracy unit takes on a slow machine, for deadlines and progress."""
    needs: Needs
    server_latency_ms: PositiveFloat | None = None
    """Server's limit on the 99th percentile, as in the round's mlperf.conf; None without one."""

    def scenarios_of(self, category: str) -> tuple[Scenario, ...]:
        """The scenarios of `category`, which may be both, `datacenter,edge`; without repeats, in the file's order."""
        parts = [Category(part.strip()) for part in category.split(",")]
        return tuple(dict.fromkeys(s for part in parts for s in self.scenarios.get(part, ())))


_R = TypeVar("_R", bound=_Rule)


def round_names() -> tuple[str, ...]:
    """Rounds this fleet has rules for, sorted."""
    return _names("rounds")


def benchmark_names() -> tuple[str, ...]:
    """Benchmarks this fleet can run, sorted."""
    return _names("benchmarks")


@cache
def load_round(name: str) -> Round:
    """The rules of round `name`.

    Raises CampaignError listing the rounds there are when it is none of them.
    """
    return _load("rounds", name, Round)


@cache
def load_benchmark(name: str) -> BenchmarkRule:
    """The rules of benchmark `name`.

    Raises CampaignError listing the benchmarks there are when it is none of them.
    """
    return _load("benchmarks", name, BenchmarkRule)


def _folder(folder: str) -> Traversable:
    return resources.files("fleet.mlperf").joinpath(folder)


def _names(folder: str) -> tuple[str, ...]:
    return tuple(sorted(e.name.removesuffix(".yml") for e in _folder(folder).iterdir() if e.name.endswith(".yml")))


def _load(folder: str, name: str, kind: type[_R]) -> _R:
    known = _names(folder)
    if name not in known:
        word = folder.removesuffix("s")
        raise CampaignError(f"{word} {name!r}: unknown; there are {', '.join(known)}", hint=f"name one of the {folder}")
    data: Any = yaml.safe_load(_folder(folder).joinpath(f"{name}.yml").read_text(encoding="utf-8"))
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CampaignError(f"fleet/mlperf/{folder}/{name}.yml: {where}: {first['msg']}") from error
