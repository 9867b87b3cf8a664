"""Sources brought over HTTP from a real server: MLCommons' lists, files by address, what breaks off and what is false."""

import hashlib
import http.server
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fleet.harness import fetch
from fleet.mlperf.rules import Source

BIG = bytes(range(256)) * 40_000
"""10 MB: more than a socket swallows, so that it can break off in the middle."""
FILES = {"model/checkpoint/a.json": b"{}", "model/checkpoint/pytorch_model-00001-of-00001.bin": BIG}


@dataclass
class Server:
    """What is published, what was asked for, and what goes wrong."""

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range of each request."""
    breaks: dict[str, int] = field(default_factory=dict)
    """Path to how many bytes of each answer come before the connection breaks."""
    ranges: bool = True
    redirect: str = ""
    url: str = ""

    def publish(self, name: str, files: dict[str, bytes], *, listed: str | None = None, base: str = "") -> str:
        """As MLCommons does; the address of the .uri."""
        lines = [f"{hashlib.md5(data).hexdigest()}  ./{path.partition('/')[2]}\n" for path, data in files.items()]
        self.files |= {f"/{path}": data for path, data in files.items()}
        self.files[f"/metadata/{name}.uri"] = f"{base or self.url + '/model'}\n".encode()
        self.files[f"/metadata/{name}.md5"] = ("".join(lines) if listed is None else listed).encode()
        return f"{self.url}/metadata/{name}.uri"


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers["Range"]
            server.asked.append((self.path, wanted))
            if server.redirect:
                self.send_response(302)
                self.send_header("Location", server.redirect)
                self.end_headers()
                return
            data = server.files.get(self.path)
            if data is None:
                self.send_error(404)
                return
            begin = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
            if begin and begin >= len(data):
                self.send_error(416)
                return
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            with suppress(ConnectionError):  # who does not want it hangs up
                self.wfile.write(data[begin:][: server.breaks.get(self.path)])

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        server.url = f"http://127.0.0.1:{made.server_address[1]}"
        thread = threading.Thread(target=made.serve_forever, args=[0.01])
        thread.start()
        try:
            yield server
        finally:
            made.shutdown()
            thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as made:
        yield made


def source(name: str = "checkpoint", **more: Any) -> dict[str, Any]:
    """As fleet.provision hands it to the role."""
    return {"file": name, **Source(**more).model_dump(mode="json", exclude={"weights"})}


def listing(server: Server, **more: Any) -> dict[str, Any]:
    uri = server.publish("checkpoint", FILES)
    return source(uri=uri, **{"files": ["*.json", "pytorch_model*.bin"], **more})


def bring(work: Path, *sources: dict[str, Any], folder: Path | None = None) -> bool:
    return fetch.bring(work, "b", {"sources": sources, "folder": str(folder or "")})


def there(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((work / "assets" / "b" / "source").iterdir())}


def test_what_a_list_names_lies_in_one_folder_and_is_asked_for_once(server: Server, tmp_path: Path) -> None:
    one = listing(server)
    assert bring(tmp_path, one)
    assert there(tmp_path) == {"a.json": b"{}", "pytorch_model-00001-of-00001.bin": BIG}
    asked = [path for path, _ in server.asked]
    assert asked[:2] == ["/metadata/checkpoint.uri", "/metadata/checkpoint.md5"]
    assert sorted(asked[2:]) == sorted(f"/{path}" for path in FILES)
    assert not bring(tmp_path, one)
    assert len(server.asked) == 4


def test_of_a_list_comes_what_was_asked_for_only(server: Server, tmp_path: Path) -> None:
    bring(tmp_path, listing(server, files=["*.json"]))
    assert there(tmp_path) == {"a.json": b"{}"}


def test_a_file_that_changed_on_the_host_is_fetched_again_and_nothing_else(server: Server, tmp_path: Path) -> None:
    one = listing(server)
    bring(tmp_path, one)
    (tmp_path / "assets" / "b" / "source" / "a.json").write_bytes(b"{broken")
    server.asked.clear()
    assert bring(tmp_path, one)
    assert there(tmp_path)["a.json"] == b"{}"
    assert [path for path, _ in server.asked if path.endswith(".bin")] == []


def test_a_wrong_md5_is_no_file(server: Server, tmp_path: Path) -> None:
    one = listing(server)
    server.files["/model/checkpoint/a.json"] = b"[]"
    with pytest.raises(ValueError, match=r"a\.json: its md5 is d751713988987e9331980363e24189ce, published is 99914b"):
        bring(tmp_path, one)
    assert there(tmp_path) == {}


def test_a_connection_that_breaks_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    one = listing(server)
    path = "/model/checkpoint/pytorch_model-00001-of-00001.bin"
    server.breaks[path] = 4_000_000
    assert bring(tmp_path, one)
    assert there(tmp_path)["pytorch_model-00001-of-00001.bin"] == BIG
    assert [wanted for asked, wanted in server.asked if asked == path] == [None, "bytes=4000000-", "bytes=8000000-"]


def test_a_truncated_file_is_named_kept_and_gone_on_with_later(server: Server, tmp_path: Path) -> None:
    one = listing(server)
    path = "/model/checkpoint/pytorch_model-00001-of-00001.bin"
    server.breaks[path] = 1_000_000
    with pytest.raises(ValueError, match=r"00001\.bin: broke off after 5000000 of 10240000 bytes"):
        bring(tmp_path, one)
    server.breaks.clear()
    server.asked.clear()
    assert bring(tmp_path, one)
    assert there(tmp_path)["pytorch_model-00001-of-00001.bin"] == BIG
    assert ("bytes=5000000-") in [wanted for asked, wanted in server.asked if asked == path]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    one = listing(server)
    partial = tmp_path / "assets" / "b" / "source" / "a.json.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x")
    server.ranges = False
    bring(tmp_path, one)
    assert there(tmp_path)["a.json"] == b"{}"


@pytest.mark.parametrize("stale", [b"x", b"xx", b"xxx"], ids=["shorter", "as long", "longer"])
def test_what_another_file_left_is_not_gone_on_with(server: Server, tmp_path: Path, stale: bytes) -> None:
    partial = tmp_path / "assets" / "b" / "source" / "a.json.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(stale)
    bring(tmp_path, listing(server))
    assert there(tmp_path)["a.json"] == b"{}"
    assert not partial.exists()


@pytest.mark.parametrize(
    ("listed", "cause"),
    [
        ("{md5}  ../evil.json\n", r"'\.\./evil\.json' is no plain path"),
        ("{md5}  a/../../evil.json\n", "is no plain path"),
        ("{md5}  /etc/evil.json\n", "is no plain path"),
        ("{md5}  .hidden.json\n", "is no plain path"),
        ("{md5}  a b.json\n", "is no plain path"),
        ("{md5}  a/x.json\n{md5}  b/x.json\n", r"x\.json is there twice"),
        ("<html>log in</html>\n", "no list of md5sum's: '<html>"),
        ("{md5}  other.txt\n", r"nothing like \*\.json"),
        ("", r"nothing like \*\.json"),
    ],
)
def test_a_list_that_cannot_be_trusted(server: Server, tmp_path: Path, listed: str, cause: str) -> None:
    uri = server.publish("checkpoint", FILES, listed=listed.format(md5="0" * 32))
    with pytest.raises(ValueError, match=cause):
        bring(tmp_path, source(uri=uri, files=["*.json"]))
    assert there(tmp_path) == {}
    assert len(server.asked) == 2


def test_a_list_of_another_server_is_not_followed(server: Server, tmp_path: Path) -> None:
    uri = server.publish("checkpoint", FILES, base="https://elsewhere.example/model")
    with pytest.raises(ValueError, match=r"names no folder of its own server but 'https://elsewhere"):
        bring(tmp_path, source(uri=uri, files=["*.json"]))


def test_a_page_for_logging_in_is_no_list(server: Server, tmp_path: Path) -> None:
    one = listing(server)
    server.redirect = f"{server.url}/login"
    with pytest.raises(ValueError, match=r"302 .*: it asks for a login, so bring its files by hand .*assets_folders"):
        bring(tmp_path, one)
    assert [path for path, _ in server.asked] == ["/metadata/checkpoint.uri"]


def test_a_file_that_is_too_large_is_not_kept(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"00001\.bin: more than the \d+ bytes that belong here"):
        bring(tmp_path, listing(server, max_gib=0.001))
    assert there(tmp_path) == {"a.json": b"{}"}


def test_a_list_that_is_too_long_is_not_read(server: Server, tmp_path: Path) -> None:
    uri = server.publish("checkpoint", FILES, listed="x" * (fetch.LIST_BYTES + 1))
    with pytest.raises(ValueError, match=r"checkpoint\.md5: more than 1048576 bytes"):
        bring(tmp_path, source(uri=uri, files=["*.json"]))


@pytest.mark.parametrize("algorithm", ["sha256", "md5", ""])
def test_a_file_by_its_address(server: Server, tmp_path: Path, algorithm: str) -> None:
    server.files["/vocab.txt"] = b"words"
    digest = {algorithm: hashlib.new(algorithm, b"words").hexdigest()} if algorithm else {}
    one = source("vocabulary.txt", url=f"{server.url}/vocab.txt", **digest)
    assert bring(tmp_path, one)
    assert there(tmp_path) == {"vocabulary.txt": b"words"}
    assert not bring(tmp_path, one)
    assert len(server.asked) == 1


def test_a_file_that_is_not_what_the_rules_say(server: Server, tmp_path: Path) -> None:
    server.files["/vocab.txt"] = b"other words"
    with pytest.raises(ValueError, match=r"vocab\.txt: its sha256 is \w+, published is 0+:"):
        bring(tmp_path, source("vocab.txt", url=f"{server.url}/vocab.txt", sha256="0" * 64))
    assert there(tmp_path) == {}


def test_a_file_that_was_there_before_is_verified_not_fetched(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "assets" / "b" / "source"
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_bytes(b"words")
    bring(tmp_path, source("vocab.txt", url=f"{server.url}/v", md5=hashlib.md5(b"words").hexdigest()))
    assert server.asked == []


@pytest.mark.parametrize(
    ("url", "cause"),
    [("{server}/none", "404 Not Found"), ("http://127.0.0.1:1/x", "refused"), ("file:///etc/passwd", "http or https")],
)
def test_an_address_that_does_not_answer_is_named(server: Server, tmp_path: Path, url: str, cause: str) -> None:
    address = url.format(server=server.url)
    with pytest.raises(ValueError, match=cause) as caught:
        bring(tmp_path, source("x", url=address))
    assert str(caught.value).startswith(address)


def test_a_folder_of_the_host_comes_before_any_address(server: Server, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "weights.safetensors").write_bytes(b"mine")
    one = listing(server, unless=["pytorch_model*.bin", "*.safetensors"])
    assert bring(tmp_path, one, folder=mine)
    assert server.asked == []
    link = tmp_path / "assets" / "b" / "source" / "weights.safetensors"
    assert link.readlink() == mine / "weights.safetensors"
    assert not bring(tmp_path, one, folder=mine)
    # What the folder has nothing of is fetched, and not into that folder.
    assert bring(tmp_path, one, source("a.json", url=f"{server.url}/model/checkpoint/a.json"), folder=mine)
    assert there(tmp_path) == {"a.json": b"{}", "weights.safetensors": b"mine"}
    assert [path.name for path in mine.iterdir()] == ["weights.safetensors"]
    (mine / "weights.safetensors").unlink()
    (mine / "a.json").write_bytes(b"[]")
    assert bring(tmp_path, folder=mine)
    assert there(tmp_path) == {"a.json": b"[]"}


def test_the_link_to_a_folder_that_older_fleets_made_is_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.json").write_bytes(b"{}")
    (tmp_path / "assets" / "b").mkdir(parents=True)
    (tmp_path / "assets" / "b" / "source").symlink_to(mine)
    bring(tmp_path, folder=mine)
    assert not (tmp_path / "assets" / "b" / "source").is_symlink()
    assert there(tmp_path) == {"a.json": b"{}"}


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="/nowhere: no such folder on this host; the role variable assets_folders"):
        bring(tmp_path, folder=Path("/nowhere"))


def test_the_role_s_command_says_what_changed_or_why_not(server: Server, tmp_path: Path) -> None:
    wanted = {"folder": "", "sources": [listing(server)]}
    command = [sys.executable, "-m", "fleet.harness", "fetch", str(tmp_path), "b"]
    done = [subprocess.run(command, input=json.dumps(wanted).encode(), capture_output=True, check=True) for _ in "12"]
    assert [json.load(io.BytesIO(one.stdout)) for one in done] == [{"changed": True}, {"changed": False}]
    wanted["folder"] = "/nowhere"
    failed = subprocess.run(command, input=json.dumps(wanted).encode(), capture_output=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.decode().splitlines() == [
        "/nowhere: no such folder on this host; the role variable assets_folders names it"
    ]
