"""AWS's protocols, as far as a layer before moto must read and write them."""

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any
from urllib.parse import parse_qsl, urlencode
from xml.sax.saxutils import escape

EC2_XMLNS = "http://ec2.amazonaws.com/doc/2016-11-15/"
_SCOPE = re.compile(r"Credential=[^/]+/\d+/([^/]+)/([^/]+)/aws4_request")
# EC2's "server errors"; whatever is not listed is the caller's, 400.
_STATUS = {
    "InsufficientInstanceCapacity": 500,
    "InsufficientHostCapacity": 500,
    "InternalError": 500,
    "InternalFailure": 500,
    "RequestLimitExceeded": 503,
    "Unavailable": 503,
    "SlowDown": 503,
    "UnauthorizedOperation": 403,
    "AccessDenied": 403,
    "AuthFailure": 401,
}
_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found"}


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes back."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "text/xml;charset=UTF-8"),)

    @property
    def line(self) -> str:
        """For WSGI."""
        return f"{self.status} {_REASONS.get(self.status, 'Answer')}"


@dataclass(slots=True)
class Call:
    """One request, understood."""

    service: str
    region: str
    action: str
    """For S3 the method."""
    parameters: dict[str, str]
    """As on the wire: `InstanceId.1`; of JSON the first level, with JSON for values that are no strings; for S3 `path`."""
    data: dict[str, Any] = field(default_factory=dict)
    """Of JSON, the whole."""

    def listed(self, name: str) -> list[str]:
        """The values of a query list, in order: `InstanceId.1`, `InstanceId.2` and so on."""
        pattern = re.compile(rf"{re.escape(name)}\.(\d+)$")
        found = {int(match[1]): value for key, value in self.parameters.items() if (match := pattern.match(key))}
        return [found[number] for number in sorted(found)]

    def filters(self) -> dict[str, list[str]]:
        """EC2's filters."""
        pattern = re.compile(r"Filter\.(\d+)\.Name$")
        return {
            value: self.listed(f"Filter.{match[1]}.Value")
            for key, value in self.parameters.items()
            if (match := pattern.match(key))
        }


def read(environ: dict[str, Any]) -> Call:
    """Understand a request; its body can be read again by whoever comes next."""
    scope = _SCOPE.search(environ.get("HTTP_AUTHORIZATION", ""))
    region, service = (scope[1], scope[2]) if scope else ("us-east-1", "s3")
    if service == "s3":
        return Call("s3", region, environ["REQUEST_METHOD"], {"path": environ.get("PATH_INFO", "")})
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.input"] = BytesIO(body)
    if target := environ.get("HTTP_X_AMZ_TARGET"):
        data = json.loads(body or b"{}")
        flat = {key: value if isinstance(value, str) else json.dumps(value) for key, value in data.items()}
        return Call(service, region, target.rpartition(".")[2], flat, data)
    parameters = dict(parse_qsl(body.decode() or environ.get("QUERY_STRING", ""), keep_blank_values=True))
    return Call(service, region, parameters.pop("Action", environ["REQUEST_METHOD"]), parameters)


def rewrite(environ: dict[str, Any], call: Call) -> None:
    """Have the request say what the (changed) call says; query protocol only."""
    body = urlencode({"Action": call.action, **call.parameters}).encode()
    environ["wsgi.input"] = BytesIO(body)
    environ["CONTENT_LENGTH"] = str(len(body))


def error(call: Call, code: str, message: str = "", status: int | None = None) -> Reply:
    """A refusal in the words of the service's protocol."""
    status = status or _STATUS.get(code, 400)
    message = message or f"{code}, said the test."
    request = str(uuid.uuid4())
    if call.service == "ec2":
        inner = f"<Code>{escape(code)}</Code><Message>{escape(message)}</Message>"
        text = f"<Response><Errors><Error>{inner}</Error></Errors><RequestID>{request}</RequestID></Response>"
        return Reply(status, text.encode())
    if call.service == "s3":
        text = f"<Error><Code>{escape(code)}</Code><Message>{escape(message)}</Message><RequestId>{request}</RequestId></Error>"
        return Reply(status, text.encode(), (("Content-Type", "application/xml"),))
    if call.service in {"sts", "iam"}:
        inner = f"<Type>Sender</Type><Code>{escape(code)}</Code><Message>{escape(message)}</Message>"
        text = f"<ErrorResponse><Error>{inner}</Error><RequestId>{request}</RequestId></ErrorResponse>"
        return Reply(status, text.encode())
    return as_json({"__type": code, "message": message}, status)


def as_json(data: Mapping[str, Any], status: int = 200) -> Reply:
    """An answer of the JSON protocols."""
    return Reply(status, json.dumps(data).encode(), (("Content-Type", "application/x-amz-json-1.1"),))


def ec2_answer(action: str, inner: str) -> Reply:
    """An answer of EC2."""
    text = f'<{action}Response xmlns="{EC2_XMLNS}"><requestId>{uuid.uuid4()}</requestId>{inner}</{action}Response>'
    return Reply(200, text.encode())
