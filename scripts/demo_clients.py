"""
The clients of the demo: rooms of chatters on real TCP connections, in a process of their own.

It decides whether each line reached each member of its room once and in its sender's order; it knows no reload.
Run by ``scripts/demo``; orders come on stdin (``round``, ``stop``), one JSON object answers each.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import random
import resource
import sys
from typing import Any

JOIN_S = 30.0
FINISH_S = 30.0
TEXT = b"It was a bright cold day in April, and the clocks were striking thirteen. " * 4


def line_of(sender: int, number: int) -> bytes:
    """Return the line that client *sender* says as its *number*-th: everybody can tell whether it came whole."""
    start = (number * 37 + sender * 101) % 80
    return b"%d %s" % (number, TEXT[start : start + (number * 53 + sender * 29) % 120])


class Tally:
    """What the clients of this process have seen."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(
            ("sent", "delivered", "lost", "repeated", "reordered", "damaged", "lost_bytes", "dropped"), 0
        )
        self.sentences: list[str] = []
        self.news = asyncio.Event()

    def say(self, what: str, sentence: str) -> None:
        self.counts[what] += 1
        if len(self.sentences) < 10:
            self.sentences.append(sentence)


class Chatter(asyncio.Protocol):
    """One client: what it said, and what it has heard from each member of its room."""

    def __init__(self, number: int, room: str, tally: Tally) -> None:
        self.number = number
        self.room = room
        self.said = 0
        self.next = collections.Counter[int]()  # the number of the line that must come next, for each sender
        self.missing: dict[int, set[int]] = collections.defaultdict(set)
        self.is_welcome = False
        self.is_leaving = False
        self.is_gone = False
        self._tally = tally
        self._transport: asyncio.Transport | None = None
        self._partial = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(transport)
        self._transport = transport
        transport.write(f"{self.number} {self.room}\n".encode())  # the first line: name and room

    def data_received(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            if self.is_welcome:
                self._hear(line)
            elif line == f"* welcome to {self.room}, {self.number}".encode():
                self.is_welcome = True
            else:
                self._tally.say("damaged", f"client {self.number}: {line!r} instead of a welcome")
        self._tally.news.set()

    def _hear(self, line: bytes) -> None:
        name, _, said = line.partition(b": ")
        digits = said.partition(b" ")[0]
        if not (name.isdigit() and digits.isdigit() and said == line_of(int(name), int(digits))):
            self._tally.say("damaged", f"client {self.number}: nobody said {line!r}")
            return
        sender, number = int(name), int(digits)
        due = self.next[sender]
        self._tally.counts["delivered"] += 1
        if number < due:
            self._hear_late(sender, number)
            return
        self.missing[sender].update(range(due, number))
        self.next[sender] = number + 1

    def _hear_late(self, sender: int, number: int) -> None:
        if number in self.missing[sender]:
            self.missing[sender].discard(number)
            self._tally.say("reordered", f"client {self.number}: line {number} of client {sender} came too late")
        else:
            self._tally.say("repeated", f"client {self.number}: line {number} of client {sender} came again")

    def eof_received(self) -> None:
        if not self.is_leaving:
            self._drop("the server ended the connection")

    def connection_lost(self, problem: Exception | None) -> None:
        if not self.is_leaving or problem is not None:
            self._drop(f"the connection broke: {problem}")
        self.is_gone = True
        self._tally.news.set()

    def _drop(self, how: str) -> None:
        if not self.is_gone:
            self.is_gone = True
            self._tally.say("dropped", f"client {self.number}: {how}")

    async def chat(self, every_s: float, stop: asyncio.Event) -> None:
        """Say something now and then: often one line, sometimes three at once, sometimes half a line first."""
        chance = random.Random(self.number)  # noqa: S311  # nothing secret: runs shall be repeatable
        while not self.is_gone and self._transport is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), chance.uniform(0, 2 * every_s))
            if stop.is_set():
                return
            lines = [line_of(self.number, self.said + more) for more in range(chance.choice((1, 1, 1, 3)))]
            stream = b"".join(line + b"\n" for line in lines)
            self.said += len(lines)
            self._tally.counts["sent"] += len(lines)
            cut = chance.randrange(len(stream)) if chance.random() < 0.3 else 0
            self._transport.write(stream[:cut])
            if cut:
                await asyncio.sleep(chance.uniform(0, 0.1))
            self._transport.write(stream[cut:])

    def leave(self) -> None:
        """End our direction; the server's end must follow, and nothing else."""
        self.is_leaving = True
        if self._transport is not None and not self.is_gone:
            self._transport.write_eof()


class Crowd:
    """All rooms of this process."""

    def __init__(self, sizes: list[int], first_room: int, first_client: int, every_s: float) -> None:
        self._tally = Tally()
        self._every_s = every_s
        self._stop = asyncio.Event()
        self._rooms: list[list[Chatter]] = []
        number = first_client
        for room, size in enumerate(sizes, first_room):
            members = [Chatter(number + more, f"room-{room}", self._tally) for more in range(size)]
            self._rooms.append(members)
            number += size
        self._everybody = [client for members in self._rooms for client in members]
        self._talking: list[asyncio.Task[None]] = []

    async def start(self, host: str, port: int) -> None:
        """Connect all, and let them talk once all are in their rooms."""
        loop = asyncio.get_running_loop()
        for client in self._everybody:
            await loop.create_connection(lambda client=client: client, host, port)  # type: ignore[misc]
        await self._wait_until(lambda: all(client.is_welcome for client in self._everybody), JOIN_S)
        self._talking = [asyncio.ensure_future(client.chat(self._every_s, self._stop)) for client in self._everybody]

    async def round(self) -> None:
        """Wait until each client has said something after this call, and heard it."""
        said = {client: client.said for client in self._everybody}
        await self._wait_until(
            lambda: all(client.is_gone or client.next[client.number] > said[client] for client in said), FINISH_S
        )

    async def stop(self) -> dict[str, Any]:
        """Let all fall silent, wait for what is still due, and tell what was seen."""
        self._stop.set()
        await asyncio.gather(*self._talking)
        with contextlib.suppress(TimeoutError):
            await self._wait_until(self._is_all_heard, FINISH_S)
        self._count_missing()
        for client in self._everybody:
            client.leave()
        try:
            await self._wait_until(lambda: all(client.is_gone for client in self._everybody), FINISH_S)
        except TimeoutError:
            self._tally.say("dropped", "the server did not end the connections of clients that had ended theirs")
        return self._tally.counts | {"clients": len(self._everybody), "sentences": self._tally.sentences}

    def _is_all_heard(self) -> bool:
        return all(
            hearer.is_gone or speaker.is_gone or hearer.next[speaker.number] >= speaker.said
            for members in self._rooms
            for hearer in members
            for speaker in members
        )

    def _count_missing(self) -> None:
        for members in self._rooms:
            for hearer in members:
                for speaker in members:
                    due = range(hearer.next[speaker.number], speaker.said)
                    for number in sorted({*due, *hearer.missing[speaker.number]}):
                        who = f"line {number} of client {speaker.number}"
                        self._tally.say("lost", f"client {hearer.number}: {who} never came")
                        line = line_of(speaker.number, number)
                        self._tally.counts["lost_bytes"] += len(f"{speaker.number}: ") + len(line) + 1

    async def _wait_until(self, is_so: Any, timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            while not is_so():
                self._tally.news.clear()
                await self._tally.news.wait()


async def obey(plan: dict[str, Any]) -> None:
    """Follow the orders on stdin, until its end."""
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    crowd = Crowd(plan["sizes"], plan["first_room"], plan["first_client"], plan["every_s"])
    await crowd.start(plan["host"], plan["port"])
    print("{}", flush=True)
    async for order in orders:
        if order == b"stop\n":
            print(json.dumps(await crowd.stop()), flush=True)
        else:
            await crowd.round()
            print("{}", flush=True)


if __name__ == "__main__":
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(obey(json.loads(sys.argv[1])))
