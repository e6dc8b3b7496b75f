"""
The clients of the demo on the web, in a process of their own: WebSockets, kept HTTP connections, event streams.

It decides whether each message, answer and event came once, whole and in order; it knows no reload. A client whose
connection breaks counts that and connects again. Run by ``scripts/demo --web``; orders come on stdin (``round``,
``stop``), one JSON object answers each.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import random
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

JOIN_S = 30.0
FINISH_S = 30.0
EVENT_MS = 250
AGAIN_S = 0.2
LONGEST_IDLE_S = 3.0  # uvicorn ends a connection that was idle for 5 s, rightly
KINDS = ("websocket", "keepalive", "stream")
TEXT = "It was a bright cold day in April … the clocks were striking thirteen ✓ " * 5


def text_of(sender: int, number: int) -> str:
    """Return what client *sender* says as its *number*-th: everybody can tell whether it came whole."""
    start = (number * 37 + sender * 101) % 80
    return TEXT[start : start + (number * 53 + sender * 29) % 160]


class Tally:
    """What the clients of one kind have seen."""

    def __init__(self, sentences: list[str], news: asyncio.Event) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.sentences = sentences
        self.news = news

    def verified(self) -> None:
        self.counts["verified"] += 1
        self.news.set()

    def say(self, what: str, sentence: str, times: int = 1) -> None:
        self.counts[what] += times
        if len(self.sentences) < 10:
            self.sentences.append(sentence)
        self.news.set()


# A client of any kind has ``done``, how much of what it asked for has come; ``due``, how much must have come before it
# was served after now; ``longest_s``, the longest that it waited; and ``live``, which connects, asks and checks, and
# connects again where the connection breaks.


# ---- WebSockets


class Chatter:
    """A member of a room: says numbered messages, and hears all that are said there, numbered by the room."""

    def __init__(self, number: int, room: int, tally: Tally, stop: asyncio.Event, every_s: float) -> None:
        self.number, self.room = number, room
        self.said = 0
        self.returned = 0
        self.seen: int | None = None  # the number of the last message of the room
        self.longest_s = 0.0
        self.is_leaving = False
        self._next: collections.Counter[int] = collections.Counter()  # what each sender must say next, less one
        self._said_s: dict[int, float] = {}
        self._tally, self._stop, self._every_s = tally, stop, every_s
        self._chance = random.Random(number)  # noqa: S311  # nothing secret: runs shall be repeatable

    @property
    def done(self) -> int:
        return self.returned

    @property
    def due(self) -> int:
        return self.said + 1

    async def live(self, base: str) -> None:
        talking: asyncio.Task[None] | None = None
        while not self.is_leaving:
            where = f"ws://{base}/ws?room=room-{self.room}&name=client-{self.number}&who={self.number}"
            where += f"&seen={self.seen or 0}&heard={self.said}"
            compression = "deflate" if self.number % 2 else None
            try:
                async with connect(where, compression=compression, ping_interval=2, open_timeout=JOIN_S) as socket:
                    talking = asyncio.create_task(self._talk(socket))
                    async for message in socket:
                        self._hear(json.loads(message))
            except (OSError, ConnectionClosed, InvalidHandshake) as problem:
                why = f"{type(problem).__name__}: {problem}"
            else:
                why = "the server said goodbye"
            if talking is not None:
                talking.cancel()
            if not self.is_leaving:
                self._tally.say("reconnects", f"chatter {self.number}: {why}")
                await asyncio.sleep(AGAIN_S)

    async def _talk(self, socket: ClientConnection) -> None:
        """Say something now and then: whole, three at once, or in fragments with a pause between them."""
        with contextlib.suppress(ConnectionClosed):
            while self.seen is None or not self._stop.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), self._chance.uniform(0, 2 * self._every_s))
                for _ in range(0 if self._stop.is_set() or self.seen is None else self._chance.choice((1, 1, 1, 3))):
                    self.said += 1
                    message = json.dumps({"number": self.said, "text": text_of(self.number, self.said)})
                    if self._chance.random() < 0.3:
                        await socket.send(self._fragments(message))
                    else:
                        self._said_s[self.said] = time.monotonic()
                        await socket.send(message)
            await asyncio.Event().wait()  # until the connection ends

    async def _fragments(self, message: str) -> AsyncIterator[str]:
        cut = self._chance.randrange(len(message))
        yield message[:cut]
        await asyncio.sleep(self._chance.uniform(0, 0.1))
        self._said_s[self.said] = time.monotonic()
        yield message[cut:]

    def _hear(self, message: dict[str, Any]) -> None:
        if message["kind"] == "said":
            self._hear_said(message)
        elif message["kind"] == "serving":
            self._hear_serving(message)
        else:
            self._tally.say("wrong", f"chatter {self.number}: the server has heard amiss: {message}")

    def _hear_serving(self, message: dict[str, Any]) -> None:
        if self.seen is not None and message["seen"] != self.seen:
            self._tally.say("wrong", f"chatter {self.number}: saw {self.seen}, and the server says {message['seen']}")
        elif not self.returned <= message["heard"] <= self.said:
            self._tally.say("wrong", f"chatter {self.number}: said {self.said}, and the server heard {message}")
        if self.seen is None:
            self.seen = message["seen"]
        self._tally.news.set()

    def _hear_said(self, message: dict[str, Any]) -> None:
        sender, number, due = int(message["who"]), message["number"], (self.seen or 0) + 1
        if message["seq"] < due or number <= self._next[sender]:
            self._tally.say("repeated", f"chatter {self.number}: {message['seq']} came again, {due} was due")
            return
        missing = max(message["seq"] - due, number - self._next[sender] - 1)
        if missing:
            self._tally.say("lost", f"chatter {self.number}: missed {missing} before {message['seq']}", missing)
        self.seen = message["seq"]
        self._next[sender] = number
        if message["text"] != text_of(sender, number):
            self._tally.say("wrong", f"chatter {self.number}: nobody said {message}")
        if sender == self.number:
            self.returned = number
            self.longest_s = max(self.longest_s, time.monotonic() - self._said_s.pop(number))
        self._tally.verified()

    def has_heard(self, speaker: Chatter) -> bool:
        return self._next[speaker.number] >= speaker.said

    def count_missing(self, speaker: Chatter) -> None:
        missing = speaker.said - self._next[speaker.number]
        if missing:
            sentence = f"chatter {self.number}: the last {missing} of chatter {speaker.number} never came"
            self._tally.say("lost", sentence, missing)


# ---- HTTP


class Broken(Exception):
    """The connection ended, or what came is not HTTP."""


class Http:
    """One connection: requests out, answers in, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def head(self) -> dict[str, str]:
        """
        Return the fields of the next answer.

        Raises:
            Broken: it is none, or not a good one.

        """
        status, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        if not status.startswith("HTTP/1.1 200 "):
            raise Broken(f"the answer was {status}")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if fields.get("connection") == "close":
            raise Broken("the server announced that it will close the connection")
        return fields

    async def chunk(self) -> bytes:
        """Return the next chunk of a body that comes in chunks; nothing at its end."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]


class Asker:
    """Sends numbered requests on one kept connection: one, three at once, or in two halves."""

    def __init__(self, number: int, tally: Tally, stop: asyncio.Event, every_s: float) -> None:
        self.number = number
        self.asked = 0
        self.done = 0
        self.longest_s = 0.0
        self._tally, self._stop, self._every_s = tally, stop, every_s
        self._chance = random.Random(number)  # noqa: S311  # nothing secret: runs shall be repeatable

    @property
    def due(self) -> int:
        return self.asked + 1

    async def live(self, base: str) -> None:
        while not self._stop.is_set():
            try:
                await self._ask_on(Http(*await open_connection(base)), base)
            except (OSError, EOFError, ValueError, Broken) as problem:
                self._tally.say("reconnects", f"asker {self.number}: {problem or type(problem).__name__}")
                if self.asked > self.done:
                    missing, self.done = self.asked - self.done, self.asked
                    self._tally.say("lost", f"asker {self.number}: {missing} requests without an answer", missing)
                await asyncio.sleep(AGAIN_S)

    async def _ask_on(self, http: Http, base: str) -> None:
        with contextlib.closing(http.writer):
            while not self._stop.is_set():
                count = self._chance.choice((1, 1, 1, 3))
                numbers = range(self.asked + 1, self.asked + count + 1)
                requests = "".join(f"GET /api/whoami?number={n} HTTP/1.1\r\nHost: {base}\r\n\r\n" for n in numbers)
                cut = self._chance.randrange(len(requests)) if self._chance.random() < 0.3 else 0
                self.asked += count
                http.writer.write(requests[:cut].encode())
                if cut:
                    await asyncio.sleep(self._chance.uniform(0, 0.1))
                http.writer.write(requests[cut:].encode())
                began_s = time.monotonic()
                for number in numbers:
                    await self._check(http, number)
                self.longest_s = max(self.longest_s, time.monotonic() - began_s)
                with contextlib.suppress(TimeoutError):
                    idle_s = min(2 * self._every_s, LONGEST_IDLE_S)
                    await asyncio.wait_for(self._stop.wait(), self._chance.uniform(0, idle_s))
            if http.reader.at_eof():
                raise Broken("the server ended the connection")

    async def _check(self, http: Http, number: int) -> None:
        fields = await http.head()
        answer = json.loads(await http.reader.readexactly(int(fields.get("content-length", "0"))))
        self.done += 1
        if answer.get("number") == str(number):
            self._tally.verified()
        else:
            self._tally.say("wrong", f"asker {self.number}: asked {number} and got {answer}")


class Listener:
    """Listens to a stream of numbered events."""

    def __init__(self, number: int, tally: Tally, stop: asyncio.Event) -> None:
        self.number = number
        self.done = 0
        self.longest_s = 0.0
        self._tally, self._stop = tally, stop

    @property
    def due(self) -> int:
        return self.done + 1

    async def live(self, base: str) -> None:
        while not self._stop.is_set():
            listening = asyncio.ensure_future(self._listen(base))
            stopping = asyncio.ensure_future(self._stop.wait())
            await asyncio.wait((listening, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not listening.done():
                listening.cancel()
                return
            problem = listening.exception()
            if not isinstance(problem, OSError | EOFError | ValueError | Broken):
                raise TypeError("a stream has no end") from problem
            self._tally.say("reconnects", f"listener {self.number}: {problem or type(problem).__name__}")
            await asyncio.sleep(AGAIN_S)

    async def _listen(self, base: str) -> None:
        http = Http(*await open_connection(base))
        with contextlib.closing(http.writer):
            where = f"/events?room=room-0&every_ms={EVENT_MS}"
            http.writer.write(f"GET {where} HTTP/1.1\r\nHost: {base}\r\nLast-Event-ID: {self.done}\r\n\r\n".encode())
            await http.head()
            last_s, text = time.monotonic(), b""
            while True:
                more = await http.chunk()
                if not more:
                    raise Broken("the server ended the stream")
                text += more
                *events, text = text.split(b"\n\n")
                for event in events:
                    self._hear(event)
                    last_s, gap_s = time.monotonic(), time.monotonic() - last_s
                    self.longest_s = max(self.longest_s, gap_s)

    def _hear(self, event: bytes) -> None:
        fields = dict(line.split(": ", 1) for line in event.decode().split("\n"))
        number = int(fields["id"])
        if number <= self.done:
            self._tally.say("repeated", f"listener {self.number}: event {number} came again")
            return
        missing = number - self.done - 1
        if missing:
            self._tally.say("lost", f"listener {self.number}: missed {missing} events before {number}", missing)
        if json.loads(fields["data"]).keys() != {"release", "worker", "members"}:
            self._tally.say("wrong", f"listener {self.number}: {event!r} is not whole")
        self.done = number
        self._tally.verified()


async def open_connection(base: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = base.rsplit(":", 1)
    return await asyncio.open_connection(host, int(port))


# ---- all of them


class Crowd:
    """All clients of this process."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._base = f"{plan['host']}:{plan['port']}"
        self._news = asyncio.Event()
        self._stop = asyncio.Event()
        self._sentences: list[str] = []
        self._tallies = {kind: Tally(self._sentences, self._news) for kind in KINDS}
        every_s = plan["every_s"]
        websocket, keepalive, stream = (self._tallies[kind] for kind in KINDS)
        self._rooms = [
            [Chatter(int(room) * 1000 + member, int(room), websocket, self._stop, every_s) for member in range(size)]
            for room, size in plan["rooms"].items()
        ]
        self._clients: dict[str, list[Any]] = {
            "websocket": [client for members in self._rooms for client in members],
            "keepalive": [Asker(number, keepalive, self._stop, every_s) for number in range(plan["keepalive"])],
            "stream": [Listener(number, stream, self._stop) for number in range(plan["stream"])],
        }
        self._everybody = [client for clients in self._clients.values() for client in clients]
        self._living: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Connect all, and wait until all are served."""
        self._living = [asyncio.create_task(client.live(self._base)) for client in self._everybody]
        await self._wait_until(lambda: all(client.done for client in self._everybody), JOIN_S)
        for client in self._everybody:  # that all came at once says nothing about what is measured
            client.longest_s = 0.0

    async def round(self) -> dict[str, Any]:
        """Wait until each client has asked for something after this call, and got it."""
        due = {client: client.due for client in self._everybody}
        with contextlib.suppress(TimeoutError):
            await self._wait_until(lambda: all(client.done >= due[client] for client in due), FINISH_S)
        for kind, clients in self._clients.items():
            for client in clients:
                if client.done < due[client]:
                    sentence = f"{kind} {client.number}: has {client.done} of {due[client]} after {FINISH_S:.0f} s"
                    self._tallies[kind].say("lost", sentence)
        return {}

    async def stop(self) -> dict[str, Any]:
        """Let all fall silent, wait for what is still due, and tell what was seen."""
        self._stop.set()
        pairs = [(hearer, speaker) for members in self._rooms for hearer in members for speaker in members]
        with contextlib.suppress(TimeoutError):
            await self._wait_until(lambda: all(hearer.has_heard(speaker) for hearer, speaker in pairs), FINISH_S)
        for hearer, speaker in pairs:
            hearer.count_missing(speaker)
        for client in self._clients["websocket"]:
            client.is_leaving = True
        for task in self._living:
            task.cancel()
        await asyncio.wait(self._living)
        return {kind: self._report(kind) for kind in KINDS} | {"sentences": self._sentences}

    def _report(self, kind: str) -> dict[str, Any]:
        counts = self._tallies[kind].counts
        gaps_ms = [client.longest_s * 1000 for client in self._clients[kind]]
        names = ("verified", "reconnects", "lost", "repeated", "wrong")
        return {"clients": len(gaps_ms), "gaps_ms": gaps_ms, **{name: counts[name] for name in names}}

    async def _wait_until(self, is_so: Any, timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            while not is_so():
                for ended in [task for task in self._living if task.done() and not self._stop.is_set()]:
                    ended.result()  # a client has no end of its own: this raises
                self._news.clear()
                await self._news.wait()


async def obey(plan: dict[str, Any]) -> None:
    """Follow the orders on stdin, until its end."""
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    crowd = Crowd(plan)
    await crowd.start()
    print("{}", flush=True)
    async for order in orders:
        print(json.dumps(await (crowd.stop() if order == b"stop\n" else crowd.round())), flush=True)


if __name__ == "__main__":
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(obey(json.loads(sys.argv[1])))
