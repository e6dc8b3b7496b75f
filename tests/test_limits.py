"""What runs out is waited for, or refused in words: in-flight descriptors, connections and records of a worker."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import others
from clients import DEADLINE_S, Client

if TYPE_CHECKING:
    from collections.abc import Iterator

APPS = Path(__file__).parent / "apps"

HOG = """
import array, os, socket, sys
sys.stdin.readline()
near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
null = os.open(os.devnull, os.O_RDONLY)
for _ in range(4):
    near.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null] * 200))])
print("in flight", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def strangers_directory() -> Iterator[Path]:
    """Return a runtime directory that belongs to a user without privileges."""
    directory = Path(tempfile.mkdtemp(prefix="co-"))
    os.chown(directory, others.STRANGER, others.STRANGER)
    yield directory
    shutil.rmtree(directory)


def ask(directory: Path, *arguments: str) -> dict[str, Any]:
    command = [others.python(), "-P", "-m", "copyover.cli", *arguments, "--json"]
    environment = others.ENVIRONMENT | {"COPYOVER_RUNTIME_DIR": str(directory)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def wait_reloaded(directory: Path, generation: int) -> dict[str, Any]:
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        last: dict[str, Any] = ask(directory, "status")["last_reload"]
        if last["generation"]["to"] == generation:
            return last
    raise TimeoutError(f"generation {generation} has no result")


@others.needs_root
def test_descriptors_in_flight_are_waited_for_without_haste(strangers_directory: Path) -> None:
    """
    ETOOMANYREFS costs no processor time while it lasts, and nothing after it.

    Another process of the same user has more descriptors in flight than holder and worker may have: neither can the
    worker lend what it accepts, nor the holder give a replacement its listeners.
    """
    environment = {"COPYOVER_RUNTIME_DIR": str(strangers_directory)}
    python = others.python()
    run = [
        python,
        "-P",
        "-m",
        "copyover.cli",
        "run",
        "--listen",
        "127.0.0.1:0",
        "--chdir",
        str(APPS),
        "--python",
        python,
    ]
    with (
        others.running(*run, "echo:echo", user=others.STRANGER, environment=environment, limit=256) as (holder, log),
        others.running(python, "-c", HOG, user=others.STRANGER, environment=environment, limit=1024) as (hog, said),
    ):
        address = ("127.0.0.1", int(next(line for line in log if line.startswith("ready ")).rpartition(":")[2]))
        with Client(address) as early:
            assert early.ask(b"a\n") == b"a\n"
            assert hog.stdin is not None
            print(file=hog.stdin, flush=True)
            assert said.readline() == "in flight\n"
            with Client(address) as waiting:
                waiting.send(b"b\n")
                assert ask(strangers_directory, "reload", "--no-wait")["outcome"] == "started"
                pids = [holder.pid, ask(strangers_directory, "status")["workers"][0]["pid"]]
                before_s = sum(map(others.cpu_s, pids))
                assert select.select([waiting.socket], [], [], 1.0)[0] == []
                assert sum(map(others.cpu_s, pids)) - before_s < 0.3
                assert early.ask(b"c\n") == b"c\n"
                hog.kill()
                assert waiting.line() == b"b\n"
                moved = wait_reloaded(strangers_directory, generation=2)["connections"]
                assert (moved["moved"], moved["lost"]) == (2, 0)
                assert (early.ask(b"d\n"), waiting.ask(b"e\n")) == (b"d\n", b"e\n")
