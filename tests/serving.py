"""A small but real OpenAI-compatible server, in a process of its own: HTTP/1.1, server-sent events, real generation.

    python -m tests.serving MODEL_DIR [--key KEY] [--plain]

It prints its port, then serves until it is killed. With --plain it knows OpenAI's own fields only, as transformers
serve does: no token ids in or out, no min_tokens. A request may carry `delay`, seconds for each token, and `fault` (see
FAULTS): what broken engines do. Faults touch requests for more than two tokens only, so that a backend can be opened.
"""

import argparse
import contextlib
import json
import os
import queue
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

FAULTS = ("500", "comments", "cut", "die", "empty", "error", "hang-up", "malformed", "no-done", "not-json", "silent")
OWN = {"model", "prompt", "messages", "max_tokens", "temperature", "stream", "stream_options", "n", "fault", "delay"}
EXTENSIONS = {"min_tokens", "stop_token_ids", "return_token_ids", "use_beam_search"}


class Streamer:
    """What transformers' generate() hands each new token to."""

    def __init__(self, delay: float) -> None:
        self.tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._delay = delay
        self._prompt = True

    def put(self, value: Any) -> None:
        if self._prompt:
            self._prompt = False  # generate() begins with the prompt
            return
        time.sleep(self._delay)
        self.tokens.put(int(value))

    def end(self) -> None:
        self.tokens.put(None)


class Engine:
    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.lock = threading.Lock()

    def generate(self, ids: list[int], body: dict[str, Any], streamer: Streamer | None) -> list[int]:
        wanted = transformers.GenerationConfig(
            max_new_tokens=body["max_tokens"],
            min_new_tokens=body.get("min_tokens") or None,
            num_beams=body.get("n", 1),
            early_stopping=body.get("n", 1) > 1,
            eos_token_id=body.get("stop_token_ids", self.model.config.eos_token_id),
            pad_token_id=0,
            do_sample=False,
        )
        given = torch.tensor([ids])
        with self.lock, torch.inference_mode():
            made = self.model.generate(
                given, attention_mask=torch.ones_like(given), generation_config=wanted, streamer=streamer
            )
        return [int(token) for token in made[0, len(ids) :]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "tiny-engine/1"
    disable_nagle_algorithm = True  # or the first token waits 40 ms for the acknowledgement of the head
    engine: Engine
    key = ""
    plain = False

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the other side has had enough
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the standard library
        pass

    def answer(self, status: int, data: Any) -> None:
        text = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def refuse(self, status: int, message: str) -> None:
        self.answer(status, {"error": {"message": message, "code": status}})

    def allowed(self) -> bool:
        if self.key and self.headers.get("Authorization") != f"Bearer {self.key}":
            self.refuse(401, "Incorrect API key provided")
            return False
        return True

    def do_GET(self) -> None:
        if not self.allowed():
            return
        if self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": "tiny", "object": "model", "owned_by": "tiny-engine"}]})
        elif self.path == "/version" and not self.plain:
            self.answer(200, {"version": "1.2.3"})
        else:
            self.refuse(404, "Not Found")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        if self.path not in {"/v1/completions", "/v1/chat/completions"}:
            self.refuse(404, "Not Found")
            return
        if body["model"] != "tiny":
            self.refuse(404, f"The model `{body['model']}` does not exist.")
            return
        if unknown := sorted(set(body) - (OWN if self.plain else OWN | EXTENSIONS)):
            self.answer(422, {"detail": f"Unexpected fields in the request: {unknown}"})
            return
        chat = self.path == "/v1/chat/completions"
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        if not isinstance(prompt, str) and self.plain:
            self.answer(400, {"detail": "prompt must be a string."})
            return
        ids = self.engine.tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
        fault = body.get("fault", "") if body["max_tokens"] > 2 else ""
        if fault == "500":
            self.refuse(500, "CUDA error: an illegal memory access was encountered")
        elif fault == "silent":
            time.sleep(3600)
        elif fault and fault not in FAULTS:
            self.refuse(400, f"no such fault: {fault}")
        elif body.get("stream"):
            self.stream(ids, body, chat=chat, fault=fault)
        else:
            tokens = self.engine.generate(ids, body, None)
            text = self.engine.tokenizer.decode(tokens)
            choice = {"index": 0, "text": text, "finish_reason": "stop", "token_ids": tokens}
            self.answer(200, {"choices": [choice], "usage": {"completion_tokens": len(tokens)}})

    def chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def event(self, data: Any) -> None:
        self.chunk(f"data: {json.dumps(data)}\n\n")

    def stream(self, ids: list[int], body: dict[str, Any], *, chat: bool, fault: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while fault == "comments":
            self.chunk(": ping\n\n")
            time.sleep(0.05)
        streamer = Streamer(body.get("delay", 0.0))
        worker = threading.Thread(target=self.engine.generate, args=(ids, body, streamer), daemon=True)
        worker.start()
        tokens: list[int] = []
        said = ""
        while (token := streamer.tokens.get()) is not None:
            if fault == "empty":
                continue
            tokens.append(token)
            whole = self.engine.tokenizer.decode(tokens)
            text, said = whole[len(said) :], whole
            choice: dict[str, Any] = {"index": 0, "finish_reason": None}
            choice |= {"delta": {"content": text}} if chat else {"text": text}
            if body.get("return_token_ids"):
                choice["token_ids"] = [token]
            self.event({"choices": [choice]})
            if len(tokens) == 2 and fault and not self.misbehave(fault):
                return
        worker.join()
        if fault != "no-done":
            last = {"index": 0, "finish_reason": "length", "text": "", "delta": {"content": ""}}
            self.event({"choices": [last]})
            if (body.get("stream_options") or {}).get("include_usage"):
                self.event({"choices": [], "usage": {"completion_tokens": len(tokens)}})
            self.chunk("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")
        self.close_connection = self.close_connection or fault == "hang-up"

    def misbehave(self, fault: str) -> bool:
        """In the middle of a stream; whether it goes on."""
        if fault == "die":
            os._exit(1)
        if fault == "malformed":
            self.chunk('data: {"choices": [{"te\n\n')
        if fault == "not-json":
            self.chunk("data: [1, 2]\n\n")
        if fault == "error":
            self.event({"error": {"message": "the worker ran out of memory"}})
        self.close_connection = fault == "cut"
        return not self.close_connection


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--key", default="")
    parser.add_argument("--plain", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    Handler.engine, Handler.key, Handler.plain = Engine(given.folder), given.key, given.plain
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
