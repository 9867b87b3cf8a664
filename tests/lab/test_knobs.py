"""What can be done to a lab host, each seen through real ssh: a fault that does not happen proves nothing."""

from __future__ import annotations

import signal
import time
from typing import IO, TYPE_CHECKING

import pytest

from tests.lab import simulated, tmpfs

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import MakeLab
    from tests.lab.hosts import Lab

# What the lab itself can do: with the faults that it is for.
pytestmark = [pytest.mark.lab, pytest.mark.faults]
DAY = 86400


def seconds(lab: Lab, host: str, command: str) -> float:
    """How long a command over ssh takes, which must end well."""
    begun = time.monotonic()
    done = lab.ssh(host, command, timeout=120)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - begun


def test_a_bad_cable_delays_and_loses_frames_while_connections_live(lab: Lab) -> None:
    reader = lab.popen(
        ["ssh", "-F", str(lab.ssh_config), "h02", "while read line; do echo $line; done"], stdin=-1, stdout=-1
    )
    assert reader.stdin is not None
    assert reader.stdout is not None

    def echo(to: IO[str] = reader.stdin, back: IO[str] = reader.stdout) -> float:
        begun = time.monotonic()
        to.write("word\n")
        to.flush()
        assert back.readline() == "word\n"
        return time.monotonic() - begun

    echo()
    near = min(echo() for _ in range(3))
    lab["h02"].slow(latency_ms=200, loss=0)
    times = [echo() for _ in range(4)]
    assert near < 0.1
    assert min(times) >= 0.2
    lab["h02"].slow(latency_ms=20, loss=0.3)
    # Larger than one frame, and than what a card would be handed at once: it arrives whole for all that is lost.
    sent = lab.run(
        ["sh", "-c", f"head -c 300000 /dev/zero | ssh -F {lab.ssh_config} h02 sha256sum"], timeout=120, check=True
    )
    assert sent.stdout == lab.run(["sh", "-c", "head -c 300000 /dev/zero | sha256sum"]).stdout
    lab["h02"].fast()
    echo()
    assert min(echo() for _ in range(3)) < 0.1
    reader.stdin.close()
    assert reader.wait(10) == 0
    reader.stdout.close()


def test_a_bad_cable_can_be_cut_and_heals(lab: Lab) -> None:
    lab["h02"].slow()
    lab["h02"].link(up=False)
    assert lab.ssh("h02", "true", connect_timeout=1).returncode == 255
    lab["h02"].link(up=True)
    assert seconds(lab, "h02", "true") > 0.6
    lab.heal()
    assert seconds(lab, "h02", "true") < 2


def test_cut_and_hung_for_a_while(lab: Lab) -> None:
    for what in (lab["h02"].cut, lab["h02"].hang):
        counting = lab.popen(
            ["ssh", "-F", str(lab.ssh_config), "h02", "for i in 1 2 3; do sleep 0.3; echo $i; done"], stdout=-1
        )
        time.sleep(0.5)
        begun = time.monotonic()
        what(2)
        assert 2 <= time.monotonic() - begun < 3
        assert counting.communicate(timeout=20)[0] == "1\n2\n3\n"


def test_a_clock_off_by_a_day_and_a_clock_that_is_set(lab: Lab) -> None:
    say = "date +%s; cut -d. -f1 /proc/uptime; python3 -c 'import time; print(int(time.time()), int(time.monotonic()))'"
    master = ["-o", "ControlMaster=auto", "-o", f"ControlPath={lab.ssh_dir}/%C", "-o", "ControlPersist=60"]
    own = [int(word) for word in lab.ssh("h02", say, *master).stdout.split()]
    lab["h02"].shift_clock(DAY)
    off = [int(word) for word in lab.ssh("h02", say, *master).stdout.split()]
    assert [later - earlier for earlier, later in zip(own, off, strict=True)] == [
        pytest.approx(DAY, abs=20), pytest.approx(0, abs=20), pytest.approx(DAY, abs=20), pytest.approx(0, abs=20)
    ]  # fmt: skip
    lab["h02"].shift_clock(0)
    watching = lab.popen(
        ["ssh", "-F", str(lab.ssh_config), "h02", "python3", "-c",
         "'import time\nfor _ in range(30): print(int(time.time()), flush=True); time.sleep(0.2)'"], stdout=-1)  # fmt: skip
    assert watching.stdout is not None
    assert int(watching.stdout.readline()) == pytest.approx(time.time(), abs=20)
    lab["h02"].shift_clock(-DAY)
    times = [int(line) for line in watching.stdout]
    assert times[-1] == pytest.approx(time.time() - DAY, abs=20)
    watching.wait(10)
    watching.stdout.close()
    lab.heal()
    assert int(lab.ssh("h02", "date +%s").stdout) == pytest.approx(time.time(), abs=20)
    assert int(lab.ssh("h03", "date +%s").stdout) == pytest.approx(time.time(), abs=20)


def test_two_hosts_with_one_hostname(make_lab: MakeLab) -> None:
    lab = make_lab(2, hostname={"h01": "node", "h02": "node"})
    said = [lab.ssh(name, "hostname; cat /etc/hostname /etc/machine-id").stdout.split() for name in lab.hosts]
    assert [words[:2] for words in said] == [["node", "node"]] * 2
    assert said[0][2] != said[1][2]


def test_power_heat_and_throttling_as_sysfs_shows_them(lab: Lab) -> None:
    host = lab["h02"]
    read = "cd /sys; cat class/power_supply/BAT0/status class/power_supply/AC/online"
    before = lab.ssh("h02", "ls /sys/class/power_supply /sys/devices/system/cpu").stdout
    host.show(simulated.battery(discharging=True))
    assert lab.ssh("h02", read).stdout.split() == ["Discharging", "0"]
    host.show(simulated.battery(discharging=False) | simulated.heat(celsius=97.5, throttled=12))
    assert lab.ssh("h02", read).stdout.split() == ["Charging", "1"]
    hot = "cd /sys; cat class/thermal/thermal_zone0/temp devices/system/cpu/cpu*/thermal_throttle/core_throttle_count"
    assert lab.ssh("h02", hot).stdout.split() == ["97500", "12"]
    # What the machine itself has is still there, and nothing can be written by users.
    assert (
        lab.ssh("h02", "cat /sys/devices/system/cpu/online").stdout
        == lab.ssh("h01", "cat /sys/devices/system/cpu/online").stdout
    )
    assert lab.ssh("h02", "echo 1 >/sys/class/power_supply/AC/online").returncode
    host.reboot()
    assert lab.ssh("h02", hot).stdout.split() == ["97500", "12"]
    lab.heal()
    assert lab.ssh("h02", "ls /sys/class/power_supply /sys/devices/system/cpu").stdout == before


def test_a_process_is_killed_by_a_word_of_its_command(lab: Lab) -> None:
    lab.ssh("h02", "setsid sleep 4711 >/dev/null 2>&1 </dev/null & setsid sleep 4712 >/dev/null 2>&1 </dev/null &")
    assert [process.command for process in lab["h02"].kill("sleep 4711")] == ["sleep 4711"]
    left = lab.ssh("h02", "ps -eo args").stdout
    assert "sleep 4711" not in left
    assert "sleep 4712" in left
    lab["h02"].kill("sleep 4712", signal.SIGTERM)
    with pytest.raises(Exception, match="no process of h02 has 'sleep 4713'"):
        lab["h02"].kill("sleep 4713")


def test_a_work_folder_full_of_stale_files(lab: Lab) -> None:
    lab["h02"].litter("/home/bench/littered", 10_000)
    count = lab.ssh(
        "h02", "find littered -type f -user bench ! -newermt 2002-01-01 | wc -l; ls littered"
    ).stdout.split()
    assert count == ["10000", "harness", "runs", "tmp"]
    lab.ssh("h02", "rm -rf littered")


def test_a_host_fills_up_in_the_middle_and_is_freed(make_lab: MakeLab) -> None:
    lab = make_lab(1, disk_mb={"h01": 512})
    writing = lab.popen(
        ["ssh", "-F", str(lab.ssh_config), "h01", "while echo word; do sleep 0.05; done >>out"], stderr=-1
    )
    assert writing.stderr is not None
    time.sleep(0.5)
    lab["h01"].fill_disk()
    assert lab.ssh("h01", "head -c 100000 /dev/zero >more").returncode == 1
    assert int(lab.ssh("h01", "df --output=avail / | tail -1").stdout) == 0
    lab["h01"].free_disk()
    assert lab.ssh("h01", "head -c 100000 /dev/zero >more").returncode == 0
    lab["h01"].kill("while echo word")
    writing.wait(10)
    writing.stderr.close()


def test_a_small_disk_at_the_controllers_place(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(1)
    folder = tmp_path / "sessions"
    folder.mkdir()
    lab.small_disk(folder, 8)
    assert lab.run(["sh", "-c", "head -c 4000000 /dev/zero >first"], cwd=folder).returncode == 0
    tmpfs.fill(folder)
    full = lab.run(["sh", "-c", "cat /etc/passwd >more"], cwd=folder)
    assert "No space left on device" in full.stderr
    tmpfs.resize(folder, 16)
    assert lab.run(["sh", "-c", "head -c 8000000 /dev/zero >more"], cwd=folder).returncode == 0
    record = lab.record
    lab.stop()
    assert record.leftovers() == []
    assert list(folder.iterdir()) == []
