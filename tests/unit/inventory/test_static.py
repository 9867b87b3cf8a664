"""From names, ranges, files and ssh aliases to one list of hosts."""

from pathlib import Path

import pytest

from fleet import campaign as campaigns
from fleet.campaign import Campaign
from fleet.errors import CampaignError, FleetError
from fleet.inventory import ssh_config, static


def campaign(hosts: str, extra: str = "") -> Campaign:
    text = f"submitter: ExampleLab\nbenchmarks: [{{name: tiny-bert}}]\nhosts:\n{hosts}{extra}"
    return campaigns.load_text(text, "fleet.yml")


def names(hosts: str, base: Path) -> list[str]:
    return [host.name for host in static.hosts(campaign(hosts), base=base, source="fleet.yml")]


def refusal(hosts: str, base: Path) -> str:
    with pytest.raises(CampaignError) as caught:
        names(hosts, base)
    assert caught.value.hint
    return caught.value.message


def test_ranges_and_names_keep_the_campaigns_order(tmp_path: Path) -> None:
    hosts = "- {name: 'z[08-10].lab', kind: server}\n- {name: a, kind: laptop}\n"
    assert names(hosts, tmp_path) == ["z08.lab", "z09.lab", "z10.lab", "a"]


def test_a_file_may_hold_comments_blank_lines_and_ranges(tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("# all of them\n\na01  # broken fan\nb[1-2]\n", encoding="utf-8")
    assert names("- {file: hosts.txt, kind: server}\n", tmp_path) == ["a01", "b1", "b2"]


def test_entries_become_hosts_with_their_settings(tmp_path: Path) -> None:
    hosts = "- {name: a, kind: laptop, address: 10.0.0.1, user: me, port: 2222, python: /p, notes: {cooling: water}, usd_per_hour: 0.4}\n"
    (host,) = static.hosts(
        campaign(hosts, "notes: {cooling: air, hw_notes: rack 7}\n"), base=tmp_path, source="fleet.yml"
    )
    assert (host.address, host.user, host.port, host.python) == ("10.0.0.1", "me", 2222, "/p")
    assert host.notes == {"cooling": "water", "hw_notes": "rack 7"}
    assert host.usd_per_hour == 0.4


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        ("- {name: 'a[1-3]', kind: server}\n- {name: a2, kind: server}\n", "a2 is given twice"),
        ("- {name: '../etc', kind: server}\n", "'../etc' is no host name"),
        ("- {name: 'a b', kind: server}\n", "'a b' is no host name"),
        ("- {file: none.txt, kind: server}\n", "none.txt cannot be read"),
        ("- {name: 'a[', kind: server}\n", "host range 'a['"),
    ],
)
def test_what_is_no_host_is_refused_by_name(hosts: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(hosts, tmp_path)


def test_a_newline_is_no_part_of_a_host_name(tmp_path: Path) -> None:
    assert names('- {name: "a\\n", kind: server}\n', tmp_path) == ["a"]
    assert "is no host name" in refusal('- {name: "a\\nb", kind: server}\n', tmp_path)
    (tmp_path / "hosts.txt").write_text("a\x0b\nb\x0cc\r\n", encoding="utf-8")
    assert names("- {file: hosts.txt, kind: server}\n", tmp_path) == ["a", "b", "c"]


def test_a_name_too_long_for_a_file_is_refused(tmp_path: Path) -> None:
    assert "host name" in refusal(f"- {{name: {'a' * 300}, kind: server}}\n", tmp_path)


def test_a_bad_line_in_a_hosts_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("fine\nbad[1-\n", encoding="utf-8")
    assert "hosts.txt: host range 'bad[1-'" in refusal("- {file: hosts.txt, kind: server}\n", tmp_path)


CONFIG = """Include {folder}/conf.d/*
Host lab-a lab-b
  HostName 10.0.0.1
Host lab-* !lab-z
  User me
Match host lab-m
  Port 7
Host other
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ssh config with an Include."""
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "10-lab").write_text("Host lab-c\n  HostName 10.0.0.3\n", encoding="utf-8")
    path = tmp_path / "config"
    path.write_text(CONFIG.format(folder=tmp_path), encoding="utf-8")
    monkeypatch.setenv("FLEET_SSH_CONFIG", str(path))
    return path


def test_a_pattern_finds_aliases_in_included_files_too(ssh: Path) -> None:
    assert sorted(names("- {ssh_config: 'lab-*', kind: server}\n", ssh.parent)) == ["lab-a", "lab-b", "lab-c"]
    assert ssh_config.aliases("other") == ["other"]


def test_a_pattern_that_matches_nothing_says_where_it_looked(ssh: Path) -> None:
    said = refusal("- {ssh_config: 'no-*', kind: server}\n", ssh.parent)
    assert "matches 'no-*'" in said


def test_files_that_include_each_other_end(ssh: Path) -> None:
    (ssh.parent / "conf.d" / "20-loop").write_text(f"Include {ssh}\n", encoding="utf-8")
    assert "other" in ssh_config.aliases("*")


@pytest.mark.parametrize("line", ["Include\t{file}", "Include={file}", 'Include "{file}"'])
def test_include_is_read_as_ssh_reads_it(ssh: Path, line: str) -> None:
    more = ssh.parent / "more"
    more.write_text("Host extra\n", encoding="utf-8")
    ssh.write_text(line.format(file=more) + "\n", encoding="utf-8")
    assert ssh_config.aliases("extra") == ["extra"]


def test_a_config_that_cannot_be_parsed_is_no_traceback(ssh: Path) -> None:
    ssh.write_text("Host a\n  nonsense\n", encoding="utf-8")
    with pytest.raises(FleetError) as caught:
        names("- {ssh_config: 'z*', kind: server}\n", ssh.parent)
    assert caught.value.message.startswith(f"{ssh}: ")
    assert caught.value.hint == f"edit {ssh}"


def test_hosts_know_the_entry_they_came_from(tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("c\n", encoding="utf-8")
    found = campaign("- {name: 'a[1-2]', kind: server}\n- {name: b, kind: laptop}\n- {file: hosts.txt, kind: server}\n")
    listed = static.hosts(found, base=tmp_path, source="fleet.yml")
    assert [(host.name, host.entry) for host in listed] == [("a1", 0), ("a2", 0), ("b", 1), ("c", 2)]
