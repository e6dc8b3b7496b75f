"""
Clients in processes of their own: they ask one line at a time, all at once, or come and go, and compare each answer.

It says what was asked and how long it took; it draws no conclusion. Started with an address it is such a process, and
obeys lines of JSON on its stdin.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import socket
import subprocess
import sys
import time
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOSTS = 200  # of 127.0.0.0/8 that clients come from: each has 28 000 ports
BACKLOG = 512  # fewer than any listener has room for
PATIENCE_S = 60.0
AT_ONCE = 16  # visitors that are there at a time
IP_BIND_ADDRESS_NO_PORT = 24  # ip(7): the port is chosen at connect, by the whole 4-tuple


class Clients:
    """*count* connections to *address*, in *processes* of their own. Ends with its ``with`` block."""

    def __init__(self, address: tuple[str, int], count: int, *, processes: int = 1) -> None:
        shares = [len(range(place, count, processes)) for place in range(processes)]
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-P", __file__, json.dumps([*address, share])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for share in shares
        ]
        self._answers()  # connected

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            _pipe(process.stdin).close()
        for process in self._processes:
            process.wait(PATIENCE_S)
            _pipe(process.stdout).close()

    def begin(self, do: str, **told: Any) -> Callable[[], list[dict[str, Any]]]:
        """Have each process do something; return what waits for their answers."""
        for process in self._processes:
            print(json.dumps({"do": do, **told}), file=_pipe(process.stdin), flush=True)
        return self._answers

    def ask(self, do: str, **told: Any) -> list[dict[str, Any]]:
        """Have each process do something, and return their answers."""
        return self.begin(do, **told)()

    def keep_asking(self, seconds: float) -> int:
        """Ask on each connection, again as soon as it is answered; return how many answers came."""
        return sum(answer["requests"] for answer in self.ask("keep_asking", seconds=seconds))

    def ask_in_turn(self, requests: int) -> None:
        """Ask so often altogether, one connection after the other, each when the one before is answered."""
        self.ask("ask_in_turn", requests=requests)

    def visit(self, visits: int) -> None:
        """Connect so often: one line, one answer, and away."""
        self.ask("visit", visits=visits)

    def ask_all(self) -> tuple[float, float]:
        """Ask on every connection; return when, by time.monotonic, the first and the last answer came."""
        answers = self.ask("ask_all")
        return min(answer["first_s"] for answer in answers), max(answer["last_s"] for answer in answers)

    def _answers(self) -> list[dict[str, Any]]:
        lines = [_pipe(process.stdout).readline() for process in self._processes]
        if not all(lines):
            raise RuntimeError("clients went away; their stderr says why")
        return [json.loads(line) for line in lines]


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


# ---- in the process of the clients


class _Crowd:
    """The connections of one process."""

    def __init__(self, address: tuple[str, int], count: int) -> None:
        self._address = address
        self._hosts = itertools.count(os.getpid())
        self._numbers = itertools.count()
        self._socks: dict[int, socket.socket] = {}
        self._expected: dict[int, bytes] = {}
        self._epoll = select.epoll()
        while len(self._socks) < count:
            for _ in range(min(BACKLOG, count - len(self._socks))):
                self._send(self._connect())
            self._await_all()  # so that the next ones find room in the backlog

    def _connect(self) -> int:
        sock = socket.socket()
        sock.settimeout(PATIENCE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((f"127.0.0.{1 + next(self._hosts) % HOSTS}", 0))
        sock.connect(self._address)
        self._socks[sock.fileno()] = sock
        self._epoll.register(sock, select.EPOLLIN)
        return sock.fileno()

    def _leave(self, descriptor: int) -> None:
        self._epoll.unregister(descriptor)
        self._socks.pop(descriptor).close()

    def _send(self, descriptor: int) -> None:
        line = b"%011d is a line of clients\n" % next(self._numbers)
        self._expected[descriptor] = line
        self._socks[descriptor].sendall(line)

    def _answered(self) -> Iterator[int]:
        """Yield the connections whose answers have come, whole."""
        ready = self._epoll.poll(PATIENCE_S)
        if not ready:
            raise TimeoutError(f"{len(self._expected)} answers did not come within {PATIENCE_S:g} s")
        for descriptor, _ in ready:
            got = self._socks[descriptor].recv(4096)
            expected = self._expected[descriptor]
            if not got or not expected.startswith(got):
                raise ValueError(f"the answer is {got!r} instead of {expected!r}")
            self._expected[descriptor] = expected[len(got) :]
            if len(got) == len(expected):
                del self._expected[descriptor]
                yield descriptor

    def _await_all(self) -> float:
        """Wait for every answer; return when the first came. CLOCK_MONOTONIC is the same in all processes."""
        first_s = 0.0
        while self._expected:
            for _ in self._answered():
                first_s = first_s or time.monotonic()
        return first_s

    # ---- what can be asked for

    def keep_asking(self, seconds: float) -> dict[str, Any]:
        until_s = time.monotonic() + seconds
        requests = 0
        for descriptor in self._socks:
            self._send(descriptor)
        while self._expected:
            is_over = time.monotonic() > until_s
            for descriptor in self._answered():
                requests += 1
                if not is_over:
                    self._send(descriptor)
        return {"requests": requests}

    def ask_in_turn(self, requests: int) -> dict[str, Any]:
        for descriptor in itertools.islice(itertools.cycle(list(self._socks)), requests):
            self._send(descriptor)
            self._await_all()
        return {}

    def ask_all(self) -> dict[str, Any]:
        """Ask on every connection; say when the first and the last answer came."""
        for descriptor in self._socks:
            self._send(descriptor)
        first_s = self._await_all()
        return {"first_s": first_s, "last_s": time.monotonic()}

    def visit(self, visits: int) -> dict[str, Any]:
        begun = min(AT_ONCE, visits)
        for _ in range(begun):
            self._send(self._connect())
        while self._expected:
            for descriptor in self._answered():
                self._leave(descriptor)
                if begun < visits:
                    begun += 1
                    self._send(self._connect())
        return {}


def main(told: str) -> None:
    """Connect, and do what the lines on stdin say until they end."""
    host, port, count = json.loads(told)
    crowd = _Crowd((host, port), count)
    print("{}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            order = json.loads(line)
            print(json.dumps(getattr(crowd, order.pop("do"))(**order)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
