"""
What the parts measure at: a server under a holder of its own, and its clients in processes of theirs.

It decides how both are started and ended; what is measured is decided by the parts.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

import attrs
from demo_running import Child

from copyover.testing import ReloadResult, Server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

MOST = 9000  # connections of a client process: within its descriptors, and its part of a core
LOOPS = ("asyncio", "uvloop")
_CLIENTS = Path(__file__).with_name("clients.py")
MOVES = ("rolling", "together")
ECHO = """
async def echo(connection):
    async for line in connection.lines():
        await connection.write(line + b"\\n")
"""


@contextlib.contextmanager
def serving(source: str, app: str, **settings: Any) -> Iterator[Server]:
    """
    Give a server of the module ``app.py`` with *source*; *settings* are further keys of copyover.toml.

    Raises:
        RuntimeError: its log is not that of a healthy server.

    """
    with TemporaryDirectory(prefix="co-") as directory:
        Path(directory, "app.py").write_text(source, encoding="utf-8")
        server = Server("bench", {"app": app, "chdir": directory, "listen": ["127.0.0.1:0"]} | settings)
        try:
            yield server
            server.stop()
        finally:
            server.discard()
    if server.problems():
        raise RuntimeError("the server's log is not that of a healthy one:\n" + "\n".join(server.problems()))


def reload_all(server: Server, connections: int, **flags: Any) -> ReloadResult:
    """
    Reload, and return the result.

    Raises:
        RuntimeError: not every connection has moved.

    """
    result = server.reload(**flags).assert_lossless()
    if result.moved != connections:
        raise RuntimeError(f"{result.moved} of {connections} connections moved: {result.answer}")
    return result


@attrs.frozen
class Asked:
    """One request that was answered: which connection's, when it was sent, how long it waited, how late it left."""

    connection: tuple[int, int]  # process and descriptor
    sent_ns: int  # CLOCK_MONOTONIC
    wait_ns: int
    late_ns: int


class Crowd:
    """All clients of a server, spread over processes and over addresses of 127.0.0.0/8."""

    def __init__(self, address: tuple[str, int], connections: int, rate: float = 0.0) -> None:
        processes = -(-connections // MOST)
        self._children: list[Child] = []
        for place in range(processes):
            first, end = (connections * edge // processes for edge in (place, place + 1))
            plan = {"host": address[0], "port": address[1], "connections": end - first, "seed": first}
            command = [sys.executable, "-P", str(_CLIENTS), json.dumps(plan | {"rate": rate / processes})]
            self._children.append(Child(command))
        try:
            self._answers()
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for child in self._children:
            child.end()

    def _answers(self) -> list[dict[str, Any]]:
        return [json.loads(child.line()) for child in self._children]

    def _say(self, order: str) -> None:
        for child in self._children:
            child.say(order)

    def load(self) -> None:
        """Begin with the load, and return at once."""
        self._say("load")

    def tell(self) -> list[Asked]:
        """End the load, and return its requests; all were answered, and rightly."""
        self._say("tell")
        return [
            Asked((place, descriptor), *times)
            for place, told in enumerate(self._answers())
            for descriptor, *times in zip(told["asked"], told["sent_ns"], told["wait_ns"], told["late_ns"], strict=True)
        ]

    def verify(self) -> None:
        """See that each connection is answered."""
        self._say("verify")
        self._answers()
