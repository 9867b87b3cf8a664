"""Instances that somebody else launched, taken in by their tags: named, kept, and never touched."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fleet import campaign as campaigns
from fleet import session as sessions
from fleet.campaign import Campaign
from fleet.cli import main
from fleet.cloud import aws, leases, tagged
from fleet.cloud.leases import Lease, Leased, LeaseState
from fleet.errors import CampaignError, CloudError
from fleet.inventory import files, reach, static
from fleet.inventory.hosts import Host, Instance
from fleet.session import Session
from fleet.terms import HostState
from tests.cloud.cloud import Cloud
from tests.unit.fakes import FakeConnection

CAMPAIGN = """\
submitter: ExampleLab
benchmarks: [{name: tiny-bert, backend: "null", scenarios: [Offline]}]
hosts:
  - {name: taken, kind: server, address: 192.0.2.1}
  - ec2_tag: {Project: bench, Stage: "te*"}
    region: us-east-1
    kind: ec2
    user: admin
    python: /opt/python
    notes: {cooling: air}
"""
TAGS = {"Project": "bench", "Stage": "test"}
ANSWER = "hostname h\nhome /home/admin\npython 3.12.1 /opt/python\n"


@pytest.fixture
def made(cloud: Cloud, tmp_path: Path) -> tuple[Session, Campaign]:
    del cloud
    return sessions.create(tmp_path / "sessions", CAMPAIGN, name="s1"), campaigns.load_text(CAMPAIGN, "fleet.yml")


def launch(cloud: Cloud, tags: Mapping[str, str], *, count: int = 1, kind: str = "g5.xlarge", region: str = "us-east-1",
           **more: Any) -> list[str]:  # fmt: skip
    """Somebody launches instances."""
    ec2 = cloud.client("ec2", region)
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    listed = [{"Key": key, "Value": value} for key, value in tags.items()]
    answer = ec2.run_instances(
        ImageId=image, InstanceType=kind, MinCount=count, MaxCount=count,
        TagSpecifications=[{"ResourceType": "instance", "Tags": listed}], **more,
    )  # fmt: skip
    return [item["InstanceId"] for item in answer["Instances"]]


def found(made: tuple[Session, Campaign]) -> dict[str, Host]:
    session, campaign = made
    return {host.name: host for host in tagged.every(session, campaign, base=session.root, source="fleet.yml")}


def taken_in(made: tuple[Session, Campaign]) -> dict[str, Host]:
    """As `found`, and kept as the inventory stage keeps them."""
    session, campaign = made
    named = found(made)
    hosts = [*static.hosts(campaign, base=session.root, source="fleet.yml"), *named.values()]
    files.write(session, hosts, [], campaign)
    return named


def instance(host: Host) -> Instance:
    assert host.instance is not None
    return host.instance


def test_running_instances_with_all_tags_are_hosts_by_their_name_tags(
    cloud: Cloud, made: tuple[Session, Campaign]
) -> None:
    (one,) = launch(cloud, {**TAGS, "Name": "trainer.lab"})
    launch(cloud, {"Project": "bench", "Name": "no-stage"})
    launch(cloud, {**TAGS, "Stage": "production", "Name": "other-stage"})
    launch(cloud, {**TAGS, "Name": "elsewhere"}, region="eu-west-1")
    (stopped,) = launch(cloud, {**TAGS, "Name": "stopped"})
    cloud.client("ec2").stop_instances(InstanceIds=[stopped])
    hosts = found(made)
    assert list(hosts) == ["trainer.lab"]
    host, given = hosts["trainer.lab"], instance(hosts["trainer.lab"])
    assert (given.id, given.type, given.region, given.gpu) == (one, "g5.xlarge", "us-east-1", "a10g")
    assert given.zone.startswith("us-east-1")
    assert (given.market, given.lease, given.known_hosts, given.cause, given.patience_s) == ("on-demand", "", "", "", 0)
    assert (host.user, host.python, host.notes, host.launched) == ("admin", "/opt/python", {"cooling": "air"}, False)
    entry = static.entry(host, made[1])
    assert entry is not None
    assert entry.ec2_tag == {"Project": "bench", "Stage": "te*"}


def test_names_that_are_doubtful_are_ids(cloud: Cloud, made: tuple[Session, Campaign]) -> None:
    twins = launch(cloud, {**TAGS, "Name": "twin"}, count=2)
    odd = launch(cloud, {**TAGS, "Name": "a name/with ../things"})
    taken = launch(cloud, {**TAGS, "Name": "taken"})
    nameless = launch(cloud, TAGS)
    assert set(found(made)) == {*twins, *odd, *taken, *nameless}


@pytest.mark.parametrize(
    ("address", "key"), [("public", "PublicIpAddress"), ("private", "PrivateIpAddress"), ("id", "InstanceId")]
)
def test_the_address_is_the_one_that_is_asked_for(cloud: Cloud, tmp_path: Path, address: str, key: str) -> None:
    (number,) = launch(cloud, TAGS)
    text = CAMPAIGN.replace("user: admin", f"user: admin\n    address: {address}")
    session = sessions.create(tmp_path / "sessions", text, name="s1")
    host = found((session, campaigns.load_text(text, "fleet.yml")))[number]
    said = cloud.client("ec2").describe_instances(InstanceIds=[number])["Reservations"][0]["Instances"][0]
    assert host.address == said[key]


def test_one_that_is_gone_stays_with_its_name_and_the_cause(cloud: Cloud, made: tuple[Session, Campaign]) -> None:
    (one,) = launch(cloud, {**TAGS, "Name": "a"})
    assert list(taken_in(made)) == ["a"]
    cloud.client("ec2").terminate_instances(InstanceIds=[one])
    (two,) = launch(cloud, {**TAGS, "Name": "a"})
    hosts = taken_in(made)
    assert set(hosts) == {"a", two}
    assert hosts["a"].missing == f"{one} is not among the running instances with Project=bench Stage=te* any more"
    assert hosts[two].missing == ""
    state = reach.probe(hosts["a"])
    assert (state.state, state.hint) == (HostState.UNREACHABLE, "fleet inventory")


def test_a_name_tag_that_changes_makes_no_other_host(cloud: Cloud, made: tuple[Session, Campaign]) -> None:
    (one,) = launch(cloud, {**TAGS, "Name": "before"})
    taken_in(made)
    cloud.client("ec2").create_tags(Resources=[one], Tags=[{"Key": "Name", "Value": "after"}])
    assert [(name, instance(host).id) for name, host in taken_in(made).items()] == [("before", one)]


def test_instances_of_the_sessions_own_leases_are_not_taken_in_again(
    cloud: Cloud, made: tuple[Session, Campaign]
) -> None:
    (one,) = launch(cloud, TAGS)
    lease = Lease(
        id="lease-1", hosts=("x-1",), region="us-east-1", zone="", subnet="", type="g5.xlarge", market="spot", image="",
        root_device="", volume_gib=8, key_name="", security_group="", owner="me", usd_per_hour=1, price_source="table",
        written_at=1, first_expires_at=2, expires_at=2, state=LeaseState.LAUNCHED,
        instances=(Leased(id=one, host="x-1"),),
    )  # fmt: skip
    leases.write(made[0], lease)
    assert found(made) == {}


def test_many_take_no_call_each(cloud: Cloud, made: tuple[Session, Campaign]) -> None:
    launch(cloud, TAGS, count=60)
    launch(cloud, TAGS, count=60, kind="m7i.large")
    cloud.forget_calls()
    assert len(found(made)) == 120
    assert sum(cloud.counted().values()) <= 3


def test_a_region_must_be_known(cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del cloud
    text = CAMPAIGN.replace("    region: us-east-1\n", "")
    session = sessions.create(tmp_path / "sessions", text, name="s1")
    made = (session, campaigns.load_text(text, "fleet.yml"))
    assert found(made) == {}
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    aws._session.cache_clear()
    with pytest.raises(CloudError, match="in which region") as caught:
        found(made)
    assert "--region" in caught.value.hint


def test_ec2_that_cannot_be_asked_is_an_error_and_no_empty_fleet(cloud: Cloud, made: tuple[Session, Campaign]) -> None:
    cloud.fault("DescribeInstances", "UnauthorizedOperation", times=None)
    with pytest.raises(CloudError, match="UnauthorizedOperation"):
        found(made)


# --- as it is typed


@pytest.fixture
def typed(cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a campaign of one host that answers, as all others do."""
    del cloud
    (tmp_path / "fleet.yml").write_text(CAMPAIGN.partition("  - ec2_tag")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reach, "SshConnection", lambda _: FakeConnection([ANSWER]))
    return tmp_path


def invoke(*words: str) -> tuple[int, Any]:
    result = CliRunner().invoke(main.cli, words, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return int(result.return_value), json.loads(result.stdout) if "--json" in words else result.output


def test_from_ec2_takes_them_in_for_the_rest_of_the_session(cloud: Cloud, typed: Path) -> None:
    (one,) = launch(cloud, {**TAGS, "Name": "a=b"}, region="eu-west-1")
    code, rows = invoke(
        "inventory", "--json", "--from-ec2", "Name=a=b", "--from-ec2", "Stage=test", "--region", "eu-west-1"
    )
    assert (code, [row["host"] for row in rows]) == (0, ["taken", one])
    code, rows = invoke("inventory", "--json")
    assert [row["host"] for row in rows] == ["taken", one]
    (session,) = (typed / "sessions").iterdir()
    written = files.hosts(Session(session))
    assert [host.entry for host in written] == [0, None]
    assert static.entry(written[1], campaigns.load(typed / "fleet.yml")) is None
    text = (session / "inventory" / "hosts.yml").read_text(encoding="utf-8")
    assert "type_g5_xlarge" in text


def test_limit_knows_them(cloud: Cloud, typed: Path) -> None:
    (typed / "fleet.yml").write_text(CAMPAIGN, encoding="utf-8")
    launch(cloud, {**TAGS, "Name": "a1"})
    launch(cloud, {**TAGS, "Name": "a2"})
    code, rows = invoke("inventory", "--json", "--limit", "a*", "--exclude", "a2")
    assert code == 3
    assert {row["host"]: row["state"] for row in rows} == {"taken": "left-out", "a1": "ready", "a2": "left-out"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--from-ec2", "Project"), "not KEY=VALUE"),
        (("--from-ec2", "=x"), "not KEY=VALUE"),
        (("--from-ec2", "a=1", "--from-ec2", "a=2"), "given twice"),
        (("--from-ec2", "a=1", "--region", "US East"), "no region's name"),
        (("--region", "us-east-1"), "only with --from-ec2"),
    ],
)
def test_what_is_typed_wrong_makes_no_session(typed: Path, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(CampaignError, match=said):
        invoke("inventory", *words)
    assert not (typed / "sessions").exists()


def test_a_source_is_remembered_once(made: tuple[Session, Campaign]) -> None:
    source = tagged.Source(tags={"a": "1"}, regions=("us-east-1",))
    for one in (source, source, replace(source, regions=())):
        tagged.remember(made[0], one)
    assert tagged.told(made[0]) == (source, replace(source, regions=()))
