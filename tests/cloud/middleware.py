"""The layer before moto: it logs, breaks, delays and completes, as a test has asked over POST /_lab/…, and passes on."""

import json
import re
import socket
import threading
import time
import traceback
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.cloud import account, wire
from tests.cloud.supplied import Supplied
from tests.cloud.wire import Call, Reply

ERROR, LOST, DELAY = "error", "lost", "delay"


@dataclass
class Fault:
    """What happens to calls that match: for `times` of them (none: for good), after the first `skip`, until `until`."""

    action: str
    kind: str = ERROR
    code: str = ""
    message: str = ""
    status: int | None = None
    """Of an error: AWS's own for the code if none. Of a lost answer: 500 sends that, none cuts the connection."""
    service: str = ""
    region: str = ""
    match: dict[str, str] = field(default_factory=dict)
    """Parameter name (regex) to its value (regex): each must be found."""
    times: int | None = 1
    skip: int = 0
    seconds: float = 0.0
    """Of a delay: how long. Of others: for how long they last, where not 0."""
    began: float = field(default_factory=time.monotonic)
    hits: int = 0

    def hit(self, call: Call) -> bool:
        """Whether it happens to this call; counts."""
        over = self.kind != DELAY and self.seconds and time.monotonic() > self.began + self.seconds
        if over or (self.times is not None and self.hits >= self.times + self.skip):
            return False
        fits = (
            re.fullmatch(self.action, call.action)
            and self.service in {"", call.service}
            and self.region in {"", call.region}
            and all(
                any(re.fullmatch(name, key) and re.search(value, had) for key, had in call.parameters.items())
                for name, value in self.match.items()
            )
        )
        if not fits:
            return False
        self.hits += 1
        return self.hits > self.skip


@dataclass
class Capacity:
    """How many instances of a type a place still has."""

    type: str
    left: int
    zone: str = ""
    market: str = ""


@dataclass
class State:
    """All that a test may set; a reset makes a new one."""

    faults: list[Fault] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    capacities: list[Capacity] = field(default_factory=list)
    slowness: account.Slowness = field(default_factory=account.Slowness)
    supplied: Supplied = field(default_factory=Supplied)
    idempotent: bool = True
    tokens: dict[tuple[str, str, str], tuple[str, Reply]] = field(default_factory=dict)
    """Region, action and token to parameters and the first answer."""
    address: str = "203.0.113.7"
    """Where the caller comes from, says checkip."""
    pool: list[str] = field(default_factory=list)
    """Private addresses that instances get instead of moto's."""


class Middleware:
    """A WSGI application around moto's."""

    def __init__(self, moto: Any) -> None:
        self._moto = moto
        self._lock = threading.RLock()
        self._log = threading.Lock()
        self.state = State()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path.startswith("/_lab/"):
            reply: Reply | None = self._control(path.removeprefix("/_lab/"), environ)
        else:
            reply = self._aws(environ)
        if reply is None:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError("as the test wanted")
        headers = [*reply.headers]
        if not any(name.lower() == "content-length" for name, _ in headers):
            headers.append(("Content-Length", str(len(reply.body))))
        start_response(reply.line, headers)
        return [reply.body]

    # --- calls to AWS

    def _aws(self, environ: dict[str, Any]) -> Reply | None:
        call = wire.read(environ)
        entry: dict[str, Any] = {
            "service": call.service, "region": call.region, "action": call.action, "parameters": dict(call.parameters),
        }  # fmt: skip
        with self._log:
            state = self.state
            state.calls.append(entry)
            hits = [fault for fault in state.faults if fault.hit(call)]
        for fault in hits:
            if fault.kind == DELAY:
                time.sleep(fault.seconds)
        refused = next((fault for fault in hits if fault.kind == ERROR), None)
        if refused is not None:
            reply = wire.error(call, refused.code, refused.message, refused.status)
        else:
            with self._lock:
                reply = self._carry_out(state, call, environ)
        entry["status"] = reply.status
        lost = next((fault for fault in hits if fault.kind == LOST), None)
        if lost is not None and refused is None:
            entry["lost"] = True
            return wire.error(call, "InternalError", status=lost.status) if lost.status else None
        return reply

    def _carry_out(self, state: State, call: Call, environ: dict[str, Any]) -> Reply:
        looking = call.action in {"DescribeInstances", "DescribeInstanceStatus"}
        state.slowness.settle(looking=looking)
        supplied = state.supplied.answer(call)
        if supplied is not None:
            return supplied
        if call.service != "ec2":
            return self._forward(environ)
        token = call.parameters.get("ClientToken", "")
        known = state.tokens.get((call.region, call.action, token)) if token and state.idempotent else None
        said = json.dumps(call.parameters, sort_keys=True)
        if known is not None:
            if known[0] != said:
                text = "The client token you have provided is associated with a resource you are attempting to create with different parameters."
                return wire.error(call, "IdempotentParameterMismatch", text)
            return known[1]
        unseen = state.slowness.unseen(looking=looking)
        reply = self._refusal(state, call, unseen) or self._done(state, call, environ)
        if looking and unseen and reply.status == 200:
            reply = _without(reply, unseen)
        if token and reply.status == 200:
            state.tokens[call.region, call.action, token] = (said, reply)
        return reply

    def _refusal(self, state: State, call: Call, unseen: set[str]) -> Reply | None:
        """EC2 says no where moto would say yes."""
        if blind := [one for one in call.listed("InstanceId") if one in unseen]:
            text = f"The instance ID '{blind[0]}' does not exist"
            return wire.error(call, "InvalidInstanceID.NotFound", text)
        if call.action == "DeleteSecurityGroup":
            group = call.parameters.get("GroupId", "")
            if any(
                one.state != "terminated" and any(had.id == group for had in one.security_groups)
                for one in account.instances(call.region)
            ):
                return wire.error(call, "DependencyViolation", f"resource {group} has a dependent object")
        if call.action == "RunInstances":
            return self._shortage(state, call)
        return None

    def _shortage(self, state: State, call: Call) -> Reply | None:
        """Too little of quota or capacity; else the call now asks for what there is: moto makes MinCount instances."""
        wanted = call.parameters
        sort = wanted.get("InstanceType", "m1.small")
        market = wanted.get("InstanceMarketOptions.MarketType", "on-demand")
        zone = wanted.get("Placement.AvailabilityZone", "") or _zone(call)
        low, high = int(wanted["MinCount"]), int(wanted["MaxCount"])
        places = [
            place
            for place in state.capacities
            if place.type == sort and place.zone in {"", zone} and place.market in {"", market}
        ]
        count = min([high, *(place.left for place in places)])
        if count < low:
            text = (
                f"We currently do not have sufficient {sort} capacity in the Availability Zone you requested ({zone})."
            )
            return wire.error(call, "InsufficientInstanceCapacity", text)
        while count > low and state.supplied.over(call.region, sort, market, count):
            count -= 1
        if state.supplied.over(call.region, sort, market, count):
            if market == "spot":
                return wire.error(call, "MaxSpotInstanceCountExceeded", "Max spot instance count exceeded")
            text = "You have requested more vCPU capacity than your current vCPU limit allows for the instance bucket that the specified instance type belongs to."
            return wire.error(call, "VcpuLimitExceeded", text)
        if wanted.get("DryRun") != "true":
            for place in places:
                place.left -= count
        wanted["MinCount"] = wanted["MaxCount"] = str(count)
        return None

    def _done(self, state: State, call: Call, environ: dict[str, Any]) -> Reply:
        if call.action == "RunInstances":
            wire.rewrite(environ, call)
        known = {one.id for one in account.instances(call.region)} if call.action == "RunInstances" else set()
        reply = self._forward(environ)
        if reply.status == 200 and call.action == "RunInstances":
            made = [one for one in account.instances(call.region) if one.id not in known]
            for one in made if state.pool else ():
                address = state.pool.pop(0)
                reply = Reply(reply.status, reply.body.replace(_text(one.private_ip), _text(address)), reply.headers)
                one.nics[0].private_ip_address = address
            state.slowness.made([one.id for one in made])
        if reply.status == 200 and call.action == "TerminateInstances":
            state.slowness.ended(call.listed("InstanceId"))
        return reply

    def _forward(self, environ: dict[str, Any]) -> Reply:
        said: list[tuple[str, list[tuple[str, str]]]] = []

        def start(status: str, headers: list[tuple[str, str]], _: Any = None) -> None:
            said.append((status, headers))

        body = b"".join(self._moto(environ, start))
        status, headers = said[-1]
        kept = tuple((name, value) for name, value in headers if name.lower() != "content-length" or not body)
        return Reply(int(status.split()[0]), body, kept)

    # --- the test's side

    def _control(self, verb: str, environ: dict[str, Any]) -> Reply:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if verb == "checkip":
            return Reply(200, f"{self.state.address}\n".encode(), (("Content-Type", "text/plain"),))
        asked = json.loads(body or b"{}")
        try:
            with self._lock:
                self.state.slowness.settle()
                answer = getattr(self, f"_lab_{verb}")(**asked)
        except Exception:  # noqa: BLE001 - whoever asked reads it
            return wire.as_json({"failed": traceback.format_exc()})
        return wire.as_json({"answer": answer})

    def _lab_reset(self) -> None:
        self.state = State()
        environ = {
            "REQUEST_METHOD": "POST", "PATH_INFO": "/moto-api/reset", "SERVER_NAME": "localhost", "SERVER_PORT": "80",
            "wsgi.url_scheme": "http", "wsgi.input": None, "HTTP_HOST": "localhost",
        }  # fmt: skip
        assert self._forward(environ).status == 200

    def _lab_calls(self) -> list[dict[str, Any]]:
        with self._log:
            return list(self.state.calls)

    def _lab_forget_calls(self) -> None:
        with self._log:
            self.state.calls.clear()

    def _lab_fault(self, **fault: Any) -> None:
        with self._log:
            self.state.faults.append(Fault(**fault))

    def _lab_faults(self) -> list[dict[str, Any]]:
        return [asdict(fault) for fault in self.state.faults]

    def _lab_heal(self) -> None:
        with self._log:
            self.state.faults.clear()

    def _lab_slow(self, **values: float) -> None:
        for name, value in values.items():
            setattr(self.state.slowness, name, value)

    def _lab_tokens(self, *, idempotent: bool) -> None:
        self.state.idempotent = idempotent

    def _lab_limit(self, region: str, family: str, market: str, vcpus: float) -> None:
        self.state.supplied.limits[region, family, market] = vcpus

    def _lab_capacity(self, **capacity: Any) -> None:
        self.state.capacities.append(Capacity(**capacity))

    def _lab_address(self, address: str) -> None:
        self.state.address = address

    def _lab_pool(self, addresses: list[str]) -> None:
        self.state.pool += addresses

    def _lab_standing(self, *, ours: bool) -> account.Found:
        return account.standing(ours=ours)

    def _lab_end(self, instance: str, code: str, message: str) -> None:
        account.end(account.find(instance), code, message)

    def _lab_no_default_vpc(self, region: str) -> None:
        account.forget_default_vpc(region)

    def _lab_instances(self) -> list[dict[str, Any]]:
        """What a machine room must know of instances, which no API tells."""
        return [
            {
                "id": one.id, "state": one.state, "address": one.private_ip, "region": one.region_name,
                "user_data": one.user_data.decode() if one.user_data is not None else "",
                "key": _key(one), "on_shutdown": one.instance_initiated_shutdown_behavior,
                "lifecycle": one.lifecycle or "on-demand", "type": one.instance_type, "zone": one.placement.zone,
            }
            for one in account.instances()
        ]  # fmt: skip


def _key(instance: Any) -> str:
    pair = instance.ec2_backend.key_pairs.get(instance.key_name)
    return pair.public_key.strip() if pair is not None else ""


def _text(address: str | None) -> bytes:
    return f">{address}<".encode()


def _zone(call: Call) -> str:
    subnet = call.parameters.get("SubnetId") or call.parameters.get("NetworkInterface.1.SubnetId", "")
    for subnets in account.backend(call.region).subnets.values():
        if subnet in subnets:
            return str(subnets[subnet].availability_zone)
    return ""


def _without(reply: Reply, ids: set[str]) -> Reply:
    """DescribeInstances' answer, or that of DescribeInstanceStatus, without some instances."""
    tree = ET.fromstring(reply.body)
    space = tree.tag.rpartition("}")[0].removeprefix("{")
    ET.register_namespace("", space)
    name = f"{{{space}}}" if space else ""
    for parent in [*tree.iter(f"{name}instancesSet"), *tree.iter(f"{name}instanceStatusSet")]:
        for item in list(parent):
            if item.findtext(f"{name}instanceId") in ids:
                parent.remove(item)
    for parent in tree.iter(f"{name}reservationSet"):
        for item in list(parent):
            if not list(item.iter(f"{name}instanceId")):
                parent.remove(item)
    return Reply(reply.status, ET.tostring(tree), reply.headers)
