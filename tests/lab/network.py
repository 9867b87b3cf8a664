"""The lab's network: one hub namespace with a bridge that has no way out, and a namespace with one cable per host."""

from __future__ import annotations

import array
import ctypes
import fcntl
import ipaddress
import os
import socket
import struct
import subprocess
import threading
from typing import TYPE_CHECKING, TypeVar

from tests.lab.record import NETNS

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

_NETWORK = ipaddress.ip_network("10.66.0.0/16")
_FIRST_HOST = 10
_CLONE_NEWNET = 0x40000000
_SIOCETHTOOL = 0x8946
_ETHTOOL_STXCSUM = 0x17


def address(index: int) -> str:
    """Address of the host with this number, from 1 up."""
    return str(_NETWORK[_FIRST_HOST + index])


def _port(index: int) -> str:
    return f"v{index}"  # interface names end at 15 characters, host names do not


def create(hub: str, hosts: dict[int, str]) -> None:
    """Make the hub and, for each host number, its namespace, cable and address."""
    _batch(None, [f"netns add {name}" for name in (hub, *hosts.values())])
    router = f"{_NETWORK[1]}/{_NETWORK.prefixlen}"
    _batch(hub, ["link set lo up", "link add br0 type bridge", f"addr add {router} dev br0", "link set br0 up"])
    _batch(None, [f"link add {_port(i)} netns {hub} type veth peer name eth0 netns {n}" for i, n in hosts.items()])
    _batch(hub, [f"link set {_port(index)} master br0 up" for index in hosts])
    for index, name in hosts.items():
        place = f"{address(index)}/{_NETWORK.prefixlen}"
        # No IPv6 addresses: their duplicate detection would only make noise.
        cable = ["link set eth0 addrgenmode none", f"addr add {place} dev eth0", "link set eth0 up"]
        _batch(name, ["link set lo up", *cable])


def own(namespace: str, address: str) -> None:
    """An address that a host has for itself alone."""
    _batch(namespace, [f"addr replace {address}/32 dev lo"])


def router() -> str:
    """The hub's own address, which every host reaches."""
    return str(_NETWORK[1])


def plug(hub: str, index: int, up: bool) -> None:
    """Plug the host's cable in or out, at the hub's end: the host itself notices only a lost carrier."""
    _batch(hub, [f"link set {_port(index)} {'up' if up else 'down'}"])


def divert(hub: str, index: int, host: str) -> tuple[str, str]:
    """Cut the host's cable in two at the hub; returns the two ends that somebody must now join, frame by frame."""
    near, far, port = _port(index), f"r{index}", f"b{index}"
    # A frame that is carried by hand must be whole: no checksum left to hardware, and so none longer than the cable
    # allows.
    inside(host, lambda: _checksums_by_hardware("eth0", on=False), 10)
    _batch(hub, [f"link add {port} type veth peer name {far}"])
    inside(hub, lambda: _checksums_by_hardware(port, on=False), 10)
    # Without ARP the hub itself does not answer at the ends: it has the bridge's address everywhere.
    ends = [f"link set {end} addrgenmode none arp off up" for end in (near, far)]
    _batch(
        hub, [f"link set {near} nomaster", *ends, f"link set {port} addrgenmode none", f"link set {port} master br0 up"]
    )
    return near, far


def join(hub: str, index: int, host: str) -> None:
    """Make one cable of it again."""
    _batch(hub, [f"link del b{index}", f"link set {_port(index)} arp on", f"link set {_port(index)} master br0"])
    inside(host, lambda: _checksums_by_hardware("eth0", on=True), 10)


def _checksums_by_hardware(interface: str, *, on: bool) -> None:
    command = array.array("I", [_ETHTOOL_STXCSUM, int(on)])
    place, _ = command.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCETHTOOL, struct.pack("16sP", interface.encode(), place))


def inside(namespace: str, function: Callable[[], _T], timeout: float) -> _T:
    """Run a function in the namespace: on a thread of its own, because a network namespace is a thread's property."""
    done: list[_T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            _enter(namespace)
            done.append(function())
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"no answer from inside {namespace} after {timeout} s")
    return done[0]


def _enter(namespace: str) -> None:
    descriptor = os.open(NETNS / namespace, os.O_RDONLY)
    try:
        # os.setns comes with Python 3.12
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {namespace}")
    finally:
        os.close(descriptor)


def _batch(namespace: str | None, lines: list[str]) -> None:
    command = ["ip", *(["-netns", namespace] if namespace else []), "-batch", "-"]
    done = subprocess.run(
        command, input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
