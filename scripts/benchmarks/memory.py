"""
What connections take of memory: in the holder, in a worker, and in all processes while a reload has two of these.

Memory is what /proc/PID/smaps_rollup says. A connection's share is a difference of anonymous memory, which is nobody
else's; what the kernel keeps of sockets is in none of it.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from benchmarks import load, servers
from benchmarks.figures import TIMES, Effort, Figure, Part, at_most

if TYPE_CHECKING:
    from collections.abc import Iterator

    from copyover.testing import Server

TITLE = "Memory"
SAMPLE_S = 0.01
MIB = 1 << 20


def measure(effort: Effort) -> Part:
    count = max(effort.linear)
    figures: list[Figure] = []
    for loop in servers.LOOPS:
        figures += _copyover(loop, count)
    return Part("memory", TITLE, tuple(figures))


def _copyover(loop: str, count: int) -> Iterator[Figure]:
    with servers.copyover(loop=loop) as server:
        (worker,) = server.worker_pids()
        at_rest = servers.memory_bytes(server.pid, "Rss")
        holder, before = (servers.memory_bytes(pid, "Anonymous") for pid in (server.pid, worker))
        with load.Clients(server.address, count, processes=2) as clients:
            full = servers.memory_bytes(server.pid, "Rss")
            holder_share = (servers.memory_bytes(server.pid, "Anonymous") - holder) / count
            worker_share = (servers.memory_bytes(worker, "Anonymous") - before) / count
            slots = servers.slot_bytes(server) / count
            worker_pss = servers.memory_bytes(worker, "Pss")
            with _peak(server) as peak:
                server.reload().assert_lossless()
            clients.ask_all()
    yield Figure(f"holder at rest, RSS, {loop}", (at_rest / MIB,), "MiB", at_most(30, "MiB"))
    yield Figure(f"holder with {count} connections, RSS, {loop}", (full / MIB,), "MiB")
    yield Figure(f"holder, a connection, {loop}", (holder_share,), "B", at_most(150, "B"))
    yield Figure(f"worker, a connection, {loop}", (worker_share,), "B", note=f"and {slots:.0f} B of slots")
    transport, streams = (_share_of_peer(kind, loop, count) for kind in ("protocol", "streams"))
    note = f"that has {transport:.0f} B; Streams have {streams:.0f} B"
    name = f"worker, a connection against a transport of {loop}'s with a protocol"
    yield Figure(name, (worker_share / transport,), TIMES, note=note)
    highest = max(peak)
    note = f"{highest / MIB:.0f} MiB, a worker {worker_pss / MIB:.0f} MiB; {len(peak)} samples"
    name = f"peak of a reload of {count}, PSS of all, against twice a worker, {loop}"
    yield Figure(name, (highest / (2 * worker_pss),), TIMES, note=note)


@contextlib.contextmanager
def _peak(server: Server) -> Iterator[list[int]]:
    """Sample the PSS of holder and workers together until the block ends; yield the samples."""
    samples: list[int] = []
    is_over = threading.Event()

    def sample() -> None:
        while not is_over.wait(SAMPLE_S):
            samples.append(sum(map(_pss, [server.pid, *servers.children(server.pid)])))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        is_over.set()
        thread.join()


def _pss(pid: int) -> int:
    try:
        return servers.memory_bytes(pid, "Pss")
    except (OSError, IndexError):  # it has just ended: a dead process has no memory
        return 0


def _share_of_peer(kind: str, loop: str, count: int) -> float:
    with servers.peer(kind, loop) as served:
        before = servers.memory_bytes(served.worker, "Anonymous")
        with load.Clients(served.address, count, processes=2):
            return (servers.memory_bytes(served.worker, "Anonymous") - before) / count
