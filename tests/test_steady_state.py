"""Serving costs what serving costs: no system call and no byte more because a holder has the connections, too."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from benchmarks.servers import switches
from benchmarks.tracing import CannotTrace, Trace

from clients import Client
from copyover.holder.crew import REST_S
from gates import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from copyover.testing import Servers

APPS = Path(__file__).parent / "apps"
PEERS = Path(__file__).parent.parent / "scripts" / "benchmarks" / "peers.py"
CONNECTIONS = 10
REQUESTS = 200
WAITS = {"epoll_wait", "epoll_pwait"}
TIMERS = 5  # more waits than the other's: what else wakes an event loop meanwhile


@contextlib.contextmanager
def bare_worker(loop: str) -> Iterator[tuple[tuple[str, int], int]]:
    """Serve the same on the event loop's epoll, with no holder and nothing of copyover; yield address and pid."""
    with subprocess.Popen([sys.executable, PEERS, "bare", loop], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield ("127.0.0.1", int(process.stdout.readline())), process.pid
        finally:
            process.kill()


def traced(address: tuple[str, int], *pids: int) -> list[Trace]:
    """Return what each process did while requests went over the connections, one after the other."""
    traces = [Trace(pid) for pid in pids]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(address)) for _ in range(CONNECTIONS)]
        for client in clients:  # past what happens once a connection
            assert client.ask(b"hello\n") == b"hello\n"
        with contextlib.ExitStack() as tracing:
            try:
                for trace in traces:
                    tracing.enter_context(trace)
            except CannotTrace as reason:
                pytest.skip(f"system calls cannot be counted: {reason}")
            for number in range(REQUESTS):
                line = b"request %d\n" % number
                client = clients[number % CONNECTIONS]
                client.send(line)
                assert client.receive(len(line)) == line
    return traces


def test_short_connections_wake_the_holder_now_and_then(copyover_server: Servers) -> None:
    """However many come and go, it looks at them together, and has heard of all in the end."""
    server = copyover_server("echo:echo", chdir=APPS)
    with Client(server.address) as staying:
        staying.ask(b"hello\n")
        woken, begun_s = switches(server.pid), time.monotonic()
        for number in range(REQUESTS):
            with Client(server.address) as client:
                assert client.ask(b"visit %d\n" % number) == b"visit %d\n" % number
        spent_s, woken = time.monotonic() - begun_s, switches(server.pid) - woken
        assert woken <= 2 * spent_s / REST_S + TIMERS
        assert server.status()["counters"]["accepted"] == REQUESTS + 1
        wait_until(lambda: server.status()["counters"]["ended"] == REQUESTS, "the holder hears of every end")


@pytest.mark.parametrize("slot_bytes", [None, 0], ids=["slots", "no-slots"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_request_makes_the_calls_of_a_bare_event_loop(
    copyover_server: Servers, loop: str, slot_bytes: int | None
) -> None:
    """
    The worker waits, receives and sends, as often as one without a holder; the holder sleeps through all of it.

    So nothing goes over the channel between them: both ends of it are these processes'. On uvloop it looks into the
    epoll of the connections once a turn of the loop, too: libuv would not tell of a reset that comes behind input.
    """
    server = copyover_server("echo:echo", chdir=APPS, loop=loop, config={"slot_bytes": slot_bytes})
    (pid,) = server.worker_pids()
    worker, holder = traced(server.address, pid, server.pid)
    with bare_worker(loop) as (address, bare_pid):
        (bare,) = traced(address, bare_pid)
    assert not holder.calls, holder.text
    waits = sum(worker.calls.pop(name, 0) for name in WAITS)
    bare_waits = sum(bare.calls.pop(name, 0) for name in WAITS)
    assert worker.calls == bare.calls == {"recvfrom": REQUESTS, "sendto": REQUESTS}, worker.text
    assert waits <= bare_waits * (2 if loop == "uvloop" else 1) + TIMERS
