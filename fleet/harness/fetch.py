"""Weights and data brought into a benchmark's folder `source/`: links to a folder of the host's, and downloads.

A source is one file with an address of its own (`url`), or what MLCommons' downloader publishes (`uri`): `<name>.uri`
holds the address of a folder, `<name>.md5` beside it is md5sum's list of the files there. Sources are fleet's own data,
lists come from outside: of a list only plain names are taken, into one flat folder, within a source's size.
"""

import contextlib
import fnmatch
import hashlib
import http.client
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = "fetched.json"
"""Beside `source/`: what was fetched and verified, so that tens of GB are read once."""
TIMEOUT_S = 60
TRIES = 5
"""Of one file, each going on where the connection broke; without progress there is no second one."""
CHUNK = 2**20
GIB = 2**30
LIST_BYTES = 2**20
"""The longest `.uri` or `.md5` that is read."""
AGENT = {"User-Agent": "mlperf-fleet"}

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")
_LINE = re.compile(r"([0-9a-f]{32})\s+\*?(\S.*)")


@dataclass(frozen=True, slots=True)
class _File:
    """A file to fetch, and what it must be; without a digest it is taken as it comes."""

    name: str
    url: str
    algorithm: str
    digest: str


class _Stay(urllib.request.HTTPRedirectHandler):
    """MLCommons' folders send on to nothing but a page for logging in."""

    def redirect_request(self, *_: Any) -> None:
        """No."""


def bring(work: Path, name: str, wanted: Mapping[str, Any]) -> bool:
    """Fill `source/` of benchmark `name` as `wanted` says; True when anything changed.

    `wanted` has `sources`, each with `file`, `url` or `uri`, `files`, `unless`, `sha256`, `md5` and `max_gib` as in
    fleet.mlperf.rules, and may have `folder`, whose files are linked. A source is left out where that folder holds a
    file that matches one of its `unless`. Raises ValueError, naming the address and the cause, for what cannot be
    fetched or is not what was published; what came until then is kept and gone on with.
    """
    assets = work / "assets" / name
    source = assets / "source"
    if source.is_symlink():
        source.unlink()
    source.mkdir(parents=True, exist_ok=True)
    theirs, changed = _link_folder(source, wanted.get("folder"))
    record = _read_record(assets / RECORD)
    for one in wanted.get("sources", ()):
        patterns = one["unless"] or one["files"] or [one["file"]]
        if any(fnmatch.fnmatchcase(there, pattern) for there in theirs for pattern in patterns):
            continue
        key = json.dumps([one["uri"] or one["url"], one["files"], one["sha256"], one["md5"]])
        if key in record and all(_state(source / file) == state for file, state in record[key].items()):
            continue
        record[key] = {file: _state(source / file) for file in _fetch(one, source)}
        partial = assets / f"{RECORD}.partial"
        partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
        partial.replace(assets / RECORD)
        changed = True
    return changed


def _link_folder(source: Path, folder: str | None) -> tuple[list[str], bool]:
    """Links in `source` to the files of `folder` and no other links; their names, and whether any changed."""
    theirs: dict[str, Path] = {}
    if folder:
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise ValueError(f"{path}: no such folder on this host; the role variable assets_folders names it")
        theirs = {each.name: each.absolute() for each in path.iterdir() if each.is_file()}
    changed = False
    for link in source.iterdir():
        if link.is_symlink() and (link.name not in theirs or link.readlink() != theirs[link.name]):
            link.unlink()
            changed = True
    for name, target in theirs.items():
        link = source / name
        if not link.is_symlink():
            link.unlink(missing_ok=True)
            link.symlink_to(target)
            changed = True
    return list(theirs), changed


def _state(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _read_record(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _fetch(one: Mapping[str, Any], source: Path) -> list[str]:
    """Fetch the files of one source; their names."""
    if one["uri"]:
        files = _published(one["uri"], one["files"])
    else:
        algorithm, digest = ("sha256", one["sha256"]) if one["sha256"] else ("md5", one["md5"])
        files = [_File(one["file"], one["url"], algorithm, digest)]
    left = int(one["max_gib"] * GIB)
    opener = urllib.request.build_opener(*([_Stay] if one["uri"] else []))
    for file in files:
        path = source / file.name
        if not path.is_file() or (file.digest and _digest(path, file.algorithm) != file.digest):
            _download(opener, file, path, left)
        left -= path.stat().st_size
    return [file.name for file in files]


def _published(uri: str, patterns: Sequence[str]) -> list[_File]:
    """The files of MLCommons' list for `uri` whose names match one of `patterns`, sorted by name."""
    opener = urllib.request.build_opener(_Stay)
    base = _text(opener, uri).strip().rstrip("/")
    here, there = urllib.parse.urlsplit(uri), urllib.parse.urlsplit(base)
    if (here.scheme, here.netloc) != (there.scheme, there.netloc):
        raise ValueError(f"{uri}: names no folder of its own server but {base[:200]!r}: not fetched")
    listed = f"{uri.removesuffix('.uri')}.md5"
    found: dict[str, _File] = {}
    for line in _text(opener, listed).splitlines():
        if not line.strip():
            continue
        if not (match := _LINE.fullmatch(line.strip())):
            raise ValueError(f"{listed}: no list of md5sum's: {line[:80]!r}")
        digest, path = match.groups()
        path = path.removeprefix("./")
        name = path.rpartition("/")[2]
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        if not all(_PLAIN.fullmatch(part) for part in path.split("/")):
            raise ValueError(f"{listed}: {path[:80]!r} is no plain path: not fetched")
        if name in found:
            raise ValueError(f"{listed}: {name} is there twice: not fetched")
        found[name] = _File(name, f"{base}/{urllib.parse.quote(path)}", "md5", digest)
    if not found:
        raise ValueError(f"{listed}: nothing like {', '.join(patterns)}: what is published has changed")
    return [found[name] for name in sorted(found)]


def _text(opener: urllib.request.OpenerDirector, url: str) -> str:
    with _opened(opener, url) as answer:
        data: bytes = answer.read(LIST_BYTES + 1)
    if len(data) > LIST_BYTES:
        raise ValueError(f"{url}: more than {LIST_BYTES} bytes: not what MLCommons' downloader reads")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{url}: no text: {error}") from error


@contextlib.contextmanager
def _opened(opener: urllib.request.OpenerDirector, url: str, headers: Mapping[str, str] | None = None) -> Iterator[Any]:
    """An answer to read. Raises ValueError with the cause."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url}: not an address of http or https")
    request = urllib.request.Request(url, headers={**AGENT, **(headers or {})})  # noqa: S310 - looked at above
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        hint = ": it asks for a login, so bring its files by hand and name their folder in assets_folders"
        raise ValueError(f"{url}: {error.code} {error.reason}{hint if error.code // 100 == 3 else ''}") from error  # noqa: PLR2004
    except urllib.error.URLError as error:
        raise ValueError(f"{url}: {error.reason}") from error


def _download(opener: urllib.request.OpenerDirector, file: _File, path: Path, most: int) -> None:
    """Fetch `file` into `path` by rename, going on with what came before."""
    partial = path.with_name(f"{path.name}.partial")
    for left in reversed(range(TRIES)):
        had = partial.stat().st_size if partial.is_file() else 0
        try:
            if cause := _attempt(opener, file, partial, most):
                raise ValueError(f"{file.url}: {cause}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            if left and partial.is_file() and partial.stat().st_size > had:
                continue
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"{file.url}: {error or type(error).__name__}") from error
        if file.digest and (found := _digest(partial, file.algorithm)) != file.digest:
            partial.unlink()
            if had and left:
                continue  # what was there before was another file's beginning
            raise ValueError(
                f"{file.url}: its {file.algorithm} is {found}, published is {file.digest}: `fleet provision` fetches it"
                " again"
            )
        partial.replace(path)
        return
    raise ValueError(f"{file.url}: broke off {TRIES} times: `fleet provision` goes on with it")


def _attempt(opener: urllib.request.OpenerDirector, file: _File, partial: Path, most: int) -> str:
    """Get the rest of `file` into `partial`; why it is not whole, or nothing."""
    begin = partial.stat().st_size if partial.is_file() else 0
    headers = {"Range": f"bytes={begin}-"} if begin else {}
    try:
        with _opened(opener, file.url, headers) as answer:
            goes_on = answer.status == http.HTTPStatus.PARTIAL_CONTENT
            if goes_on and not str(answer.headers["Content-Range"]).startswith(f"bytes {begin}-"):
                return f"answers a part that was not asked for, {answer.headers['Content-Range']}"
            told = answer.headers["Content-Length"]
            size = None if told is None else int(told) + (begin if goes_on else 0)
            with partial.open("ab" if goes_on else "wb") as stream:
                written = stream.tell()
                while written <= most and (size or 0) <= most and (data := answer.read(CHUNK)):
                    written += stream.write(data)
            if max(written, size or 0) > most:
                partial.unlink()
                return f"more than the {most} bytes that belong here"
    except ValueError as error:
        if begin and isinstance(error.__cause__, urllib.error.HTTPError) and error.__cause__.code == 416:  # noqa: PLR2004
            return ""  # nothing is missing: the digest says whether it is right
        raise
    return "" if size in {None, written} else f"broke off after {written} of {size} bytes"


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()
