"""User data: what cloud-init is handed, and the timer, really run by /bin/sh below a folder."""

import email
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path

import pytest
import yaml

from fleet.cloud import user_data
from fleet.cloud.keys import Keys

TOOLS = ("sh", "cat", "chown", "cut", "mkdir", "mv", "setsid")
WRITTEN, EXPIRES = 1_000_000, 1_003_600
PATIENCE_S = 60.0


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    private = f"-----BEGIN OPENSSH PRIVATE KEY-----\n{'QUJD' * 100}\n-----END OPENSSH PRIVATE KEY-----\n"
    return Keys(
        folder=tmp_path,
        login_key=tmp_path / "login",
        login_public="ssh-ed25519 AAAALOGIN fleet-x",
        host_private=private,
        host_public="ssh-ed25519 AAAAHOST fleet-x",
    )


def parts(data: bytes) -> list[Message]:
    message = email.message_from_bytes(data)
    assert message.is_multipart()
    return [part for part in message.walk() if not part.is_multipart()]


def text(part: Message) -> str:
    payload = part.get_payload(decode=True)
    assert isinstance(payload, bytes)
    return payload.decode()


def test_the_timer_comes_first_and_the_host_key_as_it_is(keys: Keys) -> None:
    data = user_data.make(keys, expires_at=1000.9, written_at=10, user="ubuntu")
    hook, config = parts(data)
    assert [part.get_content_type() for part in (hook, config)] == ["text/cloud-boothook", "text/cloud-config"]
    assert text(hook).startswith("#cloud-boothook\n#!/bin/sh\n")
    said = yaml.safe_load(text(config))
    assert said["ssh_keys"] == {"ed25519_private": keys.host_private, "ed25519_public": keys.host_public}
    assert said["ssh_deletekeys"] is True
    assert said["disable_root"] is True
    assert said["ssh_authorized_keys"] == [keys.login_public]


def test_the_same_lease_gives_the_same_bytes_below_the_limit(keys: Keys) -> None:
    first = user_data.make(keys, expires_at=2e9, written_at=1e9, user="u" * 32)
    assert first == user_data.make(keys, expires_at=2e9, written_at=1e9, user="u" * 32)
    assert first != user_data.make(keys, expires_at=2e9 + 1, written_at=1e9, user="u" * 32)
    assert len(first) < user_data.LIMIT


class Box:
    """A root folder, a clock that is set by hand, and a PATH with nothing on it that could end this machine."""

    def __init__(self, top: Path) -> None:
        self.root, self.bin = top / "root", top / "bin"
        (self.root / "dev").mkdir(parents=True)
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.calls, self.clock, self.ticks = top / "calls", top / "clock", top / "ticks"
        self.stub("sleep", f"exec {shutil.which('sleep')} 0.02")
        self.stub("date", f"echo tick >>{self.ticks}; cat {self.clock}")
        for name in ("shutdown", "poweroff"):
            self.stub(name, f'echo "{name} $*" >>{self.calls}')

    def stub(self, name: str, does: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
        path.chmod(0o755)

    @property
    def file(self) -> Path:
        return self.root / user_data.EXPIRES_AT.lstrip("/")

    def boot(self, *, at: int, expires_at: int = EXPIRES, written_at: int = WRITTEN) -> None:
        self.set_clock(at)
        script = user_data.boothook(expires_at=expires_at, written_at=written_at, user=str(os.getuid()))
        subprocess.run(
            ["/bin/sh"],
            input=script,
            text=True,
            check=True,
            env={"PATH": str(self.bin), "FLEET_ROOT": str(self.root)},
        )

    def set_clock(self, at: int) -> None:
        new = self.clock.with_suffix(".new")
        new.write_text(f"{at}\n", encoding="utf-8")
        new.replace(self.clock)

    def goes_round(self) -> None:
        """Wait until the timer has looked at clock and file once more, from beginning to end."""
        before = self.ticks.read_text(encoding="utf-8").count("tick") if self.ticks.exists() else 0
        until(lambda: self.ticks.exists() and self.ticks.read_text(encoding="utf-8").count("tick") >= before + 3)

    def timers(self) -> list[int]:
        """Process ids of timers that run below this root."""
        mark = str(self.root / "run/mlperf-fleet/lease.sh").encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found

    def end(self) -> None:
        for pid in self.timers():
            os.kill(pid, signal.SIGKILL)

    def called(self) -> list[str]:
        return self.calls.read_text(encoding="utf-8").splitlines() if self.calls.exists() else []

    def extend(self, at: int | str) -> None:
        new = self.file.with_name("of-the-user")
        new.write_text(f"{at}\n", encoding="utf-8")
        new.replace(self.file)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path)
    yield made
    made.end()


def until(true: Callable[[], object]) -> None:
    last = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < last, "it never came"
        time.sleep(0.01)


def test_the_instance_ends_itself_when_its_lease_does_and_not_before(box: Box) -> None:
    box.boot(at=WRITTEN + 10)
    box.goes_round()
    box.set_clock(EXPIRES - 1)
    box.goes_round()
    assert box.called() == []
    box.set_clock(EXPIRES)
    until(box.called)
    assert box.called()[0] == "shutdown -P now"


def test_an_extension_counts_and_a_reboot_keeps_it(box: Box) -> None:
    box.boot(at=WRITTEN + 10)
    box.extend(EXPIRES + 500)
    box.set_clock(EXPIRES + 499)
    box.goes_round()
    assert box.called() == []
    box.end()
    box.boot(at=EXPIRES + 499)
    box.goes_round()
    assert box.called() == []
    assert box.file.read_text(encoding="utf-8") == f"{EXPIRES + 500}\n"
    box.set_clock(EXPIRES + 500)
    until(box.called)


@pytest.mark.parametrize("said", ["", "soon", "-5", "99999999999999999999", "$(shutdown -h now)"])
def test_what_is_no_time_changes_nothing(box: Box, said: str) -> None:
    box.boot(at=WRITTEN + 10)
    box.extend(said)
    box.goes_round()
    assert box.called() == []
    box.set_clock(EXPIRES)
    until(box.called)
    assert box.called()[0] == "shutdown -P now"


def test_a_file_that_is_gone_ends_the_lease_when_it_was_to_end(box: Box) -> None:
    box.boot(at=WRITTEN + 10)
    box.file.unlink()
    box.goes_round()
    assert box.called() == []
    box.set_clock(EXPIRES)
    until(box.called)


def test_a_clock_that_runs_behind_lengthens_no_lease(box: Box) -> None:
    box.boot(at=0, expires_at=WRITTEN + 2)
    box.goes_round()
    until(box.called)


def test_where_shutdown_fails_the_power_goes(box: Box) -> None:
    box.stub("shutdown", f"echo tried >>{box.calls}; exit 1")
    box.boot(at=EXPIRES)
    until(lambda: len(box.called()) > 1)
    assert box.called()[:2] == ["tried", "poweroff -f"]


def test_where_shutdown_hangs_the_power_goes_too(box: Box) -> None:
    box.boot(at=EXPIRES)
    until(lambda: len(box.called()) > 1)
    assert box.called()[:2] == ["shutdown -P now", "poweroff -f"]


def test_a_service_manager_keeps_the_timer_alive(box: Box) -> None:
    (box.root / "run/systemd/system").mkdir(parents=True)
    asked = box.root / "asked"
    box.stub("systemd-run", f'echo "$@" >{asked}')
    box.boot(at=WRITTEN)
    said = asked.read_text(encoding="utf-8")
    assert "--no-block" in said
    assert "--property=Restart=always" in said
    assert said.rstrip().endswith(f"/bin/sh {box.root}/run/mlperf-fleet/lease.sh")
    assert box.timers() == []


def test_a_service_manager_that_refuses_is_done_without(box: Box) -> None:
    (box.root / "run/systemd/system").mkdir(parents=True)
    box.stub("systemd-run", "exit 1")
    box.boot(at=WRITTEN)
    until(box.timers)


def test_the_login_user_owns_what_an_extension_replaces(box: Box) -> None:
    # The user is made by cloud-init after the timer began: it is asked for until it is there.
    asked = box.root / "chowned"
    (box.bin / "chown").unlink()
    box.stub("chown", f'echo "$@" >>{asked}; [ "$(wc -l <{asked})" -ge 3 ]')
    (box.bin / "wc").symlink_to(str(shutil.which("wc")))
    box.boot(at=WRITTEN)
    until(lambda: asked.exists() and len(asked.read_text(encoding="utf-8").splitlines()) == 3)
    assert asked.read_text(encoding="utf-8").splitlines()[0] == f"-h {os.getuid()} {box.file.parent} {box.file}"
