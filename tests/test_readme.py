"""The README's commands, run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from clients import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (copyover .*)$", README, re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Give an environment in which ``copyover`` is that of this interpreter."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "COPYOVER_RUNTIME_DIR": str(tmp_path / "r")}


@pytest.fixture
def served(tmp_path: Path, environment: dict[str, str]) -> Iterator[tuple[str, int]]:
    """Run the README's server, with a port that is free here."""
    (tmp_path / "chat.py").write_text(PYTHON[0], encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = shlex.split(COMMANDS[0].replace("8000", str(port)))
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as holder:
        assert holder.stdout is not None
        assert re.fullmatch(rf"ready name=default pid=\d+ listen=tcp://127.0.0.1:{port}\n", holder.stdout.readline())
        yield ("127.0.0.1", port)
        subprocess.run(["copyover", "stop"], env=environment, capture_output=True, check=True)
        assert holder.wait(30) == 0


def test_the_tutorial_does_what_it_says(served: tuple[str, int], tmp_path: Path, environment: dict[str, str]) -> None:
    """Start, talk, change the code, reload: the connection is the same and talks to the new code."""
    with Client(served) as client:
        assert client.line() == b"welcome\n"
        client.send(b"hello\nhalf a ")
        assert client.line() == b"1: hello\n"
        (tmp_path / "chat.py").write_text(PYTHON[0].replace("%d: %s", "(%d) %s"), encoding="utf-8")
        done = subprocess.run(
            shlex.split(COMMANDS[1]), cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert re.match(
            r"generation 2 serves: 1 connections moved, 0 kept, 0 ended by themselves, 0 lost, in ", done.stderr
        )
        client.send(b"line\n")
        assert client.line() == b"(2) half a line\n"
        for command in ("status", "connections"):
            subprocess.run(["copyover", command], env=environment, capture_output=True, check=True)


def test_the_example_is_twenty_lines() -> None:
    """What the heading says."""
    assert len([line for line in PYTHON[0].splitlines() if line.strip()]) <= 20


def test_every_test_that_the_guarantees_name_exists() -> None:
    """Each row of the table points at a file that is there."""
    for name in re.findall(r"\| `(test_\w+\.py)` \|", README):
        assert (Path(__file__).parent / name).exists(), name
