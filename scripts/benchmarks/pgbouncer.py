"""
The takeover of PgBouncer, where it is installed: the same job by the program that has done it longest.

Its sessions are idle ones of clients that have logged in: it waits until no session is in a transaction, then passes
one descriptor a message. No server of Postgres is needed; what it would say to one connection is said here.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import struct
import subprocess
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE_S = 60.0
USER = "nobody"  # it refuses to run as root
LOGGED_IN_AT_ONCE = 200
CONFIG = """
[databases]
bench = host=127.0.0.1 port={server} user=bench
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir = {directory}
pidfile = {directory}/pid
auth_type = any
pool_mode = transaction
max_client_conn = {most}
default_pool_size = 1
log_connections = 0
log_disconnections = 0
{user}
"""
BEGINS, ENDS = "takeover_init: launching connection", "process up:"
STARTUP = b"user\0bench\0database\0bench\0\0"
QUERY = b"select 1\0"


def find() -> str | None:
    return shutil.which("pgbouncer", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")  # where Debian has it


def measure_takeovers(program: str, sessions: int, repeats: int) -> tuple[float, ...]:
    """Return for each takeover how long it took a session, in µs, from asking for the descriptors to serving."""
    with TemporaryDirectory(prefix="co-") as name, contextlib.ExitStack() as end:
        directory = Path(name)
        server = end.enter_context(socket.create_server(("127.0.0.1", 0)))
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        _configure(directory, server.getsockname()[1], port, sessions)
        serving = end.enter_context(_running([program, str(directory / "ini")]))
        _read_start(serving)
        clients = _Sessions(server, port, sessions, end)
        spent_us = []
        for _ in range(repeats):
            successor = end.enter_context(_running([program, "-R", str(directory / "ini")]))
            spent_us.append(_read_start(successor) * 1e6 / sessions)
            serving.wait(DEADLINE_S)
            serving = successor
        clients.check()
    return tuple(spent_us)


def _configure(directory: Path, server: int, port: int, sessions: int) -> None:
    user = ""
    if os.getuid() == 0:
        user = f"user = {USER}"
        os.chown(directory, pwd.getpwnam(USER).pw_uid, -1)
    text = CONFIG.format(server=server, port=port, directory=directory, most=sessions + 10, user=user)
    (directory / "ini").write_text(text, encoding="utf-8")
    (directory / "ini").chmod(0o644)


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def _read_start(process: subprocess.Popen[str]) -> float:
    """
    Return the seconds of the takeover by its own log, or 0 where there was none, once it serves.

    Raises:
        RuntimeError: it ended.

    """
    lines: list[str] = []
    began_s = 0.0
    for line in process.stderr or ():
        lines.append(line)
        if BEGINS in line:
            began_s = _logged_s(line)
        if ENDS in line:
            return _logged_s(line) - began_s if began_s else 0.0
    raise RuntimeError(f"pgbouncer did not start:\n{''.join(lines)}")


def _logged_s(line: str) -> float:
    """Return the time of a line: ``2026-11-23 15:09:37.295 UTC [23296] LOG …``."""
    return datetime.strptime(line[:23] + " UTC+0000", "%Y-%m-%d %H:%M:%S.%f UTC%z").timestamp()


class _Sessions:
    """Clients of PgBouncer that have logged in, and the one connection of its pool, whose server this is."""

    def __init__(self, server: socket.socket, port: int, count: int, end: contextlib.ExitStack) -> None:
        self._clients: list[socket.socket] = []
        self._end = end
        server.settimeout(DEADLINE_S)
        first = self._connect(port)
        self._server = end.enter_context(server.accept()[0])
        self._server.settimeout(DEADLINE_S)
        self._server.recv(4096)
        self._server.sendall(
            _message(b"R", struct.pack("!I", 0))
            + _message(b"S", b"server_version\x0015.0\0")
            + _message(b"S", b"client_encoding\0UTF8\0")
            + _message(b"S", b"standard_conforming_strings\0on\0")
            + _message(b"K", struct.pack("!II", 1, 2))
            + _message(b"Z", b"I")
        )
        _read_answer(first)
        while len(self._clients) < count:
            some = [self._connect(port) for _ in range(min(LOGGED_IN_AT_ONCE, count - len(self._clients)))]
            for client in some:
                _read_answer(client)

    def _connect(self, port: int) -> socket.socket:
        client = self._end.enter_context(socket.socket())
        client.settimeout(DEADLINE_S)
        client.bind((f"127.0.0.{1 + len(self._clients) % 200}", 0))
        client.connect(("127.0.0.1", port))
        client.sendall(_message(b"", struct.pack("!I", 3 << 16) + STARTUP))
        self._clients.append(client)
        return client

    def check(self) -> None:
        """See that sessions go on: queries of the first and the last come to the server, and their answers back."""
        for client in (self._clients[0], self._clients[-1]):
            client.sendall(_message(b"Q", QUERY))
            self._server.recv(4096)
            self._server.sendall(_message(b"C", b"SELECT 1\0") + _message(b"Z", b"I"))
            _read_answer(client)


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


def _read_answer(client: socket.socket) -> None:
    """
    Read until the other side is ready for a query.

    Raises:
        RuntimeError: it closed the connection.

    """
    read = b""
    while not read.endswith(_message(b"Z", b"I")):
        data = client.recv(4096)
        if not data:
            raise RuntimeError(f"PgBouncer closed a session; the last that it said was {read!r}")
        read += data
