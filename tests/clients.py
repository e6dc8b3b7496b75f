"""Plain clients for tests that look at single bytes: blocking sockets under a deadline."""

from __future__ import annotations

import socket
from typing import Self

DEADLINE_S = 30.0


class Client:
    """One connection; every wait ends after half a minute."""

    def __init__(self, address: tuple[str, int] | str) -> None:
        if isinstance(address, str):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(DEADLINE_S)
            self.socket.connect(address)
        else:
            self.socket = socket.create_connection(address, timeout=DEADLINE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, count: int) -> bytes:
        """Return exactly *count* bytes, fewer only at the end of the connection."""
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                break
            data += more
        return data

    def line(self) -> bytes:
        data = b""
        while not data.endswith(b"\n"):
            more = self.socket.recv(1)
            if not more:
                break
            data += more
        return data

    def ask(self, line: bytes) -> bytes:
        self.send(line)
        return self.line()

    def end(self) -> None:
        """Send FIN; go on reading."""
        self.socket.shutdown(socket.SHUT_WR)

    def is_quiet(self) -> bool:
        """Whether nothing has come, not even an end."""
        self.socket.setblocking(False)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        finally:
            self.socket.settimeout(DEADLINE_S)
        return False
