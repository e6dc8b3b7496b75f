"""A connection that a protocol object serves: what it is fed and when, where it halts, what it is told."""

from __future__ import annotations

import asyncio
import functools
import gc
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from copyover.messages import Act, Kind, Record, RecordFlag
from copyover.worker.adapter import Adapter, Staying
from copyover.worker.hosted import HIGH_WATER_BYTES, Hosted
from copyover.worker.served import CannotFreeze, Course
from copyover.worker.transport import Phase, Transport
from inside import Line, Plain, listen, turns, until

if TYPE_CHECKING:
    from copyover.worker.face import Face

DESCRIPTORS = Path("/proc/self/fd")
MUCH = bytes(4 << 20)  # more than a socket takes


class Lines(Adapter, asyncio.Protocol):
    """A small protocol: it takes a line at a time, and the next once it has answered."""

    kind = Kind.HTTP

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.events: list[str] = []
        self.is_waiting = False  # whether a line is to be answered
        self.answers_at_once = False
        self.thawed: bytes | None = None
        self.face: Any = None
        self.problem: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.events.append("made")
        self.face = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.events.append("lost")
        self.problem = exc

    def pause_writing(self) -> None:
        self.events.append("pause")

    def resume_writing(self) -> None:
        self.events.append("resume")

    def feed(self, buffer: bytearray) -> bool:
        end = buffer.find(b"\n") + 1
        if self.is_waiting or not end:
            return False
        line = bytes(buffer[:end])
        del buffer[:end]
        if line == b"raise\n":
            raise ValueError("what a protocol may raise")
        self.lines.append(line)
        self.is_waiting = not self.answers_at_once
        return True

    def answer(self, data: bytes = b"") -> None:
        if data:
            self.face.write(data)
        self.is_waiting = False
        self.face.hosted.settle_soon()

    def can_freeze(self) -> str | None:
        return "a line is being answered" if self.is_waiting else None

    @property
    def is_busy(self) -> bool:
        return self.is_waiting

    def freeze(self) -> bytes:
        return b"%d" % len(self.lines)

    def snapshot(self) -> bytes:
        return b"saved"

    def thaw(self, state: bytes) -> None:
        self.thawed = state

    def halted(self) -> None:
        self.events.append("halted")

    def going_on(self) -> None:
        self.events.append("going on")

    def asked(self) -> None:
        self.events.append("asked")

    def shutdown(self) -> None:
        self.events.append("shutdown")


Scene = Callable[[Line, Lines], Coroutine[Any, Any, None]]


def play(scene: Scene) -> None:
    """Play one scene, on a connection that has just been entered."""

    async def whole() -> None:
        line, lines = Line(listen(Plain())), Lines()
        line.transport.start()
        line.served.begin(lines)
        try:
            await scene(line, lines)
        finally:
            line.close()

    asyncio.run(whole())


# ---- feeding


def test_it_is_fed_one_piece_after_the_other() -> None:
    """The next when the last is answered; what has no end yet waits for it."""

    async def scene(line: Line, lines: Lines) -> None:
        line.send(b"one\ntwo\nthr")
        await until(lambda: lines.lines)
        await turns()
        assert lines.lines == [b"one\n"]
        assert line.transport.input == b"two\nthr"
        lines.answer()
        await until(lambda: len(lines.lines) == 2)
        lines.answer()
        await turns()
        assert line.transport.input == b"thr"
        line.send(b"ee\n")
        await until(lambda: lines.lines == [b"one\n", b"two\n", b"three\n"])

    play(scene)


def test_what_it_takes_at_once_it_gets_at_once() -> None:
    """All that is there, in the callback that read it."""

    async def scene(line: Line, lines: Lines) -> None:
        lines.answers_at_once = True
        line.send(b"one\ntwo\nthree\n")
        await until(lambda: line.transport.received)
        assert lines.lines == [b"one\n", b"two\n", b"three\n"]

    play(scene)


def test_one_that_wants_no_input_gets_none() -> None:
    """Until it does; and nobody reads without end meanwhile."""

    async def scene(line: Line, lines: Lines) -> None:
        lines.answers_at_once = True
        lines.face.pause_reading()
        line.send(b"one\n")
        await until(lambda: line.transport.input)
        await turns()
        assert lines.lines == []
        lines.face.resume_reading()
        assert lines.lines == []  # never out of its own call
        await until(lambda: lines.lines == [b"one\n"])

    play(scene)


def test_input_is_read_again_once_it_is_taken() -> None:
    """A buffer that is full stops the reading; what is then taken off it starts it again, whatever the socket does."""

    async def scene(line: Line, lines: Lines) -> None:
        lines.face.pause_reading()
        lines.answers_at_once = True
        whole = b"x" * 99 + b"\n"
        line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        line.send(whole * 1500)
        await until(lambda: len(line.transport.input) >= 64 << 10)
        await turns()
        assert line.transport.received < 150_000
        lines.face.resume_reading()
        await until(lambda: len(lines.lines) == 1500)

    play(scene)


def test_a_protocol_that_raises_ends_its_connection() -> None:
    """It alone, at once, and it hears of it."""

    async def scene(line: Line, lines: Lines) -> None:
        line.send(b"raise\nmore\n")
        await until(lambda: line.closed)
        await turns()
        assert lines.events == ["made", "lost"]
        assert lines.lines == []

    play(scene)


# ---- halting


def test_it_halts_at_a_boundary_at_once() -> None:
    """And stands still: what comes is neither read nor lost."""

    async def scene(line: Line, lines: Lines) -> None:
        await turns()
        assert line.halt()
        assert line.served.course is Course.HALTED
        line.send(b"one\n")
        await turns()
        assert (lines.lines, line.transport.received) == ([], 0)
        line.served.go_on()
        await until(lambda: lines.lines == [b"one\n"])
        assert lines.events == ["made", "halted", "going on"]

    play(scene)


def test_it_halts_at_its_next_boundary() -> None:
    """Exactly there: the next line waits in the buffer, whoever will serve it."""

    async def scene(line: Line, lines: Lines) -> None:
        halted: list[bytes] = []
        line.send(b"one\ntwo\n")
        await until(lambda: lines.lines)
        assert not line.served.ask_to_halt(lambda: halted.append(bytes(line.transport.input)))
        assert lines.events == ["made", "asked"]
        assert line.served.course is Course.ASKED
        await turns()
        assert not halted
        lines.answer(b"answer\n")
        await until(lambda: halted)
        assert halted == [b"two\n"]
        assert lines.lines == [b"one\n"]
        assert lines.events == ["made", "asked", "halted"]
        assert await line.receive(b"\n") == b"answer\n"

    play(scene)


def test_asked_to_halt_it_takes_no_more_than_one_piece() -> None:
    """A client that never stops sending does not keep it from its boundary."""

    async def scene(line: Line, lines: Lines) -> None:
        halted: list[bytes] = []
        line.send(b"one\n")
        await until(lambda: lines.lines)
        line.served.ask_to_halt(lambda: halted.append(bytes(line.transport.input)))
        lines.answers_at_once = True
        line.send(b"two\nthree\n")
        await until(lambda: line.transport.input)
        lines.answer()
        await until(lambda: halted)
        assert halted[0].endswith(b"three\n")

    play(scene)


def test_a_roll_back_goes_on_where_it_was() -> None:
    """What is in the buffer then is fed, though no event of the socket says so."""

    async def scene(line: Line, lines: Lines) -> None:
        line.send(b"one\ntwo\n")
        await until(lambda: lines.lines)
        line.halt()
        lines.answer()
        await until(lambda: line.served.course is Course.HALTED)
        assert line.transport.input == b"two\n"
        line.served.export(schema=1, state=line.served.encode())
        line.served.go_on()
        await until(lambda: lines.lines == [b"one\n", b"two\n"])

    play(scene)


def test_a_halt_that_is_called_off() -> None:
    """It had not halted yet: nothing was, and nothing goes on."""

    async def scene(line: Line, lines: Lines) -> None:
        line.send(b"one\n")
        await until(lambda: lines.lines)
        assert not line.served.ask_to_halt(lambda: pytest.fail("it was called off"))
        line.served.go_on()
        lines.answer()
        await turns()
        assert lines.events == ["made", "asked"]
        assert line.served.course is Course.RUNNING

    play(scene)


def test_it_moves_with_what_is_unread_and_unsent() -> None:
    """Every byte, both ways, and its protocol's state."""

    async def scene(line: Line, lines: Lines) -> None:
        lines.answers_at_once = True
        line.send(b"one\ntw")
        await until(lambda: lines.lines)
        line.halt()
        lines.face.write(b"late")  # as a push does
        await line.move()
        assert lines.events == ["made", "halted"]  # nobody said goodbye
        successor = Lines()
        successor.answers_at_once = True
        line.served.begin(successor)
        assert successor.thawed == b"1"
        line.transport.start()
        line.send(b"o\n")
        await until(lambda: successor.lines == [b"two\n"])
        assert await line.receive(b"late") == b"late"
        await turns()
        assert lines.lines == [b"one\n"]

    play(scene)


def test_halted_it_is_told_exactly_else_as_it_was() -> None:
    """A slot holds what ``snapshot`` says, a record what ``freeze`` does; before its entry, what it brought."""

    async def scene(line: Line, lines: Lines) -> None:
        assert line.served.encode() == b"saved"
        line.halt()
        assert line.served.encode() == b"0"
        await line.move()
        assert line.served.encode() == b"0"
        assert line.served.reason == "it was not entered yet"
        assert not line.served.is_at_boundary
        line.served.begin(lines)

    play(scene)


def test_it_is_ceded_at_each_boundary() -> None:
    """The runtime hears of it, not of places that are none."""

    async def scene(line: Line, lines: Lines) -> None:
        await turns()
        said = line.host.__dict__["said"]
        said.clear()
        line.send(b"one\n")
        await until(lambda: lines.lines)
        await turns()
        assert said == []
        lines.answer()
        await until(lambda: said)
        assert said == [("cede", line.served)]

    play(scene)


def test_first_boundary_is_told_once() -> None:
    """What waits for an entry is released by it."""

    async def scene(line: Line, lines: Lines) -> None:
        arrived: list[str] = []
        line.send(b"one\n")
        await until(lambda: lines.lines)
        line.served.on_boundary = lambda _: arrived.append("once")
        await turns()
        assert arrived == []
        lines.answer()
        await until(lambda: arrived)
        line.send(b"two\n")
        await until(lambda: len(lines.lines) == 2)
        lines.answer()
        await turns()
        assert arrived == ["once"]

    play(scene)


# ---- flow control


def test_much_that_the_kernel_takes_at_once_holds_up_nobody() -> None:
    """Asked to write no more, a protocol is asked to go on as well, though nothing was left to wait for."""

    async def scene(line: Line, lines: Lines) -> None:
        lines.face.write(bytes(HIGH_WATER_BYTES + 1))
        assert lines.events == ["made", "pause"]
        await until(lambda: not line.transport.output)
        await until(lambda: lines.events == ["made", "pause", "resume"])
        assert not line.served.is_full

    play(scene)


def test_a_slow_client_pauses_its_protocol() -> None:
    """Once over the high water, and once more below the low one; every byte arrives."""

    async def scene(line: Line, lines: Lines) -> None:
        lines.face.write(MUCH)
        lines.face.write(b"!")
        await turns()
        assert lines.events == ["made", "pause"]
        assert lines.face.get_write_buffer_size() == len(line.transport.output) > HIGH_WATER_BYTES
        got = await line.receive(b"!")
        assert len(got) == len(MUCH) + 1
        await until(lambda: lines.events == ["made", "pause", "resume"])

    play(scene)


def test_two_writes_in_one_turn_leave_in_one_piece() -> None:
    """A head and its body cost one system call, and nothing goes out before the turn ends."""

    async def scene(line: Line, lines: Lines) -> None:
        lines.face.write(b"head ")
        lines.face.write(b"body")
        assert line.received() == b""
        assert await line.receive(b"body") == b"head body"

    play(scene)


def test_what_a_turn_has_written_leaves_in_the_next() -> None:
    """Of all connections, each in one system call; one that cannot settle keeps no other from it."""

    async def whole() -> None:
        host = Plain()
        listen(host)
        host.cede = lambda served: 1 // (served.cookie - 2)  # type: ignore[assignment]  # it is what the second cannot
        used: list[int] = []
        lines = [Line(host, cookie=cookie) for cookie in (1, 2, 3)]
        for line in lines:
            line.transport.mark = functools.partial(used.append, line.served.cookie)
            line.served.begin(Lines())
        await turns()
        for line in lines:
            line.transport.start()
            line.served.face.write(b"head ")
            line.served.face.write(b"body")
        assert used == []
        await asyncio.sleep(0)
        assert used == [1, 2, 3]
        assert [line.received() for line in lines] == [b"head body"] * 3
        for line in lines:
            line.close()

    asyncio.run(whole())


def test_what_the_client_has_is_not_written_again() -> None:
    """Muted, it discards; not a byte later."""

    async def scene(line: Line, lines: Lines) -> None:
        line.served.mute(is_muted=True)
        lines.face.write(b"again")
        line.served.mute(is_muted=False)
        lines.face.write(b"new")
        assert await line.receive(b"new") == b"new"

    play(scene)


# ---- the end


def test_a_client_that_has_gone() -> None:
    """Its protocol hears of it once, and the socket is closed."""

    async def scene(line: Line, lines: Lines) -> None:
        line.socket.close()
        await until(lambda: line.closed)
        await turns()
        assert lines.events == ["made", "lost"]
        assert lines.problem is None
        assert line.closed == 1

    play(scene)


def test_what_came_whole_before_the_end_is_served() -> None:
    """Line after line, though each is answered after the client's FIN; half a line is of no use."""

    async def scene(line: Line, lines: Lines) -> None:
        line.send(b"one\ntwo\nthree\nfo")
        line.finish()
        await until(lambda: line.transport.is_eof)
        for count in (1, 2, 3):
            await until(lambda count=count: len(lines.lines) == count)  # type: ignore[misc]  # bound early
            assert "lost" not in lines.events
            lines.answer(b"answer %d\n" % count)
            line.served.settle()  # as a protocol may say out of its own call
        await until(lambda: "lost" in lines.events)
        assert lines.lines == [b"one\n", b"two\n", b"three\n"]
        assert line.received() == b"answer 1\nanswer 2\nanswer 3\n"

    play(scene)


def test_who_has_gone_is_served_to_its_end_though_a_reload_asks() -> None:
    """It will not move: nobody waits for a boundary of it, and what came whole is not forgotten."""

    async def scene(line: Line, lines: Lines) -> None:
        line.send(b"one\n")
        await until(lambda: lines.lines)
        line.send(b"two\nthree\n")
        line.finish()
        await until(lambda: line.transport.is_eof)
        assert not line.served.ask_to_halt(lambda: None)
        lines.answers_at_once = True
        lines.answer()
        await until(lambda: "lost" in lines.events)
        assert lines.lines == [b"one\n", b"two\n", b"three\n"]

    play(scene)


def test_an_end_waits_for_one_that_wants_no_input() -> None:
    """It has not had what came before."""

    async def scene(line: Line, lines: Lines) -> None:
        lines.answers_at_once = True
        lines.face.pause_reading()
        line.send(b"one\n")
        line.finish()
        await until(lambda: line.transport.is_eof)
        await turns()
        assert lines.events == ["made"]
        lines.face.resume_reading()
        line.served.settle()  # before it was fed
        await until(lambda: "lost" in lines.events)
        assert lines.lines == [b"one\n"]

    play(scene)


def test_close_sends_what_is_unsent() -> None:
    """Then FIN; its protocol hears of it once, however often anybody closes."""

    async def scene(line: Line, lines: Lines) -> None:
        lines.face.write(MUCH)
        lines.face.close()
        assert lines.face.is_closing()
        assert lines.events == ["made", "pause"]  # never out of its own call
        lines.face.close()
        lines.face.write(b"too late")
        got = 0
        while got < len(MUCH):
            await turns(1)
            got += len(line.received())
        line.finish()
        await until(lambda: line.closed)
        lines.face.close()
        lines.face.abort()
        await turns()
        assert got == len(MUCH)
        assert [event for event in lines.events if event == "lost"] == ["lost"]

    play(scene)


def test_abort_ends_at_once() -> None:
    """What is unsent is gone; its protocol hears of it once."""

    async def scene(line: Line, lines: Lines) -> None:
        lines.face.write(MUCH)
        lines.face.abort()
        assert line.transport.phase is Phase.CLOSED
        lines.face.abort()
        lines.face.close()
        await turns()
        assert [event for event in lines.events if event == "lost"] == ["lost"]
        assert line.closed == 1

    play(scene)


def test_a_connection_that_broke_before_its_entry_ends_at_it() -> None:
    """Nobody was there to hear of it then; a protocol that never did would hold it for ever."""

    async def scene(line: Line, _: Lines) -> None:
        line.halt()
        line.served.write(b"unsent")
        await line.move()
        line.socket.close()
        line.transport.start()  # it sends, and nobody is there
        assert line.transport.error is not None
        lines = Lines()
        line.served.begin(lines)
        await until(lambda: line.closed)
        assert lines.events == ["made", "lost"]
        assert isinstance(lines.problem, OSError)

    play(scene)


def test_who_has_moved_cannot_be_closed_from_here() -> None:
    """Its protocol may try: somebody else serves it."""

    async def scene(line: Line, lines: Lines) -> None:
        await turns()
        line.halt()
        line.served.export(schema=1, state=b"")
        lines.face.close()
        lines.face.abort()
        await turns()
        assert lines.events == ["made", "halted"]
        assert line.transport.phase is Phase.OPEN
        line.served.go_on()

    play(scene)


def test_closed_while_asked_to_halt() -> None:
    """It halts there: only what is unsent travels."""

    async def scene(line: Line, lines: Lines) -> None:
        halted: list[bool] = []
        line.send(b"one\n")
        await until(lambda: lines.lines)
        line.served.ask_to_halt(lambda: halted.append(True))
        lines.face.write(MUCH)
        lines.face.close()
        assert halted == [True]
        record = line.served.export(schema=1, state=line.served.encode())
        assert record.flags & RecordFlag.FINISHED
        assert record.state == b""
        assert 0 < len(record.unsent) <= len(MUCH)
        await turns()
        assert "lost" in lines.events

    play(scene)


def test_an_interrupted_connection_is_reset() -> None:
    """What its client sent or was sent is lost: it must not go on as if nothing were."""

    async def scene(line: Line, _: Lines) -> None:
        line.halt()
        await line.move()
        line.served.restore(Record(kind=Kind.HTTP, flags=RecordFlag.INTERRUPTED, state=b"0"), b"0")
        lines = Lines()
        line.served.begin(lines)
        await until(lambda: line.closed)
        assert "made" not in lines.events

    play(scene)


def test_what_others_do_to_it() -> None:
    """A server that stops tells the protocol, which knows how its clients are told; one that has left hears nothing."""

    async def scene(line: Line, lines: Lines) -> None:
        line.served.deliver(Act.SEND, b"pushed")
        assert await line.receive(b"pushed") == b"pushed"
        line.served.deliver(Act.CLOSE, b"")
        assert lines.events == ["made", "shutdown"]
        line.served.deliver(Act.ABORT, b"")
        await turns()
        assert lines.events == ["made", "shutdown", "lost"]
        line.served.stop()
        assert lines.events == ["made", "shutdown", "lost"]

    play(scene)


def test_one_that_cannot_begin_is_reset() -> None:
    """A state that its protocol does not read ends it, nobody else."""

    async def scene(line: Line, _: Lines) -> None:
        line.halt()
        await line.move()

        class Choosy(Lines):
            def thaw(self, state: bytes) -> None:
                raise ValueError(state)

        choosy = Choosy()
        line.served.begin(choosy)
        await until(lambda: line.closed)
        await turns()
        assert choosy.events == ["made", "lost"]

    play(scene)


# ---- protocols that cannot move, and what all of them see


class Foreign(asyncio.Protocol):
    """A protocol that knows nothing of us."""

    def __init__(self) -> None:
        self.got = b""
        self.events: list[str] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.events.append(f"lost {exc}")

    def data_received(self, data: bytes) -> None:
        self.got += data

    def pause_writing(self) -> None:
        self.events.append("pause")

    def resume_writing(self) -> None:
        self.events.append("resume")

    def shutdown(self) -> None:
        self.events.append("shutdown")


def test_a_protocol_that_cannot_move_serves_where_it_is() -> None:
    """All that asyncio would tell it, it hears; why it stays, an operator does."""

    async def scene(line: Line, _: Lines) -> None:
        foreign = Foreign()
        line.served.face.set_protocol(foreign)
        staying = line.served.protocol
        assert isinstance(staying, Staying)
        assert line.served.face.get_protocol() is staying
        line.send(b"half a mess")
        await until(lambda: foreign.got == b"half a mess")
        assert not line.halt()
        assert line.served.reason == line.served.obstacle == "a Foreign cannot move"
        for frozen in (staying.freeze, lambda: staying.thaw(b"")):
            with pytest.raises(CannotFreeze, match="a Foreign cannot move"):
                frozen()
        line.served.go_on()
        line.served.stop()
        staying.pause_writing()
        staying.resume_writing()
        line.finish()
        await until(lambda: line.closed)
        await turns()
        assert foreign.events == ["shutdown", "pause", "resume", "lost None"]
        assert line.served.obstacle is None

    play(scene)


def test_a_change_of_protocol_is_told() -> None:
    """The holder shows what a connection is served as."""

    async def scene(line: Line, lines: Lines) -> None:
        said = line.host.__dict__["said"]
        assert said[0] == ("became", line.served)  # from a handler's, as it was built here
        said.clear()

        class Socket(Lines):
            kind = Kind.WEBSOCKET

        other = Socket()
        lines.face.set_protocol(other)
        line.served.became(Kind.WEBSOCKET)
        assert said == [("became", line.served)]
        assert line.served.kind is Kind.WEBSOCKET
        line.send(b"one\n")
        await until(lambda: other.lines == [b"one\n"])
        assert lines.lines == []

    play(scene)


def test_a_protocol_sees_the_clients_address() -> None:
    """And nothing that is not so: no TLS, and after the end the default."""

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
            accepted, address = server.accept()
            served = Plain().build(Transport(loop, accepted), cookie=1, listener="web")
            assert isinstance(served, Hosted)
            face: Face = served.face
            assert face.get_extra_info("peername") == address == client.getsockname()
            assert face.get_extra_info("sockname") == server.getsockname()
            assert face.get_extra_info("socket").fileno() == accepted.fileno()
            assert face.get_extra_info("sslcontext") is None
            assert face.get_extra_info("cipher", "none") == "none"
            assert not face.can_write_eof()
            assert face.is_reading()
            served.transport.close()
            assert face.get_extra_info("peername", "gone") == "gone"
            assert face.is_closing()
            assert not face.is_reading()

    asyncio.run(scene())


def test_no_descriptor_is_left() -> None:
    """Of a connection that ended, nothing is."""
    gc.collect()  # loops of other tests, each with an epoll beside it
    before = len(list(DESCRIPTORS.iterdir()))

    async def scene(line: Line, _: Lines) -> None:
        line.socket.close()
        await until(lambda: line.closed)

    play(scene)
    gc.collect()
    assert len(list(DESCRIPTORS.iterdir())) == before
