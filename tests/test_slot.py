"""How a worker writes down where its connections are: places, memory, states that do not fit, and its price."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from typing import IO, TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copyover import slots
from copyover.errors import WireError
from copyover.messages import Record, RecordFlag
from copyover.worker.application import Application
from copyover.worker.handlers import Handlers
from copyover.worker.poller import Loop
from copyover.worker.served import Course, Limits
from copyover.worker.slot import Slots, reshape
from copyover.worker.transport import Transport
from inside import listen, turns, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from copyover.worker.connection import Connection


async def handler(_: object) -> None:
    """Nothing is served here."""


APPLICATION: Application[Any] = Application(handler=handler)


class File:
    """A real file, as a worker inherits it."""

    def __init__(self, count: int = 3, slot_bytes: int = 256, *, memory: bool = False) -> None:
        if memory:  # as on a tmpfs, where what was allocated counts, and a hole is one
            self.file: IO[bytes] = os.fdopen(os.memfd_create("slots"), "w+b")
        else:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115  # the fixture closes it
        self.header = slots.shape(slot_bytes, count, worker=1, generation=1)
        self.file.truncate(self.header.file_bytes)
        os.pwrite(self.file.fileno(), self.header.pack(), 0)

    def open(self, application: Application[Any] = APPLICATION) -> Slots:
        is_json = application.encode is None
        return Slots(self.file.fileno(), application.encode_state, is_json=is_json, schema=7)

    def read(self) -> dict[int, slots.Content]:
        area = os.pread(self.file.fileno(), self.header.file_bytes, slots.HEADER_BYTES)
        return dict(slots.read_all(area, self.header.slot_bytes))


@pytest.fixture
def file() -> Iterator[File]:
    made = File()
    yield made
    made.file.close()


@pytest.fixture
def transport() -> Iterator[Transport]:
    """One that is never started: its loop is not asked."""
    loop = asyncio.new_event_loop()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Transport(loop, ours)
    loop.close()


def test_a_slot_says_its_record_before_anything_else(file: File) -> None:
    """At its epoch, with the flags that outlive a thaw, and with the schema that the state was written with."""
    record = Record(0, RecordFlag.CUT | RecordFlag.INTERRUPTED, 3, 10, 20, 99, b"read", b"sent", b"state")
    slot = file.open().take(5, 4, record)
    assert slot is not None
    expected = slots.Content(4, RecordFlag.INTERRUPTED, 3, 10, 20, b"read", b"sent", 4, b"state")
    assert file.read() == {5: expected}


def test_saves_follow_the_connection(file: File, transport: Transport) -> None:
    """Counts, bytes, state and epoch of the latest; each save is whole."""
    slot = file.open().take(5, 0, Record(flags=RecordFlag.FRESH))
    assert slot is not None
    state = {"seen": 0}
    for turn in range(6):
        state["seen"] = turn // 2
        transport.received, transport.sent = 10 * turn, 20 * turn
        transport.input[:] = b"partial" if turn == 3 else b""
        transport.output[:] = b"unsent" if turn == 4 else b""
        if turn == 5:
            slot.move_to(8)
        assert slot.is_behind(transport) == (turn > 0)
        slot.save(transport, state)
        assert not slot.is_behind(transport)
        content = file.read()[5]
        assert content == slots.Content(
            *(8 if turn == 5 else 0, 0, 7, 10 * turn, 20 * turn, bytes(transport.input)),
            *(bytes(transport.output), len(transport.output), b'{"seen":%d}' % (turn // 2)),
        )
    slot.touch()
    assert slot.is_behind(transport)


def test_what_a_record_said_is_not_said_again_before_it_changes(file: File, transport: Transport) -> None:
    """Thousands are restored at once: the first boundary of each writes nothing, the next change is seen."""
    record = Record(schema=7, received=10, sent=20, state=b'{"seen":1000}')
    state = json.loads(record.state)
    slot = file.open().take(5, 4, record)
    assert slot is not None
    slot.begin(state, record)
    transport.received, transport.sent = 10, 20
    sequence = slot.sequence
    slot.save(transport, state)
    assert slot.sequence == sequence
    slot.touch()  # as who uses a socket does where the kernel counts nothing
    slot.save(transport, state)
    assert not slot.is_touched
    for change in (
        lambda: state.update(seen=1001),
        lambda: setattr(transport, "received", 11),
        lambda: setattr(transport, "sent", 21),
        lambda: transport.output.extend(b"unsent"),
    ):
        change()
        slot.save(transport, state)
        assert file.read()[5] == slots.Content(
            *(4, 0, 7, transport.received, transport.sent, b""),
            *(bytes(transport.output), len(transport.output), b'{"seen":%d}' % state["seen"]),
        )


@pytest.mark.parametrize(
    "record",
    [
        Record(schema=6, state=b'{"seen":1000}'),
        Record(schema=7, flags=RecordFlag.INTERRUPTED, state=b'{"seen":1000}'),
        Record(schema=7, unread=b"part", state=b'{"seen":1000}'),
    ],
    ids=["another schema", "interrupted", "unread bytes"],
)
def test_a_record_that_says_more_is_replaced_at_the_first_boundary(
    file: File, transport: Transport, record: Record
) -> None:
    """Its schema, its flags and its bytes are of the past by then."""
    slot = file.open().take(5, 4, record)
    assert slot is not None
    state = {"seen": 1000}
    slot.begin(state, record)
    slot.save(transport, state)
    assert file.read()[5] == slots.Content(4, 0, 7, 0, 0, b"", b"", 0, b'{"seen":1000}')


def test_a_state_that_never_fit_is_not_taken_for_one_that_is_there(file: File, transport: Transport) -> None:
    """The half that would be counted anew holds another connection's state: it must be written."""
    slot = file.open().take(5, 0, Record(state=b"another"))
    assert slot is not None
    for _ in range(3):
        slot.save(transport, {1: 2})
        assert file.read()[5].state is None


def test_places_are_used_again(file: File, caplog: pytest.LogCaptureFixture) -> None:
    """Three fit; the fourth is served without, which is said once; a freed place is the next one's."""
    book = file.open()
    taken = [book.take(cookie, 0, Record()) for cookie in (1, 2, 3, 4, 5)]
    assert [slot is not None for slot in taken] == [True, True, True, False, False]
    assert book.unslotted == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "all 3 slots are taken" in caplog.text
    assert taken[1] is not None
    taken[1].free()
    assert file.read().keys() == {1, 3}
    assert book.take(6, 0, Record()) is not None
    assert file.read().keys() == {1, 3, 6}


def test_a_place_that_is_used_again_tells_nothing_of_whose_it_was(file: File, transport: Transport) -> None:
    """Neither its state, nor that one was too large, though the very object is the next connection's."""
    book = file.open()
    slot = book.take(5, 3, Record(received=7, sent=8, state=b"{}"))
    assert slot is not None
    state: dict[str, Any] = {"seen": 1}
    slot.save(transport, state)
    slot.save(transport, {"much": "x" * 4096})
    slot.free()
    again = book.take(6, 0, Record(flags=RecordFlag.FRESH))
    assert again is slot
    assert file.read() == {6: slots.Content(0, RecordFlag.FRESH, 0, 0, 0)}
    again.save(transport, {})
    assert file.read()[6].state == b"{}"
    again.save(transport, state)
    assert file.read()[6].state == b'{"seen":1}'


def test_without_slots_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """slot_bytes = 0 is a choice."""
    made = File(slot_bytes=0)
    with made.file:
        assert made.open().take(1, 0, Record()) is None
    assert caplog.records == []


def test_a_full_file_system_costs_slots_and_no_process(
    file: File, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The memory is there before it is written: a store into a page that cannot be had is SIGBUS."""

    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    book = file.open()
    assert book.take(1, 0, Record()) is None
    assert book.take(2, 0, Record()) is None
    assert "no room for slots (No space left on device)" in caplog.text
    assert len(caplog.records) == 1


# ---- large slots, and the memory that they take


def used_bytes(file: File) -> int:
    return os.fstat(file.file.fileno()).st_blocks * 512


@pytest.fixture
def large() -> Iterator[File]:
    """A file on a tmpfs, reshaped by the worker that it was made for."""
    made = File(count=50, slot_bytes=1024, memory=True)
    reshape(made.file.fileno(), 16384)
    made.header = slots.read_header(os.pread(made.file.fileno(), slots.HEADER_BYTES, 0))
    yield made
    made.file.close()


def test_a_worker_gives_its_file_another_shape(large: File) -> None:
    """As many slots, of the worker and the generation that the holder wrote; the file is as long as they say."""
    assert large.header == slots.Header(16384, 50, worker=1, generation=1)
    assert os.fstat(large.file.fileno()).st_size == large.header.file_bytes
    book = large.open()
    for cookie in range(1, 51):
        assert book.take(cookie, 0, Record(state=b"%d" % cookie)) is not None
    assert {cookie: content.state for cookie, content in large.read().items()} == {n: b"%d" % n for n in range(1, 51)}


def test_a_file_without_slots_stays_one() -> None:
    """Whoever switched them off has switched them off."""
    made = File(slot_bytes=0)
    with made.file:
        reshape(made.file.fileno(), 16384)
        assert made.open().take(1, 0, Record()) is None


def test_a_file_that_cannot_be_so_large_is_as_before() -> None:
    """The worker serves on with the slots that it was given."""
    made = File()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with made.file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                reshape(made.file.fileno(), 1 << 20)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert made.open().take(1, 0, Record()) is not None
        assert made.read().keys() == {1}


def test_a_large_slot_takes_the_pages_that_it_writes(large: File, transport: Transport) -> None:
    """Two where little is saved, four when it grows, and these still when its place is used again."""
    book = large.open()
    before = used_bytes(large)
    held = [book.take(cookie, 0, Record()) for cookie in range(1, 41)]
    for slot in held:
        assert slot is not None
        for turn in range(4):
            slot.save(transport, {"seen": turn})
    assert used_bytes(large) - before == 40 * 2 * slots.PAGE_BYTES
    slot = held[20]
    assert slot is not None
    for length in (4000, 8000, 100, 8111):
        slot.save(transport, {"a": "x" * length})
        content = large.read()[21].state
        assert (content or b"") == b'{"a":"%s"}' % (b"x" * length)
    assert used_bytes(large) - before == 40 * 2 * slots.PAGE_BYTES + 2 * slots.PAGE_BYTES
    slot.free()
    again = book.take(99, 0, Record(unread=b"y" * 8000))
    assert again is not None
    assert large.read()[99].unread == b"y" * 8000
    assert used_bytes(large) - before == 40 * 2 * slots.PAGE_BYTES + 2 * slots.PAGE_BYTES


def test_what_a_whole_slot_has_no_room_for_makes_none_grow(large: File, transport: Transport) -> None:
    """The state is saved, the output that does not fit beside it is left out, and no page is taken for it."""
    slot = large.open().take(1, 0, Record())
    assert slot is not None
    before = used_bytes(large)
    transport.output[:] = b"z" * 9000
    slot.save(transport, {"seen": 1})
    content = large.read()[1]
    assert (content.state, content.unsent, content.unsent_bytes) == (b'{"seen":1}', None, 9000)
    assert used_bytes(large) == before


@given(
    st.sampled_from([4112, 5000, 8192, 12304, 16384, 65536]),
    st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 9000), st.integers(0, 9000)), min_size=1, max_size=8),
)
def test_nothing_is_written_that_is_not_there(slot_bytes: int, lengths: list[tuple[int, int, int]]) -> None:
    """Each page that is written was allocated before: with a full file system another would be SIGBUS."""
    allocated: set[int] = set()

    def note(_: int, start: int, length: int) -> None:
        allocated.update(range(start // slots.PAGE_BYTES, -(-(start + length) // slots.PAGE_BYTES)))

    made = File(count=3, slot_bytes=slot_bytes, memory=True)
    with made.file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", note)
        book = made.open()
        for turn, (state, unsent, unread) in enumerate(lengths):
            slot = book.take(turn + 1, 0, Record(state=b"s" * state, unsent=b"o" * unsent, unread=b"i" * unread))
            if slot is not None:
                slot.save_record(Record(state=b"t" * unread, unsent=b"o" * state), 1)
                slot.touch()
            if slot is not None and turn % 2:
                slot.free()
        assert written_pages(made) <= allocated | {0}


def written_pages(file: File) -> set[int]:
    """Return those that are no hole. lseek(2)"""
    found: set[int] = set()
    at = 0
    while True:
        try:
            start = os.lseek(file.file.fileno(), at, os.SEEK_DATA)
        except OSError:  # ENXIO: none behind it
            return found
        at = os.lseek(file.file.fileno(), start, os.SEEK_HOLE)
        found.update(range(start // slots.PAGE_BYTES, -(-at // slots.PAGE_BYTES)))


FULL = textwrap.dedent(
    """
    import asyncio, os, socket, sys
    from copyover import slots
    from copyover.messages import Record
    from copyover.worker.application import Application
    from copyover.worker.slot import Slots, reshape
    from copyover.worker.transport import Transport

    async def handler(connection): ...

    slot_bytes = int(sys.argv[2])
    with open(sys.argv[1] + "/slots", "x+b") as file:
        header = slots.shape(1024, 1000, worker=1, generation=1)
        file.truncate(header.file_bytes)
        os.pwrite(file.fileno(), header.pack(), 0)
        reshape(file.fileno(), slot_bytes)
        application = Application(handler=handler)
        book = Slots(file.fileno(), application.encode_state, is_json=True, schema=1)
        taken = [book.take(cookie, 0, Record()) for cookie in range(1, 1001)]
        held = [slot for slot in taken if slot is not None]
        transport = Transport(asyncio.new_event_loop(), socket.socket())
        for turn in range(3):
            for slot in held:
                slot.save(transport, {"turn": turn, "text": "x" * (slot.room_bytes + turn * 500)})
        for slot in held:
            slot.save(transport, {"turn": 3})
        header = slots.read_header(os.pread(file.fileno(), slots.HEADER_BYTES, 0))
        area = os.pread(file.fileno(), header.file_bytes, slots.HEADER_BYTES)
        states = [content.state for _, content in slots.read_all(area, header.slot_bytes)]
    print(len(held), book.unslotted, len(states), sum(state == b'{"turn":3}' for state in states))
    """
)


@pytest.mark.parametrize("slot_bytes", [1024, 16384])
def test_a_file_system_that_fills_up_kills_nobody(slot_bytes: int, tmp_path: Path) -> None:
    """On a real tmpfs of 512 KiB: some have no slot, some states are not saved, and no store is SIGBUS."""
    mount = 'mount -t tmpfs -o size=512k none "$0" && exec "$@"'
    inside = [sys.executable, "-c", FULL, str(tmp_path), str(slot_bytes)]
    may = subprocess.run(["unshare", "-rm", "sh", "-c", mount, str(tmp_path), "true"], capture_output=True, check=False)
    if may.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {may.stderr.decode().strip()}")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, str(tmp_path), *inside], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "has no room for slots (No space left on device)" in done.stderr
    held, unslotted, readable, small_again = map(int, done.stdout.split())
    assert held + unslotted == 1000
    assert unslotted > 0
    assert held == readable > 50
    if slot_bytes == 16384:  # a smaller one leaves states that were too large for it alone for a while
        assert small_again == held


@pytest.mark.parametrize("content", [b"", b"x" * 5000, slots.shape(256, 99, worker=1, generation=1).pack()])
def test_a_file_of_another_kind_is_refused(content: bytes) -> None:
    """Empty, foreign, or shorter than it says: writing into it would be SIGBUS."""
    with tempfile.TemporaryFile() as other:
        other.write(content)
        other.flush()
        with pytest.raises(WireError):
            Slots(other.fileno(), APPLICATION.encode_state, is_json=True, schema=1)


def test_who_is_let_go_on_is_saved_with_what_came_meanwhile(file: File) -> None:
    """It came late to its boundary and halted there; half a line that the client sent is not lost by a SIGKILL."""

    async def scene() -> None:
        is_through = asyncio.Event()

        async def read_slowly(connection: Connection[Any]) -> None:
            async for _ in connection.lines():
                await is_through.wait()

        host = listen(Handlers(asyncio.get_running_loop(), Application(handler=read_slowly), Limits()))
        near, far = socket.socketpair()
        near.setblocking(False)
        transport = Transport(asyncio.get_running_loop(), near)
        served = host.build(transport, cookie=1, listener="web")
        served.slot = file.open().take(1, 0, Record(flags=RecordFlag.FRESH))
        transport.start()
        host.enter(served)
        far.send(b"a\n")
        await until(lambda: transport.received)
        await turns()
        assert not served.ask_to_halt(lambda: None)
        is_through.set()
        await until(lambda: served.course is Course.HALTED)
        far.send(b"bb")
        served.go_on()
        await until(lambda: transport.input == b"bb")
        await turns()
        assert (file.read()[1].received, file.read()[1].unread) == (4, b"bb")
        far.close()
        transport.close()
        await turns()

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(scene())


def test_a_state_that_is_too_large_is_tried_less_and_less(
    file: File, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    """Encoding it is work for nothing; once it fits again it is saved again, and from then on always."""
    tries: list[int] = []
    state = {"size": 1000}

    def encode(state: Any) -> bytes:
        tries.append(state["size"])
        return bytes(state["size"])

    slot = file.open(Application(handler=handler, encode=encode, decode=lambda *_: {})).take(5, 0, Record())
    assert slot is not None
    for _ in range(1000):
        state["size"] = 1000 + len(tries)  # a state that has not changed is not encoded anyway
        slot.save(transport, state)
        assert file.read()[5].state is None
    assert len(tries) < 15
    assert len(caplog.records) == 1
    for _ in range(257):
        state["size"] = 5
        slot.save(transport, state)
    for size in (6, 7, 8):
        state["size"] = size
        slot.save(transport, state)
        assert file.read()[5].state == bytes(size)


def test_what_encode_raises_never_reaches_the_handler(
    file: File, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    """The reason is logged once, however many connections have it."""
    book = file.open()
    for cookie in (1, 2):
        slot = book.take(cookie, 0, Record())
        assert slot is not None
        slot.save(transport, {"a": {1, 2}})
        assert file.read()[cookie].state is None
    assert len(caplog.records) == 1
    assert "does not serialise" in caplog.text


# ---- the price

SERVE = textwrap.dedent(
    """
    import asyncio, os, socket, sys, tempfile
    from copyover import slots
    from copyover.messages import Record
    from copyover.worker.application import Application
    from copyover.worker.connection import Connection
    from copyover.worker.served import Limits
    from copyover.worker.slot import Slots
    from copyover.worker.transport import Transport

    async def echo(connection):
        async for line in connection.lines():
            connection.state["seen"] = connection.state.get("seen", 0) + 1
            await connection.write(line)

    async def main(requests, has_slot):
        loop = asyncio.get_running_loop()
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
        client.setblocking(False)
        ours.setblocking(False)
        with tempfile.TemporaryFile() as file:
            header = slots.shape(1024, 10, worker=1, generation=1)
            file.truncate(header.file_bytes)
            os.pwrite(file.fileno(), header.pack(), 0)
            application = Application(handler=echo)
            book = Slots(file.fileno(), application.encode_state, is_json=True, schema=1)
            connection = Connection(loop, Transport(loop, ours), cookie=1, listener="", limits=Limits(), forward=print)
            connection.state = {}
            if has_slot:
                connection.slot = book.take(1, 0, Record())
            connection.transport.start()
            task = loop.create_task(echo(connection))
            for _ in range(requests):
                await loop.sock_sendall(client, b"hello\\n")
                assert await loop.sock_recv(client, 5) == b"hello"
            os._exit(0)

    asyncio.run(main(int(sys.argv[1]), sys.argv[2] == "slot"))
    """
)


def _system_calls(requests: int, how: str) -> int:
    command = ["strace", "-f", "-c", "-o", "/dev/stdout", sys.executable, "-c", SERVE, str(requests), how]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != 0:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()[-200:]}")
    found = re.search(r"^\s*100\.00\s+[\d.]+\s+\d+\s+(\d+)", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    return int(found[1])


def test_a_slot_costs_no_system_call_per_request() -> None:
    """A thousand requests more make as many calls with a slot as without: memory is written, and that is all."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    plain, saved = (_system_calls(1100, how) - _system_calls(100, how) for how in ("plain", "slot"))
    assert plain >= 2000
    assert abs(saved - plain) < 50  # how often the loop finds both ends ready varies a little
