"""
The demo on the web, run as a newcomer runs it; and its clients, which miss no fault.

The venv is this interpreter's; making one is not tested here, as that needs a package index.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from alone import Uvicorn
from test_demo import DEMO, ENVIRONMENT, read_until, run_demo

ROOT = Path(__file__).parent.parent
KINDS = ("WebSocket", "HTTP, kept alive", "server-sent events")
ROUNDS = 12  # each client has by then been sent more than lossy_web.FAULTY things, together with its kind
COUNTS = ("reconnects", "lost", "repeated", "wrong")


def test_the_web_loses_nothing() -> None:
    """450 clients of three kinds meet five reloads, one of them refused: nothing is dropped, lost or repeated."""
    done = run_demo("--web")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^[1-5]  .*? (done|refused) +(\d+) +(\d+) +(\d+) ", done.stdout, re.MULTILINE)
    assert [outcome for outcome, *_ in rows] == ["done", "refused", "done", "done", "done"]
    assert {(int(moved) + int(kept), lost) for outcome, moved, kept, lost in rows if outcome == "done"} == {(450, "0")}
    for kind, clients in zip(KINDS, ("200", "200", "50"), strict=True):
        row = re.search(rf"^{kind} +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) ", done.stdout, re.MULTILINE)
        assert row is not None, done.stdout
        assert row[1] == clients
        assert int(row[2]) > int(clients)
        assert row.groups()[2:] == ("0",) * len(COUNTS)


def test_a_faulty_server_fails_the_demo() -> None:
    """A server that loses a message makes the demo exit with 1, and say so."""
    faulty = ("--example", str(ROOT / "tests" / "apps"), "--app", "lossy_web:lose")
    done = run_demo("--web", "--clients", "20", "--every", "0.2", *faulty)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout


def test_interactive_says_where_to_look_and_how_to_reload() -> None:
    """The page is there, the commands that it shows work as they stand, and Ctrl-C ends everything with 0."""
    arguments = ("--web", "--interactive", "--clients", "20", "--every", "0.2")
    demo = subprocess.Popen([str(DEMO), *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE)
    try:
        shown = read_until(demo, b"Ctrl-C here ends it all")
        assert "Nothing was dropped." in shown, shown
        page = re.search(r"^ +(http://\S+/)$", shown, re.MULTILINE)
        reload = re.search(r"^ +(ln -sfn \S+/blue .* reload)$", shown, re.MULTILINE)
        assert page is not None
        assert reload is not None
        subprocess.run(reload[1], shell=True, capture_output=True, timeout=60, check=True)
        with urllib.request.urlopen(page[1] + "api/whoami?number=7", timeout=30) as answer:
            assert json.load(answer).items() >= {"release": "blue", "number": "7"}.items()
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 0
    finally:
        demo.kill()
        demo.communicate()


# ---- the clients alone


def run_clients(port: int) -> dict[str, Any]:
    """Let a few clients of each kind talk for some rounds; return what they report."""
    plan = {"host": "127.0.0.1", "port": port, "rooms": {"0": 4}, "keepalive": 4, "stream": 4, "every_s": 0.1}
    program = str(ROOT / "scripts" / "demo_web_clients.py")
    done = subprocess.run(
        [sys.executable, "-P", program, json.dumps(plan)],
        input="round\n" * ROUNDS + "stop\n", capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.parametrize(
    ("variant", "noticed"),
    [
        ("web_chat:app", {}),
        ("lossy_web:lose", {"websocket": "lost", "stream": "lost"}),
        ("lossy_web:repeat", {"websocket": "repeated", "stream": "repeated"}),
        ("lossy_web:spoil", {"websocket": "wrong", "keepalive": "wrong", "stream": "wrong"}),
        ("lossy_web:drop", {"websocket": "reconnects", "keepalive": "reconnects", "stream": "reconnects"}),
    ],
)
def test_the_clients_notice_each_fault(variant: str, noticed: dict[str, str]) -> None:
    """A message lost, repeated, changed or cut off is counted for its kind, and a good server is blamed for nothing."""
    directory = ROOT / "tests" / "apps" if variant.startswith("lossy") else ROOT / "scripts" / "examples"
    with Uvicorn(variant, directory) as server:
        report = run_clients(server.port)
    for kind in ("websocket", "keepalive", "stream"):
        assert report[kind]["verified"] > 0
        counted = {count for count in COUNTS if report[kind][count]}
        expected = {noticed[kind]} if kind in noticed else set()
        assert expected <= counted <= expected | ({"lost"} if variant.endswith("drop") else set()), report
