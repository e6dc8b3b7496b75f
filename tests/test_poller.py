"""How the sockets of connections are watched: in asyncio's own epoll, and on loops that have none of ours."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import TYPE_CHECKING

import attrs
import pytest
import uvloop

from copyover.worker.poller import EVENTS_A_TURN, IN, OUT, Loop, watcher_of
from copyover.worker.transport import Transport
from inside import turns, until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

Socket = socket.socket
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "ours": Loop,
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}
SOON_S = 30.0


@attrs.define(eq=False)
class Ear:
    """One end of a pair, and what it was told."""

    socket: Socket
    peer: Socket
    wants: int = IN
    heard: list[str] = attrs.field(factory=list)
    on_readable: Callable[[], None] = lambda: None

    def ready(self, events: int) -> None:
        if events & ~OUT and self.wants & IN:
            self.readable()
        if events & ~IN and self.wants & OUT:
            self.writable()

    def readable(self) -> None:
        try:
            data = self.socket.recv(100)
        except BlockingIOError:
            self.heard.append("nothing")
        else:
            self.heard.append(data.decode() or "end")
        self.on_readable()

    def writable(self) -> None:
        self.heard.append("room")

    def close(self) -> None:
        self.socket.close()
        self.peer.close()


def new_ear() -> Ear:
    near, far = socket.socketpair()
    near.setblocking(False)
    return Ear(near, far)


@pytest.fixture
def ear() -> Iterator[Ear]:
    made = new_ear()
    yield made
    made.close()


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[None, None, None]], None]:
    def on_loop(coroutine: Coroutine[None, None, None]) -> None:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(asyncio.wait_for(coroutine, SOON_S))

    return on_loop


def test_input_room_and_the_end_are_told(run: Callable[[Coroutine[None, None, None]], None], ear: Ear) -> None:
    """Who waits for input, room or both hears of it, as long as he waits and no longer."""

    async def scene() -> None:
        watcher = watcher_of(asyncio.get_running_loop())
        watcher.watch(ear, 0, IN)
        ear.peer.send(b"one")
        await until(lambda: ear.heard == ["one"])
        ear.wants = IN | OUT
        watcher.watch(ear, IN, ear.wants)
        await until(lambda: "room" in ear.heard)
        ear.wants = IN
        watcher.watch(ear, IN | OUT, IN)
        ear.heard.clear()
        ear.peer.close()
        await until(lambda: "end" in ear.heard)
        assert "room" not in ear.heard
        watcher.watch(ear, IN, 0)
        ear.heard.clear()
        await turns()
        assert ear.heard == []

    run(scene())


def test_a_reset_behind_input_is_told(run: Callable[[Coroutine[None, None, None]], None]) -> None:
    """First what came before it, then the reset itself: who waits for more would wait for ever."""

    async def scene() -> None:
        ends: list[OSError | None] = []
        transport = Transport(asyncio.get_running_loop(), near)
        transport.on_change = lambda: ends.append(transport.error)
        transport.start()
        far.send(b"input")
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far.close()
        await until(lambda: transport.error, "the reset was not seen")
        assert (bytes(transport.input), ends[0]) == (b"input", None)
        transport.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.create_connection(server.getsockname())
        near, _ = server.accept()
    near.setblocking(False)
    run(scene())


def test_who_waits_for_room_hears_of_a_broken_connection(
    run: Callable[[Coroutine[None, None, None]], None], ear: Ear
) -> None:
    """A hangup comes to him too, or he would wait for ever."""

    async def scene() -> None:
        ear.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        while True:
            try:
                ear.socket.send(bytes(4096))
            except BlockingIOError:
                break
        ear.wants = OUT
        watcher_of(asyncio.get_running_loop()).watch(ear, 0, OUT)
        ear.peer.close()
        await until(lambda: ear.heard)
        watcher_of(asyncio.get_running_loop()).watch(ear, OUT, 0)

    run(scene())


def test_more_than_one_turn_holds_are_all_told() -> None:
    """None is left out when more sockets are ready than one look returns, and the loop's own are among them."""

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        watcher = watcher_of(loop)
        read, write = os.pipe()
        signalled = asyncio.Event()
        loop.add_reader(read, signalled.set)
        for ear in ears:
            ear.peer.send(b"x")
            watcher.watch(ear, 0, IN)
        os.write(write, b"x")
        await until(lambda: all(ear.heard == ["x"] for ear in ears))
        await signalled.wait()
        loop.remove_reader(read)
        os.close(read)
        os.close(write)
        for ear in ears:
            watcher.watch(ear, IN, 0)

    ears = [new_ear() for _ in range(2 * EVENTS_A_TURN + 1)]
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(asyncio.wait_for(scene(), SOON_S))
    for ear in ears:
        ear.close()


def test_a_fault_in_one_ends_no_others_turn(ear: Ear) -> None:
    """It is told to the loop's exception handler, as one of a callback of its own is."""

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        said: list[BaseException] = []
        loop.set_exception_handler(lambda _, told: said.append(told["exception"]))
        other.peer.send(b"x")
        ear.peer.send(b"x")
        ear.on_readable = broken
        for one in (ear, other):
            watcher_of(loop).watch(one, 0, IN)
        await until(lambda: other.heard == ["x"] and said)
        assert [str(problem) for problem in said] == ["of one"]
        for one in (ear, other):
            watcher_of(loop).watch(one, IN, 0)

    def broken() -> None:
        raise RuntimeError("of one")

    other = new_ear()
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(asyncio.wait_for(scene(), SOON_S))
    other.close()


def test_who_is_let_go_within_a_turn_hears_nothing_of_it() -> None:
    """Two are ready at once; whichever comes first lets the other go, and that one is not told."""

    async def scene() -> None:
        watcher = watcher_of(asyncio.get_running_loop())

        def let_go(one: Ear) -> Callable[[], None]:
            return lambda: watcher.watch(one, IN, 0)

        for one, other in (ears, ears[::-1]):
            one.peer.send(b"x")
            one.on_readable = let_go(other)
        for one in ears:
            watcher.watch(one, 0, IN)
        await until(lambda: any(one.heard for one in ears))
        assert sorted(one.heard for one in ears) == [[], ["x"]]
        watcher.watch(next(one for one in ears if one.heard), IN, 0)

    ears = [new_ear(), new_ear()]
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(asyncio.wait_for(scene(), SOON_S))
    for one in ears:
        one.close()


def test_timers_are_on_time() -> None:
    """The loop sleeps until its next timer, neither longer nor busily."""

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        looks: list[float] = []
        tell = loop.watcher.tell

        def look(wait_s: float = 0) -> list[tuple[int, int]]:
            looks.append(wait_s)
            return tell(wait_s)

        loop.watcher.tell = look  # type: ignore[method-assign]  # to count them
        before_s = loop.time()
        await asyncio.sleep(0.0503)
        assert loop.time() - before_s >= 0.05
        assert len(looks) < 10

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(asyncio.wait_for(scene(), SOON_S))
