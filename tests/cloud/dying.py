"""A controller in a process of its own that dies at a point of its life: before a write, before or after a call to AWS."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.httpsession import URLLib3Session

DIED = 9
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True, slots=True)
class Ended:
    """How a life ended, and all the points it came by: the last one is where it died, if it did."""

    code: int
    points: tuple[str, ...]
    said: str


@dataclass
class _Life:
    """What the child counts."""

    roots: tuple[Path, ...]
    trace: int
    die_at: int | None
    passed: int = 0

    def point(self, what: str) -> None:
        """Something is about to be written or asked, or was just answered; the end, if it is the number for it."""
        os.write(self.trace, f"{what}\n".encode())
        self.passed += 1
        if self.passed - 1 == self.die_at:
            os._exit(DIED)

    def audited(self, event: str, args: tuple[Any, ...]) -> None:
        """Python says it before it does it, whoever asked for it."""
        if event == "open":
            path, _, flags = args
            if isinstance(path, str | Path) and isinstance(flags, int) and flags & _WRITING:
                self._wrote("create", path)
        elif event == "os.rename":
            self._wrote("rename", args[1])
        elif event in {"os.remove", "os.rmdir"} and isinstance(args[0], str | Path):
            path = Path(f"/proc/self/fd/{args[1]}").resolve() / args[0] if args[1] >= 0 else args[0]
            if os.path.lexists(path):
                self._wrote(event.removeprefix("os."), path)
        elif event == "os.mkdir" and not os.path.lexists(args[0]):
            self._wrote("mkdir", args[0])

    def _wrote(self, what: str, path: Any) -> None:
        # A lock says nothing to who comes later: its owner is dead.
        name = str(Path(os.fsdecode(path)).absolute()) if isinstance(path, str | bytes | Path) else ""
        if name.endswith(".lock"):
            return
        for root in self.roots:
            if name.startswith(str(root)):
                self.point(f"{what} {name.removeprefix(str(root)).lstrip('/') or '.'}")


def live(does: Callable[[], int], roots: Sequence[Path], *, die_at: int | None = None, later_s: float = 0.0) -> Ended:
    """Fork a controller that does something, and see how it ends; its clock is `later_s` ahead of ours."""
    out = roots[0].parent / "life"
    trace, said = out.with_suffix(".trace"), out.with_suffix(".said")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _speak_to(said)
            life = _Life(tuple(roots), os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), die_at)
            code = _child(does, life, later_s)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    points = tuple(trace.read_text(encoding="utf-8").splitlines())
    return Ended(os.waitstatus_to_exitcode(status), points, said.read_text(encoding="utf-8"))


def _speak_to(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115


def _child(does: Callable[[], int], life: _Life, later_s: float) -> int:
    if later_s:
        now = time.time
        time.time = lambda: now() + later_s
    send = URLLib3Session.send

    def watched(session: URLLib3Session, request: Any) -> Any:
        what = _asked(request)
        life.point(f"before {what}")
        answer = send(session, request)
        life.point(f"after {what}")
        return answer

    URLLib3Session.send = watched
    sys.addaudithook(life.audited)
    try:
        return does()
    except BaseException:  # noqa: BLE001 - the parent reads it
        traceback.print_exc()
        return 70


def _asked(request: Any) -> str:
    target = request.headers.get("X-Amz-Target")
    if target:
        return str(target.decode() if isinstance(target, bytes) else target).rpartition(".")[2]
    body = request.body.decode() if isinstance(request.body, bytes) else str(request.body or "")
    fields = dict(part.split("=", 1) for part in body.split("&") if "=" in part)
    return str(fields.get("Action", request.method))
