"""What stands between fleet and AWS: configuration that is wrong, answers that are none, and who we are."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet.cli.main import main
from fleet.cloud import aws
from fleet.errors import CloudError, ExitCode
from tests.cloud.cloud import Cloud
from tests.cloud.conftest import CAMPAIGN


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Type `fleet …` beside a campaign with instances; its exit code and what it says."""
    (tmp_path / "fleet.yml").write_text(CAMPAIGN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["fleet", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


WRONG = {
    "AWS_PROFILE": ("nope", "profile (nope) could not be found", "aws configure"),
    "AWS_ENDPOINT_URL": ("localhost:1", "Invalid endpoint", "AWS_ENDPOINT_URL"),
}
"""Variable to its value, what is said of it, and what is to be done."""


@pytest.mark.parametrize("words", [("up", "--dry-run"), ("reap",)], ids=["up", "reap"])
@pytest.mark.parametrize("name", list(WRONG))
def test_a_configuration_that_is_wrong_is_said_with_what_helps(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, typed: Any, name: str, words: tuple[str, ...]
) -> None:
    value, *texts = WRONG[name]
    monkeypatch.setenv(name, value)
    code, err = typed(*words)
    assert code == ExitCode.ERROR
    told = " ".join(err.split())
    assert [text for text in texts if text not in told] == []
    assert "Traceback" not in told
    assert cloud.calls() == []


class _Portal(http.server.BaseHTTPRequestHandler):
    """Answers everything with a page."""

    def do_POST(self) -> None:
        page = b"<html><body>Please log in<br></body></html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def portal() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Portal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.usefixtures("cloud")
def test_a_page_in_place_of_an_answer_says_nothing_of_what_was_carried_out(
    monkeypatch: pytest.MonkeyPatch, portal: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", portal)
    with pytest.raises(CloudError) as caught:
        aws.client("ec2", "us-east-1").once("describe_vpcs")
    assert caught.value.code == aws.NO_ANSWER


@pytest.mark.parametrize(
    ("arn", "name"),
    [
        ("arn:aws:iam::1:user/team/anna", "anna"),
        ("arn:aws:iam::1:root", "root"),
        ("arn:aws:sts::1:assumed-role/Admin/anna@example.org", "anna@example.org"),
        ("arn:aws:sts::1:assumed-role/Admin/botocore-session-1764072000", "Admin"),
        ("arn:aws:sts::1:assumed-role/controller/i-0123456789abcdef0", "controller"),
        ("arn:aws:iam::1:user/last,first", "last_first"),
    ],
)
def test_we_are_the_same_in_every_process(monkeypatch: pytest.MonkeyPatch, arn: str, name: str) -> None:
    class Sts:
        def call(self, _: str) -> dict[str, str]:
            return {"Arn": arn}

    monkeypatch.setattr(aws, "client", lambda *_: Sts())
    assert aws.identity() == name


@pytest.mark.usefixtures("cloud")
def test_the_region_is_that_of_either_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    aws._session.cache_clear()
    assert aws.default_region() == "eu-west-1"
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert aws.default_region() == "eu-north-1"
