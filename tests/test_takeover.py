"""SIGKILL of the holder, at any moment: no client notices, and the next holder goes on with everything."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from clients import Client
from operators import Operator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from copyover.testing import Server, Servers

APPS = "tests/apps"
BOTH_MOVES = pytest.mark.parametrize("move", ["together", "rolling"])


@contextlib.contextmanager
def change_under_way(server: Server, **flags: object) -> Iterator[None]:
    """Reload beside the test; its command fails when the holder is killed."""
    thread = threading.Thread(target=lambda: server.reload(**flags))
    thread.start()
    yield
    thread.join(60)


def has_ended(pid: int) -> bool:
    """Whether it is gone, or a zombie that whoever adopted it has not reaped."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"


def wait_phase(server: Server, phase: str) -> None:
    """Return once the holder is in that phase, however short: no interpreter is started to look."""
    operator = Operator(server.directory / server.name / "control.sock")
    operator.wait_until(lambda status: status["phase"]["name"] == phase)


@BOTH_MOVES
def test_workers_serve_and_accept_while_no_holder_lives(copyover_server: Servers, move: str) -> None:
    """The next holder has the same workers, listeners and connections, and reloads at once; again and again."""
    server = copyover_server("echo:echo", chdir=APPS, move=move, workers=2)
    pids, addresses = server.worker_pids(), server.addresses
    with server.swarm(clients=30, churn=6) as swarm:
        swarm.wait_round()
        for _ in range(3):
            before = server.descriptors(pids[0])
            server.kill()
            swarm.wait_round()
            with Client(server.address) as fresh:
                assert fresh.ask(b"while nobody holds\n") == b"while nobody holds\n"
                server.run()
                assert (server.worker_pids(), server.addresses) == (pids, addresses)
                assert fresh.ask(b"and after\n") == b"and after\n"
            assert server.descriptors(pids[0]) <= before + 20  # what leaks is a copy of each connection
            swarm.wait_round()
            result = server.reload().assert_lossless()
            assert result.moved >= 30
            pids = server.worker_pids()
            swarm.wait_round()
    swarm.report.assert_lossless()


def test_the_state_of_a_connection_stays_where_it_is(copyover_server: Servers) -> None:
    """Nothing is entered again: the very coroutine goes on, in the middle of a message too."""
    server = copyover_server("handlers:two_parts", chdir=APPS)
    with Client(server.address) as client:
        assert client.ask(b"5\n") == b"go on\n"
        server.kill()
        server.run()
        client.send(b"hello")
        assert client.line() == b"got hello\n"


@BOTH_MOVES
@pytest.mark.parametrize("phase", ["booting", "moving", "baking"])
def test_a_change_that_was_under_way_is_rolled_back(copyover_server: Servers, move: str, phase: str) -> None:
    """Of a change that no worker saw committed nothing stays: the incumbent has all, the replacement is gone."""
    server = copyover_server("counting:count", chdir=APPS, move=move, config={"boundary_s": 60.0, "gather_s": 30.0})
    held = copyover_server("handlers:two_parts", chdir=APPS, move=move, config={"boundary_s": 60.0, "gather_s": 30.0})
    target = held if phase == "moving" else server
    with Client(server.address) as client, Client(held.address) as busy:
        assert client.line() == b"hello\n"
        assert client.ask(b"a\n") == b"1 1\n"
        assert busy.ask(b"5\n") == b"go on\n"  # in the middle of a message: the move waits for it
        incumbent = target.worker_pids()
        with change_under_way(target, bake=50):  # so that it has not ended when the holder is killed
            wait_phase(target, phase)
            if phase == "baking":
                assert client.ask(b"bb\n") == b"2 2\n"
            target.kill()
        target.run()
        wait_phase(target, "serving")
        while target.worker_pids() != incumbent:  # the replacement is reaped a moment later
            continue
        assert target.status()["generation"] == 1
        expected = b"3 3\n" if (phase, target) == ("baking", server) else b"2 3\n"
        assert client.ask(b"ccc\n") == expected
        busy.send(b"hello")
        assert busy.line() == b"got hello\n"
        target.reload().assert_lossless()
        assert busy.ask(b"2\n") == b"go on\n"


@BOTH_MOVES
def test_killed_at_any_moment_of_a_reload(copyover_server: Servers, move: str) -> None:
    """Clients that send all the time lose nothing; each time the next holder settles it and the next reload works."""
    server = copyover_server("echo:echo", chdir=APPS, move=move, workers=2)
    with server.swarm(clients=40, churn=4) as swarm:
        swarm.wait_round()
        for turn in range(6):
            with change_under_way(server, no_audit=True):
                for _ in range(turn):
                    server.status()  # lets time go by: each takes about as long as a phase
                server.kill()
            server.run()
            wait_phase(server, "serving")
            swarm.wait_round()
            server.reload().assert_lossless()
    swarm.report.assert_lossless()


def test_a_worker_that_died_meanwhile_costs_only_what_it_had(copyover_server: Servers) -> None:
    """Both copies are gone then; the other worker's connections go on, and there are two workers again."""
    server = copyover_server("echo:echo", chdir=APPS, workers=2)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server.address)) for _ in range(20)]
        assert all(client.ask(b"a\n") == b"a\n" for client in clients)
        by_peer = {row["peer"]: row["worker"] for row in server.connections()}
        owners = [by_peer["{}:{}".format(*client.socket.getsockname())] for client in clients]
        workers = {worker["worker"]: worker["pid"] for worker in server.status()["workers"]}
        first = min(workers)
        server.kill()
        os.kill(workers[first], signal.SIGKILL)
        server.run()
        for client, owner in zip(clients, owners, strict=True):
            if owner == first:
                with contextlib.suppress(ConnectionError):
                    assert client.ask(b"b\n") == b""
            else:
                assert client.ask(b"b\n") == b"b\n"
        while len(server.worker_pids()) != 2:
            continue
        server.reload().assert_lossless()


def test_a_holder_that_answers_is_left_alone(copyover_server: Servers) -> None:
    """Exit 15: the name is taken, and nothing was disturbed."""
    server = copyover_server("echo:echo", chdir=APPS)
    with Client(server.address) as client:
        command = [sys.executable, "-P", "-m", "copyover.cli", "run", "echo:echo", "--name", server.name]
        environment = os.environ | {"COPYOVER_RUNTIME_DIR": str(server.directory)}
        second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert second.returncode == 15
        assert f"a holder named '{server.name}' is running (pid {server.pid})" in second.stderr
        assert client.ask(b"a\n") == b"a\n"


def test_a_stalled_holder_is_killed_and_replaced(copyover_server: Servers) -> None:
    """It is never bypassed: while it lives it may wake up, and two would serve."""
    server = copyover_server("echo:echo", chdir=APPS)
    server.expect_errors = True
    stalled = server.pid
    with Client(server.address) as client:
        os.kill(stalled, signal.SIGSTOP)
        server.run()
        assert has_ended(stalled)
        assert client.ask(b"a\n") == b"a\n"
        server.reload().assert_lossless()


def test_a_stalled_worker_is_killed_before_anything_is_decided(copyover_server: Servers) -> None:
    """One that does not report is fenced; the others' connections go on."""
    server = copyover_server("echo:echo", chdir=APPS, workers=2)
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"a\n"
        owner = server.connections()[0]["worker"]
        other = next(w["pid"] for w in server.status()["workers"] if w["worker"] != owner)
        server.kill()
        os.kill(other, signal.SIGSTOP)
        server.run()
        assert other not in server.worker_pids()
        assert client.ask(b"b\n") == b"b\n"


def test_a_stop_is_obeyed_while_workers_are_heard(copyover_server: Servers) -> None:
    """A holder that waits for a stalled worker of its predecessor takes them all over, and ends them."""
    server = copyover_server("echo:echo", chdir=APPS)
    worker = server.worker_pids()[0]
    server.kill()
    os.kill(worker, signal.SIGSTOP)

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # it stops as soon as it is ready
            server.run()

    starting = threading.Thread(target=run)
    starting.start()
    door = server.directory / server.name / "workers.sock"
    while not door.exists():
        continue
    assert "does not answer yet: it is starting, or hears the workers of one that died" in server.command("stop").stderr
    os.kill(server.pid, signal.SIGTERM)
    os.kill(worker, signal.SIGCONT)
    starting.join(60)
    assert server.stop() == 0
    assert has_ended(worker)


def test_a_stranger_at_the_door_is_turned_away(copyover_server: Servers) -> None:
    """Whoever is no registered worker gets in nowhere, however often it knocks; the workers do."""
    server = copyover_server("echo:echo", chdir=APPS)
    server.expect_errors = True
    door = server.directory / server.name / "workers.sock"
    is_over = threading.Event()
    refusals: list[bytes] = []

    def knock() -> None:
        while not is_over.is_set():
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
                stranger.settimeout(30)
                try:
                    stranger.connect(str(door))
                except OSError:
                    continue  # there is no door yet, or no more, or there are many before it
                answer = b""
                with contextlib.suppress(ConnectionError):  # what it said was left unread
                    stranger.send(b"co" + bytes(14))
                    answer = stranger.recv(100)
                refusals.append(answer)

    with Client(server.address) as client:
        worker = server.worker_pids()[0]
        server.kill()
        os.kill(worker, signal.SIGSTOP)  # so that the stranger is there first
        knocking = threading.Thread(target=knock)
        knocking.start()
        starting = threading.Thread(target=server.run)
        starting.start()
        while not refusals and starting.is_alive():
            continue
        os.kill(worker, signal.SIGCONT)
        starting.join(60)
        is_over.set()
        knocking.join(60)
        assert set(refusals) == {b""}
        assert server.worker_pids() == [worker]
        assert client.ask(b"a\n") == b"a\n"
