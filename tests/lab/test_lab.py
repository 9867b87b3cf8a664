"""The lab itself: if these fail, no other lab test means anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.lab import rootfs
from tests.lab.hosts import Lab
from tests.lab.record import Record, clean_stale

if TYPE_CHECKING:
    from tests.conftest import MakeLab

pytestmark = pytest.mark.lab


def boot_id(lab: Lab, host: str) -> str:
    return lab.ssh(host, "cat /proc/sys/kernel/random/boot_id").stdout


def test_every_host_answers_real_ssh_as_an_ordinary_user(lab: Lab) -> None:
    for name in ("h01", "h02", "h03"):
        done = lab.ssh(name, "hostname; id -un; sudo -n true")
        assert done.stdout.split() == [name, "bench"]
        assert done.returncode != 0, "the user must not be able to become root"
    assert lab.ssh("h01", "id -un", "-l", "root").stdout == "root\n"
    assert lab.ssh("h01", "/usr/bin/python3 --version").stdout.startswith("Python 3.11")


def test_hosts_share_nothing(lab: Lab) -> None:
    lab["h01"].sh("touch /opt/only-here; sleep 60 >/dev/null & echo $! >/run/sleeper")
    assert lab.ssh("h01", "ls /opt").stdout.split()[0] == "only-here"
    assert "only-here" not in lab.ssh("h02", "ls /opt").stdout
    assert "sleep 60" in [process.command for process in lab["h01"].processes()]
    assert "sleep 60" not in lab.ssh("h02", "ps -eo args").stdout
    own = "cat /etc/hostname /etc/machine-id /proc/sys/kernel/random/boot_id /etc/ssh/ssh_host_ed25519_key.pub"
    facts = [lab.ssh(name, own).stdout.splitlines() for name in lab.hosts]
    assert all(len(set(column)) == 3 for column in zip(*facts, strict=True))


def test_hosts_reach_each_other_and_nothing_else(lab: Lab) -> None:
    greet = 'python3 -c \'import socket; socket.create_connection(("{}", 22), 2); print("open")\''
    assert lab.ssh("h01", greet.format("h02")).stdout == "open\n"
    # an address of the documentation range: no network may be reachable, this one least
    assert "unreachable" in lab.ssh("h01", greet.format("192.0.2.1")).stderr.lower()
    assert lab.run(["ip", "route", "show", "default"]).stdout == ""


def test_a_cut_cable_times_out_and_heals(lab: Lab) -> None:
    lab["h02"].link(up=False)
    begun = time.monotonic()
    assert lab.ssh("h02", "true", connect_timeout=1).returncode == 255
    assert 0.9 < time.monotonic() - begun < 5
    assert lab.ssh("h01", "true").returncode == 0
    lab["h02"].link(up=True)
    assert lab.ssh("h02", "true").returncode == 0


def test_a_frozen_host_takes_the_connection_and_says_nothing(lab: Lab) -> None:
    lab["h02"].freeze()
    assert lab.answers("h02")
    assert lab.ssh("h02", "true", connect_timeout=1).returncode == 255
    assert 1 in [process.pid for process in lab["h02"].processes()]
    lab["h02"].thaw()
    assert lab.ssh("h02", "true").returncode == 0


def test_a_reboot_keeps_the_disk_and_changes_the_boot_id(lab: Lab) -> None:
    host = lab["h02"]
    host.sh("echo kept >/var/tmp/kept; sleep 1000 >/dev/null 2>&1 &")
    before = boot_id(lab, "h02")
    host.reboot()
    assert boot_id(lab, "h02") != before
    assert lab.ssh("h02", "cat /var/tmp/kept").stdout == "kept\n"
    assert "sleep 1000" not in [process.command for process in host.processes()]
    host.reinstall()
    assert lab.ssh("h02", "cat /var/tmp/kept").returncode == 1


def test_a_switched_off_host_is_silent_until_healed(lab: Lab) -> None:
    lab["h03"].power_off()
    assert lab["h03"].processes() == []
    assert not lab.answers("h03", timeout=0.5)
    lab.heal()
    assert lab.ssh("h03", "true").returncode == 0


def test_a_dead_sshd_refuses_and_detached_jobs_live(lab: Lab) -> None:
    lab.ssh("h03", "setsid sleep 321 >/dev/null 2>&1 </dev/null &")
    lab["h03"].kill_sshd(sessions=True)
    begun = time.monotonic()
    assert "refused" in lab.ssh("h03", "true").stderr
    assert time.monotonic() - begun < 2
    assert "sleep 321" in [process.command for process in lab["h03"].processes()]
    lab["h03"].start_sshd()
    assert lab.ssh("h03", "true").returncode == 0


def test_orphans_are_reaped(lab: Lab) -> None:
    lab.ssh("h01", "for i in 1 2 3; do (setsid sleep 0.1 &) ; done")
    deadline = time.monotonic() + 10
    while leftover := [
        line for line in lab["h01"].sh("ps -eo stat=,args=").splitlines() if line[0] == "Z" or " 0.1" in line
    ]:
        assert time.monotonic() < deadline, leftover
        time.sleep(0.1)


def test_a_host_without_python(lab: Lab) -> None:
    lab["h03"].remove_python()
    assert lab.ssh("h03", "python3 --version").returncode == 127
    lab.heal()
    assert lab.ssh("h03", "python3 --version").returncode == 0


def test_unknown_and_changed_host_keys_are_refused(lab: Lab, make_lab: MakeLab) -> None:
    lab.forget("h01")
    assert "Host key verification failed" in lab.ssh("h01", "true").stderr
    lab.heal()
    assert lab.ssh("h01", "true").returncode == 0
    other = make_lab(2, unknown=["h02"])
    assert "Host key verification failed" in other.ssh("h02", "true").stderr
    other["h01"].change_host_key()
    assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in other.ssh("h01", "true").stderr


def test_a_small_host(make_lab: MakeLab) -> None:
    lab = make_lab(names=["tiny"], disk_mb={"tiny": 32}, memory_mb={"tiny": 128}, meminfo_mb={"tiny": 512})
    lab["tiny"].fill_disk()
    done = lab.ssh("tiny", "echo more >more")
    assert "No space left on device" in done.stderr
    lab.heal()
    assert lab.ssh("tiny", "echo more >more").returncode == 0
    assert "MemTotal:         524288 kB" in lab.ssh("tiny", "cat /proc/meminfo").stdout
    lab["tiny"].reboot()
    assert lab.ssh("tiny", "free -m").stdout.splitlines()[1].split()[1] == "512"
    assert lab.ssh("tiny", "python3 -c 'bytearray(300 << 20)'; echo $?").stdout == "137\n"


def test_mounts_are_read_only_and_layers_lie_below(make_lab: MakeLab, tmp_path: Path) -> None:
    shared, layer = tmp_path / "shared", tmp_path / "layer"
    (layer / "opt/product").mkdir(parents=True)
    (layer / "opt/product/file").write_text("layer")
    shared.mkdir()
    (shared / "wheel").write_text("shared")
    lab = make_lab(2, mounts={shared: "/srv/shared"}, extra_layers=[layer])
    done = lab.ssh("h02", "cat /srv/shared/wheel /opt/product/file; touch /srv/shared/x", "-l", "root")
    assert done.stdout == "sharedlayer"
    assert "Read-only file system" in done.stderr


def test_commands_run_at_the_controllers_place(lab: Lab, tmp_path: Path) -> None:
    done = lab.run(
        ["sh", "-c", 'echo "$HOME $FLEET_SSH_CONFIG $MORE $PWD"; cat'], env={"MORE": "1"}, cwd=tmp_path, input="in"
    )
    assert done.stdout == f"{lab.home} {lab.ssh_config} 1 {tmp_path}\nin"
    with pytest.raises(subprocess.TimeoutExpired):
        lab.run(["sleep", "30"], timeout=0.2)
    process = lab.popen(
        [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(30)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == -signal.SIGINT
    process.stdout.close()
    home = lab.home_of("nobody")
    done = lab.run(["sh", "-c", 'id -un; ssh -F "$FLEET_SSH_CONFIG" h01 hostname'], user="nobody", cwd=home)
    assert done.stdout == "nobody\nh01\n"


def test_a_master_that_ssh_leaves_behind_does_not_block_and_dies_with_the_lab(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    begun = time.monotonic()
    master = ["-o", "ControlMaster=auto", "-o", f"ControlPath={lab.ssh_dir}/%C", "-o", "ControlPersist=60"]
    assert lab.ssh("h01", "true", *master).returncode == 0
    assert time.monotonic() - begun < 5
    record = lab.record
    lab.stop()
    assert record.leftovers() == []


def test_teardown_leaves_nothing_behind(make_lab: MakeLab) -> None:
    lab = make_lab(3, disk_mb={"h02": 32})
    for host in lab.hosts.values():
        host.sh("sleep 1000 >/dev/null 2>&1 & dd if=/dev/zero of=/var/tmp/dirty bs=1M count=8 2>/dev/null")
    lab["h03"].freeze()
    record = lab.record
    pids = [process.machine_pid for host in lab.hosts.values() for process in host.processes()]
    kinds = {line.split()[0] for line in record.leftovers()}
    assert kinds == {"process", "cgroup", "namespace", "mount", "file"}, "the check sees what is there"
    begun = time.monotonic()
    lab.stop()
    assert time.monotonic() - begun < 3
    assert record.leftovers() == []
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.scale
def test_forty_eight_hosts_cost_little_and_can_be_used_again(large_lab: Lab) -> None:
    with ThreadPoolExecutor(len(large_lab.hosts)) as pool:
        names = list(pool.map(lambda name: large_lab.ssh(name, "hostname", connect_timeout=30).stdout, large_lab.hosts))
    assert names == [f"{name}\n" for name in large_lab.hosts]
    # About 2 MB of it are sshd and the host's first process.
    assert sum(host.memory() for host in large_lab.hosts.values()) / len(large_lab.hosts) < 8e6
    large_lab["h17"].freeze()
    large_lab["h48"].power_off()
    large_lab.heal()
    assert all(large_lab.ssh(name, "true").returncode == 0 for name in ("h17", "h48"))


def test_a_failed_start_leaves_nothing_behind(lab_possible: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setattr("tests.lab.disk._SSHD_CONFIG", "NoSuchOption yes\n")
    records: list[Record] = []
    monkeypatch.setattr(Record, "save", lambda self: records.append(self))  # noqa: PLW0108 - binds self
    with pytest.raises(Exception, match=r"(?s)h01 died while booting.*NoSuchOption"), Lab(2):
        pass
    assert records[0].leftovers() == []


def test_the_next_lab_cleans_up_after_a_crashed_one(lab_possible: None) -> None:  # noqa: ARG001
    program = "import time; from tests.lab.hosts import Lab; lab = Lab(2); lab.start(); print(lab.record.path, flush=True); time.sleep(60)"
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True) as crashing:
        assert crashing.stdout is not None
        path = Path(crashing.stdout.readline().strip())
        clean_stale()
        assert path.exists(), "a lab whose process lives is nobody's business"
        crashing.kill()
    record = Record.read(path)
    assert any(line.startswith("process") for line in record.leftovers())
    clean_stale()
    assert record.leftovers() == []


def test_a_half_built_root_file_system_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def interrupted(target: Path) -> None:
        (target / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rootfs._built_once("thing", interrupted)
    (tmp_path / "mlperf-fleet/thing.partial-old").mkdir()  # as a killed build leaves it
    built = rootfs._built_once("thing", lambda target: (target / "whole").touch())
    assert [path.name for path in built.iterdir()] == ["whole"]
    assert rootfs._built_once("thing", interrupted) == built
    assert sorted(path.name for path in (tmp_path / "mlperf-fleet").iterdir()) == ["thing", "thing.lock"]


@pytest.mark.parametrize(("ci", "outcome"), [("", "1 skipped"), ("true", "1 error")])
def test_where_the_lab_cannot_run_tests_skip_but_fail_in_ci(ci: str, outcome: str) -> None:
    test = f"{__file__}::{test_teardown_leaves_nothing_behind.__name__}"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", test]
    environment = {**os.environ, "PATH": "/nonexistent", "CI": ci}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert outcome in done.stdout.splitlines()[-1]
    assert "the lab needs: apt-get install debootstrap iproute2 mount openssh-client util-linux" in done.stdout


def test_a_host_that_is_not_in_the_lab_is_an_error() -> None:
    with pytest.raises(Exception, match="no host of this lab: h09"):
        Lab(2, disk_mb={"h09": 1})
