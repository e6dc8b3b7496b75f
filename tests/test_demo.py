"""
The demo, run as a newcomer runs it: what it shows is true, and it fails when it should.

The venv is this interpreter's; making one is not tested here, as that needs a package index.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "scripts" / "demo"
ENVIRONMENT = os.environ | {"COPYOVER_DEMO_PYTHON": sys.executable}
TOTALS = ("lost lines", "repeated lines", "reordered lines", "damaged lines", "lost bytes", "dropped connections")


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(DEMO), *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )


def total(shown: str, what: str) -> int:
    found = re.search(rf"^ +{what} +(\d+)$", shown, re.MULTILINE)
    assert found is not None, shown
    return int(found[1])


def test_500_clients_lose_nothing() -> None:
    """500 clients meet five reloads, one of them refused: each line reaches each member of its room exactly once."""
    done = run_demo()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^[1-5]  .*? (done|refused) +(\d+) +(\d+) +(\d+) ", done.stdout, re.MULTILINE)
    assert [outcome for outcome, *_ in rows] == ["done", "done", "refused", "done", "done"]
    assert {(moved, lost) for outcome, moved, _, lost in rows if outcome == "done"} == {("500", "0")}
    assert {what: total(done.stdout, what) for what in TOTALS} == dict.fromkeys(TOTALS, 0)
    deliveries = re.search(r"^500 clients said (\d+) lines; (\d+) deliveries", done.stdout, re.MULTILINE)
    assert deliveries is not None
    assert 0 < 10 * int(deliveries[1]) == int(deliveries[2])


@pytest.mark.parametrize(
    ("fault", "what"), [("lose", "lost lines"), ("repeat", "repeated lines"), ("drop", "dropped connections")]
)
def test_a_faulty_server_fails_the_demo(fault: str, what: str) -> None:
    """A server that loses or repeats one line, or drops one client, makes the demo exit with 1 and say which."""
    faulty = ("--example", str(ROOT / "tests" / "apps"), "--app", f"lossy_chat:{fault}")
    done = run_demo("--clients", "40", "--every", "0.2", *faulty)
    assert done.returncode == 1, done.stdout + done.stderr
    assert total(done.stdout, what) > 0
    assert "FAILED" in done.stdout


def test_interactive_says_how_to_join_and_reload() -> None:
    """The commands that it shows work as they stand, and Ctrl-C ends everything with 0."""
    demo = subprocess.Popen(
        [str(DEMO), "--interactive", "--clients", "20", "--every", "0.2"], env=ENVIRONMENT, stdout=subprocess.PIPE
    )
    try:
        shown = read_until(demo, b"The log is ")
        assert "Nothing was lost." in shown, shown
        joined = re.search(r"^ +nc (\S+) (\d+)$", shown, re.MULTILINE)
        reload = re.search(r"^ +(COPYOVER_RUNTIME_DIR=\S+ \S+ reload)$", shown, re.MULTILINE)
        assert joined is not None
        assert reload is not None
        with socket.create_connection((joined[1], int(joined[2])), timeout=30) as ada, ada.makefile("rb") as heard:
            ada.sendall(b"ada lobby\n")
            assert heard.readline() == b"* welcome to lobby, ada\n"
            done = subprocess.run(reload[1], shell=True, capture_output=True, text=True, timeout=60, check=True)
            assert "1 connections moved" in done.stderr
            ada.sendall(b"still here\n")
            assert heard.readline() == b"ada: still here\n"
            demo.send_signal(signal.SIGINT)
            assert demo.wait(60) == 0
    finally:
        demo.kill()
        demo.communicate()
    assert not Path(reload[1].split()[0].partition("=")[2]).exists()


def read_until(process: subprocess.Popen[bytes], mark: bytes) -> str:
    assert process.stdout is not None
    shown = b""
    while mark not in shown:
        assert select.select([process.stdout], [], [], 120)[0], shown
        data = os.read(process.stdout.fileno(), 64 << 10)
        assert data, shown
        shown += data
    return shown.decode()
