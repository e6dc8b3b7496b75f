"""A worker is killed with SIGKILL: what goes on exactly, what does not, and never one for the other."""

from __future__ import annotations

import fcntl
import os
import random
import select
import socket
import struct
from typing import TYPE_CHECKING

import attrs
import pytest

from clients import DEADLINE_S, Client
from copyover import slots
from copyover.holder.recovery import Orphan, Recovered, SlotFile, recover
from copyover.messages import Record, RecordFlag
from copyover.worker.slot import Slots, reshape
from killed import Held, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KILLS = 150
CLIENTS = 24


@pytest.fixture(autouse=True)
def leave_no_worker() -> Iterator[None]:
    """Without a holder it would serve on when a test fails."""
    yield
    for worker in list(Worker.alive):
        worker.kill()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """With small buffers, so that much is unsent."""
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        made.bind(("127.0.0.1", 0))
        made.listen(128)
        made.setblocking(False)
        yield made


# ---- under load


class Verifier:
    """A client that sends numbered lines ahead of their answers, in pieces, and checks each byte that comes back."""

    def __init__(self, address: tuple[str, int], chance: random.Random) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(address)
        self.socket.setblocking(False)
        self._chance = chance
        self._lines: list[bytes] = []
        self._unsent = b""
        self._partial = b""
        self.answered = 0

    @property
    def open_lines(self) -> int:
        return len(self._lines) - self.answered

    def push(self) -> None:
        """Send a piece of a line or of several."""
        while self.open_lines < 20:
            self._lines.append(b"%d %s" % (len(self._lines), b"z" * self._chance.choice((0, 3, 40, 300))))
            self._unsent += self._lines[-1] + b"\n"
        self.flush(self._chance.randrange(1, 400))

    def flush(self, most: int = 1 << 20) -> None:
        try:
            sent = self.socket.send(self._unsent[:most])
        except BlockingIOError:
            return
        self._unsent = self._unsent[sent:]

    def pull(self) -> int:
        """Check what has come; return how many answers that was."""
        try:
            data = self.socket.recv(self._chance.randrange(1, 3000))
        except BlockingIOError:
            return 0
        assert data, "the connection ended"
        *whole, self._partial = (self._partial + data).split(b"\n")
        for line in whole:
            assert line == b"%d %b" % (self.answered + 1, self._lines[self.answered])
            self.answered += 1
        return len(whole)


class Crowd:
    """So many of them, on one worker after the other."""

    def __init__(self, address: tuple[str, int], seed: int) -> None:
        self._address = address
        self._chance = random.Random(seed)
        self.clients: dict[object, Verifier] = {}

    def fill(self) -> None:
        while len(self.clients) < CLIENTS:
            client = Verifier(self._address, self._chance)
            self.clients[client.socket.getsockname()] = client

    def run(self, answers: int) -> None:
        """Load the worker until so many answers have come; the others are on their way."""
        while answers > 0:
            for client in self.clients.values():
                if self._chance.random() < 0.7:
                    client.push()
                if self._chance.random() < 0.5:
                    answers -= client.pull()

    def finish(self) -> None:
        """Wait for all answers."""
        for client in self.clients.values():
            while client.open_lines:
                client.flush()
                assert select.select([client.socket], [], [], DEADLINE_S)[0], "answers are missing"
                client.pull()
            client.socket.close()

    def forget(self, peer: object) -> None:
        self.clients.pop(peer).socket.close()


def test_no_kill_under_load_is_taken_for_exact_that_is_not(listener: socket.socket, tmp_path: Path) -> None:
    """Every client that went on did so on each byte: nothing was lost, repeated, or answered from another state."""
    chance = random.Random(3)
    crowd = Crowd(listener.getsockname(), seed=5)
    held: dict[int, Held] = {}
    recovered = Recovered()
    exact = reset = 0
    for number in range(KILLS):
        worker = Worker(tmp_path, listener, "recovering:count", number=number)
        worker.resume(held, recovered)
        worker.accept()
        crowd.fill()
        worker.wait_for(CLIENTS)
        crowd.run(chance.choice((0, 1, 5, 30, 100)))
        worker.kill()
        recovered, held = worker.recover(), worker.held
        assert not recovered.interrupted
        assert not recovered.ended
        for cookie in recovered.reset:
            crowd.forget(held[cookie].peer)
            os.close(held[cookie].descriptor)
        exact += recovered.exact
        reset += len(recovered.reset)
    worker = Worker(tmp_path, listener, "recovering:count", number=KILLS)
    worker.resume(held, recovered)
    crowd.finish()
    worker.kill()
    worker.file.remove()
    worker.close()
    assert exact > KILLS
    assert reset > KILLS
    assert list(tmp_path.iterdir()) == []


# ---- one by one


@attrs.define
class Stage:
    """One worker after the other, on one listener."""

    directory: Path
    listener: socket.socket
    worker: Worker
    number: int = 1

    def client(self) -> Client:
        count = len(self.worker.held)
        client = Client(self.listener.getsockname())
        self.worker.wait_for(count + 1)
        return client

    def settle(self) -> None:
        """Once another client has come, was answered and has gone, the worker waits again for those before it."""
        count = len(self.worker.held)
        with self.client() as passing:
            assert passing.line() == b"fresh 0\n"
            assert passing.ask(b"say x\n") == b"said x\n"
        while len(self.worker.held) > count:
            self.worker.take_packet()

    def crash(self, on_crash: str = "reset") -> Recovered:
        """Kill the worker and give a new one what is recovered."""
        self.worker.kill()
        recovered = self.worker.recover(on_crash)
        held, self.number = self.worker.held, self.number + 1
        self.worker = Worker(self.directory, self.listener, "recovering:application", number=self.number)
        self.worker.resume(held, recovered)
        for cookie in held.keys() - recovered.records.keys():
            os.close(held[cookie].descriptor)
        self.worker.accept()
        return recovered


@pytest.fixture
def stage(listener: socket.socket, tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path, listener, Worker(tmp_path, listener, "recovering:application"))
    made.worker.accept()
    yield made
    made.worker.kill()
    made.worker.file.remove()
    made.worker.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def unix_stage(tmp_path: Path) -> Iterator[Stage]:
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "x.sock"))
        listener.listen()
        listener.setblocking(False)
        made = Stage(runtime, listener, Worker(runtime, listener, "recovering:application"))
        made.worker.accept()
        yield made
        made.worker.kill()
        made.worker.file.remove()
        made.worker.close()


def reasons(recovered: Recovered) -> list[str]:
    return [*recovered.reset.values(), *recovered.interrupted.values()]


def test_idle_connections_go_on_exactly(stage: Stage) -> None:
    """With their state; with half a line; with what others pushed; whoever they were served by before."""
    with stage.client() as plain, stage.client() as partial, stage.client() as pushed:
        assert [client.line() for client in (plain, partial, pushed)] == [b"fresh 0\n"] * 3
        assert plain.ask(b"tell x\n") == b"done\n"
        assert [client.line() for client in (partial, pushed)] == [b"told x\n"] * 2
        partial.send(b"say a")
        stage.settle()
        for _ in range(3):
            recovered = stage.crash()
            assert (recovered.exact, reasons(recovered)) == (3, [])
            seen = [client.line() for client in (plain, partial, pushed)]
            assert seen == [b"resumed 1\n", b"resumed 0\n", b"resumed 0\n"]
            stage.settle()
        partial.send(b" b\n")
        assert partial.line() == b"said a b\n"


def test_unsent_bytes_go_on(stage: Stage) -> None:
    """What the kernel had not taken is sent by the next worker, once."""
    with stage.client() as slow, stage.client() as other:
        assert [client.line() for client in (slow, other)] == [b"fresh 0\n"] * 2
        slow.send(b"fill\n")
        stage.settle()
        cookie = stage.worker.cookie_of(slow.socket)
        recovered = stage.crash()
        assert recovered.exact == 2
        unsent = recovered.records[cookie].unsent
        assert 0 < len(unsent) <= 100
        expected = recovered.records[cookie].sent - len(b"fresh 0\n") + len(unsent)
        assert slow.receive(expected) == b"0123456789" * (expected // 10)
        assert slow.line() == b"resumed 1\n"


def test_one_that_reached_no_boundary_begins_as_fresh(stage: Stage) -> None:
    """Its handler waits for something else before its first message: the next worker enters it as for a new client."""
    with stage.client() as first:
        assert first.line() == b"fresh 0\n"
        assert first.ask(b"close the door\n") == b"closed\n"
        with stage.client() as client:
            stage.settle()
            recovered = stage.crash()
            assert recovered.exact == 2
            assert recovered.records[stage.worker.cookie_of(client.socket)].flags == RecordFlag.FRESH
            assert first.line() == b"resumed 1\n"
            assert client.line() == b"fresh 0\n"


@pytest.mark.parametrize("on_crash", ["reset", "resume"])
def test_in_the_middle_of_a_message_the_policy_decides(stage: Stage, on_crash: str) -> None:
    """Reset, or entered with interrupted true and the state of the last boundary; the other one goes on exactly."""
    with stage.client() as busy, stage.client() as idle:
        assert [client.line() for client in (busy, idle)] == [b"fresh 0\n"] * 2
        assert busy.ask(b"say x\n") == b"said x\n"
        busy.send(b"half\n")
        assert busy.receive(7) == b"half a "
        cookie = stage.worker.cookie_of(busy.socket)
        stage.settle()
        recovered = stage.crash(on_crash)
        assert idle.line() == b"resumed 0\n"
        if on_crash == "reset":
            assert recovered.reset.keys() == {cookie}
            assert (recovered.exact, recovered.interrupted) == (1, {})
        else:
            assert recovered.interrupted.keys() == {cookie}
            assert recovered.records[cookie].flags & RecordFlag.INTERRUPTED
            assert busy.line() == b"interrupted 1\n"
            stage.settle()
            assert stage.crash().exact == 2  # and from here on it is as any other
            assert busy.line() == b"resumed 1\n"


def test_a_pinned_connection_is_where_it_was_before(stage: Stage) -> None:
    """The line that it was pinned for is read and not unread: it is not exact."""
    with stage.client() as client, stage.client() as other:
        assert [one.line() for one in (client, other)] == [b"fresh 0\n"] * 2
        client.send(b"wait\n")
        stage.settle()
        recovered = stage.crash()
        assert recovered.exact == 1
        assert reasons(recovered) == ["5 bytes were read since its last boundary"]


@pytest.mark.parametrize("line", [b"put 2000\n", b"odd\n"])
def test_a_state_that_cannot_be_saved_cannot_be_resumed(stage: Stage, line: bytes) -> None:
    """Too large, or no JSON: the handler notices nothing, and its connection is reset by either policy."""
    with stage.client() as client, stage.client() as other:
        assert [one.line() for one in (client, other)] == [b"fresh 0\n"] * 2
        assert client.ask(line) == b"done\n"
        assert client.ask(b"say x\n") == b"said x\n"
        stage.settle()
        recovered = stage.crash("resume")
        assert recovered.exact == 1
        assert reasons(recovered) == ["its state did not fit the slot"]


def test_a_finished_connection_ends_in_the_next_worker(stage: Stage) -> None:
    """Our FIN was sent, the client's has not come: the next worker lingers for it."""
    with stage.client() as client, stage.client() as other:
        assert [one.line() for one in (client, other)] == [b"fresh 0\n"] * 2
        client.send(b"bye\n")
        assert client.line() == b""
        cookie = stage.worker.cookie_of(client.socket)
        stage.settle()
        recovered = stage.crash()
        assert recovered.records[cookie].flags == RecordFlag.WRITE_CLOSED | RecordFlag.FINISHED
        client.end()
        while cookie in stage.worker.held:
            stage.worker.take_packet()
        assert other.line() == b"resumed 0\n"


def test_what_the_client_ended_is_not_counted_as_lost(stage: Stage) -> None:
    """Its reset was first; the worker had no time to see it."""
    with stage.client() as client:
        assert client.line() == b"fresh 0\n"
        os.kill(stage.worker.pid, 19)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.socket.close()
        (cookie,) = stage.worker.held
        recovered = stage.crash()
        assert recovered.ended == {cookie}
        assert recovered.reset == {}


def test_an_ended_connection_has_no_slot(stage: Stage) -> None:
    """Its place is free for another."""
    with stage.client() as first:
        assert first.line() == b"fresh 0\n"
    while stage.worker.held:
        stage.worker.take_packet()
    with stage.client() as second:
        assert second.line() == b"fresh 0\n"
        area = os.pread(stage.worker.file.fileno(), 2 * 1024, slots.HEADER_BYTES)
        assert [cookie for cookie, _ in slots.read_all(area, 1024)] == [stage.worker.cookie_of(second.socket)]


def test_unix_connections_go_on_exactly_when_idle(unix_stage: Stage) -> None:
    """Nobody counts their bytes: a mark before each use, taken away when it is written down, says the same."""
    stage = unix_stage
    with stage.client() as plain, stage.client() as partial:
        assert [client.line() for client in (plain, partial)] == [b"fresh 0\n"] * 2
        assert plain.ask(b"tell x\n") == b"done\n"
        assert partial.line() == b"told x\n"
        partial.send(b"say a")
        stage.settle()
        recovered = stage.crash()
        assert (recovered.exact, reasons(recovered)) == (2, [])
        assert [client.line() for client in (plain, partial)] == [b"resumed 1\n", b"resumed 0\n"]
        stage.settle()
        partial.send(b" b\n")
        assert partial.line() == b"said a b\n"
        plain.send(b"half\n")
        assert plain.receive(7) == b"half a "
        stage.settle()
        recovered = stage.crash("resume")
        assert reasons(recovered) == ["its socket was used since its last boundary"]
        assert plain.line() == b"interrupted 1\n"


# ---- the file


def test_the_lock_names_the_living_worker(stage: Stage) -> None:
    """A new holder finds the process by the file, and that it is dead by the lock's absence."""
    ask = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    descriptor = os.open(stage.worker.file.path, os.O_RDWR)
    try:
        kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(descriptor, fcntl.F_GETLK, ask))
        assert (kind, pid) == (fcntl.F_WRLCK, stage.worker.pid)
        stage.crash()
        assert struct.unpack("hhqqi4x", fcntl.fcntl(descriptor, fcntl.F_GETLK, ask))[0] == fcntl.F_UNLCK
    finally:
        os.close(descriptor)


def write_slot(file: SlotFile, slot_bytes: int, place: int, cookie: int, epoch: int) -> None:
    area = bytearray(slots.HEADER_BYTES + slot_bytes)
    view = memoryview(area)
    pen = slots.Pen(view, view.cast("Q"), 0, slot_bytes)
    pen.publish(0, 0, epoch, 0, 1, b"", b"", b"%d" % epoch)
    pen.name(cookie)
    os.pwrite(file.fileno(), area[slots.HEADER_BYTES :], slots.HEADER_BYTES + place * slot_bytes)


CASES = [((1, 2, 0), 2), ((2, 2), None), ((1, 1, 3), 3), ((3, 1, 1), 3)]
# Of large slots two are read for a connection: whoever has three lies.
LARGE_CASES = [((1, 2, 0), 2), ((2, 2), None), ((1, 1, 3), None), ((3, 1, 4), 3)]


@pytest.mark.parametrize(
    ("slot_bytes", "epochs", "counts"), [*((1024, *case) for case in CASES), *((16384, *case) for case in LARGE_CASES)]
)
def test_of_two_slots_of_one_connection_the_higher_epoch_counts(
    tmp_path: Path, slot_bytes: int, epochs: tuple[int, ...], counts: int | None
) -> None:
    """Of equal ones none: nobody can say which of them is a lie. Holes between them are passed over."""
    file = SlotFile.make(tmp_path, "x", slots.shape(slot_bytes, 20_000, worker=1, generation=1))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for place, epoch in enumerate(epochs):
            write_slot(file, slot_bytes, 9000 * place, 5, epoch)
            write_slot(file, slot_bytes, 9000 * place + 1, 6, epoch)  # nobody's that was asked for
        found = recover(file.fileno(), [Orphan(5, counts or 2, ours.fileno(), "reset")])
    file.remove()
    assert [record.state for record in found.records.values()] == ([] if counts is None else [b"%d" % counts])
    assert len(found.reset) == (counts is None)


def test_a_file_that_its_worker_has_reshaped_is_read(tmp_path: Path) -> None:
    """The holder takes its shape from the file, not from what it made."""
    file = SlotFile.make(tmp_path, "x", slots.shape(1024, 100, worker=1, generation=1))
    reshape(file.fileno(), 16384)
    book = Slots(file.fileno(), bytes, is_json=False, schema=1)
    pairs = [socket.socketpair() for _ in range(100)]
    for cookie in range(1, 101):
        assert book.take(cookie, 0, Record(state=b"s" * 80 * cookie)) is not None
    orphans = [Orphan(cookie, 0, pairs[cookie - 1][0].fileno(), "reset") for cookie in range(1, 101)]
    found = recover(file.fileno(), orphans)
    for end in (end for pair in pairs for end in pair):
        end.close()
    file.remove()
    assert {cookie: len(record.state) for cookie, record in found.records.items()} == {n: 80 * n for n in range(1, 101)}


def test_a_worker_that_lies_does_not_keep_the_holder_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand large slots say that they are of the same two connections: four of them are read."""
    file = SlotFile.make(tmp_path, "x", slots.shape(1024, 1000, worker=1, generation=1))
    reshape(file.fileno(), 65536)
    for place in range(1000):
        write_slot(file, 65536, place, 5 + place % 2, 1)
    taken: list[int] = []
    pread = os.pread

    def count(descriptor: int, length: int, at: int) -> bytes:
        taken.append(length)
        return pread(descriptor, length, at)

    monkeypatch.setattr(os, "pread", count)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        found = recover(file.fileno(), [Orphan(cookie, 1, ours.fileno(), "reset") for cookie in (5, 6)])
    file.remove()
    assert found.records == {}
    assert taken.count(65536) == 4
    assert sum(taken) < 5 * 65536
