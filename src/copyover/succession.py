"""
What a holder leaves to its successor at an upgrade: one plain estate, and its bytes.

It decides what travels and whether a successor can read all of it; it touches no descriptor: here they are numbers.

The two are different releases of copyover. A field that is new in this one gets a default, so that it can be missing;
what changes its meaning needs a new FORMAT.
"""

from __future__ import annotations

import base64
import itertools
import json
import struct
from typing import TYPE_CHECKING, Any

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from copyover import wire
from copyover.change import Phase
from copyover.config import Config  # noqa: TC001  # cattrs reads the annotations
from copyover.entries import Column, Standing
from copyover.errors import ChangeRefused, IllegalEvent
from copyover.events import Quotas  # noqa: TC001  # cattrs reads the annotations
from copyover.holdings import Holdings, Strength, Worker
from copyover.listeners import Address  # noqa: TC001  # the same
from copyover.messages import Hello  # noqa: TC001  # the same
from copyover.release import Release  # noqa: TC001  # the same
from copyover.reload import Machine
from copyover.users import User  # noqa: TC001  # the same

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMATS = (1, 1)  # the oldest and the newest that this release reads; it writes the newest

# Columns of the ledger's entries, little-endian. Standing and passage stay: nothing leaves before all is served.
COLUMNS: dict[Column, str] = {
    "cookie": "Q",
    "descriptor": "I",
    "listener": "I",
    "owner": "Q",
    "kind": "B",
    "epoch": "Q",
}
# Fields of a Worker that mean something only while a move is under way.
OF_THE_MOVE = ("is_off", "has_gathered", "has_entered", "shared", "unanswered", "queue", "parked_bytes")


@attrs.frozen(kw_only=True)
class Held:
    """The machine's part, of Holdings in the phase serving. Capacity stays: it is counted from the process's limits."""

    generation: int
    wanted: int
    failures: int
    is_full: bool
    next_worker: int
    next_batch: int
    counters: dict[str, int]
    kept: list[tuple[int, str]]
    withdrawn: list[int]
    workers: list[Worker]
    entries: dict[str, bytes]
    quotas: Quotas


@attrs.frozen(kw_only=True)
class Generation:
    """The crew's part, of what a generation is started from."""

    release: Release
    config: Config
    last_words: list[str]


@attrs.frozen(kw_only=True)
class Tail:
    """The pipe behind the stderr of a worker that was not ready yet."""

    descriptor: int
    partial: bytes


@attrs.frozen(kw_only=True)
class Hand:
    """The crew's part, of one worker process."""

    worker: int
    generation: int
    pid: int
    pidfd: int
    channel: int
    slots: int
    slots_path: str
    wire: int  # the version that its channel speaks
    started_s: float
    hello: Hello | None
    tail: Tail | None
    lines: list[str]


@attrs.frozen(kw_only=True)
class Caller:
    """The desk's part, of one connected operator."""

    number: int
    descriptor: int
    heard: bytes
    unsent: bytes
    is_done: bool


@attrs.frozen(kw_only=True)
class Desk:
    control: int
    next_caller: int
    denied: int
    group: int | None  # whose members may command
    callers: list[Caller]


@attrs.frozen(kw_only=True)
class Listener:
    number: int
    name: str
    descriptor: int
    path: str | None
    address: Address | None
    file: tuple[int, int] | None
    removed_s: float | None  # when it was removed; its backlog is being served


@attrs.frozen(kw_only=True)
class Listeners:
    """All listeners, and the names of all that there ever were."""

    listeners: list[Listener]
    names: list[tuple[int, str, str | None]]  # number, name, and what is to become of connections at a crash
    are_passed: bool


@attrs.frozen(kw_only=True)
class Departure:
    """Who leaves, for whom, and when: on CLOCK_MONOTONIC, as all times of an estate."""

    copyover: str
    python: str
    asker: int
    left_s: float
    signals_blocked: list[int]  # to be restored: all are blocked in between


@attrs.frozen(kw_only=True)
class Estate:
    """All that a holder leaves."""

    format: int
    departure: Departure
    told: dict[str, Any]
    lock: int
    instance: str
    newest: int
    started_s: float
    last_reload: dict[str, Any] | None
    protocol_errors: int
    timers: dict[str, float]
    desk: Desk
    listening: Listeners
    generations: list[tuple[int, Generation]]
    previous: Generation | None
    hands: list[Hand]
    held: Held
    user: User | None  # as whom workers run
    noted: list[dict[str, Any]]  # the chronicle
    followers: list[int]

    def descriptors(self) -> Iterator[int]:
        """Name every descriptor that must live on."""
        yield self.lock
        yield self.desk.control
        yield from (caller.descriptor for caller in self.desk.callers)
        yield from (listener.descriptor for listener in self.listening.listeners)
        for hand in self.hands:
            yield from (hand.pidfd, hand.channel, hand.slots)
            if hand.tail is not None:
                yield hand.tail.descriptor
        yield from _unpack(self.held, "descriptor")


# ---- the machine


def obstacle(machine: Machine) -> str | None:
    """Say why the machine cannot be left just now, or None."""
    if machine.phase is not Phase.SERVING:
        return f"another change is under way ({machine.phase.value})"
    if machine.holdings.generation == 0:
        return "the first generation is being started"
    for worker in machine.holdings.workers.values():
        if worker.strength is Strength.DYING:
            return f"worker {worker.id} was killed and has not ended yet"
    for cookie in machine.ledger.find(Standing.FREEZING, Standing.PARKED, Standing.THAWING):
        return f"connection {cookie} is {machine.ledger.standing(cookie).value}"
    return None


def hold(holdings: Holdings) -> Held:
    """Export what *holdings* has; the next number of each counter is used up by it."""
    cookies = list(holdings.ledger)
    return Held(
        generation=holdings.generation,
        wanted=holdings.wanted,
        failures=holdings.failures,
        is_full=holdings.is_full,
        next_worker=next(holdings.worker_numbers),
        next_batch=next(holdings.batches),
        counters=dict(holdings.counters),
        kept=list(holdings.kept.items()),
        withdrawn=sorted(holdings.withdrawn),
        workers=list(holdings.workers.values()),
        quotas=holdings.quotas,
        entries={
            name: struct.pack(f"<{len(cookies)}{code}", *holdings.ledger.column(name, cookies))
            for name, code in COLUMNS.items()
        },
    )


def revive(held: Held, capacity: int) -> Machine:
    """
    Return a serving machine with what is *held*.

    Raises:
        ChangeRefused: it contradicts itself.

    """
    machine = Machine(capacity)
    holdings = machine.holdings
    holdings.generation, holdings.wanted, holdings.failures = held.generation, held.wanted, held.failures
    holdings.is_full, holdings.quotas = held.is_full, held.quotas
    holdings.worker_numbers = itertools.count(held.next_worker)
    holdings.batches = itertools.count(held.next_batch)
    holdings.counters.update(held.counters)
    holdings.kept, holdings.withdrawn = dict(held.kept), set(held.withdrawn)
    holdings.workers = {worker.id: worker for worker in held.workers}
    if set(held.entries) != set(COLUMNS):
        raise ChangeRefused(f"the state has the columns {', '.join(held.entries)}, not {', '.join(COLUMNS)}")
    try:
        columns = {name: _unpack(held, name) for name in COLUMNS}
        for cookie, owner in zip(columns["cookie"], columns["owner"], strict=True):
            if owner not in holdings.workers:
                raise ChangeRefused(f"the state has connection {cookie} of worker {owner}, whom it does not have")
        machine.ledger.inherit(**columns)
    except (IllegalEvent, OverflowError, ValueError) as problem:
        raise ChangeRefused(f"the state's connections do not add up: {problem}") from problem
    return machine


def _unpack(held: Held, name: Column) -> tuple[int, ...]:
    packed = held.entries[name]
    code = struct.Struct(f"<{COLUMNS[name]}")
    if len(packed) % code.size:
        raise ChangeRefused(f"the state's column {name} of {len(packed)} bytes is cut short")
    return struct.unpack(f"<{len(packed) // code.size}{COLUMNS[name]}", packed)


# ---- the whole


def check(estate: Estate) -> None:
    """
    See that this release can go on from *estate*, all of it.

    Raises:
        ChangeRefused: it contradicts itself, or a worker speaks no version of ours.

    """
    machine = revive(estate.held, 1 << 30)
    generations = {number for number, _ in estate.generations}
    for hand in estate.hands:
        if hand.worker not in machine.holdings.workers or hand.generation not in generations:
            raise ChangeRefused(f"the state has process {hand.pid}, and not its worker or not its generation")
        _check_versions(hand)
    if machine.holdings.generation not in generations:
        raise ChangeRefused(f"the state does not have generation {machine.holdings.generation}, which serves")
    names = estate.listening.names
    numbers = set(machine.ledger.column("listener", machine.ledger))
    numbers |= {listener.number for listener in estate.listening.listeners}
    unknown = numbers.difference(number for number, _, _ in names)
    if unknown:
        raise ChangeRefused(f"the state has a connection of listener {min(unknown)}, which has no name in it")
    descriptors = list(estate.descriptors())
    if len(set(descriptors)) != len(descriptors):
        raise ChangeRefused("the state names one descriptor twice")


def _check_versions(hand: Hand) -> None:
    if hand.hello is None:
        return  # it will be told when it says hello
    oldest, newest = wire.WIRE_VERSIONS
    if not oldest <= hand.wire <= newest or wire.common_version(hand.hello.record, wire.RECORD_VERSIONS) is None:
        raise ChangeRefused(
            f"worker {hand.worker} (pid {hand.pid}, copyover {hand.hello.copyover}) speaks wire {hand.wire} and record "
            f"{hand.hello.record}, the successor wire {list(wire.WIRE_VERSIONS)} and record "
            f"{list(wire.RECORD_VERSIONS)}; reload with a release whose copyover both speak with, then upgrade"
        )


def encode(estate: Estate) -> bytes:
    return json.dumps(_converter.unstructure(estate), separators=(",", ":")).encode()


def decode(data: bytes) -> Estate:
    """
    Read an estate.

    Raises:
        ChangeRefused: it is none, of a format that this release does not read, or has a field that is missing, unknown
            or of another type.

    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise ChangeRefused(f"the state is no JSON: {problem}") from problem
    number = found.get("format") if type(found) is dict else None
    oldest, newest = FORMATS
    if type(number) is not int or not oldest <= number <= newest:
        raise ChangeRefused(f"the state has format {number!r}, this release reads {oldest} to {newest}")
    try:
        return _converter.structure(found, Estate)
    except (cattrs.BaseValidationError, TypeError, ValueError) as problem:
        raise ChangeRefused(f"the state cannot be read: {'; '.join(cattrs.transform_error(problem)[:3])}") from problem


def _exactly(kind: type) -> Any:
    def structure(value: Any, _: type) -> Any:
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        raise TypeError(f"should be of type {kind.__name__}, not {type(value).__name__}")

    return structure


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (bool, int, float, str):
        converter.register_structure_hook(kind, _exactly(kind))
    converter.register_unstructure_hook(bytes, lambda value: base64.b64encode(value).decode())
    converter.register_structure_hook(bytes, lambda value, _: base64.b64decode(value, validate=True))
    left_out: dict[str, Any] = {name: override(omit=True) for name in OF_THE_MOVE}
    converter.register_unstructure_hook(Worker, make_dict_unstructure_fn(Worker, converter, **left_out))
    converter.register_structure_hook(
        Worker, make_dict_structure_fn(Worker, converter, _cattrs_forbid_extra_keys=True, **left_out)
    )
    return converter


_converter = _make_converter()
