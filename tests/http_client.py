"""
An HTTP/1.1 client that looks at every byte of framing, and keeps its connection.

It refuses what a lenient client passes over: a body of another length, a chunk cut wrongly, bytes after an answer.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs

from clients import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD = b"Host: test\r\nUser-Agent: raw\r\n"


@attrs.frozen
class Response:
    """An answer: the head's lines by name, in lower case, and the body, unframed."""

    status: int
    headers: dict[str, str]
    body: bytes = b""

    @property
    def told(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.body)
        return told

    @property
    def pid(self) -> int:
        return int(self.told["pid"])


def request(path: str, *, method: str = "GET", headers: bytes = b"", body: bytes | None = None) -> bytes:
    """Return the bytes of one request."""
    if body is not None:
        headers += b"Content-Length: %d\r\n" % len(body)
    return f"{method} {path} HTTP/1.1\r\n".encode() + HEAD + headers + b"\r\n" + (body or b"")


def chunked(*pieces: bytes) -> bytes:
    """Return a whole chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


class HttpClient(Client):
    """One keep-alive connection."""

    def get(self, path: str, **parts: Any) -> Response:
        self.send(request(path, **parts))
        return self.response()

    def head(self) -> Response:
        """
        Read the head of an answer.

        Raises:
            AssertionError: it is none, or says goodbye.

        """
        data = self._until(b"\r\n\r\n")
        first, *rest = data[:-4].decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1", first
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
        assert "close" not in headers.get("connection", ""), headers
        return Response(int(status), headers)

    def response(self, *, has_body: bool = True) -> Response:
        """Read an answer to its end, and no byte further."""
        head = self.head()
        if not has_body:
            return head
        if head.headers.get("transfer-encoding") == "chunked":
            return attrs.evolve(head, body=b"".join(self.chunks()))
        length = int(head.headers["content-length"])
        body = self.receive(length)
        assert len(body) == length, "the connection ended in the middle of a body"
        return attrs.evolve(head, body=body)

    def chunk(self) -> bytes:
        """Read one chunk; the last is empty."""
        size = self._until(b"\r\n")
        length = int(size, 16)
        assert size.lower() == b"%x\r\n" % length, size
        data = self.receive(length + 2)
        assert data[length:] == b"\r\n", data[-20:]
        return data[:length]

    def chunks(self) -> Iterator[bytes]:
        while piece := self.chunk():
            yield piece

    def wait_served_by(self, pid: int, path: str = "/who") -> None:
        """Ask, on the same connection, until *pid* answers; every answer must be whole."""
        while self.get(path).pid != pid:
            continue

    def _until(self, mark: bytes) -> bytes:
        data = b""
        while not data.endswith(mark):
            more = self.socket.recv(1)
            assert more, f"the connection ended after {data!r}"
            data += more
        return data
