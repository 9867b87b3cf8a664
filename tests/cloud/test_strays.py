"""Strays: sessions of this machine that nobody works with are said at the start of a verb, quickly, or not at all."""

import subprocess
import sys
import time

import pytest

from fleet.cli.main import cli
from fleet.cloud import down, keys, strays
from fleet.errors import ExitCode
from fleet.watch import Silent
from tests.cloud.cloud import Cloud
from tests.cloud.conftest import MakeSession
from tests.cloud.launched import launched


def test_instances_of_another_session_are_said_with_what_they_cost(cloud: Cloud, make_session: MakeSession) -> None:
    current, other = make_session()[0], make_session(name="s2")[0]
    launched(cloud, current, 1)
    launched(cloud, other, 2)
    launched(cloud, other, 1, region="eu-west-1")
    base = other.root.parent
    assert strays.lines(current, budget_s=30) == [
        f"session s2 has 3 instances that nobody works with, 3.02 US dollars an hour: fleet down --session s2 --sessions {base}"
    ]


def test_a_session_that_somebody_works_with_is_no_stray(cloud: Cloud, make_session: MakeSession) -> None:
    other, _ = make_session(name="s2")
    launched(cloud, other, 1)
    with other.locked():
        assert strays.lines(None, budget_s=30) == []


def test_when_nothing_is_left_the_rest_may_go(cloud: Cloud, make_session: MakeSession) -> None:
    other, _ = make_session(name="s2")
    lease = launched(cloud, other, 1)
    cloud.end(lease.instances[0].id)
    (line,) = strays.lines(None, budget_s=30)
    assert line.startswith("session s2 has no instance any more; its key pair, group and secrets go with: fleet down ")
    down.down(other, Silent())
    assert strays.lines(None) == []


def test_a_session_whose_folder_is_gone_is_named(cloud: Cloud, make_session: MakeSession) -> None:
    other, _ = make_session(name="s2")
    token = other.token
    keys.ensure(other)
    other.root.rename(other.root.parent / ".elsewhere")
    assert strays.lines(None) == [
        f"session {token} may have instances, and its folder is gone: fleet reap --session {token}"
    ]
    assert not cloud.calls()


def test_an_ec2_that_does_not_answer_holds_nobody_up(cloud: Cloud, make_session: MakeSession) -> None:
    launched(cloud, make_session(name="s2")[0], 1)
    cloud.delay("DescribeInstances", 20)
    began = time.monotonic()
    assert strays.lines(None, budget_s=1) == ["EC2 gave no answer whether instances are left of: s2"]
    assert time.monotonic() - began < 10


def test_expired_credentials_are_one_line(cloud: Cloud, make_session: MakeSession) -> None:
    launched(cloud, make_session(name="s2")[0], 1)
    cloud.expire()
    assert strays.lines(None, budget_s=30) == ["EC2 gave no answer whether instances are left of: s2"]


def test_a_verb_says_it(
    cloud: Cloud, make_session: MakeSession, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strays.lines, "__kwdefaults__", {"budget_s": 30.0})
    current, other = make_session()[0], make_session(name="s2")[0]
    launched(cloud, other, 1)
    code = cli.main(["down", "--session", current.id, "--sessions", str(current.root.parent)], standalone_mode=False)
    assert code is ExitCode.OK
    assert "session s2 has 1 instance that nobody works with, 1.01 US dollars an hour" in capsys.readouterr().err


def test_who_has_no_cloud_session_does_not_even_import_boto3(cloud: Cloud, make_session: MakeSession) -> None:
    session, _ = make_session()
    code = (
        "import sys\nfrom pathlib import Path\nfrom fleet.cli import options\nfrom fleet.session import Session\n"
        "options.say_strays(Session(Path(sys.argv[1])))\nsys.exit('boto3' in sys.modules or 'botocore' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(session.root)], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not cloud.calls()


def test_a_session_that_cannot_be_read_stops_nobody(cloud: Cloud, make_session: MakeSession) -> None:
    broken, other = make_session(name="s2")[0], make_session(name="s3")[0]
    lease = launched(cloud, broken, 1)
    launched(cloud, other, 1)
    (broken.cloud / "leases" / f"{lease.id}.json").write_text("{", encoding="utf-8")
    first, second = strays.lines(None, budget_s=30)
    assert first.startswith("session s2 may have instances, and ")
    assert first.endswith(f"fleet reap --session {broken.token}")
    assert second.startswith("session s3 has 1 instance that nobody works with")
