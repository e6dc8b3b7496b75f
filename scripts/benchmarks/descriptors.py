"""
Descriptors moved per second: our channel, beside a C program on sendmsg and recvmsg, and one descriptor at a time.

It measures one crossing between two processes, each descriptor with a record of 256 bytes; no holder takes part.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import select
import shutil
import socket
import subprocess
import tempfile
import time
from multiprocessing import reduction
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures import TIMES, Effort, Figure, Part, at_least
from copyover import channel, messages, wire
from copyover.columns import Column

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkProcess

TITLE = "Descriptors moved per second, each with a record of 256 bytes"
RECORD_BYTES = 256
MOST = 70 * messages.MAX_DESCRIPTORS  # 17 710: sender and receiver each hold them all, within 20 000 a process
QUICK_MOST = 8 * messages.MAX_DESCRIPTORS
ONE_BY_ONE = 2000  # enough for a rate that is a hundredth
DEADLINE_S = 60.0

_PROCESSES = multiprocessing.get_context("fork")


def measure(effort: Effort) -> Part:
    count = min(QUICK_MOST if effort.is_quick else MOST, effort.room)
    cc = shutil.which("cc")
    ways: dict[str, Callable[[], float]] = {
        "ours": lambda: _through_channel(count, as_records=False),
        "records": lambda: _through_channel(count, as_records=True),
        "recipe": lambda: _one_by_one(min(ONE_BY_ONE, count)),
    }
    with tempfile.TemporaryDirectory(prefix="co-") as directory:
        if cc is not None:
            program = _build(cc, Path(directory))
            ways["c"] = lambda: _in_c(program, count)
        rates = _interleave(ways, effort.repeats)
    return Part(
        name="descriptors",
        title=TITLE,
        figures=tuple(_figures(rates, count)),
        skipped="" if cc else "no C compiler (cc) here: nothing to compare the channel with but the recipe",
    )


def _interleave(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, tuple[float, ...]]:
    """Return the rates of each way. Each repeat begins with another, so that none is always the first or the last."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for way in ways.values():  # uncounted: the first run meets memory and code that nobody has touched yet
        way()
    for turn in range(repeats):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            rates[name].append(ways[name]())
    return {name: tuple(found) for name, found in rates.items()}


def _figures(rates: dict[str, tuple[float, ...]], count: int) -> Iterator[Figure]:
    def against(name: str, other: str) -> tuple[float, ...]:
        return tuple(ours / theirs for ours, theirs in zip(rates[name], rates[other], strict=True))

    note = f"{count} dups of a TCP socket; messages Stage and Thaw as the holder passes them on"
    yield Figure("our channel", rates["ours"], "/s", note=note)
    yield Figure("… from and to Record objects", rates["records"], "/s", note="as workers make and take them")
    yield Figure("send_handle and an ack, one by one", rates["recipe"], "/s")
    yield Figure("our channel against the recipe", against("ours", "recipe"), TIMES, at_least(30, TIMES))
    if "c" in rates:
        yield Figure("C, 253 a message", rates["c"], "/s", note="cc -O2, both sides copy the records")
        yield Figure("our channel against C", against("ours", "c"), TIMES, at_least(0.6, TIMES))
        yield Figure("… from and to Record objects, against C", against("records", "c"), TIMES)


@contextlib.contextmanager
def _dups(count: int) -> Iterator[list[int]]:
    """Give *count* descriptors of one socket: to SCM_RIGHTS each is one more reference, as it is of another socket."""
    dups: list[int] = []
    with socket.socket() as client:
        try:
            dups.extend(os.dup(client.fileno()) for _ in range(count))
            yield dups
        finally:
            for descriptor in dups:
                os.close(descriptor)


# ---- in C


def _build(cc: str, directory: Path) -> Path:
    program = directory / "descriptors"
    subprocess.run([cc, "-O2", "-o", str(program), str(Path(__file__).with_suffix(".c"))], check=True)
    return program


def _in_c(program: Path, count: int) -> float:
    done = subprocess.run([program, str(count)], stdout=subprocess.PIPE, check=True, timeout=DEADLINE_S)
    return count / (int(done.stdout) / 1e9)


# ---- one by one


def _one_by_one(count: int) -> float:
    """Return the rate of the recipe: a handle, its record, and an acknowledgement before the next."""
    ours, theirs = _PROCESSES.Pipe()
    receiver = _PROCESSES.Process(target=_take_one_by_one, args=(ours, theirs, count))
    with ours:
        receiver.start()
        with theirs, _dups(count) as dups:
            pid, record = receiver.pid or 0, bytes(RECORD_BYTES)
            ours.recv_bytes()
            began_ns = time.perf_counter_ns()
            for descriptor in dups:
                reduction.send_handle(ours, descriptor, pid)
                ours.send_bytes(record)
                ours.recv_bytes()
            spent_ns = time.perf_counter_ns() - began_ns
    _reap(receiver)
    return count / (spent_ns / 1e9)


def _take_one_by_one(others_end: Connection, end: Connection, count: int) -> None:
    others_end.close()
    end.send_bytes(b"r")
    taken = []
    for _ in range(count):
        descriptor = reduction.recv_handle(end)
        taken.append((descriptor, end.recv_bytes()))
        end.send_bytes(b"a")


# ---- ours


def _through_channel(count: int, *, as_records: bool) -> float:
    """
    Return the rate through our channel, with the messages of a move: Stage has the descriptors, Thaw the records.

    *as_records*: records are objects at both ends, as in the workers; else columns as they came, which the holder
    passes on.
    """
    ours, theirs = channel.pair()
    receiver = _PROCESSES.Process(target=_take_all, args=(ours, theirs, count, as_records))
    records = [
        messages.Record(received=at, state=at.to_bytes(8, "little") * (RECORD_BYTES // 8)) for at in range(count)
    ]
    with ours, _collecting_nothing():
        receiver.start()
        theirs.close()
        with _dups(count) as dups:
            sender = channel.Channel(ours)
            came = [] if as_records else [wire.decode(*wire.encode(thaw)) for thaw in _thaws(records)]
            cookies = Column("Q", range(count))
            _receive(sender)  # it is ready
            began_ns = time.perf_counter_ns()
            for at in range(0, count, messages.MAX_DESCRIPTORS):
                batch = dups[at : at + messages.MAX_DESCRIPTORS]
                listeners = Column("H", bytes(2 * len(batch)))
                stage = messages.Stage(cookie=cookies[at : at + len(batch)], listener=listeners)
                _send(sender, stage, batch)
            for thaw in came or _thaws(records):
                _send(sender, thaw)
            _receive(sender)
            spent_ns = time.perf_counter_ns() - began_ns
    _reap(receiver)
    return count / (spent_ns / 1e9)


def _thaws(records: list[messages.Record]) -> Iterator[messages.Thaw]:
    """Cut records into packets as a move does."""
    for cut in messages.record_chunks(records, messages.MAX_ROWS):
        cookies = tuple(range(cut.start, cut.stop))
        columns = messages.record_columns(records[cut])
        yield messages.Thaw(cookie=cookies, epoch=(1,) * len(cookies), **columns)


def _take_all(others_end: socket.socket, end: socket.socket, count: int, as_records: bool) -> None:  # noqa: FBT001  # a process's arguments
    others_end.close()
    gc.disable()
    receiver = channel.Channel(end)
    descriptors: list[int] = []
    taken: list[object] = []
    _send(receiver, messages.MoveOver())
    thawed = 0
    while thawed < count:
        with _receive(receiver) as packet:
            descriptors += packet.take()
            if isinstance(packet.message, messages.Thaw):
                thawed += packet.message.rows
                taken.append(list(packet.message.records()) if as_records else packet.message)
    _send(receiver, messages.MoveOver())
    if len(descriptors) != count:
        raise SystemExit(f"{len(descriptors)} of {count} descriptors came")


def _send(end: channel.Channel, message: messages.Message, descriptors: Sequence[int] = ()) -> None:
    end.send(message, descriptors)
    while end.has_backlog:
        _is_ready(end, select.POLLOUT, channel.RETRY_S)
        end.flush()


def _receive(end: channel.Channel) -> channel.Packet:
    while True:
        with contextlib.suppress(BlockingIOError):
            return end.receive()
        if not _is_ready(end, select.POLLIN, DEADLINE_S):
            raise TimeoutError(f"the other process said nothing for {DEADLINE_S:g} s")


def _is_ready(end: channel.Channel, what: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(end, what)
    return bool(poll.poll(timeout_s * 1000))


@contextlib.contextmanager
def _collecting_nothing() -> Iterator[None]:
    """Collect no garbage meanwhile: neither does a holder in a move."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _reap(process: ForkProcess) -> None:
    process.join(DEADLINE_S)
    if process.exitcode != 0:
        raise RuntimeError(f"the receiving process {process.pid} ended with {process.exitcode}")
