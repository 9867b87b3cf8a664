"""A serving engine behind an OpenAI-compatible endpoint: vLLM, TensorRT-LLM, SGLang, transformers serve.

Speaks HTTP by the standard library: a client package would add nothing to one POST and its event stream but time for
every token. Proxies of the environment are not used, since they would be measured too.

A sample is asked for once. A second try would hide that the engine failed, and its time would count from the second
beginning; so any failure ends the run with its cause.
"""

import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fleet.harness.interfaces import Benchmark, Features, Options, Output, generation_of

OPTIONS = {
    "api", "api_key_env", "beams", "concurrency", "endpoint", "extra", "model", "timeout_s", "weights_data_type",
}  # fmt: skip
PATHS = {"completions": "/completions", "chat": "/chat/completions"}
CONNECT_S = 10.0
CONCURRENCY = 256
"""As many sequences as vLLM computes at once, unless it is told otherwise."""
TIMEOUT_S = 300.0
CHUNK = 65_536
LONGEST_LINE = 16 * 2**20
"""Bytes: no token needs as many."""

Tokens = npt.NDArray[np.int64]
Encode = Callable[[str], Tokens]


class _Endpoint:
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

    def request(self, method: str, path: str, body: bytes | None = None) -> "_Answer":
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

    def _ask(self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None) -> "_Answer":
        held: socket.socket = connection.sock
        try:
            held.settimeout(self.timeout_s)
            headers = {**self._headers, **({"Content-Type": "application/json"} if body else {})}
            connection.request(method, path, body, headers)
            return _Answer(self, connection, held, connection.getresponse())
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


class _Answer:
    """An HTTP response whose body is still to be read, once: by `text` or by `events`."""

    def __init__(
        self,
        endpoint: _Endpoint,
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


class _RefusedError(ValueError):
    """The server answered with an error status."""

    def __init__(self, name: str, status: int, said: str) -> None:
        hint = "; name the variable with the key in api_key_env" if status in {401, 403} else ""
        super().__init__(f"{name} answered {status}: {said}{hint}")
        self.status, self.said = status, said


class _Chunks:
    """What one sample's stream has brought so far."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.texts: list[str] = []
        self.ids: list[int] = []
        self.ended = False
        """[DONE] or a finish_reason has come."""
        self.counted: int | None = None
        """Tokens of the answer by the engine's count."""

    def add(self, data: str) -> bool:
        """Take one event's data, or a whole answer; whether it brought any part of the answer.

        Raises ValueError when it is not what OpenAI's API promises, with the engine's words when it reports an error.
        """
        if data == "[DONE]":
            self.ended = True
            return False
        try:
            chunk = json.loads(data)
            if error := chunk.get("error"):
                said = error.get("message", error) if isinstance(error, dict) else error
                raise ValueError(f"the engine says {said}")
            if usage := chunk.get("usage"):
                self.counted = int(usage["completion_tokens"])
            choices = chunk["choices"]
            if not choices:
                return False
            choice = choices[0]
            content = choice.get("delta") or choice.get("message")
            text = (content.get("content") if content else choice.get("text")) or ""
            ids = choice.get("token_ids") or []
            self.ids += [int(one) for one in ids]
            self.texts.append(text)
            self.ended = self.ended or choice.get("finish_reason") is not None
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            why = str(error) if "the engine says" in str(error) else "that is no completion in OpenAI's format"
            raise ValueError(f"{self._name} streamed {data[:120]!r}: {why}") from error
        return bool(text or ids)


class OpenAIBackend:
    """Asks a serving engine, each sample by itself; the engine does the batching. For its options see OPTIONS."""

    batch_size = 1024
    by_length = False

    def __init__(self, benchmark: Benchmark, options: Options) -> None:
        if unknown := set(options) - OPTIONS:
            raise ValueError(f"the openai backend has no option {min(unknown)!r}; it has {sorted(OPTIONS)}")
        if benchmark.generation is None:
            raise ValueError("this benchmark wants logits, which an OpenAI-compatible endpoint does not give")
        if "endpoint" not in options:
            raise ValueError("option endpoint is missing: the engine's base URL, such as http://127.0.0.1:8000/v1")
        self._generation, labels = generation_of(benchmark, options)
        self._api = str(options.get("api", "completions"))
        if self._api not in PATHS:
            raise ValueError(f"api {self._api!r}: one of {', '.join(PATHS)}")
        self.concurrency = int(options.get("concurrency", CONCURRENCY))
        timeout_s = float(options.get("timeout_s", TIMEOUT_S))
        if self.concurrency < 1 or not timeout_s > 0:
            raise ValueError("concurrency is a whole number from 1 on, timeout_s a number of seconds above 0")
        extra = _extra(options.get("extra"))
        self._beams = self._generation.beams > 1
        if self._beams and not extra.get("use_beam_search"):
            raise ValueError(
                f"{self._generation.beams} beams: serving engines search with one; set beams to 1, or for vLLM, which"
                ' can, extra to {"use_beam_search": true}'
            )
        self._weights_data_type = str(options.get("weights_data_type", "as served"))
        encode: Encode | None = getattr(benchmark, "encode", None)
        self._encode = encode
        self._endpoint = _Endpoint(str(options["endpoint"]), _key(options.get("api_key_env")), timeout_s)
        self._threads: ThreadPoolExecutor | None = None
        served, self._engine = self._served("model" in options)
        self._fields = self._request(self._model(options.get("model"), served)) | extra
        self._as_ids = self._api == "completions"
        refused = self._negotiate(benchmark.features(0), set(extra), served)
        if "min_tokens" in refused and self._generation.min_new_tokens:
            labels = (*labels, "min_tokens refused by the engine")
        self.labels: tuple[str, ...] = (*labels, f"served by {self._engine['engine']}")

    def _served(self, named: bool) -> tuple[list[str], dict[str, str]]:
        """Names of the models, and what tells the engine.

        Raises ValueError when the endpoint refuses to say; where the model is `named`, only when it wants a key.
        """
        answer = self._endpoint.request("GET", f"{self._endpoint.path}/models")
        engine, found = answer.server or "unknown", list[str]()
        if answer.status != http.client.OK:
            said = answer.refusal()
            if not named or answer.status in {401, 403}:
                raise _RefusedError(f"{self._endpoint.name}{self._endpoint.path}/models", answer.status, said)
        else:
            text = answer.text()
            try:
                for model in json.loads(text)["data"]:
                    found.append(str(model["id"]))
                    engine = str(model.get("owned_by") or engine)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                where = f"{self._endpoint.name}{self._endpoint.path}/models"
                raise ValueError(f"{where} lists no models: is option endpoint the base URL, with /v1?") from error
        facts = {"engine": engine, "endpoint": self._endpoint.name}
        answer = self._endpoint.request("GET", "/version")
        text = answer.text()
        if answer.status == http.client.OK:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # some other page: not every engine has this one
                facts["engine_version"] = str(json.loads(text)["version"])
        return found, facts

    def _model(self, wanted: object, served: Sequence[str]) -> str:
        if wanted is not None:
            return str(wanted)
        if len(served) != 1:
            raise ValueError(
                f"{self._endpoint.name} serves {', '.join(served) or 'no model'}: name one in option model"
            )
        return served[0]

    def _request(self, model: str) -> dict[str, Any]:
        """The fields that all samples share, those beyond OpenAI's own API among them."""
        wanted = self._generation
        fields: dict[str, Any] = {
            "model": model,
            "max_tokens": wanted.max_new_tokens,
            "min_tokens": wanted.min_new_tokens,
            "temperature": 0,
            "stop_token_ids": list(wanted.eos_token_ids),
            "return_token_ids": True,
        }
        if self._beams:
            return fields | {"n": wanted.beams}  # no engine streams what a later beam may overtake
        return fields | {"stream": True, "stream_options": {"include_usage": True}}

    def _negotiate(self, sample: Features, asked: set[str], served: Sequence[str]) -> set[str]:
        """Ask for two tokens, leaving out what the engine refuses, until it answers; the fields it would not have.

        Raises ValueError in its words when it goes on refusing, or when its answers cannot become tokens.
        """
        spare = {"min_tokens", "stop_token_ids", "return_token_ids", "stream_options"} - asked
        refused: set[str] = set()
        tried = Features(sample.input_ids[:8], sample.token_type_ids[:8], sample.text[:40])
        few = {"max_tokens": 2, "min_tokens": min(2, self._generation.min_new_tokens)}
        while True:
            fields = self._fields | {name: few[name] for name in few if name in self._fields and name not in asked}
            try:
                chunks = self._ask(self._body(tried, fields), lambda _: None)
                break
            except _RefusedError as error:
                if error.status not in {400, 422}:
                    names = f"; it serves {', '.join(served)}" if served else ""
                    raise ValueError(f"{error}{names}") from error
                named = {name for name in spare if re.search(rf"\b{name}\b", error.said)}
                if named:
                    dropped = named
                elif self._as_ids and sample.text and "prompt" in error.said:
                    self._as_ids, dropped = False, set[str]()
                elif spare:
                    dropped = set(spare)
                elif self._as_ids and sample.text:
                    self._as_ids, dropped = False, set[str]()
                else:
                    raise
                refused |= dropped
                spare -= dropped
                self._fields = {name: value for name, value in self._fields.items() if name not in dropped}
        if not chunks.ids and self._encode is None:
            raise ValueError(f"{self._endpoint.name} gives no token ids, and this benchmark cannot make any from text")
        return refused

    def _body(self, sample: Features, fields: dict[str, Any]) -> bytes:
        if self._as_ids:
            prompt: dict[str, Any] = {"prompt": sample.input_ids.tolist()}
        elif not sample.text:
            raise ValueError(f"{self._endpoint.name} wants prompts as text, and this benchmark has none")
        elif self._api == "chat":
            prompt = {"messages": [{"role": "user", "content": sample.text}]}
        else:
            prompt = {"prompt": sample.text}
        return json.dumps({**fields, **prompt}).encode()

    def _ask(self, body: bytes, begun: Callable[[_Chunks], None]) -> _Chunks:
        """One sample's stream to its end; `begun` is called at the first piece of the answer.

        Raises _RefusedError for an error status, ConnectionError and TimeoutError, and ValueError for a stream that is
        broken off or not OpenAI's.
        """
        endpoint = self._endpoint
        answer = endpoint.request("POST", endpoint.path + PATHS[self._api], body)
        if answer.status != http.client.OK:
            raise _RefusedError(endpoint.name, answer.status, answer.refusal())
        chunks = _Chunks(endpoint.name)
        waiting = True
        for data in answer.events() if answer.is_stream else iter((answer.text(),)):
            if chunks.add(data):
                answer.alive = time.monotonic()
                if waiting:
                    begun(chunks)
                    waiting = False
        if not chunks.ended:
            raise ValueError(
                f"{endpoint.name} ended a stream without finish_reason and [DONE]: the answer is not whole"
            )
        return chunks

    def stream(self, sample: Features, first: Callable[[Output], None]) -> Output:
        """The answer's tokens int64 [count]; `first` gets the first as soon as any part of the answer is there.

        Tokens are the engine's own where it gives them, else those of its text. Raises ConnectionError, TimeoutError
        or ValueError with the cause; nothing is tried twice.
        """
        chunks = self._ask(self._body(sample, self._fields), lambda begun: first(self._tokens(begun)[:1]))
        tokens = self._tokens(chunks)
        if not len(tokens):
            raise ValueError(f"{self._endpoint.name} ended a stream without any token")
        return tokens

    def _tokens(self, chunks: _Chunks) -> Tokens:
        if chunks.ids or self._encode is None:
            return np.array(chunks.ids, dtype=np.int64)
        # The same text can be cut into more tokens than the engine made: they must not count as its work.
        most = self._generation.max_new_tokens if chunks.counted is None else chunks.counted
        return np.asarray(self._encode("".join(chunks.texts)), dtype=np.int64)[:most]

    def predict(self, samples: Sequence[Features]) -> Iterator[Output]:
        """The answers in order, `concurrency` asked for at once."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.concurrency, thread_name_prefix="openai")
        return self._threads.map(lambda sample: self.stream(sample, lambda _: None), samples)

    @property
    def model(self) -> dict[str, str]:
        """The engine has its own weights; only their owner can say which."""
        return {"weight_data_types": self._weights_data_type, "weights_sha256": "as served"}

    def versions(self) -> dict[str, str]:
        """The engine as it calls itself, and its host."""
        return dict(self._engine)

    def close(self) -> None:
        """End threads and connections."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        self._endpoint.close()


def _extra(text: object) -> dict[str, Any]:
    """Raises ValueError when it is not the JSON of an object."""
    if text is None:
        return {}
    try:
        fields = json.loads(str(text))
    except ValueError as error:
        raise ValueError(f"option extra is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(  # noqa: TRY004 - what a user wrote
            'option extra: a JSON object of request fields, such as {"top_k": 1}'
        )
    return fields


def _key(name: object) -> str | None:
    """The key itself, from the environment variable or the file `name`; it goes into the request's header only.

    Raises ValueError when there is neither.
    """
    if name is None:
        return None
    if found := os.environ.get(str(name)):
        return found
    path = Path(str(name)).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError("api_key_env names neither a variable that is set on this host nor a file there") from error


def open(benchmark: Benchmark, options: Options) -> OpenAIBackend:  # noqa: A001 - every backend's door has this name
    """A connection to the endpoint in option `endpoint`, tried with two tokens.

    Raises ValueError for unknown options, a benchmark that wants logits, and whatever the endpoint refuses;
    ConnectionError and TimeoutError when it does not answer.
    """
    return OpenAIBackend(benchmark, options)
