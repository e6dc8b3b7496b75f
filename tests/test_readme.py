"""The README's commands, run as they stand."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from websockets.sync.client import connect

from clients import DEADLINE_S, Client

if TYPE_CHECKING:
    from collections.abc import Iterator

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (copyover .*)$", README, re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
RUN_WEB, RELOAD, RUN_CHAT = COMMANDS[:3]
WEB, CHAT = PYTHON[:2]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Give an environment in which ``copyover`` is that of this interpreter."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "COPYOVER_RUNTIME_DIR": str(tmp_path / "r")}


@contextlib.contextmanager
def running(run: str, directory: Path, environment: dict[str, str]) -> Iterator[tuple[str, int]]:
    """Run a server of the README, with a port that is free here."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = shlex.split(run.replace("8000", str(port)))
    with subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as holder:
        assert holder.stdout is not None
        assert re.fullmatch(rf"ready name=default pid=\d+ listen=tcp://127.0.0.1:{port}\n", holder.stdout.readline())
        try:
            yield ("127.0.0.1", port)
        finally:
            subprocess.run(["copyover", "stop"], env=environment, capture_output=True, check=True)
            assert holder.wait(30) == 0


def reload(directory: Path, environment: dict[str, str], moved: int) -> None:
    done = subprocess.run(
        shlex.split(RELOAD), cwd=directory, env=environment, capture_output=True, text=True, check=True
    )
    says = f"generation 2 serves: {moved} connections moved, 0 kept, 0 ended by themselves, 0 lost, in "
    assert re.match(says, done.stderr)


def test_the_asgi_example_does_what_it_says(tmp_path: Path, environment: dict[str, str]) -> None:
    """Ask, count, change the code, reload: a kept connection answers, and the WebSocket counts on, in the new code."""
    file = tmp_path / "app.py"
    file.write_text(WEB, encoding="utf-8")
    with contextlib.ExitStack() as opened:
        host, port = opened.enter_context(running(RUN_WEB, tmp_path, environment))
        kept = opened.enter_context(contextlib.closing(http.client.HTTPConnection(host, port, timeout=DEADLINE_S)))
        kept.request("GET", "/")
        assert json.load(kept.getresponse()) == {"hello": "world"}
        same = kept.sock
        counted = opened.enter_context(connect(f"ws://{host}:{port}/ws"))
        counted.send("one")
        assert counted.recv(DEADLINE_S) == "1: one"
        file.write_text(WEB.replace("world", "new world").replace("}: {", "} - {"), encoding="utf-8")
        reload(tmp_path, environment, moved=2)
        counted.send("two")
        assert counted.recv(DEADLINE_S) == "2 - two"
        kept.request("GET", "/")
        assert json.load(kept.getresponse()) == {"hello": "new world"}
        assert kept.sock is same  # http.client connects again where it was closed


def test_the_tutorial_does_what_it_says(tmp_path: Path, environment: dict[str, str]) -> None:
    """Start, talk, change the code, reload: the connection is the same and talks to the new code."""
    (tmp_path / "chat.py").write_text(CHAT, encoding="utf-8")
    with running(RUN_CHAT, tmp_path, environment) as served, Client(served) as client:
        assert client.line() == b"welcome\n"
        client.send(b"hello\nhalf a ")
        assert client.line() == b"1: hello\n"
        (tmp_path / "chat.py").write_text(CHAT.replace("%d: %s", "(%d) %s"), encoding="utf-8")
        reload(tmp_path, environment, moved=1)
        client.send(b"line\n")
        assert client.line() == b"(2) half a line\n"
        for command in ("status", "connections"):
            subprocess.run(["copyover", command], env=environment, capture_output=True, check=True)


def test_the_example_is_twenty_lines() -> None:
    """What the heading says."""
    assert len([line for line in CHAT.splitlines() if line.strip()]) <= 20


def test_every_test_that_the_guarantees_name_exists() -> None:
    """Each row of the table points at a file that is there."""
    for name in re.findall(r"\| `(test_\w+\.py)` \|", README):
        assert (Path(__file__).parent / name).exists(), name
