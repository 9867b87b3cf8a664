"""What an instance is told at its first breath: when to end itself, and which host key to show.

Two MIME parts for cloud-init. The boothook runs before everything else and at every boot: it starts the timer. The
cloud-config brings the host key, so that even the first ssh connection is verified.
"""

import email.message
import email.mime.multipart
import email.mime.text

import yaml

from fleet.cloud.keys import Keys

EXPIRES_AT = "/var/lib/mlperf-fleet/expires-at"
"""On the instance: Unix seconds at which it ends itself. The login user may replace it, as `fleet extend` does."""
LIMIT = 16 * 1024
"""Bytes that EC2 takes."""

# For /bin/sh alone. FLEET_ROOT is for those who try it; nothing sets it on an instance.
_HOOK = r"""#!/bin/sh
# mlperf-fleet: this instance ends itself when its lease does, whatever has become of who launched it.
root=${{FLEET_ROOT:-}}
export FLEET_ROOT="$root"
mkdir -p "$root/run/mlperf-fleet" "$root/var/lib/mlperf-fleet"
cat >"$root/run/mlperf-fleet/lease.sh" <<'LEASE'
#!/bin/sh
file=$FLEET_ROOT{file}
expires={expires}
written={written}
pace=30
uptime_s() {{ cut -d. -f1 /proc/uptime; }}
begun=$(uptime_s)
owned=no
while :; do
    # The user that image and cloud-init make may not be there yet.
    [ $owned = yes ] || {{ chown -h {user} "${{file%/*}}" "$file" 2>/dev/null && owned=yes; }}
    # What is no number, or is missing, changes nothing.
    said=$(cat "$file" 2>/dev/null)
    case $said in
    '' | *[!0-9]* | 0* | ????????????*) ;;
    *) expires=$said ;;
    esac
    # A clock that runs behind must not lengthen the lease: it was written before this instance was there.
    now=$(date +%s)
    least=$((written + $(uptime_s) - begun))
    [ "$now" -ge "$least" ] || now=$least
    left=$((expires - now))
    if [ $left -le 0 ]; then
        echo "mlperf-fleet: the lease has ended" >"$FLEET_ROOT/dev/console" 2>/dev/null
        shutdown -P now || poweroff -f
        sleep 120
        poweroff -f
    elif [ $left -lt $pace ]; then
        sleep $left
    else
        sleep $pace
    fi
done
LEASE
# A reboot does not undo an extension.
if [ ! -s "$root{file}" ]; then
    echo {expires} >"$root{file}.new" && mv "$root{file}.new" "$root{file}"
fi
if [ -d "$root/run/systemd/system" ] && systemd-run --no-block --collect --unit=mlperf-fleet-lease \
    --property=DefaultDependencies=no --property=Restart=always --property=RestartSec=5 \
    --property=StartLimitIntervalSec=0 --property=OOMScoreAdjust=-1000 \
    --setenv=FLEET_ROOT="$root" /bin/sh "$root/run/mlperf-fleet/lease.sh"; then
    exit 0
fi
setsid /bin/sh "$root/run/mlperf-fleet/lease.sh" </dev/null >/dev/null 2>&1 &
"""


def boothook(*, expires_at: float, written_at: float, user: str) -> str:
    """The shell script that arms the timer; times in Unix seconds."""
    return _HOOK.format(file=EXPIRES_AT, expires=int(expires_at), written=int(written_at), user=user)


def make(keys: Keys, *, expires_at: float, written_at: float, user: str) -> bytes:
    """User data of an instance, the same bytes for the same arguments; below LIMIT.

    The host key's private half is in it: whoever may read the instance's user data may pass for the instance.
    """
    whole = email.mime.multipart.MIMEMultipart(boundary="==mlperf-fleet==")
    parts = {
        "cloud-boothook": "#cloud-boothook\n" + boothook(expires_at=expires_at, written_at=written_at, user=user),
        "cloud-config": "#cloud-config\n" + yaml.safe_dump(_config(keys), sort_keys=True, width=1000),
    }
    for kind, text in parts.items():
        part = email.mime.text.MIMEText(text, kind, "us-ascii")
        _plain(part)
        whole.attach(part)
    return whole.as_bytes()


def _config(keys: Keys) -> dict[str, object]:
    return {
        "disable_root": True,
        "ssh_pwauth": False,
        "ssh_deletekeys": True,
        "ssh_keys": {"ed25519_private": keys.host_private, "ed25519_public": keys.host_public},
        "ssh_authorized_keys": [keys.login_public],
        # An image of Ubuntu may come without; where there is no way out, the preflight says so.
        "packages": ["python3-venv"],
    }


def _plain(part: email.message.Message) -> None:
    """Seven bits and no more headers than cloud-init needs."""
    del part["MIME-Version"]
