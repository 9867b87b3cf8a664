"""Threads that nobody waits for."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from fleet import threads


def test_each_item_has_its_answer_and_none_waits_for_another() -> None:
    gate = threading.Event()

    def work(number: int) -> int:
        assert number or gate.wait(10)
        return number * 2

    found = []
    for number, answer in threads.each(work, range(100)):
        found.append((number, answer))
        if len(found) == 99:
            gate.set()
    assert found[-1] == (0, 0)
    assert sorted(found) == [(number, number * 2) for number in range(100)]
    assert list(threads.each(work, [])) == []


def test_an_error_is_raised_while_others_hang() -> None:
    gate = threading.Event()

    def work(number: int) -> None:
        if number == 1:
            raise ValueError("one")
        gate.wait(20)

    started = time.monotonic()
    with pytest.raises(ValueError, match="one"):
        list(threads.each(work, range(3)))
    assert time.monotonic() - started < 10
    gate.set()


def test_ctrl_c_waits_for_nobody() -> None:
    code = (
        "import time, sys; from fleet import threads\n"
        "def work(_): print('up', flush=True); time.sleep(60)\n"
        "list(threads.each(work, range(50)))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"up")  # of several threads at once
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in {-signal.SIGINT, 130}
