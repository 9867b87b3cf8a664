"""Which AMI to launch: found by an SSM public parameter, so that it is the newest, and never by an id alone."""

import difflib
import itertools
from dataclasses import dataclass

from fleet.cloud import aws
from fleet.errors import CloudError

# 24.04, for hosts need Python 3.11 and 22.04 has an older one.
_DEEP_LEARNING = "/aws/service/deeplearning/ami/{cpu}/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"

LOOKED_THROUGH = 300
"""Parameters that a misspelt name is compared with: they come by ten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An AMI of one region."""

    id: str
    """`ami-…`"""
    root_device: str
    architecture: str
    """`x86_64` or `arm64`."""
    root_gib: int
    """What its root volume must hold at least."""


def parameter(architecture: str) -> str:
    """The parameter that is asked where the campaign names none: AWS's Deep Learning Base AMI, Ubuntu, for a CPU."""
    return _DEEP_LEARNING.format(cpu=architecture)


def find(region: str, name: str) -> Image:
    """The image that an SSM parameter names.

    Raises CloudError when there is no such parameter or image in the region.
    """
    hint = "set cloud.image_parameter to an SSM parameter that holds an AMI id in that region"
    try:
        value = aws.client("ssm", region).call("get_parameter", Name=name)["Parameter"]["Value"]
        found = aws.client("ec2", region).call("describe_images", ImageIds=[value])["Images"]
    except CloudError as error:
        if error.code in {"ParameterNotFound", "ValidationException"} or error.code.startswith("InvalidAMIID"):
            text = f"no image {name} in {region} ({error.code}){_nearest(region, name)}"
            raise CloudError(text, hint=hint, code=error.code) from error
        raise
    if not found:
        raise CloudError(f"no image {name} in {region}: {value} is not there", hint=hint)
    image = found[0]
    root = str(image.get("RootDeviceName", ""))
    disks = [disk for disk in image.get("BlockDeviceMappings", ()) if disk.get("DeviceName") == root]
    if image.get("RootDeviceType", "ebs") != "ebs" or not root:
        raise CloudError(f"image {name} in {region} ({value}) has no EBS root volume to encrypt", hint=hint)
    return Image(
        id=str(image["ImageId"]),
        root_device=root,
        architecture=str(image.get("Architecture", "")),
        root_gib=max([int(disk.get("Ebs", {}).get("VolumeSize", 0)) for disk in disks], default=0),
    )


def _nearest(region: str, name: str) -> str:
    """`, did you mean /aws/service/…?`, of AWS's own parameters beside it; empty when none is like it."""
    beside = "/".join(name.split("/")[:6])
    if not name.startswith("/aws/service/"):
        return ""
    try:
        found = aws.client("ssm", region).every("get_parameters_by_path", "Parameters", Path=beside, Recursive=True)
        known = [str(item["Name"]) for item in itertools.islice(found, LOOKED_THROUGH)]
    except CloudError:
        # It only makes a message clearer.
        return ""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]}?" if close else ""
