"""The only place that prints: tables and JSON on stdout, progress and words on stderr."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fleet.watch import Silent, Watch

PLAIN_SECONDS = 15.0
"""Between two plain progress lines of one host that say nothing new but a counter."""


def console(*, err: bool = False) -> Console:
    """A console that knows NO_COLOR and terminals."""
    return Console(stderr=err, highlight=False)


def print_json(value: Any, *, headline: str = "") -> None:
    """Data as JSON on stdout, keys in order but for the `headline` of an object, which comes first."""
    data = TypeAdapter(Any).dump_python(value, mode="json")
    text = json.dumps(data, indent=1, sort_keys=True)
    print(f'{{\n "headline": {json.dumps(headline)},{text.removeprefix("{")}' if headline else text)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; `title` is its first line, so that nobody reads numbers without it."""
    out = console()
    if not out.is_terminal:
        out.width = 200
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name in {"host", "state"})
    for row in rows:
        # Cells may come from hosts: as Text they cannot carry console markup.
        table.add_row(*(Text(_printable(cell)) for cell in row))
    out.print(table)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def say(text: str) -> None:
    """A line for the person watching, on stderr; never wrapped, so that a command in it can be pasted."""
    for line in text.splitlines():
        console(err=True).print(Text(_printable(line)), soft_wrap=True)


def print_hosts(found: Sequence[Any], columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    """A table of hosts, then what each of them needs next."""
    print_table(title, columns, rows)
    for item in found:
        if item.hint:
            say(f"{item.host}: next: {item.hint}")


def show(text: str) -> None:
    """A line of data on stdout."""
    print(_printable(text))


@contextmanager
def watching(*, quiet: bool) -> Iterator[Watch]:
    """Live progress on stderr: a table that redraws on a terminal, plain lines elsewhere, nothing when quiet."""
    if quiet:
        yield Silent()
    elif sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        watch = _LiveWatch()
        with Live(watch, console=console(err=True), refresh_per_second=4, transient=False) as live:
            watch.live = live
            yield watch
    else:
        plain = _PlainWatch()
        ticker = threading.Thread(target=plain.tick, daemon=True)
        ticker.start()
        try:
            yield plain
        finally:
            plain.ended.set()


class _PlainWatch:
    """One line per thing that happens, and now and then a sign of life."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._last: dict[str, tuple[str, float]] = {}
        self._busy: dict[str, float] = {}
        self.ended = threading.Event()

    def tick(self) -> None:
        """Say now and then who is still at the same thing: silence looks like death."""
        while not self.ended.wait(PLAIN_SECONDS):
            with self._lock:
                now = time.monotonic()
                still = {host: self._last[host][0] for host, when in self._busy.items() if now - when >= PLAIN_SECONDS}
            for host, what in still.items():
                self._print(f"  {host}: {what}, still")

    def stage(self, name: str, text: str) -> None:
        """A stage begins."""
        with self._lock:
            self._last.clear()
            self._busy.clear()
        self._print(f"{name}: {text}")

    def host(self, host: str, text: str, *, fraction: float | None = None, ended: bool = False) -> None:
        """What a host does, when it is new or a while has passed."""
        what = text.partition(",")[0]
        now = time.monotonic()
        with self._lock:
            self._busy.pop(host, None)
            if not ended:
                self._busy[host] = now
            before, when = self._last.get(host, ("", 0.0))
            if what == before and now - when < PLAIN_SECONDS and not ended:
                return
            self._last[host] = (what, now)
        share = f" [{fraction:.0%}]" if fraction is not None else ""
        self._print(f"  {host}: {text}{share}")

    def note(self, text: str) -> None:
        """A line of its own."""
        self._print(text)

    def _print(self, text: str) -> None:
        print(f"{time.monotonic() - self._started:6.1f}s {_printable(text)}", file=sys.stderr, flush=True)


class _LiveWatch:
    """A table of hosts that rich redraws; finished stages stay above it as lines."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stage = ("", "")
        self._since = time.monotonic()
        self._hosts: dict[str, tuple[str, float | None, bool]] = {}
        self.live: Live | None = None

    def stage(self, name: str, text: str) -> None:
        """A stage begins: the last one becomes a line."""
        with self._lock:
            done, self._stage = self._stage[0], (name, text)
            seconds, self._since = time.monotonic() - self._since, time.monotonic()
            self._hosts.clear()
        if done and self.live:
            self.live.console.print(Text(f"✓ {done} {seconds:.1f} s", style="green"))

    def host(self, host: str, text: str, *, fraction: float | None = None, ended: bool = False) -> None:
        """What a host does."""
        with self._lock:
            self._hosts[host] = (_printable(text), fraction, ended)

    def note(self, text: str) -> None:
        """A line above the table."""
        if self.live:
            self.live.console.print(Text(_printable(text)))

    def __rich__(self) -> Table:
        """The current stage and its hosts."""
        with self._lock:
            hosts, (name, text) = dict(self._hosts), self._stage
            seconds = time.monotonic() - self._since
        table = Table.grid(padding=(0, 1))
        title = Spinner("dots", Text(f"{name}: {text}, {seconds:.0f} s", style="bold"))
        outer = Table.grid()
        outer.add_row(title)
        for host, (doing, fraction, ended) in hosts.items():
            bar = ProgressBar(total=1, completed=fraction, width=20) if fraction is not None and not ended else Text("")
            table.add_row(Text(f"  {host}", style="green" if ended else "cyan"), bar, Text(doing, overflow="ellipsis"))
        outer.add_row(table)
        return outer
