"""A machine room behind moto: each instance that runs there is a lab host, with its address, keys, user data and metadata."""

import email
import shlex
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml

from tests.cloud.cloud import Cloud, Server
from tests.lab import network
from tests.lab.hosts import Lab, LabHost
from tests.lab.record import NETNS
from tests.unit.harness import metadata
from tests.unit.harness.metadata import Metadata

METADATA = "169.254.169.254"
_LOOK_S = 0.1
_SAID = "var/lib/shutdown"
_SHUTDOWN = f"""#!/bin/sh
# Nothing in a PID namespace can end its first process: the bridge does, when it sees this.
echo "$0 $*" >>/{_SAID}
"""
_T = TypeVar("_T")


class HubCloud(Cloud):
    """A cloud that is reached from the lab's hub alone."""

    def __init__(self, url: str, lab: Lab) -> None:
        super().__init__(url)
        self._lab = lab

    def ask(self, verb: str, **asked: Any) -> Any:
        """From there."""
        return self._lab.inside(lambda: super(HubCloud, self).ask(verb, **asked))


@dataclass
class Machine:
    """A place in the machine room: a lab host, and the instance that it is just now."""

    host: LabHost
    instance: str = ""
    metadata: Metadata = field(default_factory=Metadata)
    service: ThreadingHTTPServer | None = None


class Bridge:
    """moto in the hub of a lab whose hosts are its instances; a context manager.

    `places` instances can run at once. `lab` is for what is typed at the controller's place, `cloud` for what AWS does;
    `environment` is what a command there needs to have this for its AWS.
    """

    def __init__(self, places: int, *, mounts: dict[Path, str] | None = None, user: str = "bench") -> None:
        self.lab = Lab(places, user=user, mounts=mounts)
        self._machines: list[Machine] = []
        self._stack = ExitStack()
        self._over = threading.Event()
        self._failed: BaseException | None = None
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.lab)
            enter = ("nsenter", f"--net={NETNS / self.lab.hub}")
            server = stack.enter_context(Server(network.router(), enter))
            self.cloud = HubCloud(server.url, self.lab)
            self._machines = [Machine(host) for host in self.lab.hosts.values()]
            for machine in self._machines:
                machine.host.power_off()
            self.reset()
            watching = threading.Thread(target=self._watch, daemon=True)
            watching.start()
            stack.callback(watching.join, 60)
            stack.callback(self._over.set)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if self._failed is not None:
            raise RuntimeError("the bridge broke down") from self._failed

    @property
    def environment(self) -> dict[str, str]:
        """For commands at the controller's place."""
        return self.cloud.environment()

    def reset(self) -> None:
        """An empty account, and no instance up."""
        with self._lock:
            self.cloud.reset()
            for machine in self._machines:
                self._take_down(machine)
            self.cloud.pool([machine.host.address for machine in self._machines])

    def host(self, instance: str) -> LabHost | None:
        """The host that is an instance, once it has booted and until it is gone."""
        with self._lock:
            return next((machine.host for machine in self._machines if machine.instance == instance), None)

    def up(self) -> list[str]:
        """Instances that are up."""
        with self._lock:
            return [machine.instance for machine in self._machines if machine.instance]

    def until(self, true: Callable[[], _T], timeout: float = 30.0) -> _T:
        """Wait for something, which the bridge may bring about; raises what broke it."""
        last = time.monotonic() + timeout
        while not (found := true()):
            if self._failed is not None:
                raise RuntimeError("the bridge broke down") from self._failed
            assert time.monotonic() < last, "it never came"
            time.sleep(_LOOK_S)
        return found

    def interrupt(self, instance: str, after_s: float) -> None:
        """EC2 takes a spot instance back: its metadata say so now, and it is ended after so long."""
        with self._lock:
            machine = next(machine for machine in self._machines if machine.instance == instance)
            at = datetime.fromtimestamp(time.time() + after_s, UTC)
            machine.metadata.interrupt(at=at.strftime("%Y-%m-%dT%H:%M:%SZ"))
        timer = threading.Timer(after_s, self.cloud.end, [instance])
        timer.daemon = True
        timer.start()

    # --- what the room does by itself

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_S):
            try:
                with self._lock:
                    self._step({one["id"]: one for one in self.cloud.instances()})
            except BaseException as error:  # noqa: BLE001 - raised where somebody waits
                self._failed = error
                return

    def _step(self, instances: dict[str, dict[str, Any]]) -> None:
        for machine in self._machines:
            known = instances.get(machine.instance)
            if machine.instance and (known is None or known["state"] in {"shutting-down", "terminated"}):
                self._take_down(machine)
                self.cloud.pool([machine.host.address])
            elif known is not None and (machine.host.upper / _SAID).exists():
                terminate = known["on_shutdown"] == "terminate"
                assert terminate, "an instance was stopped: nothing here starts it again"
                self.cloud.end(known["id"], "Client.InstanceInitiatedShutdown", "Instance initiated shutdown")
        places = {machine.host.address: machine for machine in self._machines}
        for one in instances.values():
            found = places.get(one["address"])
            if one["state"] == "running" and found is not None and not found.instance:
                self._boot(found, one)

    def _take_down(self, machine: Machine) -> None:
        if machine.service is not None:
            machine.service.shutdown()
            machine.service.server_close()
            machine.service = None
        if machine.instance:
            machine.host.power_off()
            machine.instance = ""

    def _boot(self, machine: Machine, one: dict[str, Any]) -> None:
        hook, config = _parts(one["user_data"])
        machine.host.hostname = f"ip-{one['address'].replace('.', '-')}"
        machine.host.renew(lambda upper: self._install(upper, one, hook, config))
        machine.host.answer_at(METADATA)
        state = machine.metadata = Metadata()
        state.answers = {
            "instance-id": one["id"], "instance-type": one["type"], "instance-life-cycle": one["lifecycle"],
            "local-ipv4": one["address"], "placement/availability-zone": one["zone"], "placement/region": one["region"],
        }  # fmt: skip
        service = machine.host.inside(lambda: metadata.server(state, (METADATA, 80)))
        machine.service = service
        threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        machine.instance = one["id"]
        machine.host.power_on()

    def _install(self, upper: Path, one: dict[str, Any], hook: str, config: dict[str, Any]) -> None:
        """What cloud-init makes of an image and user data."""
        keys = [one["key"], *config.get("ssh_authorized_keys", ())]
        login = upper / "home" / self.lab.user / ".ssh/authorized_keys"
        login.write_text("".join(f"{key}\n" for key in dict.fromkeys(keys) if key))
        if config.get("disable_root", True):
            (upper / "root/.ssh/authorized_keys").unlink()
        for kind, given in config.get("ssh_keys", {}).items():
            sort, _, half = kind.rpartition("_")
            path = upper / f"etc/ssh/ssh_host_{sort}_key{'.pub' if half == 'public' else ''}"
            path.write_text(given if given.endswith("\n") else f"{given}\n")
            path.chmod(0o644 if half == "public" else 0o600)
        place = upper / "usr/local/sbin"
        place.mkdir(parents=True, exist_ok=True)
        for word in ("shutdown", "poweroff"):
            (place / word).write_text(_SHUTDOWN)
            (place / word).chmod(0o755)
        (upper / _SAID).parent.mkdir(parents=True, exist_ok=True)
        if hook:
            (upper / "etc/boothook").write_text(hook)
            (upper / "etc/boothook").chmod(0o755)


def _parts(user_data: str) -> tuple[str, dict[str, Any]]:
    """The boothook and the cloud-config of user data; parts of other kinds are refused."""
    parsed = email.message_from_string(user_data)
    texts = [str(part.get_payload()) for part in parsed.walk() if not part.is_multipart()] if user_data else []
    if not parsed.is_multipart() and user_data:
        texts = [user_data]
    hook, config = "", {}
    for text in texts:
        first, _, rest = text.partition("\n")
        if first == "#cloud-boothook":
            hook = rest
        elif first == "#cloud-config":
            config = yaml.safe_load(rest)
        else:
            raise ValueError(f"user data of a kind that the bridge does not know: {shlex.quote(first)}")
    return hook, config
