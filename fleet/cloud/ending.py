"""Ending things in EC2: by the batch, and one failure holds no other up. Who decides what is ours is not here."""

from collections.abc import Sequence

from fleet.cloud import aws
from fleet.cloud.described import Leftover
from fleet.errors import CloudError

BATCH = 500
"""Instances of one TerminateInstances call."""
HOPELESS = aws.EXPIRED | {
    aws.NO_CREDENTIALS,
    "AuthFailure",
    "UnrecognizedClientException",
    "InvalidClientTokenId",
    "SignatureDoesNotMatch",
    "UnauthorizedOperation",
    "AccessDenied",
    "AccessDeniedException",
}
"""Codes that waiting does not help against: somebody has to do something first."""
_ALONE = frozenset({"InvalidInstanceID.NotFound", "InvalidInstanceID.Malformed", "OperationNotPermitted"})
"""One instance of a call is the matter, and EC2 ended none of the others either."""
_ABSENT = frozenset({"InvalidGroup.NotFound", "InvalidGroupId.Malformed", "InvalidKeyPair.NotFound",
                     "InvalidVolume.NotFound"})  # fmt: skip


def terminate(region: str, ids: Sequence[str]) -> dict[str, CloudError]:
    """Ask for the end of instances of a region; what failed, by id. Asking twice for one is fine."""
    failed: dict[str, CloudError] = {}
    for first in range(0, len(ids), BATCH):
        failed |= _terminate(region, ids[first : first + BATCH])
    return failed


def _terminate(region: str, ids: Sequence[str]) -> dict[str, CloudError]:
    try:
        aws.client("ec2", region).call("terminate_instances", InstanceIds=list(ids))
    except CloudError as error:
        if error.code not in _ALONE or len(ids) == 1:
            return dict.fromkeys(ids, error)
        middle = len(ids) // 2
        return _terminate(region, ids[:middle]) | _terminate(region, ids[middle:])
    return {}


def remove(item: Leftover) -> CloudError | None:
    """Delete a group, key pair or volume; what failed, or None. One that is not there any more is fine."""
    ec2 = aws.client("ec2", item.region)
    try:
        if item.kind == "security-group":
            ec2.call("delete_security_group", GroupId=item.id)
        elif item.kind == "key-pair":
            ec2.call("delete_key_pair", KeyName=item.name)
        elif item.state != "deleting":
            ec2.call("delete_volume", VolumeId=item.id)
    except CloudError as error:
        return None if error.code in _ABSENT else error
    return None
