"""What runs out is waited for, or refused in words: in-flight descriptors, connections and records of a worker."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
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

    from copyover.testing import Server, Servers

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


# ---- quotas of a worker


def test_a_worker_has_its_quota_of_connections(copyover_server: Servers) -> None:
    """Clients over it wait in the backlog until others have ended; nobody is refused, and status says why."""
    server = copyover_server("echo:echo", chdir=APPS, config={"worker_connections": 2})
    with Client(server.address) as first, Client(server.address) as second:
        assert (first.ask(b"a\n"), second.ask(b"b\n")) == (b"a\n", b"b\n")
        (worker,) = server.status()["workers"]
        assert worker["is_full"]
        assert server.status()["limits"]["worker_connections"] == 2
        with Client(server.address) as third:
            third.send(b"c\n")
            server.reload().assert_lossless()
            assert (first.ask(b"d\n"), second.ask(b"e\n")) == (b"d\n", b"e\n")
            assert third.is_quiet()
            second.socket.close()
            assert third.line() == b"c\n"
            server.configure(worker_connections=None)
            assert server.reload().assert_lossless().moved == 2
            with Client(server.address) as fourth:
                assert (fourth.ask(b"f\n"), third.ask(b"g\n")) == (b"f\n", b"g\n")


def test_records_over_a_worker_s_quota_roll_the_move_back(copyover_server: Servers) -> None:
    """The sentence names the worker and the key; nothing is lost, and a higher quota lets them move."""
    server = copyover_server("handlers:flood", chdir=APPS, config={"worker_record_bytes": 1 << 20})
    with Client(server.address) as client:
        client.send(b"300\n")
        assert client.receive(8) == b"00000000"
        result = server.reload()
        result.assert_refused()
        assert result.outcome == "rolled-back"
        assert "worker 1 gave records of" in str(result.error)
        assert "raise worker_record_bytes" in str(result.error)
        server.configure(worker_record_bytes=64 << 20)
        assert server.reload().assert_lossless().moved == 1
        expected = b"".join(b"%08d" % piece * 8192 for piece in range(300))[8:]
        assert client.receive(len(expected)) == expected


# ---- the OOM killer


def oom_scores(server: Server) -> dict[int, int]:
    """Return each worker's score above the holder's."""
    pids = {worker["worker"]: worker["pid"] for worker in server.status()["workers"] if worker["pid"] is not None}
    found = {key: int(Path(f"/proc/{pid}/oom_score_adj").read_text(encoding="ascii")) for key, pid in pids.items()}
    ours = int(Path(f"/proc/{server.pid}/oom_score_adj").read_text(encoding="ascii"))
    return {key: score - ours for key, score in found.items()}


def test_a_replacement_is_killed_before_the_incumbent_when_memory_runs_out(copyover_server: Servers) -> None:
    """Until the commit it costs nothing to lose it; from then on it is worth as much as anybody, restarts too."""
    server = copyover_server("handlers:two_parts", chdir=APPS, config={"boundary_s": 60.0})
    with Client(server.address) as client:
        assert client.ask(b"2\n") == b"go on\n"
        assert oom_scores(server) == {1: 0}
        server.reload(no_wait=True)
        while server.status()["phase"]["name"] != "moving":
            assert server.status()["generation"] == 1
        assert oom_scores(server) == {1: 0, 2: 500}
        client.send(b"ok")
        assert client.line() == b"got ok\n"
        while server.status()["generation"] != 2:
            assert server.status()["is_serving"]
        while 1 in oom_scores(server):
            continue
        assert oom_scores(server) == {2: 0}
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        while oom_scores(server) != {3: 0}:
            continue
