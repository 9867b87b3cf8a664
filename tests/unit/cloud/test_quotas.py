"""Which quota counts an instance, and what is known of it."""

import pytest

from fleet.cloud import aws, quotas
from fleet.errors import CloudError
from tests.unit.cloud.answering import Answering, listed, refused


@pytest.mark.parametrize(
    ("kind", "market", "code"),
    [
        ("g5.xlarge", "on-demand", "L-DB2E81BA"),
        ("g6e.48xlarge", "spot", "L-3819A6DF"),
        ("gr6.4xlarge", "on-demand", "L-DB2E81BA"),
        ("vt1.3xlarge", "spot", "L-3819A6DF"),
        ("p4d.24xlarge", "on-demand", "L-417A185B"),
        ("p4d.24xlarge", "spot", "L-7212CCBC"),
        ("p5en.48xlarge", "on-demand", "L-417A185B"),
        ("p5en.48xlarge", "spot", "L-C4BD4855"),
        ("p6-b200.48xlarge", "on-demand", "L-417A185B"),
        ("p6-b200.48xlarge", "spot", ""),
        ("c7i.large", "on-demand", "L-1216C47A"),
        ("im4gn.large", "spot", "L-34B43A08"),
        ("t3.micro", "spot", "L-34B43A08"),
        ("inf2.xlarge", "on-demand", "L-1945791B"),
        ("trn1.2xlarge", "spot", "L-6B0D517C"),
        ("x2idn.16xlarge", "on-demand", "L-7295265B"),
        ("dl1.24xlarge", "spot", "L-85EED4F7"),
        ("f2.6xlarge", "on-demand", "L-74FC7D96"),
        ("mac2.metal", "on-demand", ""),
        ("u-6tb1.metal", "on-demand", ""),
        ("hpc7g.4xlarge", "on-demand", ""),
    ],
)
def test_the_quota_of_a_type(kind: str, market: str, code: str) -> None:
    assert quotas.code(kind, market) == code


RUNNING = {
    "Instances": [
        {"InstanceType": "g5.xlarge"},
        {"InstanceType": "g5.xlarge", "InstanceLifecycle": "spot"},
        {"InstanceType": "g4dn.12xlarge", "CpuOptions": {"CoreCount": 24, "ThreadsPerCore": 2}},
        {"InstanceType": "c7i.large", "CpuOptions": {"CoreCount": 1, "ThreadsPerCore": 2}},
    ]
}
G, G_SPOT = "L-DB2E81BA", "L-3819A6DF"


def test_what_runs_counts_against_its_own_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Answering(
        describe_instances=listed(RUNNING),
        get_service_quota=lambda QuotaCode, **_: {"Quota": {"Value": 64.0 if QuotaCode == G else 8.0}},  # noqa: N803
    )
    monkeypatch.setattr(aws, "client", asked)
    found = quotas.look("us-east-1", {G, G_SPOT, ""}, {"g5.xlarge": 4})
    assert (found[G].limit, found[G].used, found[G].free) == (64, 52, 12)
    assert (found[G_SPOT].limit, found[G_SPOT].used, found[G_SPOT].free) == (8, 4, 4)
    assert asked.asked == {"describe_instances": 1, "get_service_quota": 2}


def test_what_nobody_says_is_unknown_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = Answering(describe_instances=listed(), get_service_quota=refused("NoSuchResourceException"))
    monkeypatch.setattr(aws, "client", limited)
    found = quotas.look("us-east-1", {G}, {})[G]
    assert (found.limit, found.used, found.free) == (None, 0, None)
    assert "NoSuchResource" in found.cause
    blind = Answering(
        describe_instances=refused("UnauthorizedOperation"), get_service_quota=lambda **_: {"Quota": {"Value": 8}}
    )
    monkeypatch.setattr(aws, "client", blind)
    found = quotas.look("us-east-1", {G}, {})[G]
    assert (found.limit, found.used, found.free) == (8, None, None)
    assert "Unauthorized" in found.cause
    monkeypatch.setattr(aws, "client", Answering(describe_instances=listed(), get_service_quota=lambda **_: {}))
    assert quotas.look("us-east-1", {G}, {})[G].free is None


def test_without_credentials_nothing_is_unknown_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "client", Answering(describe_instances=refused(aws.NO_CREDENTIALS)))
    with pytest.raises(CloudError, match=aws.NO_CREDENTIALS):
        quotas.look("us-east-1", {G}, {})
