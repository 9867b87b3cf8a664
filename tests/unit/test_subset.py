"""--limit and --exclude: ranges and patterns over host names, and slips of the finger."""

import pytest

from fleet.errors import CampaignError
from fleet.subset import EVERYTHING, Subset, matching

HOSTS = ["gpu01", "gpu02", "gpu03", "lab-a"]


@pytest.mark.parametrize(
    ("subset", "left"),
    [
        (EVERYTHING, HOSTS),
        (Subset(limit=("gpu[01-02]",)), ["gpu01", "gpu02"]),
        (Subset(limit=("gpu01,lab-a",)), ["gpu01", "lab-a"]),
        (Subset(limit=("gpu*",), exclude=("gpu0?",)), []),
        (Subset(limit=("gpu*", "lab-a"), exclude=("gpu02",)), ["gpu01", "gpu03", "lab-a"]),
        (Subset(exclude=("gpu[01-03]",)), ["lab-a"]),
    ],
)
def test_what_is_left(subset: Subset, left: list[str]) -> None:
    assert [host for host in HOSTS if not subset.left_out(host)] == left


def test_the_cause_is_what_was_typed() -> None:
    assert Subset(limit=("gpu01", "gpu02")).left_out("lab-a") == "--limit gpu01 gpu02"
    assert Subset(exclude=("gpu01", "lab-*")).left_out("lab-a") == "--exclude lab-*"


@pytest.mark.parametrize(
    ("subset", "said"),
    [
        (Subset(limit=("gpu09",)), "--limit gpu09: no such host"),
        (Subset(exclude=("x*",)), "--exclude x.: no such host"),
        (Subset(exclude=("*",)), "--exclude leaves no host"),
        (Subset(limit=("gpu[01-",)), "host range"),
    ],
)
def test_a_slip_of_the_finger_is_refused(subset: Subset, said: str) -> None:
    with pytest.raises(CampaignError, match=said.replace("[", r"\[")):
        subset.check(HOSTS)
    EVERYTHING.check(HOSTS)


def test_matching_keeps_the_hosts_order() -> None:
    assert matching(["lab-a", "gpu02"], HOSTS) == ["gpu02", "lab-a"]
