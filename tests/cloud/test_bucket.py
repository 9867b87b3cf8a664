"""Results by way of S3: a real harness process puts archives into moto's bucket, and what comes from there is not trusted."""

import hashlib
import io
import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, urlsplit

import pytest

from fleet import campaign as campaigns
from fleet import collect, transfers
from fleet import session as sessions
from fleet.cloud import aws, bucket, up
from fleet.cloud_settings import CloudSettings, ResultsBucket
from fleet.errors import CloudError
from fleet.handoff import Collected, Plan, Readiness, ReadinessFile
from fleet.harness import packing, push
from fleet.harness.contract import Reason, UnitState
from fleet.inventory import reach
from fleet.session import Session
from fleet.terms import HostState
from tests.cloud.cloud import Cloud
from tests.unit.collecting import UNIT, record, spec_of, unit_folder
from tests.unit.fakes import RecordingWatch
from tests.unit.harness.units import TOP

NAME = "results-of-lab"
OTHER = UNIT.replace("performance", "accuracy")
SECRET = "X-Amz-Signature"
CAMPAIGN = f"""\
submitter: ExampleLab
benchmarks: [{{name: tiny-bert}}]
hosts: [{{name: h01, kind: server}}]
cloud:
  max_cost: 1
  regions: [eu-central-1]
  instances: [{{name: g5, types: [g5.xlarge]}}]
  results: {{bucket: {NAME}, prefix: some/where}}
"""


class Here(reach.LocalConnection):
    """This machine as the host; what is said to it is kept."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.addresses: list[str] = []
        self.answers: dict[str, reach.Answer | reach.Unreachable] = {}
        """Instead of what a verb says."""

    def run(self, command: str, *, timeout: float, stdin: bytes = b"", stalled: float | None = None) -> reach.Answer:
        self.commands.append(command)
        if stdin:
            self.addresses.append(json.loads(stdin)["address"])
        for verb, answer in self.answers.items():
            if f" {verb} " in command:
                if isinstance(answer, reach.Unreachable):
                    raise answer
                return answer
        return super().run(command, timeout=timeout, stdin=stdin, stalled=stalled)

    def copy(self, command: str, sink: BinaryIO, *, limit: int, stalled: float = 15.0) -> None:
        self.commands.append(command)
        super().copy(command, sink, limit=limit, stalled=stalled)

    def verbs(self) -> list[str]:
        """What the harness was asked for, in order."""
        known = {"pack", "push", "send", "home"}
        return [word for command in self.commands for word in command.split() if word in known]


@pytest.fixture
def store(cloud: Cloud) -> Any:
    """A client of the S3 in which the bucket is."""
    client = cloud.client("s3", "eu-central-1")
    client.create_bucket(Bucket=NAME, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    return client


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    """A host with its harness, in a folder with a space."""
    work = tmp_path / "w o"
    (work / "venv" / "bin").mkdir(parents=True)
    (work / "venv" / "bin" / "python").symlink_to(sys.executable)
    (work / "harness" / "current").mkdir(parents=True)
    start = f"import sys; sys.path.insert(0, {str(TOP)!r}); from fleet.harness.__main__ import main; sys.exit(main())\n"
    (work / "harness" / "current" / "__main__.py").write_text(start, encoding="utf-8")
    connection = Here()
    monkeypatch.setattr(reach, "connect", lambda _: connection)
    return connection


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """Two units have ended on the host, and nothing is home."""
    made = sessions.create(tmp_path / "sessions", CAMPAIGN, name="s1")
    made.write(made.inventory / "hosts.json", [{"name": "h01", "kind": "server", "connection": "ssh", "address": "h"}])
    made.write(made.run / "plan.json", Plan(quick=False, units=(spec_of(UNIT), spec_of(OTHER))))
    work = str(tmp_path / "w o")
    ready = Readiness(host="h01", state=HostState.READY, work_dir=work)
    made.write(made.provision / "readiness.json", ReadinessFile(hosts=(ready,)))
    for unit in (UNIT, OTHER):
        record(made, unit, UnitState.DONE)
        unit_folder(tmp_path / "w o" / "runs" / made.token / unit)
    return made


def keys(store: Any) -> list[str]:
    return [found["Key"] for found in store.list_objects_v2(Bucket=NAME).get("Contents", [])]


def is_home(session: Session, found: dict[str, Collected]) -> bool:
    return found == {
        unit: Collected(folder=f"collect/h01/{unit}", complete=True, attempt=1) for unit in (UNIT, OTHER)
    } and all(collect.verify(session.collect / "h01" / unit) == "" for unit in (UNIT, OTHER))


def lies_somewhere(word: str, *folders: Path) -> list[Path]:
    """Files that hold a word."""
    return [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and word.encode() in path.read_bytes()
    ]


def test_archives_go_by_way_of_the_bucket_and_are_verified_here(
    tmp_path: Path, session: Session, here: Here, store: Any
) -> None:
    watch = RecordingWatch()
    assert is_home(session, collect.collect(session, watch))
    assert here.verbs() == ["pack", "push", "home"] * 2
    assert watch.notes == []
    digests = [packing.pack(tmp_path / "w o", session.token, unit)["sha256"] for unit in (UNIT, OTHER)]
    wanted = [f"some/where/{session.token}/{unit}/{sha}.tar" for unit, sha in zip((UNIT, OTHER), digests, strict=True)]
    assert sorted(keys(store)) == sorted(wanted)
    data = store.get_object(Bucket=NAME, Key=wanted[0])["Body"].read()
    assert hashlib.sha256(data).hexdigest() == digests[0]
    assert list((session.collect / ".incoming").iterdir()) == []


def test_an_address_is_seen_nowhere(  # noqa: PLR0917 - wherever it could be seen
    tmp_path: Path, session: Session, here: Here, store: Any, cloud: Cloud,
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    cloud.delay("PUT", 1.0, service="s3", times=None)
    lines: set[bytes] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            for process in Path("/proc").glob("[0-9]*"):
                for part in ("cmdline", "environ"):
                    with suppress(OSError):
                        lines.add((process / part).read_bytes())

    looking = threading.Thread(target=look)
    looking.start()
    with caplog.at_level("INFO"):
        found = collect.collect(session, RecordingWatch())
    over.set()
    looking.join()
    assert is_home(session, found)
    assert keys(store)
    # The processes that had it were seen, and it was one that would be recognised.
    assert any(b"push\0" in line for line in lines)
    assert len(here.addresses) == 2
    assert all(SECRET in address for address in here.addresses)
    signatures = [parse_qs(urlsplit(address).query)[SECRET][0] for address in here.addresses]
    out, err = capfd.readouterr()
    said = [*here.commands, caplog.text, out, err, *(line.decode(errors="replace") for line in lines)]
    for word in (SECRET, *signatures):
        assert not [text for text in said if word in text]
        assert lies_somewhere(word, session.root, tmp_path / "w o") == []


def test_an_address_is_good_for_that_archive_alone_in_the_buckets_own_region(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    sha = hashlib.sha256(b"x").hexdigest()
    for region in ("us-east-1", "eu-west-3"):
        made = bucket.Bucket(ResultsBucket(bucket=NAME, prefix="", region=None), region, "t1")
        parts = urlsplit(made.address("u", sha, 17))
        assert parts.scheme == "https"
        assert parts.netloc == f"{NAME}.s3.{region}.amazonaws.com"
        assert parts.path == f"/t1/u/{sha}.tar"
        query = parse_qs(parts.query)
        assert query["X-Amz-SignedHeaders"] == ["content-length;host;x-amz-checksum-sha256"]
        assert query["X-Amz-Expires"] == ["3600"]
    del cloud


def test_what_the_bucket_refuses_comes_by_ssh_and_is_tried_once_a_host(
    session: Session, here: Here, store: Any, cloud: Cloud
) -> None:
    cloud.fault("PUT", "AccessDenied", service="s3", times=None)
    watch = RecordingWatch()
    assert is_home(session, collect.collect(session, watch))
    assert here.verbs() == ["pack", "push", "send", "home", "pack", "send", "home"]
    said = "h01: not by way of s3://results-of-lab: the bucket said 403 AccessDenied; its files come by ssh"
    assert watch.notes == [said]
    assert keys(store) == []


def test_a_bucket_that_is_busy_is_asked_again(session: Session, here: Here, store: Any, cloud: Cloud) -> None:
    cloud.fault("PUT", "SlowDown", service="s3", times=1)
    cloud.fault("PUT", kind="lost", service="s3", times=1)
    watch = RecordingWatch()
    assert is_home(session, collect.collect(session, watch))
    assert "send" not in here.verbs()
    assert watch.notes == []
    assert len(keys(store)) == 2


def test_without_a_bucket_everything_comes_by_ssh(session: Session, here: Here, cloud: Cloud) -> None:
    del cloud
    watch = RecordingWatch()
    assert is_home(session, collect.collect(session, watch))
    assert watch.notes == [
        "h01: not by way of s3://results-of-lab: the bucket said 404 NoSuchBucket; its files come by ssh"
    ]
    assert here.verbs().count("send") == 2


def test_without_credentials_everything_comes_by_ssh(
    session: Session, here: Here, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cloud
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    watch = RecordingWatch()
    assert is_home(session, collect.collect(session, watch))
    assert watch.notes == ["h01: not by way of s3://results-of-lab: no AWS credentials; its files come by ssh"]
    assert "push" not in here.verbs()


def test_what_somebody_put_there_instead_is_not_taken(
    session: Session, here: Here, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = bucket.Bucket.fetch

    def swapped(self: bucket.Bucket, unit: str, sha256: str, sink: BinaryIO, size: int) -> None:
        store.put_object(Bucket=NAME, Key=self.key(unit, sha256), Body=b"x" * size)
        fetch(self, unit, sha256, sink, size)

    monkeypatch.setattr(bucket.Bucket, "fetch", swapped)
    watch = RecordingWatch()
    assert is_home(session, collect.collect(session, watch))
    assert "its sha256 is not the one announced; its files come by ssh" in watch.notes[0]
    assert here.verbs() == ["pack", "push", "send", "home", "pack", "send", "home"]


@pytest.mark.parametrize("body", [b"", b"short", b"y" * 100_000])
def test_an_object_of_another_size_is_not_taken(
    session: Session, here: Here, store: Any, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    fetch = bucket.Bucket.fetch

    def swapped(self: bucket.Bucket, unit: str, sha256: str, sink: BinaryIO, size: int) -> None:
        store.put_object(Bucket=NAME, Key=self.key(unit, sha256), Body=body)
        fetch(self, unit, sha256, sink, size)

    monkeypatch.setattr(bucket.Bucket, "fetch", swapped)
    watch = RecordingWatch()
    assert is_home(session, collect.collect(session, watch))
    assert len(watch.notes) == 1
    assert here.verbs().count("send") == 2


def test_a_download_that_broke_off_goes_on_where_it_stopped(
    session: Session, here: Here, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del store
    download, ranges = aws.Client.download, list[str]()

    def broken(self: aws.Client, sink: BinaryIO, *, limit: int, **arguments: Any) -> None:
        ranges.append(arguments["Range"])
        if len(ranges) == 1:
            whole = io.BytesIO()
            download(self, whole, limit=limit, **arguments)
            sink.write(whole.getvalue()[:100])
            raise CloudError("cut", code=aws.NO_ANSWER)
        download(self, sink, limit=limit, **arguments)

    monkeypatch.setattr(aws.Client, "download", broken)
    assert is_home(session, collect.collect(session, RecordingWatch()))
    assert ranges == ["bytes=0-", "bytes=100-", "bytes=0-"]
    assert "send" not in here.verbs()


def test_what_had_come_by_ssh_is_not_fetched_twice(
    tmp_path: Path, session: Session, here: Here, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del store, here
    whole = io.BytesIO()
    packing.send(tmp_path / "w o", session.token, UNIT, 0, whole)
    sha = hashlib.sha256(whole.getvalue()).hexdigest()
    begun = session.collect / ".incoming" / f"{UNIT}.{sha}.tar"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(whole.getvalue()[:200])
    download, ranges = aws.Client.download, list[str]()

    def watched(self: aws.Client, sink: BinaryIO, *, limit: int, **arguments: Any) -> None:
        ranges.append(arguments["Range"])
        download(self, sink, limit=limit, **arguments)

    monkeypatch.setattr(aws.Client, "download", watched)
    assert is_home(session, collect.collect(session, RecordingWatch()))
    assert ranges[0] == "bytes=200-"


def test_a_host_that_falls_silent_while_it_pushes_is_lost_as_ever(session: Session, here: Here, store: Any) -> None:
    del store
    here.answers["push"] = reach.Unreachable(HostState.UNREACHABLE, "no answer in 15 s")
    found = collect.collect(session, RecordingWatch())
    assert found[UNIT].reason is Reason.UNREACHABLE
    assert "send" not in here.verbs()


def test_words_of_a_host_that_repeat_its_address_are_not_said(session: Session, here: Here, store: Any) -> None:
    del store
    here.answers["push"] = reach.Answer(rc=1, out="", err=f"cannot reach http://x/?{SECRET}=0123\n")
    watch = RecordingWatch()
    assert is_home(session, collect.collect(session, watch))
    assert watch.notes == ["h01: not by way of s3://results-of-lab: it cannot push; its files come by ssh"]


def test_what_s3_does_not_take_at_once_comes_by_ssh(
    session: Session, here: Here, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "PUT_LIMIT", 10)
    assert is_home(session, collect.collect(session, RecordingWatch()))
    assert "push" not in here.verbs()
    assert keys(store) == []


# --- the host's side


@pytest.mark.parametrize("change", ["longer", "shorter", "another", "gone"])
def test_files_that_changed_since_they_were_packed_come_to_lie_nowhere(
    tmp_path: Path, session: Session, store: Any, change: str
) -> None:
    work, folder = tmp_path / "w o", tmp_path / "w o" / "runs" / session.token / UNIT
    told = packing.pack(work, session.token, UNIT)
    told["address"] = _bucket("eu-central-1").address(UNIT, told["sha256"], told["size"])
    log = folder / "mlperf_log_detail.txt"
    if change == "gone":
        log.unlink()
    else:
        log.write_bytes({"longer": os.urandom(300_000), "shorter": b"", "another": log.read_bytes()[::-1]}[change])
    before = time.monotonic()
    with pytest.raises(push.PushError, match="its files have changed since they were packed"):
        push.push(work, session.token, UNIT, told)
    assert time.monotonic() - before < push.TIMEOUT_S
    assert keys(store) == []


@pytest.mark.parametrize(
    "told", [{}, {"address": "x", "size": "y", "sha256": "00"}, {"address": "x", "size": 1, "sha256": "z"}]
)
def test_a_push_that_was_told_nonsense_says_so(tmp_path: Path, told: dict[str, Any]) -> None:
    with pytest.raises(push.PushError, match="it was not told what to put where"):
        push.push(tmp_path, "s", "u", told)


@pytest.mark.parametrize(
    "address",
    [f"nonsense?{SECRET}=1", f"http://h/a b?{SECRET}=1", f"http://[?{SECRET}=1", f"http://127.0.0.1:1/?{SECRET}=1"],
)
def test_what_is_wrong_with_an_address_is_said_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(push, "PAUSE_S", 0.01)
    (tmp_path / "runs" / "s" / "u").mkdir(parents=True)
    told = {"address": address, **packing.pack(tmp_path, "s", "u")}
    with pytest.raises(push.PushError) as caught:
        push.push(tmp_path, "s", "u", told)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


# --- before anything costs money


def _bucket(region: str) -> bucket.Bucket:
    return bucket.Bucket(ResultsBucket(bucket=NAME, prefix="", region=None), region, "t1")


def settings(**results: str) -> CloudSettings:
    entry = {"name": "g5", "types": ["g5.xlarge"]}
    return CloudSettings.model_validate(
        {"instances": [entry], "max_cost": 1, "regions": ["eu-central-1"], "results": {"bucket": NAME, **results}}
    )


def test_a_check_leaves_nothing_behind(store: Any, cloud: Cloud) -> None:
    bucket.check(settings(prefix="a/b/"))
    methods = [call["action"] for call in cloud.calls(service="s3")][-3:]
    assert methods == ["PUT", "GET", "DELETE"]
    assert keys(store) == []


def test_a_campaign_without_a_bucket_has_nothing_to_check(cloud: Cloud) -> None:
    bucket.check(None)
    bucket.check(settings().model_copy(update={"results": None}))
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("code", "status", "said", "hint"),
    [
        ("AccessDenied", 403, "access denied", "s3:PutObject"),
        ("PermanentRedirect", 301, "it is not in eu-central-1", "cloud.results.region"),
        ("TemporaryRedirect", 307, "it is not in eu-central-1", "cloud.results.region"),
        ("AuthorizationHeaderMalformed", 400, "it is not in eu-central-1", "cloud.results.region"),
        ("ServiceUnavailable", 503, "503 ServiceUnavailable", ""),
    ],
)
def test_what_is_wrong_with_a_bucket_is_said_before_anything_costs(  # noqa: PLR0917 - two are fixtures
    store: Any, cloud: Cloud, code: str, status: int, said: str, hint: str
) -> None:
    del store
    cloud.fault("PUT", code, status=status, service="s3", times=None)
    with pytest.raises(CloudError) as caught:
        bucket.check(settings())
    assert caught.value.code == code
    assert said in caught.value.message
    assert NAME in caught.value.message
    assert hint in caught.value.hint
    assert SECRET not in caught.value.message


def test_a_bucket_that_is_not_there_is_said(cloud: Cloud) -> None:
    del cloud
    with pytest.raises(CloudError) as caught:
        bucket.check(settings())
    assert caught.value.message == "cloud.results: s3://results-of-lab: there is no such bucket"
    assert caught.value.hint.startswith("aws s3 mb s3://results-of-lab --region eu-central-1")


def test_with_such_a_bucket_nothing_is_launched(tmp_path: Path, cloud: Cloud) -> None:
    text = CAMPAIGN.replace("hosts: [{name: h01, kind: server}]\n", "").replace("max_cost: 1", "max_cost: 100")
    made = sessions.create(tmp_path / "sessions", text, name="s1")
    with pytest.raises(CloudError, match="there is no such bucket"):
        up.up(made, campaigns.load_text(text, "fleet.yml"), RecordingWatch(), hosts=["g5-1"])
    assert cloud.counted()["RunInstances"] == 0
    assert cloud.counts() == {"instances": 0, "key_pairs": 0, "groups": 0, "volumes": 0}


@pytest.mark.parametrize("action", ["GET", "DELETE"])
def test_a_permission_that_is_lacking_later_is_said_too(store: Any, cloud: Cloud, action: str) -> None:
    del store
    cloud.fault(action, "AccessDenied", service="s3", times=None)
    with pytest.raises(CloudError, match="access denied") as caught:
        bucket.check(settings())
    assert "s3:DeleteObject" in caught.value.hint


def test_a_bucket_that_cannot_be_reached_is_said(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    del cloud
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(CloudError, match="no answer") as caught:
        bucket.check(settings())
    assert caught.value.code == aws.NO_ANSWER


def test_the_buckets_region_is_its_own_or_the_first() -> None:
    found = bucket.of_settings(settings(region="us-west-2"), "t")
    assert found is not None
    assert found.region == "us-west-2"
    found = bucket.of_settings(settings(), "t")
    assert found is not None
    assert found.region == "eu-central-1"


def test_results_of_a_session_are_below_its_own_name(session: Session) -> None:
    found = bucket.of_settings(settings(prefix="/p/"), session.token)
    assert found is not None
    assert found.key("u", "0" * 64) == f"p/{session.token}/u/{'0' * 64}.tar"
