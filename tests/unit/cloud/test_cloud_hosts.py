"""Leases as hosts: all that the campaign asks for, there or not, each with its address or its cause."""

import time
from pathlib import Path

import pytest

from fleet.campaign import Campaign
from fleet.cloud import hosts, keys
from fleet.cloud.leases import LeaseState
from fleet.handoff import Collected, CollectedFile, Plan, UnitRecord
from fleet.harness.contract import Market, UnitState
from fleet.inventory import static
from fleet.inventory.hosts import Host, Instance
from fleet.planning import Planner
from fleet.session import Session
from fleet.terms import HostKind
from tests.unit.cloud import ledger

NAMES = ["g5-1", "g5-2", "g5-3", "big-1"]


def instance(host: Host) -> Instance:
    assert host.instance is not None
    return host.instance


def causes(session: Session, campaign: Campaign) -> dict[str, str]:
    return {host.name: host.missing for host in hosts.planned(session, campaign)}


def test_every_instance_is_a_host_before_anything_is_launched(tmp_path: Path) -> None:
    session, campaign = ledger.session(tmp_path)
    found = hosts.planned(session, campaign)
    assert [host.name for host in found] == NAMES
    assert {host.missing for host in found} == {"not launched yet"}
    assert [(host.kind, host.address, host.launched, host.entry) for host in found] == [
        *[(HostKind.EC2, "", True, 0)] * 3,
        (HostKind.EC2, "", True, 1),
    ]
    assert [static.entry(host, campaign) for host in found] == [None] * 4


def test_a_campaign_without_instances_has_none(tmp_path: Path) -> None:
    text = ledger.CAMPAIGN.partition("cloud:")[0] + "hosts: [{name: h01, kind: server}]\n"
    assert hosts.planned(*ledger.session(tmp_path, text)) == ()


def test_a_launched_instance_has_all_that_is_needed_to_reach_it(tmp_path: Path) -> None:
    session, campaign = ledger.session(tmp_path)
    just_now = ledger.leased(1, 0, "g5-1", launched_at=time.time() - 60)
    ledger.write(session, ledger.lease(1, "g5-1", instances=(just_now,)))
    host = hosts.planned(session, campaign)[0]
    assert (host.address, host.user, host.missing) == ("203.0.113.0", "ubuntu", "")
    assert host.identity_file == str(keys.ensure(session).login_key)
    assert host.notes == {"cooling": "air", "hw_notes": "rented"}
    assert host.usd_per_hour == 1.006
    found = instance(host)
    assert (found.id, found.lease, found.type, found.zone) == ("i-10", f"lease-{1:024}", "g5.xlarge", "us-east-1a")
    assert (found.market, found.gpu, found.image, found.region) == ("on-demand", "a10g", "ami-1", "us-east-1")
    known = Path(found.known_hosts)
    assert known.is_absolute()
    assert known.read_text(encoding="ascii").startswith(f"{found.key_alias} ssh-ed25519 ")
    assert 500 < found.patience_s <= hosts.BOOT_S - 60


def test_nobody_waits_for_an_instance_that_should_have_answered_long_ago(tmp_path: Path) -> None:
    session, campaign = ledger.session(tmp_path)
    old = ledger.leased(1, 0, "g5-1", launched_at=ledger.NOW - 5000)
    ledger.write(session, ledger.lease(1, "g5-1", instances=(old,)))
    assert instance(hosts.planned(session, campaign)[0]).patience_s == 0


@pytest.mark.parametrize(
    ("address", "there", "used", "cause"),
    [
        ("auto", ("203.0.113.9", "10.0.0.9"), "203.0.113.9", ""),
        ("auto", ("", "10.0.0.9"), "10.0.0.9", ""),
        ("private", ("203.0.113.9", "10.0.0.9"), "10.0.0.9", ""),
        ("public", ("203.0.113.9", "10.0.0.9"), "203.0.113.9", ""),
        ("public", ("", "10.0.0.9"), "", "i-10 has no public address"),
        ("auto", ("", ""), "", "i-10 has no address yet"),
    ],
)
def test_the_address_is_the_one_that_the_campaign_asks_for(
    tmp_path: Path, address: str, there: tuple[str, str], used: str, cause: str
) -> None:
    session, campaign = ledger.session(tmp_path, ledger.CAMPAIGN.replace("cloud:\n", f"cloud:\n  address: {address}\n"))
    made = ledger.leased(1, 0, "g5-1", public_address=there[0], private_address=there[1])
    ledger.write(session, ledger.lease(1, "g5-1", instances=(made,)))
    host = hosts.planned(session, campaign)[0]
    assert host.address == used
    assert host.missing.startswith(cause)
    assert bool(host.missing) == bool(cause)


def test_refusals_are_named_each_once_with_what_was_asked_for(tmp_path: Path) -> None:
    session, campaign = ledger.session(tmp_path)
    refused = {"state": LeaseState.REFUSED, "instances": ()}
    ledger.write(
        session,
        ledger.lease(1, "g5-1", **refused, code="InsufficientInstanceCapacity", market="spot"),
        ledger.lease(2, "g5-1", **refused, code="InsufficientInstanceCapacity", market="spot"),
        ledger.lease(3, "g5-1", **refused, code="VcpuLimitExceeded", zone=""),
    )
    assert causes(session, campaign)["g5-1"] == (
        "InsufficientInstanceCapacity (g5.xlarge, spot, us-east-1a); VcpuLimitExceeded (g5.xlarge, on-demand, us-east-1)"
    )


def test_what_came_of_a_lease_that_brought_fewer_than_asked_for(tmp_path: Path) -> None:
    session, campaign = ledger.session(tmp_path)
    came = (ledger.leased(1, 0, "g5-1"),)
    ledger.write(
        session,
        ledger.lease(1, "g5-1", "g5-2", instances=came),
        ledger.lease(2, "g5-3", state=LeaseState.INTENDED, instances=()),
    )
    assert causes(session, campaign) == {
        "g5-1": "",
        "g5-2": "EC2 gave 1 of 2 (g5.xlarge, on-demand, us-east-1a)",
        "g5-3": "its launch was not seen to end (g5.xlarge, on-demand, us-east-1a)",
        "big-1": "not launched yet",
    }


def test_an_instance_that_ended_is_named_with_its_end_and_what_it_was(tmp_path: Path) -> None:
    session, campaign = ledger.session(tmp_path)
    ended = ledger.leased(1, 0, "g5-1", ended_at=1764072000.0, cause="spot interruption")
    ledger.write(
        session,
        ledger.lease(1, "g5-1", instances=(ended,)),
        ledger.lease(2, "g5-1", state=LeaseState.REFUSED, code="MaxSpotInstanceCountExceeded", instances=()),
    )
    (host, *_) = hosts.planned(session, campaign)
    assert host.missing == (
        "i-10 ended at 2025-11-25 12:00 UTC: spot interruption; "
        "MaxSpotInstanceCountExceeded (g5.xlarge, on-demand, us-east-1a)"
    )
    assert (instance(host).id, instance(host).type, host.address, host.finished) == ("i-10", "g5.xlarge", "", "")
    assert host.launched


def test_another_instance_takes_the_place_of_one_that_ended(tmp_path: Path) -> None:
    session, campaign = ledger.session(tmp_path)
    ended = ledger.leased(1, 0, "g5-1", ended_at=ledger.NOW)
    ledger.write(session, ledger.lease(1, "g5-1", instances=(ended,)), ledger.lease(2, "g5-1", type="g6.xlarge"))
    (host, *_) = hosts.planned(session, campaign)
    assert (instance(host).id, instance(host).type, host.missing) == ("i-20", "g6.xlarge", "")


def test_a_lease_that_is_over_says_so_before_anybody_has_seen_it(tmp_path: Path) -> None:
    session, campaign = ledger.session(tmp_path)
    ledger.write(session, ledger.lease(1, "g5-1", expires_at=1764072000.0))
    assert causes(session, campaign)["g5-1"] == "the lease of i-10 ended at 2025-11-25 12:00 UTC"


def done(session: Session, campaign: Campaign, *names: str) -> None:
    """All units of these hosts are done and home, of the others none."""
    planner = Planner(session, campaign, quick=True, ready={})
    units = tuple(spec for host in hosts.planned(session, campaign) for spec in planner.units(host))
    session.write(session.run / "plan.json", Plan(quick=True, units=units))
    home = {}
    for spec in units:
        if spec.host in names:
            record = UnitRecord(unit=spec.unit, host=spec.host, state=UnitState.DONE)
            session.write(session.run / "units" / f"{spec.unit}.json", record)
            home[spec.unit] = Collected(folder=f"collect/{spec.host}/{spec.unit}", complete=True)
    session.write(session.collect / "collected.json", CollectedFile(units=home))


def test_a_host_whose_units_are_home_is_finished_once_its_instance_has_ended(tmp_path: Path) -> None:
    session, campaign = ledger.session(tmp_path)
    ended = ledger.leased(1, 0, "g5-1", ended_at=1764072000.0)
    both = (ended, ledger.leased(1, 1, "g5-2"))
    ledger.write(session, ledger.lease(1, "g5-1", "g5-2", instances=both))
    done(session, campaign, "g5-1", "g5-2")
    one, two, three, _ = hosts.planned(session, campaign)
    assert one.finished == "finished: all its units are home; i-10 ended at 2025-11-25 12:00 UTC"
    assert (two.finished, two.missing) == ("", "")
    assert (three.finished, three.missing) == ("", "not launched yet")


def test_a_unit_that_is_done_and_not_home_keeps_its_host_unfinished(tmp_path: Path) -> None:
    session, campaign = ledger.session(tmp_path)
    done(session, campaign, "g5-1")
    assert hosts.finished(session) == {"g5-1"}
    session.write(session.collect / "collected.json", CollectedFile(units={}))
    assert hosts.finished(session) == set()


def test_specs_say_which_instance_measures(tmp_path: Path) -> None:
    session, campaign = ledger.session(tmp_path)
    ledger.write(session, ledger.lease(1, "g5-1"))
    planner = Planner(session, campaign, quick=True, ready={})
    assert [planner.units(host)[0].instance for host in hosts.planned(session, campaign)] == ["i-10", "", "", ""]


def test_specs_say_how_their_instance_was_bought(tmp_path: Path) -> None:
    session, campaign = ledger.session(tmp_path)
    ledger.write(session, ledger.lease(1, "g5-1"), ledger.lease(2, "g5-2", market="spot"))
    planner = Planner(session, campaign, quick=True, ready={})
    found = [planner.units(host)[0].market for host in hosts.planned(session, campaign)]
    assert found == [Market.ON_DEMAND, Market.SPOT, Market.UNKNOWN, Market.UNKNOWN]


def test_of_hosts_that_somebody_else_launched_only_those_on_ec2_are_asked_for_their_market(tmp_path: Path) -> None:
    text = "submitter: ExampleLab\nbenchmarks: [{name: tiny-bert}]\nhosts:\n"
    text += "".join(f"- {{name: {kind}, kind: {kind}}}\n" for kind in ("ec2", "server"))
    session, campaign = ledger.session(tmp_path, text)
    planner = Planner(session, campaign, quick=True, ready={})
    listed = static.hosts(campaign, base=tmp_path, source="fleet.yml")
    assert [planner.units(host)[0].market for host in listed] == [Market.UNKNOWN, Market.NONE]
