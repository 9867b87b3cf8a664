"""What `ssh -G` answers for real configurations, read as fleet reads it."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fleet.errors import FleetError
from fleet.inventory import reach, ssh_config
from fleet.inventory.hosts import Host, Instance
from fleet.terms import HostKind

pytestmark = pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh client")

CONFIG = """
Host inner
  HostName 10.1.2.3
  Port 2201
  User me
  ProxyJump first,bastion
  HostKeyAlias inner-key
  ConnectTimeout 7
  IdentityFile ~/.ssh/special
  UserKnownHostsFile ~/one ~/two
Host one-hop
  ProxyJump bastion
Host odd-port
  ProxyJump jo@bastion:2222
Host command
  HostName command.example.org
  User you
  ProxyCommand nc -X connect %h %p --user %r
Host direct
  ProxyJump none
  ProxyCommand none
Match host matched
  User from-match
"""


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config"
    path.write_text(CONFIG, encoding="utf-8")
    monkeypatch.setenv("FLEET_SSH_CONFIG", str(path))
    return path


def host(address: str, **more: object) -> Host:
    return Host(name="h", kind=HostKind.SERVER, connection="ssh", address=address, **more)  # type: ignore[arg-type]


def asked(command: str) -> dict[str, str]:
    """What ssh itself makes of a command line."""
    first, *rest = shlex.split(command)
    done = subprocess.run([first, "-G", *rest], capture_output=True, text=True, check=True)
    return dict(line.partition(" ")[::2] for line in done.stdout.splitlines())


def test_a_name_that_no_config_knows_is_taken_as_it_is() -> None:
    found = ssh_config.resolve(host("plain.example.org"))
    assert (found.hostname, found.port, found.proxy_command) == ("plain.example.org", 22, "")
    assert found.connect_timeout == 10.0
    assert found.host_key_alias == ""
    assert any(name.endswith("/.ssh/id_ed25519") for name in found.identity_files)


def test_an_alias_is_resolved_in_full() -> None:
    found = ssh_config.resolve(host("inner"))
    assert (found.hostname, found.port, found.user) == ("10.1.2.3", 2201, "me")
    assert found.host_key_alias == "inner-key"
    assert found.connect_timeout == 7.0
    assert found.identity_files == (str(ssh_config.home() / ".ssh" / "special"),)
    assert found.known_hosts[:2] == (str(ssh_config.home() / "one"), str(ssh_config.home() / "two"))


def test_the_campaigns_user_port_and_key_win() -> None:
    found = ssh_config.resolve(host("inner", user="other", port=2300, identity_file="~/k"))
    assert (found.user, found.port, found.identity_files) == ("other", 2300, (str(ssh_config.home() / "k"),))


def test_match_blocks_apply() -> None:
    assert ssh_config.resolve(host("matched")).user == "from-match"


def test_a_chain_of_jumps_asks_the_last_and_passes_the_others(config: Path) -> None:
    command = ssh_config.resolve(host("inner")).proxy_command
    words = shlex.split(command)
    assert words[-1] == "ssh://bastion"
    assert "BatchMode=yes" in words
    assert words[words.index("-J") + 1] == "first"
    assert words[words.index("-W") + 1] == "[10.1.2.3]:2201"
    assert words[words.index("-F") + 1] == str(config)
    assert asked(command)["hostname"] == "bastion"


def test_one_jump_needs_no_chain() -> None:
    assert "-J" not in shlex.split(ssh_config.resolve(host("one-hop")).proxy_command)


def test_a_jump_on_another_port_is_asked_there() -> None:
    found = asked(ssh_config.resolve(host("odd-port")).proxy_command)
    assert (found["user"], found["hostname"], found["port"]) == ("jo", "bastion", "2222")


def test_a_proxy_command_is_filled_in() -> None:
    found = ssh_config.resolve(host("command"))
    assert found.proxy_command == "nc -X connect command.example.org 22 --user you"


def test_none_means_no_proxy() -> None:
    assert ssh_config.resolve(host("direct")).proxy_command == ""


def test_a_broken_config_is_an_error_in_ssh_s_own_words(config: Path) -> None:
    config.write_text("Host a\n  NoSuchOption yes\n", encoding="utf-8")
    with pytest.raises(FleetError, match=r"(?i)nosuchoption") as caught:
        ssh_config.resolve(host("a"))
    assert caught.value.hint


def test_no_ssh_client_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FleetError, match="no ssh client") as caught:
        ssh_config.resolve(host("a"))
    assert "openssh-client" in caught.value.hint


def test_an_address_that_looks_like_an_option_stays_an_address() -> None:
    with pytest.raises(FleetError):
        ssh_config.resolve(host("-oProxyCommand=touch /tmp/never"))


def test_without_the_variable_ssh_s_own_config_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEET_SSH_CONFIG")
    assert ssh_config.ssh_arguments() == []
    assert ssh_config.config_file() == ssh_config.home() / ".ssh" / "config"


def made(known_hosts: str, key: Path) -> Host:
    """An instance whose host key the controller made."""
    return host("10.0.0.9", user="ubuntu", identity_file=str(key),
                instance=Instance(id="i-1", lease="l", known_hosts=known_hosts, key_alias="fleet-s1-AbC"))  # fmt: skip


@pytest.mark.parametrize("name", ["known_hosts", "with a space", "100%d", 'a "quote"', "back\\slash", "it's"])
def test_an_instance_is_known_by_the_file_that_was_made_for_it_and_no_other(tmp_path: Path, name: str) -> None:
    key = tmp_path / "login"
    # ssh forgets about keys that are not there.
    key.touch()
    item = made(str(tmp_path / name), key)
    found = ssh_config.resolve(item)
    assert (found.known_hosts, found.host_key_alias) == ((str(tmp_path / name),), "fleet-s1-AbC")
    assert found.identities_only
    said = asked(reach._ssh_command(item))
    assert said["userknownhostsfile"] == str(tmp_path / name)
    assert said["globalknownhostsfile"] == "/dev/null"
    assert said["hostkeyalias"] == "fleet-s1-abc"
    assert said["stricthostkeychecking"] in {"true", "yes"}
    assert said["identityfile"] == str(key)


def test_other_hosts_are_known_as_the_user_says() -> None:
    assert ssh_config.trust(host("inner")) == []
    found = host("inner", instance=Instance(id="i-1"))
    assert ssh_config.trust(found) == []
    assert ssh_config.resolve(found).host_key_alias == "inner-key"
    assert not ssh_config.resolve(found).identities_only
