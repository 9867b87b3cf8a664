"""The openai backend against a real server process, which generates with a tiny GPT-J of random weights."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet.harness.backends import openai
from fleet.harness.interfaces import Features, Generation, StreamingBackend

pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[3]
GENERATION = Generation(beams=1, min_new_tokens=4, max_new_tokens=10, eos_token_ids=(0,), pad_token_id=0)
WORDS = [
    "the", "a", "of", "town", "firm", "bridge", "opened", "closed", "in", "on", "near", "north", "south", "new", "old",
    "week", "day", "year", "river", "mill",
]  # fmt: skip


class Wanted:
    """As much of a benchmark as the backend needs."""

    generation: Generation | None = GENERATION

    def __init__(self, folder: Path) -> None:
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def features(self, index: int) -> Features:
        text = " ".join(WORDS[(7 * index + 3 * place) % len(WORDS)] for place in range(5 + index % 9))
        ids = np.array(self.tokenizer.encode(text).ids, dtype=np.int64)
        return Features(ids, np.zeros_like(ids), text)

    def encode(self, text: str) -> Any:
        return np.array(self.tokenizer.encode(text).ids, dtype=np.int64)


class NoEncode(Wanted):
    encode = None  # type: ignore[assignment]


def wanted(folder: Path, kind: type[Wanted] = Wanted) -> Any:
    return kind(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-J folder as Hugging Face writes it, with a tokenizer of whole words."""
    import tokenizers
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("model")
    words = {word: number for number, word in enumerate(["<end>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(4)
    config = transformers.GPTJConfig(
        vocab_size=len(words), n_positions=64, n_embd=32, n_layer=2, n_head=2, rotary_dim=8,
        bos_token_id=0, eos_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    transformers.GPTJForCausalLM(config).eval().save_pretrained(folder)
    return folder


class Server:
    def __init__(self, folder: Path, *arguments: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.serving", str(folder), *arguments],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._port: str | None = None

    @property
    def endpoint(self) -> str:
        if self._port is None:
            assert self.process.stdout is not None
            self._port = self.process.stdout.readline().strip()
            assert self._port, "the server ended before it served"
        return f"http://127.0.0.1:{self._port}/v1"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[dict[str, Server]]:
    """Started together, since most of their start is importing."""
    started = {
        "full": Server(folder),
        "plain": Server(folder, "--plain", "--key", "s3cret"),
    }
    yield started
    for server in started.values():
        server.kill()


@pytest.fixture
def opened(servers: dict[str, Server], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    backends = []
    monkeypatch.setenv("ENGINE_KEY", "s3cret")

    def open_(server: str = "full", benchmark: Any = None, **options: Any) -> openai.OpenAIBackend:
        if server == "plain":
            options = {"api_key_env": "ENGINE_KEY"} | options
        chosen = {"endpoint": servers[server].endpoint, "timeout_s": 20, "concurrency": 4} | options
        backends.append(openai.open(benchmark or wanted(folder), chosen))
        return backends[-1]

    yield open_
    for backend in backends:
        backend.close()


def expected(folder: Path, sample: Features, beams: int = 1) -> list[int]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.from_numpy(sample.input_ids)[None]
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=beams, early_stopping=beams > 1, do_sample=False,
        min_new_tokens=4, max_new_tokens=10, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in made[0, ids.shape[1] :]]


def test_tokens_are_the_engines_own(opened: Any, folder: Path) -> None:
    backend, benchmark = opened(), Wanted(folder)
    samples = [benchmark.features(index) for index in range(12)]
    answers = list(backend.predict(samples))
    assert [list(answer) for answer in answers] == [expected(folder, sample) for sample in samples]
    assert all(answer.dtype == np.int64 for answer in answers)
    assert backend.labels == ("served by tiny-engine",)
    streams = isinstance(backend, StreamingBackend)
    assert streams
    assert backend.versions()["engine"] == "tiny-engine"
    assert backend.versions()["engine_version"] == "1.2.3"
    assert backend.model["weight_data_types"] == "as served"


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_an_engine_that_knows_openais_fields_only_is_asked_for_text(opened: Any, folder: Path, api: str) -> None:
    backend = opened("plain", api=api, weights_data_type="fp8")
    sample = Wanted(folder).features(3)
    firsts: list[Any] = []
    tokens = backend.stream(sample, firsts.append)
    # Without min_tokens the engine may end early; its end token is no text.
    assert list(tokens) == expected(folder, sample)[: len(tokens)]
    assert len(tokens) >= 2
    assert list(firsts[0]) == [tokens[0]]
    assert "min_tokens refused by the engine" in backend.labels
    assert backend.model["weight_data_types"] == "fp8"


def test_text_is_never_counted_as_more_tokens_than_the_engine_made(opened: Any, folder: Path) -> None:
    class Finer(Wanted):
        def encode(self, text: str) -> Any:
            return np.array([ord(letter) for letter in text], dtype=np.int64)

    tokens = opened("plain", Finer(folder)).stream(Wanted(folder).features(3), lambda _: None)
    assert 0 < len(tokens) <= GENERATION.max_new_tokens


def test_the_first_token_is_reported_long_before_the_last(opened: Any, folder: Path) -> None:
    backend = opened(extra='{"delay": 0.05}')
    times: list[float] = []
    firsts: list[Any] = []

    def first(token: Any) -> None:
        times.append(time.perf_counter())
        firsts.append(list(token))

    tokens = backend.stream(Wanted(folder).features(1), first)
    times.append(time.perf_counter())
    assert firsts == [[tokens[0]]]
    assert times[1] - times[0] > 0.04 * (len(tokens) - 1)


def test_samples_in_flight_together_get_their_own_answers(opened: Any, folder: Path) -> None:
    backend, benchmark = opened(concurrency=8), Wanted(folder)
    samples = [benchmark.features(index) for index in range(9)] * 4
    once = [list(answer) for answer in backend.predict(samples[:9])]
    assert [list(answer) for answer in backend.predict(samples)] == once * 4


def test_beams_are_refused_unless_the_engine_is_said_to_have_them(opened: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match="4 beams: serving engines search with one; set beams to 1"):
        opened(beams=4)
    backend, sample = opened(beams=4, extra='{"use_beam_search": true}'), Wanted(folder).features(2)
    firsts: list[Any] = []
    tokens = backend.stream(sample, firsts.append)
    assert list(tokens) == expected(folder, sample, beams=4)
    assert list(firsts[0]) == [tokens[0]]
    assert "beam 4 instead of 1" in backend.labels


def test_a_benchmark_without_text_is_refused(folder: Path) -> None:
    class Logits(Wanted):
        generation = None

    with pytest.raises(ValueError, match="wants logits, which an OpenAI-compatible endpoint does not give"):
        openai.open(wanted(folder, Logits), {"endpoint": "http://127.0.0.1:1/v1"})


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"endpont": "x"}, "has no option 'endpont'; it has"),
        ({}, "option endpoint is missing"),
        ({"endpoint": "127.0.0.1:8000"}, "the base URL of an engine"),
        ({"endpoint": "http://127.0.0.1:99999/v1"}, "the base URL of an engine"),
        ({"endpoint": "http://me:secret@127.0.0.1:1/v1"}, "holds a user or password"),
        ({"endpoint": "http://127.0.0.1:1/v1", "api": "responses"}, "one of completions, chat"),
        ({"endpoint": "http://127.0.0.1:1/v1", "extra": "top_k=1"}, "extra is no JSON"),
        ({"endpoint": "http://127.0.0.1:1/v1", "extra": "[1]"}, "a JSON object"),
        ({"endpoint": "http://127.0.0.1:1/v1", "concurrency": 0}, "concurrency"),
        ({"endpoint": "http://127.0.0.1:1/v1", "timeout_s": 0}, "timeout_s"),
        ({"endpoint": "http://127.0.0.1:1/v1", "api_key_env": "NOT_SET_ANYWHERE"}, "neither a variable"),
    ],
)
def test_wrong_options_are_named(folder: Path, options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValueError, match=cause) as caught:
        openai.open(wanted(folder), options)
    assert "secret" not in str(caught.value)


def test_a_closed_port_is_named(folder: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        with pytest.raises(ConnectionError, match=rf"no connection to 127.0.0.1:{port}: .*refused.*start the engine"):
            openai.open(wanted(folder), {"endpoint": f"http://127.0.0.1:{port}/v1"})


def test_a_missing_key_is_told_in_the_servers_words(opened: Any) -> None:
    with pytest.raises(ValueError, match="answered 401: Incorrect API key provided; name the variable with the key"):
        opened("plain", api_key_env=None)


def test_the_key_may_lie_in_a_file_and_is_shown_nowhere(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    backend = opened("plain", api_key_env=str(tmp_path / "key"))
    assert "s3cret" not in json.dumps([backend.versions(), backend.model, backend.labels])


def test_a_model_that_is_not_served_is_answered_with_those_that_are(opened: Any) -> None:
    with pytest.raises(ValueError, match=r"answered 404: The model `llama` does not exist\.; it serves tiny"):
        opened(model="llama")


def test_a_url_without_v1_is_told(opened: Any, servers: dict[str, Server]) -> None:
    with pytest.raises(ValueError, match="/models answered 404: Not Found"):
        opened(endpoint=servers["full"].endpoint.removesuffix("/v1"))


def test_without_token_ids_and_encode_nothing_could_be_counted(opened: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match="gives no token ids, and this benchmark cannot make any from text"):
        opened("plain", NoEncode(folder))
    assert len(opened("full", NoEncode(folder)).stream(Wanted(folder).features(0), lambda _: None)) >= 4


@pytest.mark.parametrize(
    ("fault", "kind", "cause"),
    [
        ("500", ValueError, "answered 500: CUDA error: an illegal memory access"),
        ("cut", ConnectionError, "ended the connection in the middle of an answer: IncompleteRead"),
        ("empty", ValueError, "ended a stream without any token"),
        ("error", ValueError, "the engine says the worker ran out of memory"),
        ("malformed", ValueError, r"streamed '\{\"choices.*no completion in OpenAI's format"),
        ("not-json", ValueError, r"streamed '\[1, 2\]': that is no completion in OpenAI's format"),
        ("no-done", ValueError, "without finish_reason and .DONE.: the answer is not whole"),
        ("silent", TimeoutError, "has not begun to answer for 0.5 s .option timeout_s"),
        ("comments", TimeoutError, "has streamed no token for 0.5 s .option timeout_s"),
    ],
)
def test_a_broken_stream_ends_with_its_cause(
    opened: Any, folder: Path, fault: str, kind: type[Exception], cause: str
) -> None:
    options: dict[str, Any] = {"timeout_s": 0.5} if kind is TimeoutError else {}
    backend, sample = opened(extra=json.dumps({"fault": fault}), **options), Wanted(folder).features(0)
    with pytest.raises(kind, match=cause):
        backend.stream(sample, lambda _: None)
    with pytest.raises(kind, match=cause):  # and nothing of it is left in the next one's connection
        backend.stream(sample, lambda _: None)


def test_a_connection_that_the_server_closed_between_samples_is_made_anew(opened: Any, folder: Path) -> None:
    backend, benchmark = opened(extra='{"fault": "hang-up"}', concurrency=1), Wanted(folder)
    samples = [benchmark.features(index) for index in range(5)]
    assert [list(answer) for answer in backend.predict(samples)] == [expected(folder, one) for one in samples]


def test_an_engine_that_dies_ends_every_stream_and_is_not_waited_for(folder: Path) -> None:
    server = Server(folder)
    options = {"endpoint": server.endpoint, "concurrency": 3, "extra": '{"delay": 0.2}'}
    backend = openai.open(wanted(folder), options)
    together, errors = threading.Barrier(3, timeout=30), list[BaseException]()

    def ask(index: int) -> None:
        together.wait()
        try:
            # Whoever has a token first kills the engine: in the middle of its own stream, before the others'.
            backend.stream(Wanted(folder).features(index), lambda _: server.process.kill())
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert [type(error) for error in errors] == [ConnectionError] * 3
    assert any("in the middle of an answer" in str(error) for error in errors)
    with pytest.raises(ConnectionError, match="no connection to"):
        backend.stream(Wanted(folder).features(0), lambda _: None)
    backend.close()
    server.kill()


def test_transformers_own_server_is_understood(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    command = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from transformers.cli.transformers import main; main()", *command],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < until:
            time.sleep(0.2)
        options = {"endpoint": f"http://127.0.0.1:{port}/v1", "model": str(folder)}
        backend = openai.open(wanted(folder), options)
        sample, firsts = Wanted(folder).features(3), list[Any]()
        tokens = backend.stream(sample, firsts.append)
        assert list(tokens) == expected(folder, sample)[: len(tokens)]
        assert list(firsts[0]) == [tokens[0]]
        backend.close()
    finally:
        process.kill()
        process.wait()
