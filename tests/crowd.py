"""
Clients of apps/faults.py that verify every byte and go on after a reset, which they count by what they were doing.

They decide what is wrong; whether a reset was allowed is for whoever made the server fail to say.
"""

from __future__ import annotations

import asyncio
import collections
import random
import threading
import time
from typing import TYPE_CHECKING, Self

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping

DEADLINE_S = 15.0
THINK_S = 0.02
KINDS = {
    "idle": "says nothing between checks",
    "half": "has sent half a line, and says nothing more between checks",
    "busy": "sends lines all the time",
    "parts": "sends messages of two parts all the time, a pause between them",
    "visitor": "comes, says some lines, and leaves",
}


class Gone(Exception):
    """The server ended the connection."""


class Wrong(Exception):
    """Other bytes came than must come, or none in time."""


@attrs.define
class Tally:
    """What all have seen so far."""

    resets: collections.Counter[str] = attrs.field(factory=collections.Counter)  # by kind
    wrong: list[str] = attrs.field(factory=list)
    lines: int = 0
    bytes: int = 0
    visits: int = 0


class Session:
    """One connection, and the number of its next line."""

    def __init__(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tally: Tally) -> None:
        self._name, self._reader, self._writer, self._tally = name, reader, writer, tally
        self.n = 0

    def next_line(self, text: bytes) -> bytes:
        self.n += 1
        return b"%d %s %s" % (self.n, self._name.encode(), text)

    async def send(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except ConnectionError as problem:
            raise Gone(problem) from problem

    async def expect(self, due: bytes) -> None:
        try:
            async with asyncio.timeout(DEADLINE_S):
                came = await self._reader.readexactly(len(due))
        except asyncio.IncompleteReadError as problem:
            if problem.partial != due[: len(problem.partial)]:
                raise Wrong(f"{self._name}: {problem.partial!r} came; {due!r} should have come") from problem
            raise Gone(problem) from problem
        except ConnectionError as problem:
            raise Gone(problem) from problem
        except TimeoutError as problem:
            raise Wrong(f"{self._name}: waited {DEADLINE_S:g} s for {due!r}") from problem
        if came != due:
            raise Wrong(f"{self._name}: {came!r} came; {due!r} should have come")
        self._tally.lines += due.count(b"\n")
        self._tally.bytes += len(due)

    async def ask(self, text: bytes) -> None:
        line = self.next_line(text) + b"\n"
        await self.send(line)
        await self.expect(line)

    async def wait_silent(self, until: asyncio.Event) -> None:
        """Nothing may come, not even an end, until *until* is set."""
        told = asyncio.ensure_future(until.wait())
        heard = asyncio.ensure_future(self._reader.read(1))
        try:
            await asyncio.wait({told, heard}, return_when=asyncio.FIRST_COMPLETED)
            if not heard.done():
                return
            try:
                came = heard.result()
            except ConnectionError as problem:
                raise Gone(problem) from problem
            if not came:
                raise Gone
            raise Wrong(f"{self._name}: {came!r} came; nothing should have come")
        finally:
            for task in (told, heard):
                task.cancel()
            await asyncio.gather(told, heard, return_exceptions=True)

    def close(self) -> None:
        self._writer.close()


class Crowd:
    """So many clients of each kind, in a thread of their own; a context manager."""

    def __init__(self, address: tuple[str, int] | str, clients: Mapping[str, int], *, seed: int = 0) -> None:
        self.tally = Tally()
        self._address = address
        self._seed = seed
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="crowd", daemon=True)
        self._thread.start()
        self._names = [(kind, number) for kind, count in clients.items() for number in range(count)]
        self._rounds: dict[str, int] = {}
        self._round = 0
        self._news = asyncio.Event()  # a new round, or the end
        self._reached = asyncio.Condition()
        self._is_over = False
        self._tasks = [asyncio.run_coroutine_threadsafe(self._live(*name), self._loop) for name in self._names]
        self.wait_round()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def wait_round(self, timeout_s: float = 2 * DEADLINE_S) -> None:
        """
        Wait until each client has verified something that it sent after this call.

        Raises:
            AssertionError: wrong bytes came, now or before.

        """
        told = asyncio.run_coroutine_threadsafe(self._wait_round(), self._loop)
        try:
            told.result(timeout_s)
        except TimeoutError:
            behind = sorted(name for name, reached in self._rounds.items() if reached < self._round)
            self.tally.wrong.append(f"{', '.join(behind)} did not get on within {timeout_s:g} s")
        if self.tally.wrong:
            raise AssertionError("\n".join(self.tally.wrong))

    def end(self) -> None:
        """Leave."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._leave(), self._loop).result(DEADLINE_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(DEADLINE_S)
            self._loop.close()

    async def _leave(self) -> None:
        self._is_over = True
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # what was closed leaves the loop

    async def _wait_round(self) -> None:
        self._round += 1
        wanted = self._round
        self._news.set()
        self._news = asyncio.Event()
        async with self._reached:
            await self._reached.wait_for(
                lambda: self.tally.wrong or all(self._rounds.get(f"{k}{n}", 0) >= wanted for k, n in self._names)
            )

    async def _live(self, kind: str, number: int) -> None:
        """Be one client: connect anew after a reset."""
        name, chance = f"{kind}{number}", random.Random(f"{self._seed} {kind} {number}")
        live = getattr(self, f"_{kind}")
        for session_number in range(1, 1 << 30):
            try:
                session = await self._connect(f"{name}.{session_number}")
                try:
                    await live(name, session, chance)
                    self.tally.visits += 1
                finally:
                    session.close()
            except Gone:
                self.tally.resets[kind] += 1
            except Wrong as problem:
                async with self._reached:
                    self.tally.wrong.append(str(problem))
                    self._reached.notify_all()
                return

    async def _connect(self, name: str) -> Session:
        deadline_s = time.monotonic() + DEADLINE_S
        while True:
            try:
                if isinstance(self._address, str):
                    reader, writer = await asyncio.open_unix_connection(self._address)
                else:
                    reader, writer = await asyncio.open_connection(*self._address)
            except OSError as problem:
                if time.monotonic() > deadline_s:
                    raise Wrong(f"{name}: could not connect: {problem}") from problem
                await asyncio.sleep(THINK_S)
                continue
            return Session(name, reader, writer, self.tally)

    async def _tell(self, name: str, current: int) -> None:
        async with self._reached:
            self._rounds[name] = max(current, self._rounds.get(name, 0))
            self._reached.notify_all()

    # ---- the kinds

    async def _idle(self, name: str, session: Session, _: random.Random) -> None:
        while True:
            current = self._round
            await session.ask(b"idle")
            await self._tell(name, current)
            if self._round == current:
                await session.wait_silent(self._news)

    async def _half(self, name: str, session: Session, chance: random.Random) -> None:
        while True:
            line = session.next_line(b"half") + b"\n"
            cut = chance.randrange(1, len(line) - 1)
            await session.send(line[:cut])
            if self._rounds.get(name) == self._round:
                await session.wait_silent(self._news)
            current = self._round
            await session.send(line[cut:])
            await session.expect(line)
            await self._tell(name, current)

    async def _busy(self, name: str, session: Session, chance: random.Random) -> None:
        while True:
            current = self._round
            lines = [session.next_line(b"x" * chance.choice((3, 30, 3000))) for _ in range(chance.randint(1, 4))]
            data = b"".join(line + b"\n" for line in lines)
            cut = chance.randrange(len(data))
            await session.send(data[:cut])
            await asyncio.sleep(chance.choice((0.0, THINK_S)) * chance.random())
            await session.send(data[cut:])
            await session.expect(data)
            await self._tell(name, current)
            await asyncio.sleep(chance.random() * THINK_S)

    async def _parts(self, name: str, session: Session, chance: random.Random) -> None:
        while True:
            current = self._round
            line = session.next_line(b"parts ")
            await session.send(line + b"\n")
            await session.expect(b"go on\n")
            await asyncio.sleep(chance.random() * THINK_S)
            await session.send(b"rest\n")
            await session.expect(line + b"|rest\n")
            await self._tell(name, current)
            await asyncio.sleep(chance.random() * THINK_S)

    async def _visitor(self, name: str, session: Session, chance: random.Random) -> None:
        current = self._round
        for _ in range(chance.randint(1, 5)):
            await session.ask(b"visit")
            await asyncio.sleep(chance.random() * THINK_S)
        await self._tell(name, current)
