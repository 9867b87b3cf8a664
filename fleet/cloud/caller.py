"""Where fleet itself runs, as EC2 sees it: which address ssh will come from, and in which VPC this machine is, if any."""

import os
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from fleet.errors import CloudError

CHECKIP = "https://checkip.amazonaws.com"
"""Says which address a question came from."""
_IMDS = "http://169.254.169.254"


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """What EC2 says of this machine, if it is an instance."""

    vpc: str
    address: IPv4Address
    """Its private address there."""


def public_address() -> IPv4Address:
    """The address that this machine's connections come from, outside.

    Raises CloudError when nobody says it.
    """
    hint = "set cloud.ssh_from to the addresses that ssh comes from, such as 198.51.100.7/32"
    try:
        with urllib.request.urlopen(CHECKIP, timeout=10) as answer:
            return IPv4Address(answer.read(64).decode().strip())
    except (OSError, ValueError) as error:
        raise CloudError(f"{CHECKIP} does not say where ssh will come from: {error}", hint=hint) from error


def address_towards(network: IPv4Network) -> IPv4Address:
    """The address of this machine that packets to a network carry; sends none.

    Raises CloudError without a route there.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((str(network.network_address + 1), 9))
            return IPv4Address(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise CloudError(
            f"no way to {network}, where instances would be: {error}", hint="set cloud.ssh_from"
        ) from error


def here() -> Here | None:
    """What the instance metadata service says of this machine; None where there is none, or it is switched off.

    It is asked under AWS_EC2_METADATA_SERVICE_ENDPOINT, and not at all with AWS_EC2_METADATA_DISABLED=true, as the AWS
    tools do.
    """
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return None
    try:
        token = _ask("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
        mine = {"X-aws-ec2-metadata-token": token}
        mac = _ask("/latest/meta-data/mac", mine)
        vpc = _ask(f"/latest/meta-data/network/interfaces/macs/{mac}/vpc-id", mine)
        return Here(vpc=vpc, address=IPv4Address(_ask("/latest/meta-data/local-ipv4", mine)))
    except (OSError, ValueError):
        return None


def _ask(path: str, headers: dict[str, str], *, method: str = "GET") -> str:
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "").rstrip("/") or _IMDS
    # No proxy: the service is this machine's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(base + path, headers=headers, method=method)  # noqa: S310 - the user's own setting
    with opener.open(request, timeout=1) as answer:
        text: str = answer.read(4096).decode().strip()
        return text
