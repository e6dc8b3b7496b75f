"""SIGKILL of a worker under a real holder: its connections live on in another, exactly, or by the listener's policy."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

import pytest

from clients import Client

if TYPE_CHECKING:
    from pathlib import Path

    from copyover.testing import Server, Servers

APPS = "tests/apps"


def kill_worker(server: Server, place: int = 0) -> None:
    """Kill one, and return once the holder has noticed."""
    pid = server.worker_pids()[place]
    os.kill(pid, signal.SIGKILL)
    while pid in server.worker_pids():
        continue


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix"])
def test_idle_connections_live_on_exactly(copyover_server: Servers, tmp_path: Path, workers: int, listen: str) -> None:
    """In another worker or in a fresh one, with their state and half a message: twice in a row, and over a reload."""
    where = f"unix://{tmp_path}/s" if listen == "unix" else listen
    server = copyover_server("counting:count", chdir=APPS, workers=workers, listen=[where])
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server.addresses[0])) for _ in range(12)]
        for client in clients:
            assert client.line() == b"hello\n"
            assert client.ask(b"a\n") == b"1 1\n"
            client.send(b"bb")
        for turn in range(2):
            kill_worker(server)
            for client in clients:
                assert client.ask(b"\nbb") == b"%d 2\n" % (turn + 2)
        server.reload().assert_lossless()
        for client in clients:
            assert client.ask(b"\n") == b"4 2\n"
        assert server.status()["counters"]["recovered"] > 0
        assert server.status()["counters"].get("interrupted", 0) == 0


def test_who_is_in_the_middle_of_a_message_is_reset(copyover_server: Servers) -> None:
    """A true RST, at once, counted as lost; nobody is left waiting for an answer that never comes."""
    server = copyover_server("handlers:two_parts", chdir=APPS)
    with Client(server.address) as busy, Client(server.address) as idle:
        assert busy.ask(b"5\n") == b"go on\n"
        kill_worker(server)
        with pytest.raises(ConnectionResetError):
            busy.line()
        assert idle.ask(b"2\n") == b"go on\n"
        assert server.status()["counters"]["lost"] == 1


def test_the_policy_resume_enters_it_again_at_its_last_boundary(copyover_server: Servers) -> None:
    """The handler is told that something is missing, and agrees anew with its client."""
    server = copyover_server("recovering:interruptible", chdir=APPS, listen=["tcp://127.0.0.1:0?on_crash=resume"])
    with Client(server.address) as client:
        assert client.ask(b"begin\n") == b"begun 1\n"
        kill_worker(server)
        assert client.line() == b"interrupted after 0\n"
        assert client.ask(b"begin\n") == b"begun 1\n"
        client.send(b"end\n")
        assert client.line() == b"ended 1\n"
        assert server.status()["counters"]["interrupted"] == 1


def test_without_slots_a_killed_worker_costs_its_connections(copyover_server: Servers) -> None:
    """Switched off, they are reset; the server goes on."""
    server = copyover_server("echo:echo", chdir=APPS, config={"slot_bytes": 0})
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"a\n"
        kill_worker(server)
        with pytest.raises(ConnectionResetError):
            client.line()
    with Client(server.address) as client:
        assert client.ask(b"b\n") == b"b\n"


def test_connections_wait_for_a_worker_that_cannot_start_at_once(copyover_server: Servers, tmp_path: Path) -> None:
    """Parked, however long it takes; status says so; a release that works takes them along."""
    source = (
        "import os\n"
        f"if os.path.exists({str(tmp_path / 'broken')!r}):\n    raise SystemExit('broken')\n"
        "async def handler(connection):\n"
        "    async for line in connection.lines():\n"
        "        await connection.write(line + b'\\n')\n"
    )
    (tmp_path / "app.py").write_text(source, encoding="utf-8")
    server = copyover_server("app:handler", chdir=str(tmp_path))
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"a\n"
        (tmp_path / "broken").touch()
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        while server.status()["connections"]["parked"] != 1:
            continue
        client.send(b"b\n")
        (tmp_path / "broken").unlink()
        server.reload().assert_lossless()
        assert client.line() == b"b\n"


def test_a_release_that_cannot_read_the_state_gets_no_connection(copyover_server: Servers, tmp_path: Path) -> None:
    """Changed in place under a running server: reset, never served from what the release would guess."""
    source = (
        "import copyover\n"
        "async def handler(connection):\n"
        "    async for line in connection.lines():\n"
        "        await connection.write(line + b'\\n')\n"
        "app = copyover.Application(handler=handler, schema=SCHEMA)\n"
    )
    (tmp_path / "app.py").write_text(source.replace("SCHEMA", "1"), encoding="utf-8")
    server = copyover_server("app:app", chdir=str(tmp_path))
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"a\n"
        (tmp_path / "app.py").write_text(source.replace("SCHEMA", "23"), encoding="utf-8")
        kill_worker(server)
        with pytest.raises(ConnectionResetError):
            client.line()
    assert "schema 1, this release reads 23" in server.log
