"""
How operators reach the holder: the server's half of the control socket.

One JSON object a line in each direction. It checks who asks and what the lines are; it performs nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copyover.errors import CopyoverError

if TYPE_CHECKING:
    from copyover.directory import Directory

LONGEST_REQUEST = 64 << 10
MOST_UNREAD = 8 << 20


class BadRequest(CopyoverError):
    """A line that is no request; the sentence goes back to the sender."""


def listen(directory: Directory) -> socket.socket:
    """Bind the control socket, 0600; a dead holder's is replaced (the lock says that it is dead)."""
    temporary = f"{directory.control}.{os.getpid()}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(temporary)
    finally:
        os.umask(before)
    sock.listen(16)
    sock.setblocking(False)
    Path(temporary).rename(directory.control)
    return sock


def unlink(directory: Directory, sock: socket.socket) -> None:
    """Remove the socket's file, if it is still there."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(directory.control.stat().st_mode):
            directory.control.unlink()
    sock.close()


class Caller:
    """One connected operator."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._input = b""
        self._output = bytearray()
        self.number = number
        self.is_done = False

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        return bool(self._output)

    @property
    def is_permitted(self) -> bool:
        """Only this user and root may command the holder. unix(7), SO_PEERCRED"""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, uid, _ = struct.unpack("3i", credentials)
        return uid in (os.geteuid(), 0)

    def requests(self) -> list[dict[str, Any]]:
        """
        Return the requests that have come.

        Raises:
            BadRequest: a line is no JSON object, or too long.
            EOFError: the caller has gone.

        """
        try:
            data = self._socket.recv(LONGEST_REQUEST)
        except BlockingIOError:
            return []
        except ConnectionError as gone:
            raise EOFError from gone
        if not data:
            raise EOFError
        *lines, self._input = (self._input + data).split(b"\n")
        if len(self._input) > LONGEST_REQUEST:
            raise BadRequest(f"a request is longer than {LONGEST_REQUEST} bytes")
        return [_request(line) for line in lines]

    def reply(self, answer: dict[str, Any], *, is_last: bool = False) -> None:
        """Queue one line; after the last the connection is closed."""
        self._output += json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        self.is_done = self.is_done or is_last

    def flush(self) -> None:
        """
        Send what is queued, as far as it goes.

        Raises:
            EOFError: the caller has gone, or reads nothing.

        """
        try:
            sent = self._socket.send(self._output)
        except BlockingIOError:
            sent = 0
        except ConnectionError as gone:
            raise EOFError from gone
        del self._output[:sent]
        if len(self._output) > MOST_UNREAD:
            raise EOFError

    def close(self) -> None:
        self._socket.close()


def _request(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise BadRequest(f"a request is one JSON object a line: {problem}") from problem
    if type(request) is not dict or type(request.get("do")) is not str:
        raise BadRequest('a request is an object with a key "do"')
    return request
