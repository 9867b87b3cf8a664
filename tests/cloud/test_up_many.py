"""Five hundred instances in one `up`: what it costs in calls, time and memory."""

import resource
import time

from fleet.cloud import leases
from fleet.cloud.up import up
from fleet.watch import Silent
from tests.cloud.cloud import Cloud
from tests.cloud.conftest import MakeSession
from tests.cloud.launching import entry, launched, running, text

COUNT = 500


def test_five_hundred_take_no_call_each(cloud: Cloud, make_session: MakeSession) -> None:
    session, read = make_session(text(instances=entry(count=COUNT), max_cost=10_000))
    hosts = [f"g5-{number}" for number in range(1, COUNT + 1)]
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.monotonic()
    assert up(session, read, Silent(), hosts=hosts) == {}
    wall = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    calls = cloud.counted()
    print(
        f"\n{COUNT} instances: {sum(calls.values())} calls {dict(calls)}, {wall:.1f} s, "
        f"{after.ru_utime - before.ru_utime:.1f} s of CPU, {after.ru_maxrss / 1024:.0f} MiB at most"
    )
    assert len(leases.read(session)) == 5
    assert launched(session).keys() == set(hosts)
    assert sorted(launched(session).values()) == running(cloud)
    assert calls["RunInstances"] == 5
    assert calls["TerminateInstances"] == calls["CreateTags"] == 0
    # Each page of DescribeInstances is a call, and there is no other that grows with the number of instances.
    assert sum(calls.values()) < 40
