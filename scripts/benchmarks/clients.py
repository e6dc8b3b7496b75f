"""
Clients of a benchmark: many connections, requests on a schedule that waits for no answer, each verified.

It decides what is sent and what counts as wrong, not what a wait means. It is a program of its own, which imports
nothing of copyover and takes orders on stdin, a line each.
"""

from __future__ import annotations

import array
import collections
import gc
import json
import random
import resource
import select
import socket
import sys
import time
from typing import Any

ORDERS = 0  # stdin
GREETED_AT_ONCE = 200  # fewer than any backlog
PATIENCE_S = 60.0


# ---- the program


class Clients:
    """The connections of one process."""

    def __init__(self, host: str, port: int, connections: int, rate: float, seed: int) -> None:
        self.rate = rate  # requests a second, over all connections
        self.sockets: dict[int, socket.socket] = {}
        self.due: dict[int, collections.deque[tuple[int, int, bytes]]] = {}  # late and sent, ns, and the answer due
        self.arrived: dict[int, bytes] = {}  # the beginning of an answer
        self.epoll = select.epoll()
        self.number = 0
        self.asked: array.array[int] = array.array("q")  # columns: which connection, when, how long it waited
        self.sent_ns: array.array[int] = array.array("q")
        self.wait_ns: array.array[int] = array.array("q")
        self.late_ns: array.array[int] = array.array("q")  # how long after its time it was sent: that is our own fault
        for place in range(connections):
            self._connect(host, port, seed + place)
            if place % GREETED_AT_ONCE == GREETED_AT_ONCE - 1 or place == connections - 1:
                self._greet()
        # In another order than that of the server's ledger, in which batches move.
        self.order = list(self.sockets)
        random.Random(seed).shuffle(self.order)  # noqa: S311  # nothing secret: runs shall be repeatable
        self.forget()

    def _connect(self, host: str, port: int, place: int) -> None:
        client = socket.socket()
        client.settimeout(PATIENCE_S)
        client.bind((f"127.0.0.{1 + place % 200}", 0))  # one address has 28 000 ports, less those in TIME_WAIT
        client.connect((host, port))
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sockets[client.fileno()] = client
        self.due[client.fileno()] = collections.deque()
        self.epoll.register(client, select.EPOLLIN)

    def _greet(self) -> None:
        """Ask the newest once: a connection that was answered has been accepted, and lent."""
        for descriptor in list(self.sockets)[-GREETED_AT_ONCE:]:
            self.ask(descriptor)
        self.settle()

    def ask(self, descriptor: int, at_ns: int = 0) -> None:
        self.number += 1
        line = b"request %d of connection %d\n" % (self.number, descriptor)
        now_ns = time.monotonic_ns()
        self.due[descriptor].append((now_ns - at_ns if at_ns else 0, now_ns, line))
        self.sockets[descriptor].send(line)

    def receive(self, timeout_s: float) -> bool:
        """Take what comes and compare it; true if an order has come."""
        is_ordered = False
        for descriptor, _ in self.epoll.poll(timeout_s):
            if descriptor == ORDERS:
                is_ordered = True
            else:
                self._take(descriptor)
        return is_ordered

    def _take(self, descriptor: int) -> None:
        data = self.sockets[descriptor].recv(64 << 10)
        now_ns = time.monotonic_ns()
        if not data:
            sys.exit(f"connection {descriptor} was closed")
        data = self.arrived.pop(descriptor, b"") + data
        due = self.due[descriptor]
        while due and data.startswith(due[0][2]):
            late_ns, sent_ns, line = due.popleft()
            data = data[len(line) :]
            self.asked.append(descriptor)
            self.sent_ns.append(sent_ns)
            self.wait_ns.append(now_ns - sent_ns)
            self.late_ns.append(late_ns)
        if data:
            if not due or not due[0][2].startswith(data):
                sys.exit(f"connection {descriptor} got {data[:80]!r} where {list(due)[:1]} was due")
            self.arrived[descriptor] = data

    def settle(self) -> None:
        """Wait for what is not answered yet."""
        deadline_s = time.monotonic() + PATIENCE_S
        while any(self.due.values()):
            if time.monotonic() > deadline_s:
                sys.exit(f"{sum(map(len, self.due.values()))} requests were not answered within {PATIENCE_S:g} s")
            self.receive(0.1)

    def verify(self) -> None:
        """Ask each connection once."""
        for place, descriptor in enumerate(self.order):
            self.ask(descriptor)
            if place % GREETED_AT_ONCE == 0:
                self.settle()
        self.settle()
        self.forget()

    def forget(self) -> None:
        for column in (self.asked, self.sent_ns, self.wait_ns, self.late_ns):
            del column[:]

    def load(self) -> None:
        """Send on schedule until an order comes; who waits for an answer holds up nobody, not even itself."""
        self.epoll.register(ORDERS, select.EPOLLIN)
        began_ns, every_ns, sent, is_ordered = time.monotonic_ns(), 1e9 / self.rate, 0, False
        while not is_ordered:
            passed_ns = time.monotonic_ns() - began_ns
            while sent * every_ns < passed_ns:
                self.ask(self.order[sent % len(self.order)], began_ns + int(sent * every_ns))
                sent += 1
            is_ordered = self.receive(max(sent * every_ns - passed_ns, 0) / 1e9)
        self.epoll.unregister(ORDERS)
        self.settle()

    def tell(self) -> dict[str, list[int]]:
        names = ("asked", "sent_ns", "wait_ns", "late_ns")
        told = {name: list(getattr(self, name)) for name in names}
        self.forget()
        return told


def main(plan: dict[str, Any]) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    clients = Clients(**plan)
    gc.freeze()
    gc.disable()  # a collection would look like a pause of the server
    print("{}", flush=True)
    # Unbuffered: an order that waits in a buffer here would not wake the epoll.
    with open(ORDERS, "rb", buffering=0, closefd=False) as orders:
        for order in orders:
            if order == b"load\n":
                clients.load()
                continue
            if order == b"verify\n":
                clients.verify()
            print(json.dumps(clients.tell()), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
