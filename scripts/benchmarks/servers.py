"""
The servers that are measured, each in processes of its own: copyover, one that lost its holder, asyncio's ways.

It starts and ends them, and reads what the kernel says of their processes; it measures nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from copyover.testing import Server

if TYPE_CHECKING:
    from collections.abc import Iterator

APPS = Path(__file__).parent / "apps"
PEERS = Path(__file__).parent / "peers.py"
LOOPS = ("asyncio", "uvloop")


@attrs.frozen
class Served:
    """A server that is measured: where it listens, the process that serves, and its holder's, if it has one."""

    address: tuple[str, int]
    worker: int
    holder: int | None = None


@contextlib.contextmanager
def copyover(app: str = "echo:echo", **settings: Any) -> Iterator[Server]:
    """Run a holder with one worker; *settings* are keys of copyover.toml. Its slots are in memory, as in /run."""
    if Path("/dev/shm").is_dir():  # noqa: S108  # where a file of ours gets a name that nobody else has
        tempfile.tempdir = "/dev/shm"  # noqa: S108
    server = Server("bench", {"app": app, "chdir": str(APPS), "listen": ["127.0.0.1:0"]} | settings)
    try:
        yield server
        server.stop()
    finally:
        server.discard()


@contextlib.contextmanager
def worker(app: str = "echo:echo", **settings: Any) -> Iterator[Served]:
    with copyover(app, **settings) as server:
        (pid,) = server.worker_pids()
        yield Served(server.address, pid, server.pid)


@contextlib.contextmanager
def worker_alone(app: str = "echo:echo", **settings: Any) -> Iterator[Served]:
    """Run a worker without a holder to lend to: it had one, which was killed."""
    with copyover(app, **settings) as server:
        (pid,) = server.worker_pids()
        server.kill()
        yield Served(server.address, pid)


@contextlib.contextmanager
def peer(kind: str, loop: str) -> Iterator[Served]:
    """Run one of the servers in peers.py."""
    with subprocess.Popen([sys.executable, "-P", PEERS, kind, loop], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Served(("127.0.0.1", int(process.stdout.readline())), process.pid)
        finally:
            process.kill()


def events_of(server: Server) -> list[dict[str, Any]]:
    """Return what ``copyover events`` has of a server."""
    environment = os.environ | {"COPYOVER_RUNTIME_DIR": str(server.directory)}
    command = [sys.executable, "-P", "-m", "copyover.cli", "events", server.name]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in told.splitlines()]


def cpu_ns(pid: int) -> int:
    """Return what the process has used of a processor: the number of its clock is made of its pid. clock_gettime(2)"""
    return time.clock_gettime_ns(~pid << 3 | 2)


def user_s(pid: int) -> float:
    """Return what of that was outside the kernel, to the hundredth."""
    return int(_stat(pid)[11]) / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def switches(pid: int) -> int:
    """Return how often the process has gone to sleep of itself. proc(5), voluntary_ctxt_switches"""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])


def slot_bytes(server: Server) -> int:
    """Return what the files of slots take, of all workers. inode(7), st_blocks"""
    return sum(path.stat().st_blocks * 512 for path in server.directory.rglob("worker-*"))


def memory_bytes(pid: int, field: str) -> int:
    """Return a field of the process's smaps_rollup: Rss, Pss, Anonymous … proc(5)"""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    return int(text.split(f"\n{field}:")[1].split()[0]) << 10
