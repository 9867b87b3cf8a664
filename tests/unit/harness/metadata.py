"""The metadata service of an instance, over real HTTP: what IMDSv2 says and what it refuses."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LIFETIME, TOKEN = "X-aws-ec2-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token"


class Metadata:
    """What is asked, and what is answered."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {"instance-life-cycle": "spot"}
        """Below latest/meta-data/."""
        self.tokens: set[str] = set()
        self.asked: list[str] = []
        self.broken = 0
        """So many answers are 503."""
        self.url = ""

    def interrupt(self, action: str = "terminate", at: str = "2026-11-25T05:02:00Z") -> None:
        """EC2 takes the instance back."""
        self.answers["spot/instance-action"] = json.dumps({"action": action, "time": at})


class _Handler(BaseHTTPRequestHandler):
    state: Metadata

    def answer(self, code: int, text: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def broke(self) -> bool:
        self.state.asked.append(f"{self.command} {self.path}")
        if not self.state.broken:
            return False
        self.state.broken -= 1
        self.answer(503)
        return True

    def do_PUT(self) -> None:
        if self.broke():
            return
        if self.path != "/latest/api/token" or not 1 <= int(self.headers.get(LIFETIME, "0")) <= 21600:
            self.answer(400)
            return
        token = f"token-{len(self.state.asked)}"
        self.state.tokens.add(token)
        self.answer(200, token)

    def do_GET(self) -> None:
        if self.broke():
            return
        name = self.path.removeprefix("/latest/meta-data/")
        if self.headers.get(TOKEN) not in self.state.tokens:
            self.answer(401)
        elif name in self.state.answers:
            self.answer(200, self.state.answers[name])
        else:
            self.answer(404)

    def log_message(self, *_: Any) -> None:
        pass


def server(state: Metadata, address: tuple[str, int] = ("127.0.0.1", 0)) -> ThreadingHTTPServer:
    """The service, bound and not yet serving."""
    return ThreadingHTTPServer(address, type("Handler", (_Handler,), {"state": state}))


@contextmanager
def serving() -> Iterator[Metadata]:
    """A metadata service on this machine."""
    state = Metadata()
    service = server(state)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{service.server_port}/"
    try:
        yield state
    finally:
        service.shutdown()
        service.server_close()
