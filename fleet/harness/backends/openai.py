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
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fleet.harness.endpoint import Endpoint, RefusedError
from fleet.harness.interfaces import Benchmark, Features, Options, Output, generation_of

OPTIONS = {
    "api", "api_key_env", "beams", "concurrency", "endpoint", "extra", "model", "timeout_s", "weights_data_type",
}  # fmt: skip
PATHS = {"completions": "/completions", "chat": "/chat/completions"}
CONCURRENCY = 256
"""As many sequences as vLLM computes at once, unless it is told otherwise."""
TIMEOUT_S = 300.0

Tokens = npt.NDArray[np.int64]
Encode = Callable[[str], Tokens]


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
        self._endpoint = Endpoint(str(options["endpoint"]), _key(options.get("api_key_env")), timeout_s)
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
                raise RefusedError(f"{self._endpoint.name}{self._endpoint.path}/models", answer.status, said)
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
            except RefusedError as error:
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

        Raises RefusedError for an error status, ConnectionError and TimeoutError, and ValueError for a stream that is
        broken off or not OpenAI's.
        """
        endpoint = self._endpoint
        answer = endpoint.request("POST", endpoint.path + PATHS[self._api], body)
        if answer.status != http.client.OK:
            raise RefusedError(endpoint.name, answer.status, answer.refusal())
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
