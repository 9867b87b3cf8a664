"""The archive of the harness, and readiness from what a play said."""

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fleet import handoff, planning, provision
from fleet.errors import PlayError
from fleet.handoff import Readiness
from fleet.harness.contract import SystemFacts
from fleet.inventory import files, reach
from fleet.inventory.hosts import Host, Instance
from fleet.plays import HostOutcome, PlayEvent, PlayRequest
from fleet.subset import Subset
from fleet.terms import HostKind, HostState
from tests.unit.fakes import MINIMAL, FakeConnection, FakePlays, RecordingWatch, Scene, scene
from tests.unit.results.session_files import facts

TWO = MINIMAL.replace("[{name: h01, kind: server}]", "[{name: h01, kind: server}, {name: h02, kind: server}]")
PREFLIGHT = {"work_dir": "/w", "cannot": {"tiny-bert": "0.5 GiB memory"}, "host_warnings": ["on battery"]}


@pytest.fixture(autouse=True)
def answer(monkeypatch: pytest.MonkeyPatch) -> FakeConnection:
    """Every host's connection; its answer settles nothing, so that the host is left to the play."""
    connection = FakeConnection([""])
    monkeypatch.setattr(reach, "connect", lambda _: connection)
    return connection


def outcome(state: HostState = HostState.READY, **more: Any) -> HostOutcome:
    return HostOutcome(host="h01", state=state, **more)


def described(value: SystemFacts | str) -> dict[str, dict[str, Any]]:
    text = value if isinstance(value, str) else json.dumps(asdict(value))
    return {provision.PREFLIGHT: PREFLIGHT, provision.DESCRIBE: {"stdout": text}}


def test_the_archive_is_the_same_bytes_for_the_same_code(tmp_path: Path) -> None:
    first, digest = provision.harness_archive(tmp_path / "a")
    second, again = provision.harness_archive(tmp_path / "b")
    assert digest == again
    assert digest in first.name
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == [first.name]


def test_the_archive_holds_the_harness_and_nothing_else(tmp_path: Path) -> None:
    path, _ = provision.harness_archive(tmp_path)
    with tarfile.open(path) as archive:
        names = archive.getnames()
        assert all(member.isfile() and member.mtime == 0 and member.uid == 0 for member in archive)
    assert {"__main__.py", "fleet/__init__.py", "fleet/harness/supervise.py"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    others = [name for name in names if not name.startswith("fleet/harness/")]
    assert others == ["__main__.py", "fleet/__init__.py"]
    assert any(name.endswith(".safetensors") for name in names)


def test_the_unpacked_archive_runs_alone(tmp_path: Path) -> None:
    path, _ = provision.harness_archive(tmp_path)
    folder = tmp_path / "harness"
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    done = subprocess.run(
        [sys.executable, "-I", str(folder), "selftest"], capture_output=True, text=True, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"loadgen": "6.0.17"}


def test_every_host_has_an_answer_and_only_reachable_ones_are_asked(tmp_path: Path) -> None:
    made = scene(tmp_path, TWO, states={"h02": HostState.UNKNOWN_KEY})
    plays = FakePlays({"h01": outcome(changed=2, results=described(facts("aws-g5-xlarge")))})
    watch = RecordingWatch()
    found = provision.provision(made.session, made.campaign, plays, watch)
    assert [request.playbook for request in plays.requests] == ["provision"]
    assert list(plays.requests[0].hosts) == ["h01"]
    one, two = found
    assert (one.state, one.changed, one.work_dir, one.hint) == (HostState.READY, 2, "/w", "")
    assert one.cannot == {"tiny-bert": "0.5 GiB memory"}
    assert one.warnings == ("on battery",)
    assert (two.host, two.state, two.cause) == ("h02", HostState.UNKNOWN_KEY, "h02 is away")
    assert handoff.readiness(made.session) == found
    assert watch.stages == ["provision"]
    assert watch.ended == ["h02", "h01"]
    kept = made.session.read(made.session.provision / "facts" / "h01.json", SystemFacts)
    assert kept == facts("aws-g5-xlarge")


def test_check_changes_nothing_here_either(tmp_path: Path) -> None:
    made = scene(tmp_path)
    before = handoff.readiness(made.session)
    plays = FakePlays({"h01": outcome(HostState.NOT_READY, cause="no venv")})
    (found,) = provision.check(made.session, made.campaign, plays, RecordingWatch())
    assert plays.requests[0].playbook == "preflight"
    assert (found.state, found.hint) == (HostState.NOT_READY, "fix h01 as said, then: fleet check")
    assert handoff.readiness(made.session) == before


def test_converged_hosts_are_asked_and_not_played(tmp_path: Path, answer: FakeConnection) -> None:
    made = scene(tmp_path, TWO, states={"h02": HostState.UNKNOWN_KEY})
    given = provision.variables(made.session, made.campaign, describe=True)
    stamps = {
        "python_env": given["python_env_digest"],
        "harness": given["harness_digest"],
        "assets": {"tiny-bert": given["assets_digest"]},
    }
    told = {
        **PREFLIGHT,
        "cannot": {},
        "stamps": stamps,
        "msg": "",
        "description": json.dumps(asdict(facts("aws-g5-xlarge"))),
    }
    answer.answers = [json.dumps(told)]
    plays, watch = FakePlays(), RecordingWatch()
    one, two = provision.provision(made.session, made.campaign, plays, watch)
    assert plays.requests == []
    assert (one.state, one.changed, one.work_dir, one.warnings) == (HostState.READY, 0, "/w", ("on battery",))
    assert two.state is HostState.UNKNOWN_KEY
    assert watch.lines == [("h02", "h02 is away"), ("h01", "Look at the host"), ("h01", "ready; on battery")]
    kept = facts("aws-g5-xlarge")
    assert one.lock == {
        "fleet": given["harness_digest"],
        "environment": given["python_env_digest"],
        "driver": kept.driver_version,
        "cuda": kept.cuda_version,
    }
    assert made.session.read(made.session.provision / "facts" / "h01.json", SystemFacts) == facts("aws-g5-xlarge")


def test_hosts_that_need_changes_are_played_and_others_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scene(tmp_path, TWO)
    stamps = {"python_env": "old", "harness": "old", "assets": {}}
    full = {
        "h01": {"msg": "", "cannot": {}, "stamps": stamps},
        "h02": {"msg": "disk full", "cannot": {}, "stamps": stamps},
    }
    monkeypatch.setattr(reach, "connect", lambda host: FakeConnection([json.dumps(full[host.name])]))
    plays = FakePlays()
    one, two = provision.provision(made.session, made.campaign, plays, RecordingWatch())
    assert [list(request.hosts) for request in plays.requests] == [["h01"]]
    assert one.state is HostState.READY
    assert (two.state, two.cause, two.hint) == (HostState.NOT_READY, "disk full", "fix h02 as said, then: fleet check")
    plays = FakePlays()
    found = provision.check(made.session, made.campaign, plays, RecordingWatch())
    assert [item.state for item in found] == [HostState.READY, HostState.NOT_READY]
    assert plays.requests == []


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "Invalid JSON"), ("", "Invalid JSON"), ('{"hostname": "a"}', "machine_id: Field required"), ("[]", "")],
)
def test_a_description_that_is_none_makes_the_host_fail(tmp_path: Path, text: str, said: str) -> None:
    made = scene(tmp_path)
    plays = FakePlays({"h01": outcome(results=described(text))})
    (found,) = provision.provision(made.session, made.campaign, plays, RecordingWatch())
    assert found.state is HostState.FAILED
    assert found.cause.startswith("its description cannot be read: ")
    assert said in found.cause
    assert found.hint == "fleet provision"
    assert not (made.session.provision / "facts").exists()


def test_facts_of_a_wrong_type_are_refused_by_name(tmp_path: Path) -> None:
    made = scene(tmp_path)
    data = asdict(facts("aws-g5-xlarge")) | {"cpu_cores": "many"}
    plays = FakePlays({"h01": outcome(results=described(json.dumps(data)))})
    (found,) = provision.provision(made.session, made.campaign, plays, RecordingWatch())
    assert "cpu_cores" in found.cause


@pytest.mark.parametrize(
    ("state", "cause", "hint"),
    [
        (HostState.FAILED, "harness: Unpack: No space left on device", "free space on h01, then: fleet provision"),
        (HostState.FAILED, "python_env: pip: no such package", "fleet provision"),
        (HostState.NOT_READY, "on battery", "fix h01 as said, then: fleet check"),
        (HostState.UNREACHABLE, "timed out", "fix h01 as said, then: fleet check"),
    ],
)
def test_the_hint_fits_the_trouble(tmp_path: Path, state: HostState, cause: str, hint: str) -> None:
    made = scene(tmp_path)
    plays = FakePlays({"h01": outcome(state, cause=cause)})
    (found,) = provision.provision(made.session, made.campaign, plays, RecordingWatch())
    assert (found.state, found.cause, found.hint) == (state, cause, hint)


def test_variables_change_with_what_is_wanted_only(tmp_path: Path) -> None:
    made = scene(tmp_path)
    first = provision.variables(made.session, made.campaign, describe=True)
    assert first == provision.variables(made.session, made.campaign, describe=True)
    assert Path(first["harness_archive"]).is_absolute()
    assert first["preflight_python_env_digest"] == first["python_env_digest"]
    assert any("torch==" in text for text in first["python_env_requirements"])
    null = scene(tmp_path / "2", MINIMAL.replace("name: tiny-bert", "name: tiny-bert, backend: 'null'"))
    other = provision.variables(null.session, null.campaign, describe=True)
    assert not any("torch==" in text for text in other["python_env_requirements"])
    assert other["python_env_digest"] != first["python_env_digest"]
    index = scene(tmp_path / "3", MINIMAL + "role_variables: {python_env_no_index: true}\n")
    assert (
        provision.variables(index.session, index.campaign, describe=True)["python_env_digest"]
        != first["python_env_digest"]
    )


@pytest.mark.parametrize("own", ["preflight_spare_gib: 1", "assets_timeout: 60", "preflight_on_battery: stop"])
def test_variables_of_other_roles_make_no_other_environment(tmp_path: Path, own: str) -> None:
    plain, made = scene(tmp_path / "1"), scene(tmp_path / "2", MINIMAL + f"role_variables: {{{own}}}\n")
    first = provision.variables(plain.session, plain.campaign, describe=True)
    assert (
        provision.variables(made.session, made.campaign, describe=True)["python_env_digest"]
        == first["python_env_digest"]
    )


def rescued(**failed: str) -> dict[str, dict[str, Any]]:
    """What a play says where the assets role gave up on some benchmarks."""
    named = {name.replace("_", "-"): said for name, said in failed.items()}
    return {
        provision.PREFLIGHT: PREFLIGHT | {"cannot": {}},
        provision.RESCUED: {"ansible_facts": {"assets_failed": named}},
        provision.DESCRIBE: {"stdout": json.dumps(asdict(facts("aws-g5-xlarge")))},
    }


def test_a_benchmark_without_its_files_holds_back_no_other(tmp_path: Path) -> None:
    made = scene(tmp_path, MINIMAL.replace("[{name: tiny-bert}]", "[{name: tiny-bert}, {name: tiny-gptj}]"))
    plays = FakePlays({"h01": outcome(results=rescued(tiny_gptj="a warning\nhttp://x/y: its md5 is wrong\n\n"))})
    (found,) = provision.provision(made.session, made.campaign, plays, RecordingWatch())
    assert (found.state, found.cause) == (HostState.READY, "")
    assert found.cannot == {"tiny-gptj": "http://x/y: its md5 is wrong"}
    assert (made.session.provision / "facts" / "h01.json").is_file()


def test_a_host_with_no_benchmark_left_has_failed(tmp_path: Path) -> None:
    made = scene(tmp_path)
    plays = FakePlays({"h01": outcome(results=rescued(tiny_bert="a: No space left on device"))})
    (found,) = provision.provision(made.session, made.campaign, plays, RecordingWatch())
    assert (found.state, found.cause) == (HostState.FAILED, "tiny-bert: a: No space left on device")
    assert found.hint == "free space on h01, then: fleet provision"


def test_what_holds_no_model_is_sent_no_weights(tmp_path: Path) -> None:
    def asked(entry: str) -> list[str]:
        made = scene(tmp_path / str(len(list(tmp_path.iterdir()))), MINIMAL.replace("{name: tiny-bert}", entry))
        (found,) = provision.variables(made.session, made.campaign, describe=True)["assets_benchmarks"]
        return [source["file"] for source in found["sources"]]

    small = ["cnn_eval", "punkt_tab.zip", "tokenizer"]
    assert asked("{name: gptj-99}") == [*small, "checkpoint"]
    assert asked("{name: gptj-99, backend_options: {weights: random}}") == small
    assert asked("{name: gptj-99, backend: 'null'}") == small
    assert asked("{name: llama3.1-8b-edge, backend: 'null'}") == ["articles", "punkt_tab.zip"]


@pytest.mark.parametrize("gpus", [[{"memory_bytes": None}], [{"memory_bytes": "1"}], [{}], [None], {"a": 1}])
def test_a_host_that_tells_nonsense_of_its_gpus_ends_no_other(tmp_path: Path, gpus: Any) -> None:
    looked = {"work_dir": "/w", "memory_bytes": 2**34, "gpus": gpus}
    plays = FakePlays({"h01": outcome(results={**described(facts("h200-vm")), provision.PREFLIGHT: looked})})
    made = scene(tmp_path, TWO)
    found = provision.provision(made.session, made.campaign, plays, RecordingWatch())
    assert [(item.state, item.batches) for item in found] == [(HostState.READY, {})] * 2


def test_words_that_nobody_thought_of_make_their_host_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Any, looked: dict[str, Any]) -> dict[str, int]:
        return {"h": 1 // 0} if looked.get("work_dir") == "/bad" else {}

    monkeypatch.setattr(provision, "_batches", fails)
    plays = FakePlays({"h01": outcome(results={provision.PREFLIGHT: {"work_dir": "/bad"}})})
    made = scene(tmp_path, TWO)
    first, second = provision.provision(made.session, made.campaign, plays, RecordingWatch())
    assert (first.state, first.hint) == (HostState.FAILED, "fleet provision")
    assert first.cause.startswith("its answers cannot be used: ZeroDivisionError: ")
    assert second.state is HostState.READY


def test_the_watch_hears_tasks_but_not_ansibles_own(tmp_path: Path) -> None:
    made = scene(tmp_path)
    events = [
        PlayEvent(host="h01", task="Validating arguments against arg spec main", kind="start", result={}),
        PlayEvent(host="h01", task="Install the pinned packages", kind="start", result={}),
        PlayEvent(host="h01", task="Install the pinned packages", kind="ok", result={}),
    ]
    watch = RecordingWatch()
    provision.check(made.session, made.campaign, FakePlays(events=events), watch)
    assert watch.lines == [("h01", "Look at the host"), ("h01", "Install the pinned packages"), ("h01", "ready")]


def test_wheels_and_weights_are_part_of_the_lock(tmp_path: Path) -> None:
    made = scene(tmp_path)
    described_host = replace(facts("aws-g5-xlarge"), software={"python": "3.11.9", "torch": "2.13.0"})
    looked = {**PREFLIGHT, "stamps": {"weights": {"tiny-bert": "a" * 64}}}
    results = {provision.PREFLIGHT: looked, provision.DESCRIBE: {"stdout": json.dumps(asdict(described_host))}}
    (found,) = provision.provision(
        made.session, made.campaign, FakePlays({"h01": outcome(results=results)}), RecordingWatch()
    )
    # The interpreter is part of the environment's digest; the harness on the host knows no other names than these.
    assert set(found.lock) == {"fleet", "environment", "python", "wheel:torch", "driver", "cuda"}
    assert found.lock["python"] == "3.11.9"
    assert found.lock["wheel:torch"] == "2.13.0"
    assert found.weights == {"tiny-bert": "a" * 64}
    (spec, *_) = planning.plan(made.session, made.campaign, quick=False).units
    assert spec.lock == {**found.lock, "weights": "a" * 64}


@pytest.mark.parametrize("described_before", [False, True])
def test_a_host_is_ready_when_its_own_last_task_is_over(tmp_path: Path, *, described_before: bool) -> None:
    made = scene(tmp_path, TWO)
    text = json.dumps(asdict(facts("aws-g5-xlarge")))
    looked = {**PREFLIGHT, "description": text if described_before else ""}
    prepared = {
        "stdout": json.dumps({"changed": True, "weights_sha256": "b" * 64}),
        "cmd": ["/w/venv/bin/python", "/w/harness/current", "prepare", "/w", "tiny-bert", "tiny", "x"],
    }
    told: list[handoff.Readiness] = []
    seen: list[int] = []

    class Plays(FakePlays):
        def run(self, request: PlayRequest, on_event: Callable[[PlayEvent], None]) -> dict[str, HostOutcome]:
            for task, kind, result in (
                (provision.PREFLIGHT, "ok", looked),
                ("Install the pinned packages", "skipped", {}),
                (provision.PREPARE, "ok", prepared),
                (provision.DESCRIBE, *(("skipped", {}) if described_before else ("ok", {"stdout": text}))),
            ):
                on_event(PlayEvent(host="h02", task=task, kind=kind, result=result))
            seen.append(len(told))
            return super().run(request, on_event)

    plays = Plays({"h01": outcome(HostState.FAILED, cause="no room")})
    found = provision.provision(made.session, made.campaign, plays, RecordingWatch(), on_ready=told.append)
    assert seen == [1]
    assert [(item.host, item.state) for item in told] == [("h02", HostState.READY), ("h01", HostState.FAILED)]
    assert told[0].weights == {"tiny-bert": "b" * 64}
    assert told[0].lock
    assert told[0].changed == 0
    assert found == (told[1], told[0])


def test_hosts_that_are_left_out_are_not_asked_and_what_is_known_of_them_stays(tmp_path: Path) -> None:
    made = scene(tmp_path, TWO)
    plays = FakePlays()
    one, two = provision.provision(made.session, made.campaign, plays, RecordingWatch(), subset=Subset(limit=("h01",)))
    assert [list(request.hosts) for request in plays.requests] == [["h01"]]
    assert one.state is HostState.READY
    assert (two.state, two.cause) == (HostState.LEFT_OUT, "--limit h01")
    assert [item.state for item in handoff.readiness(made.session)] == [HostState.READY] * 2
    three, _ = provision.provision(
        made.session, made.campaign, plays, RecordingWatch(), spared=["h01"], subset=Subset(exclude=("h02",))
    )
    assert three.work_dir == one.work_dir
    assert len(plays.requests) == 1


def test_a_playbook_that_cannot_run_costs_only_the_hosts_that_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scene(tmp_path, TWO)

    class Broken(FakePlays):
        def run(self, request: PlayRequest, on_event: Callable[[PlayEvent], None]) -> dict[str, HostOutcome]:
            del on_event
            raise PlayError(f"{request.playbook}: broken", hint="look")

    with pytest.raises(PlayError):
        provision.provision(made.session, made.campaign, Broken(), RecordingWatch())
    given = provision.variables(made.session, made.campaign, describe=True)
    converged = {
        **PREFLIGHT,
        "cannot": {},
        "msg": "",
        "description": json.dumps(asdict(facts("aws-g5-xlarge"))),
        "stamps": {
            "python_env": given["python_env_digest"],
            "harness": given["harness_digest"],
            "assets": {"tiny-bert": given["assets_digest"]},
        },
    }
    said = {"h01": json.dumps(converged), "h02": ""}
    monkeypatch.setattr(reach, "connect", lambda host: FakeConnection([said[host.name]]))
    one, two = provision.provision(made.session, made.campaign, Broken(), RecordingWatch())
    assert one.state is HostState.READY
    assert (two.state, two.cause, two.hint) == (HostState.FAILED, "provision: broken", "look")


def test_a_host_that_is_away_keeps_the_place_of_its_files(tmp_path: Path) -> None:
    made = scene(tmp_path)
    provision.provision(made.session, made.campaign, FakePlays(), RecordingWatch())
    before = [item.work_dir for item in handoff.readiness(made.session)]
    gone = FakePlays({"h01": outcome(HostState.UNREACHABLE, cause="no answer")})
    (found,) = provision.provision(made.session, made.campaign, gone, RecordingWatch())
    assert (found.state, [found.work_dir]) == (HostState.UNREACHABLE, before)
    assert before != [""]


def an_instance(number: str, kind: str) -> Host:
    given = Instance(id=number, lease="l", type=kind)
    return Host(name="g5-1", kind=HostKind.EC2, connection="ssh", address="10.0.0.1", instance=given)


def provisioned(made: Scene, told: SystemFacts) -> Readiness:
    """What becomes of g5-1, which describes itself so."""
    plays = FakePlays({"g5-1": replace(outcome(results=described(told)), host="g5-1")})
    found = provision.provision(made.session, made.campaign, plays, RecordingWatch())
    return next(item for item in found if item.host == "g5-1")


def test_an_instance_has_its_type_in_the_lock_and_keeps_its_own_facts(tmp_path: Path) -> None:
    made = scene(tmp_path, instances=[an_instance("i-1", "g5.xlarge")])
    one, two = facts("aws-g5-xlarge"), facts("laptop-hybrid-cores")
    assert provisioned(made, one).lock["instance_type"] == "g5.xlarge"
    reachable, (first, _) = files.reachability(made.session), files.hosts(made.session)
    files.write(made.session, [first, an_instance("i-2", "g6.xlarge")], reachable, made.campaign)
    assert provisioned(made, two).lock["instance_type"] == "g6.xlarge"
    folder = made.session.provision / "facts"
    for path, kept in (("instances/i-1", one), ("instances/i-2", two), ("g5-1", two)):
        assert made.session.read(folder / f"{path}.json", SystemFacts) == kept


def test_a_finished_host_is_left_out_and_what_is_known_of_it_stays(tmp_path: Path) -> None:
    ended = Instance(id="i-1", lease="l", cause="finished: all home", home=True)
    gone = replace(an_instance("i-1", "g5.xlarge"), address="", instance=ended)
    made = scene(tmp_path, instances=[gone], lock={"instance_type": "g5.xlarge"})
    plays = FakePlays()
    found = provision.provision(made.session, made.campaign, plays, RecordingWatch())
    assert [(item.host, item.state, item.cause) for item in found][1:] == [
        ("g5-1", HostState.LEFT_OUT, "finished: all home")
    ]
    assert "g5-1" not in [name for request in plays.requests for name in request.hosts]
    kept = {item.host: item for item in handoff.readiness(made.session)}["g5-1"]
    assert (kept.state, kept.lock) == (HostState.READY, {"instance_type": "g5.xlarge"})
