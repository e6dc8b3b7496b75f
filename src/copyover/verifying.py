"""
Clients that compare every byte which comes back with the byte that must come, while the server is replaced.

It decides what counts as wrong and what as dropped; it starts no server and knows nothing of reloads.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import random
import string
import time
from typing import TYPE_CHECKING

import attrs

from copyover.errors import CopyoverError

if TYPE_CHECKING:
    from collections.abc import Callable

SENTENCES = 20  # more of the same tell no more
_SHOWN_BYTES = 40


@attrs.frozen(kw_only=True)
class Plan:
    """
    Who talks to whom, and how.

    Args:
        address: (host, port), or the path of a unix socket.
        clients: connections that stay until the swarm is stopped.
        churn: clients that connect, talk a little and leave (politely, or not) all the time.
        seed: of all that is random.
        greeting: what the server sends before the first reply.
        half_close: whether the clients end their direction at the end and expect the server's end to follow.
        longest_bytes: of a line; most are much shorter.
        burst: lines that may be on their way at a time.
        pause_s: how long a client thinks at most.
        deadline_s: a reply, a connect or an end that takes longer is missing.

    """

    address: tuple[str, int] | str
    clients: int = 8
    churn: int = 0
    seed: int = 0
    greeting: str = ""
    half_close: bool = True
    longest_bytes: int = 3000
    burst: int = 4
    pause_s: float = 0.02
    deadline_s: float = 30.0


@attrs.frozen(kw_only=True)
class SwarmReport:
    """
    What a swarm saw.

    *dropped* counts connections that were refused, reset or ended before their time; *drops* and *wrong* say in words
    what happened, *wrong* with the exact position in the stream of replies.
    """

    clients: int
    visits: int
    lines_sent: int
    lines_verified: int
    bytes_verified: int
    dropped: int
    drops: list[str]
    wrong: list[str]
    longest_gap_ms: float

    @property
    def is_lossless(self) -> bool:
        return not self.dropped and not self.wrong and 0 < self.lines_verified == self.lines_sent

    def assert_lossless(self) -> SwarmReport:
        """
        Return the report, if something was checked and all of it was right.

        Raises:
            AssertionError: something was dropped, missing, repeated or wrong, or nothing was checked.

        """
        if not self.is_lossless:
            found = "\n".join(f"  {sentence}" for sentence in [*self.drops, *self.wrong])
            raise AssertionError(
                f"{self.dropped} connections dropped, {len(self.wrong)} with wrong bytes, "
                f"{self.lines_verified} of {self.lines_sent} lines verified\n{found}"
            )
        return self


def echo(line: bytes) -> bytes:
    """Return what an echo server answers."""
    return line + b"\n"


# ---- the clients, in one event loop


class _ClientError(CopyoverError):
    """The client has told the tally what went wrong."""


@functools.cache
def _text(size: int) -> bytes:
    """Return what lines are filled with."""
    letters = string.ascii_letters + string.digits + " .,;"
    return "".join(random.Random(size).choices(letters, k=size)).encode()  # noqa: S311  # nothing secret


class _Tally:
    """What all clients of a loop have seen so far."""

    def __init__(self) -> None:
        self.visits = 0
        self.lines_sent = 0
        self.lines_verified = 0
        self.bytes_verified = 0
        self.dropped = 0
        self.drops: list[str] = []
        self.wrong: list[str] = []
        self.longest_gap_s = 0.0
        self._targets: dict[_Client, int] = {}
        self._reached: asyncio.Future[None] | None = None

    def drop(self, sentence: str) -> None:
        self.dropped += 1
        if len(self.drops) < SENTENCES:
            self.drops.append(sentence)

    def say_wrong(self, sentence: str) -> None:
        if len(self.wrong) < SENTENCES:
            self.wrong.append(sentence)

    async def wait_reached(self, targets: dict[_Client, int], timeout_s: float) -> None:
        """Wait until each client has verified so many lines, or has failed."""
        self._targets = {client: target for client, target in targets.items() if not client.is_over}
        if self._targets:
            self._reached = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(timeout_s):
                await self._reached

    def told(self, client: _Client) -> None:
        """A client has verified lines, or it is over."""
        target = self._targets.get(client)
        if target is None or (client.verified < target and not client.is_over):
            return
        del self._targets[client]
        if not self._targets and self._reached is not None and not self._reached.done():
            self._reached.set_result(None)


class _Client(asyncio.Protocol):
    """One connection, and the bytes that must come on it."""

    def __init__(self, name: str, plan: Plan, reply: Callable[[bytes], bytes], tally: _Tally, seed: str) -> None:
        self.name = name
        self.sent = 0
        self.verified = 0
        self.is_over = False
        self._plan = plan
        self._reply = reply
        self._tally = tally
        self._random = random.Random(seed)  # noqa: S311  # nothing secret: runs shall be repeatable
        self._transport: asyncio.Transport | None = None
        self._due = bytearray(plan.greeting.encode())  # what must come next
        self._position = 0  # how many bytes came and were right
        self._ends: collections.deque[int] = collections.deque()  # where each reply ends
        self._last_end = len(self._due)
        self._waiting_since_s = time.monotonic()
        self._is_failed = False
        self._is_leaving = False
        self._news: asyncio.Future[None] | None = None
        self._text = _text(2 * plan.longest_bytes)

    # ---- what comes back

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        if self._due:
            self._tally.longest_gap_s = max(self._tally.longest_gap_s, now_s - self._waiting_since_s)
        self._waiting_since_s = now_s
        if self._is_failed:
            return
        if self._due[: len(data)] != data:
            self._fail_wrong(data)
            return
        del self._due[: len(data)]
        self._position += len(data)
        self._tally.bytes_verified += len(data)
        while self._ends and self._ends[0] <= self._position:
            self._ends.popleft()
            self.verified += 1
            self._tally.lines_verified += 1
        self._tally.told(self)
        self._wake()

    def eof_received(self) -> None:
        if not self._is_leaving or self._due:
            self._fail_dropped("the server ended the connection")

    def connection_lost(self, problem: Exception | None) -> None:
        if problem is not None or not self._is_leaving or self._due:
            self._fail_dropped("the connection broke" if problem is None else f"the connection broke: {problem}")
        self.is_over = True
        self._tally.told(self)
        self._wake()

    def _fail_wrong(self, data: bytes) -> None:
        due = bytes(self._due[: len(data)])
        same = next((at for at, (a, b) in enumerate(zip(due, data, strict=False)) if a != b), len(due))
        came, expected = data[same : same + _SHOWN_BYTES], bytes(self._due[same : same + _SHOWN_BYTES])
        what = f"{expected!r} should have come" if expected else "nothing more should have come"
        position = self._position + same
        self._tally.say_wrong(f"{self.name}, byte {position} (reply {self.verified + 1}): {came!r} came; {what}")
        self._fail()

    def _fail_dropped(self, how: str) -> None:
        if not self._is_failed:
            self._tally.drop(f"{self.name}: {how} at byte {self._position}, with {len(self._due)} bytes still to come")
            self._fail()

    def _fail(self) -> None:
        self._is_failed = True
        self.is_over = True
        self.abort()
        self._tally.told(self)
        self._wake()

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    # ---- what is said

    async def connect(self) -> None:
        """Connect, under the deadline."""
        loop, address = asyncio.get_running_loop(), self._plan.address
        try:
            async with asyncio.timeout(self._plan.deadline_s):
                if isinstance(address, str):
                    await loop.create_unix_connection(lambda: self, address)
                else:
                    await loop.create_connection(lambda: self, *address)
        except (OSError, TimeoutError) as problem:
            self._fail_dropped(f"it could not connect ({type(problem).__name__}: {problem})")
            raise _ClientError from problem
        self._waiting_since_s = time.monotonic()

    async def talk(self, bursts: int) -> None:
        """Send lines, some together and some in pieces, and wait for most of their replies."""
        for _ in range(bursts):
            await self._send([self._line() for _ in range(self._random.randint(1, self._plan.burst))])
            most = self._random.randrange(self._plan.burst)
            await self._wait_until(lambda most=most: len(self._ends) <= most, "its replies")  # type: ignore[misc]
            await self._think()

    async def finish(self) -> None:
        """Wait for all that is due, then end the connection and see that nothing more comes."""
        await self._wait_until(lambda: not self._due, "its last replies")
        self._is_leaving = True
        if self._plan.half_close and self._transport is not None:
            self._transport.write_eof()
            await self._wait_until(lambda: self.is_over, "the server's end of the connection")
        elif self._transport is not None:
            self._transport.close()

    async def leave(self) -> None:
        """Wait for all that is due, then close both directions at once."""
        await self._wait_until(lambda: not self._due, "its last replies")
        self._is_leaving = True
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Break it off, in the middle of whatever there is; what is due no longer counts as sent."""
        if not self._is_failed:
            self._tally.lines_sent -= len(self._ends)
            self._is_failed = True
        if self._transport is not None:
            self._transport.abort()

    def _line(self) -> bytes:
        self.sent += 1
        longest = self._plan.longest_bytes if self._random.random() < 0.1 else min(80, self._plan.longest_bytes)
        start = self._random.randrange(self._plan.longest_bytes)
        padding = self._text[start : start + self._random.randrange(longest)]
        return b"%d %s %s" % (self.sent, self.name.encode(), padding)

    async def _send(self, lines: list[bytes]) -> None:
        stream = b"".join(line + b"\n" for line in lines)
        ahead = collections.deque(lines)
        sent = complete = 0
        pieces = self._random.choice((1, 1, 2, 5))
        while sent < len(stream):
            until = len(stream) if pieces == 1 else min(sent + self._random.randint(1, len(stream)), len(stream))
            while ahead and complete + len(ahead[0]) < until:  # its newline is in this piece: its reply may come
                complete += len(ahead[0]) + 1
                self._expect(self._reply(ahead.popleft()))
            if self._is_failed or self._transport is None:
                raise _ClientError
            self._transport.write(stream[sent:until])
            sent, pieces = until, max(pieces - 1, 1)
            if sent < len(stream):
                await self._think()

    def _expect(self, reply: bytes) -> None:
        if not self._due:
            self._waiting_since_s = time.monotonic()
        self._due += reply
        self._last_end += len(reply)
        self._ends.append(self._last_end)
        self._tally.lines_sent += 1

    async def _think(self) -> None:
        """Let the loop turn, or pause a little."""
        await asyncio.sleep(self._random.choice((0.0, self._plan.pause_s * self._random.random())))

    async def _wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(self._plan.deadline_s):
                while not is_so():
                    if self.is_over:
                        raise _ClientError
                    self._news = asyncio.get_running_loop().create_future()
                    await self._news
        except TimeoutError as late:
            missing = f"{len(self._due)} bytes missing at byte {self._position} (reply {self.verified + 1})"
            self._tally.say_wrong(f"{self.name} waited {self._plan.deadline_s:g} s for {what}: {missing}")
            self._fail()
            raise _ClientError from late


class Pack:
    """All clients of one event loop."""

    def __init__(self, plan: Plan, reply: Callable[[bytes], bytes]) -> None:
        self._plan = plan
        self._reply = reply
        self._tally = _Tally()
        self._is_stopped = False
        self._clients = [self._client(f"client {number}", number) for number in range(plan.clients)]
        self._tasks: list[asyncio.Task[None]] = []

    def _client(self, name: str, *seed: int) -> _Client:
        return _Client(name, self._plan, self._reply, self._tally, f"{self._plan.seed} {seed}")

    async def start(self) -> None:
        """Connect all, and wait until each that stays has its first reply."""
        staying = [asyncio.ensure_future(self._stay(client)) for client in self._clients]
        coming = [asyncio.ensure_future(self._come_and_go(number)) for number in range(self._plan.churn)]
        self._tasks = [*staying, *coming]
        await self._tally.wait_reached(dict.fromkeys(self._clients, 1), 2 * self._plan.deadline_s)

    async def round(self) -> None:
        """Wait until each client that stays has said something after this call and got its reply."""
        targets = {client: client.sent + 1 for client in self._clients}
        await self._tally.wait_reached(targets, 2 * self._plan.deadline_s)

    async def stop(self) -> SwarmReport:
        """Let all finish, and tell what they saw."""
        self._is_stopped = True
        if self._tasks:
            for ended in asyncio.as_completed(self._tasks, timeout=4 * self._plan.deadline_s):
                await ended
        tally = self._tally
        return SwarmReport(
            clients=len(self._clients),
            visits=tally.visits,
            lines_sent=tally.lines_sent,
            lines_verified=tally.lines_verified,
            bytes_verified=tally.bytes_verified,
            dropped=tally.dropped,
            drops=tally.drops,
            wrong=tally.wrong,
            longest_gap_ms=round(tally.longest_gap_s * 1000, 3),
        )

    async def _stay(self, client: _Client) -> None:
        try:
            await client.connect()
            while not self._is_stopped:
                await client.talk(1)
            await client.finish()
        except _ClientError:
            return
        finally:
            client.is_over = True  # whatever a user's reply() raised: nobody waits for it
            self._tally.told(client)

    async def _come_and_go(self, number: int) -> None:
        chance = random.Random(f"{self._plan.seed} churn {number}")  # noqa: S311  # repeatable
        visit = 0
        while not self._is_stopped:
            visit += 1
            client = self._client(f"visitor {number}.{visit}", number, visit)
            try:
                await client.connect()
                self._tally.visits += 1
                await client.talk(chance.randrange(4))
                way = chance.choice((client.finish, client.leave, client.abort))
                left = way()
                if left is not None:
                    await left
            except _ClientError:
                return
