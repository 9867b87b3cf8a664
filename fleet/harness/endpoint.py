"""An HTTP endpoint that streams server-sent events: connections kept, silence and refusals told in its own words."""

import http.client
import json
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator

CONNECT_S = 10.0
CHUNK = 65_536
LONGEST_LINE = 16 * 2**20
"""Bytes: no token needs as many."""


class Endpoint:
    """Connections to one base URL, kept alive and each used by one thread at a time."""

    def __init__(self, url: str, key: str | None, timeout_s: float) -> None:
        """Raises ValueError when `url` is no http(s) URL."""
        parts = urllib.parse.urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == -1:
            raise ValueError("option endpoint: the base URL of an engine, such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise ValueError("option endpoint holds a user or password: a key belongs into api_key_env")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, port or (443 if self._secure else 80)
        self.name = f"{parts.hostname}:{self._port}"
        self.path = parts.path.rstrip("/")
        self.timeout_s = timeout_s
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def _connect(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection
        if self._secure:
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=CONNECT_S, context=context)
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        try:
            connection.connect()
        except OSError as error:
            raise ConnectionError(
                f"no connection to {self.name}: {error}; start the engine or correct option endpoint"
            ) from error
        return connection

    def request(self, method: str, path: str, body: bytes | None = None) -> "Answer":
        """Ask for `path` of the server; the answer's head has come.

        Raises ConnectionError or TimeoutError, saying which host.
        """
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None:
            try:
                return self._ask(connection, method, path, body)
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                # Closed by the server while nobody used it, as servers do after some seconds: it never saw the request.
                connection.close()
        connection = self._connect()
        try:
            return self._ask(connection, method, path, body)
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self.broken(error, "before it answered") from error

    def _ask(self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None) -> "Answer":
        held: socket.socket = connection.sock
        try:
            held.settimeout(self.timeout_s)
            headers = {**self._headers, **({"Content-Type": "application/json"} if body else {})}
            connection.request(method, path, body, headers)
            return Answer(self, connection, held, connection.getresponse())
        except TimeoutError as error:
            connection.close()
            raise self.silent("has not begun to answer") from error

    def silent(self, what: str) -> TimeoutError:
        """Nothing came for as long as option timeout_s allows."""
        return TimeoutError(f"{self.name} {what} for {self.timeout_s:g} s (option timeout_s); is the engine stuck?")

    def broken(self, error: BaseException, when: str) -> ConnectionError:
        """The connection did not last."""
        return ConnectionError(f"{self.name} ended the connection {when}: {type(error).__name__}; did the engine die?")

    def keep(self, connection: http.client.HTTPConnection) -> None:
        """Have it used again."""
        with self._lock:
            self._idle.append(connection)

    def close(self) -> None:
        """End what is not in use."""
        with self._lock:
            for connection in self._idle:
                connection.close()
            self._idle.clear()


class Answer:
    """An HTTP response whose body is still to be read, once: by `text` or by `events`."""

    def __init__(
        self,
        endpoint: Endpoint,
        connection: http.client.HTTPConnection,
        held: socket.socket,
        response: http.client.HTTPResponse,
    ) -> None:
        self._endpoint, self._connection, self._response = endpoint, connection, response
        self._socket = held  # the connection forgets it when the server means to close
        self.status = response.status
        self.server = response.headers.get("Server", "")
        self.is_stream = "event-stream" in response.headers.get("Content-Type", "")
        self.alive = time.monotonic()
        """When a token, or anything else that counts as progress, came last."""

    def _pieces(self) -> Iterator[bytes]:
        """The body as it comes. Raises TimeoutError when nobody moved `alive` for as long as is allowed."""
        endpoint = self._endpoint
        try:
            while True:
                left = self.alive + endpoint.timeout_s - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                self._socket.settimeout(left)
                piece = self._response.read1(CHUNK)
                if not piece:
                    break
                yield piece
            if self._response.length:
                raise http.client.IncompleteRead(b"", self._response.length)
            self._response.close()  # read1 leaves an empty one open, and the next could not begin
        except TimeoutError as error:
            self._connection.close()
            raise endpoint.silent("has streamed no token") from error
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise endpoint.broken(error, "in the middle of an answer") from error
        except GeneratorExit:
            self._connection.close()  # what is still to come would be read as the next answer
            raise
        if self._response.will_close:
            self._connection.close()
        else:
            endpoint.keep(self._connection)

    def text(self) -> str:
        """The whole body. Raises ConnectionError or TimeoutError."""
        return b"".join(self._pieces()).decode(errors="replace")

    def events(self) -> Iterator[str]:
        """The data of each server-sent event (WHATWG HTML, section 9.2), without comments and other fields.

        Raises ConnectionError, TimeoutError, or ValueError for a line without end.
        """
        held = b""
        for piece in self._pieces():
            *lines, held = (held + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip().decode(errors="replace")
            if len(held) > LONGEST_LINE:
                raise ValueError(f"{self._endpoint.name} sent a line of over {LONGEST_LINE} bytes")
        if held.startswith(b"data:"):
            yield held[5:].strip().decode(errors="replace")

    def refusal(self) -> str:
        """The server's own words about an error, in one line."""
        text = self.text()
        try:
            said = json.loads(text)
            for key in ("error", "detail", "message"):
                said = said.get(key, said) if isinstance(said, dict) else said
            text = said if isinstance(said, str) else json.dumps(said)
        except ValueError:
            pass  # a plain text, or a page
        return " ".join(text.split())[:300] or "no message"


class RefusedError(ValueError):
    """The server answered with an error status."""

    def __init__(self, name: str, status: int, said: str) -> None:
        hint = "; name the variable with the key in api_key_env" if status in {401, 403} else ""
        super().__init__(f"{name} answered {status}: {said}{hint}")
        self.status, self.said = status, said
