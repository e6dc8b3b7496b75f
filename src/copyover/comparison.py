"""
What a ledger and the kernel's own account say when they are laid side by side: the verdict of an audit.

It asks nobody: both are given to it, and whoever looked decides when to look again. A connection is accused only by
what a second look confirms, because connections come and end while the first is taken.
"""

from __future__ import annotations

import collections
import enum
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping


class State(enum.IntEnum):
    """The kernel's numbers. include/net/tcp_states.h"""

    ESTABLISHED = 1
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11


_LIVE = frozenset(State) - {State.TIME_WAIT, State.LISTEN}
_UNTOUCHED = frozenset({State.ESTABLISHED, State.CLOSE_WAIT})  # our side has neither ended nor reset it
_ANY_ADDRESS = bytes(16)


class Socket(NamedTuple):
    """One socket as the kernel has it. A tuple: a server has thousands. Unix sockets have no byte counters."""

    cookie: int
    family: int
    state: int
    inode: int  # 0: no process has it; it waits to be accepted, or is only finished by the kernel
    port: int
    local: bytes  # the address, or the name of a unix socket
    received: int
    acked: int
    queue: int  # of a listener: how many wait to be accepted, and how many may
    limit: int


class Plight(enum.Enum):
    """What a descriptor of the holder says of itself."""

    OPEN = "open"
    CLOSED = "closed"  # reset by its peer, timed out, or finished by both
    DISSOLVED = "dissolved"  # reset by this side
    FOREIGN = "foreign"  # it is another socket


class Held(NamedTuple):
    """One row of the ledger; *plight* is told at a second look only."""

    listener: int
    worker: int
    generation: int
    epoch: int
    state: str
    plight: Plight | None = None


@attrs.frozen
class Listening:
    """A listener as the holder has it; *port* is 0 for a unix socket."""

    name: str
    address: str
    cookie: int
    family: int
    port: int


@attrs.frozen
class View:
    """Both accounts at one moment, the ledger's first."""

    listeners: tuple[Listening, ...]
    held: Mapping[int, Held]
    sockets: Mapping[int, Socket]
    counters: Mapping[str, int]


@attrs.frozen
class Finding:
    """A socket that is not as it should be, and why. *held* is its row in the ledger, if it has one."""

    cookie: int
    reason: str
    held: Held | None = None


@attrs.frozen
class Queue:
    """The accept queue of one listener."""

    listener: Listening
    waiting: int
    limit: int

    @property
    def is_full(self) -> bool:
        return self.waiting > self.limit  # the kernel takes one more than the limit. listen(2)


@attrs.frozen
class Account:
    """
    What an audit found.

    *same* were held before and are the same live sockets now, *fresh* came since. *ended* says how, *counted* is the
    holder's own count of the same time. Only what is *missing* is an accusation.
    """

    held: int
    same: int
    fresh: int
    half_closed: Mapping[str, int]
    ended: Mapping[str, int]
    missing: tuple[Finding, ...]
    over: tuple[Finding, ...]
    unheld: tuple[Finding, ...]
    queues: tuple[Queue, ...]
    counted: Mapping[str, int]

    @property
    def exit_code(self) -> int:
        return 4 if self.missing else 0


def doubts(before: View, now: View) -> set[int]:
    """Return the cookies that one look does not explain: of connections, and of listeners."""
    unsound = {c for c in now.held if not _is_sound(now.sockets.get(c), before.sockets.get(c))}
    deaf = {listener.cookie for listener in now.listeners if not _listens(now, listener)}
    return unsound | deaf | _unheld(now).keys()


def corrected(first: View, doubtful: Collection[int], later: View) -> View:
    """Return *first*, with the word of a *later* look, which asked the ledger about the *doubtful* only, on these."""
    held = {cookie: row for cookie, row in first.held.items() if cookie not in doubtful}
    sockets = {cookie: socket for cookie, socket in first.sockets.items() if cookie not in doubtful}
    sockets |= {cookie: later.sockets[cookie] for cookie in doubtful if cookie in later.sockets}
    return View(later.listeners, held | dict(later.held), sockets, later.counters)


def account(before: View, now: View) -> Account:
    """Say what became of all that was held *before*."""
    sound: dict[int, Socket] = {}
    missing, over, unheld = [], [], []
    for cookie, row in now.held.items():
        socket = now.sockets.get(cookie)
        if row.plight in (None, Plight.OPEN) and socket and _is_sound(socket, before.sockets.get(cookie)):
            sound[cookie] = socket
        elif row.plight is Plight.CLOSED:
            over.append(Finding(cookie, _why_over(socket), row))
        else:
            missing.append(Finding(cookie, _why_missing(row, socket), row))
    for cookie, listener in _unheld(now).items():
        state = State(now.sockets[cookie].state)
        if cookie not in before.held:
            unheld.append(Finding(cookie, f"{state.name} at {listener.name}, and not in the ledger"))
        elif state in _UNTOUCHED:
            missing.append(Finding(cookie, f"{state.name} at {listener.name}, and not in the ledger any more"))
    ended = before.held.keys() - now.held.keys() - {finding.cookie for finding in missing}
    return Account(
        held=len(now.held),
        same=len(sound.keys() & before.held.keys()),
        fresh=len(sound.keys() - before.held.keys()),
        half_closed=_half_closed(sound.values()),
        ended=collections.Counter(_how_ended(now.sockets.get(cookie)) for cookie in ended),
        missing=(*missing, *_deaf(now)),
        over=tuple(over),
        unheld=tuple(unheld),
        queues=tuple(_queues(now)),
        counted={key: now.counters[key] - before.counters.get(key, 0) for key in now.counters},
    )


def _is_sound(socket: Socket | None, earlier: Socket | None) -> bool:
    if socket is None or socket.state not in _LIVE:
        return False
    return earlier is None or (socket.received >= earlier.received and socket.acked >= earlier.acked)


def _listens(view: View, listener: Listening) -> bool:
    socket = view.sockets.get(listener.cookie)
    return socket is not None and socket.state == State.LISTEN


def _unheld(view: View) -> dict[int, Listening]:
    """Return what some process has open on our listeners' addresses and the ledger lacks."""
    places: dict[tuple[int, int], list[tuple[bytes, Listening]]] = {}
    for listener in view.listeners:
        if _listens(view, listener):
            local = view.sockets[listener.cookie].local
            places.setdefault((listener.family, listener.port), []).append((local, listener))
    return {
        socket.cookie: listener
        for socket in view.sockets.values()
        if socket.inode and socket.cookie not in view.held and socket.state in _LIVE
        for local, listener in places.get((socket.family, socket.port), ())
        if local in (socket.local, _ANY_ADDRESS)
    }


def _why_over(socket: Socket | None) -> str:
    if socket is not None and socket.state == State.TIME_WAIT:
        return "both sides have finished it; its worker has not told the end yet"
    return "it was reset from outside or timed out; its worker has not told the end yet"


def _why_missing(row: Held, socket: Socket | None) -> str:
    if row.plight is Plight.DISSOLVED:
        return "it was reset on this side, and nobody told an end"
    if row.plight is Plight.FOREIGN:
        return "the descriptor that the holder has for it is another socket"
    if socket is None or socket.state not in _LIVE:
        return "the ledger has it, and the kernel has no such connection"
    return "its byte counters went back"


def _how_ended(socket: Socket | None) -> str:
    """*gone*: the client ended it first, or one side reset it; the kernel keeps no trace of these."""
    return "gone" if socket is None else "finished"


def _half_closed(sockets: Iterable[Socket]) -> dict[str, int]:
    states = collections.Counter(socket.state for socket in sockets)
    return {State(state).name: number for state, number in states.items() if state != State.ESTABLISHED}


def _deaf(view: View) -> Iterator[Finding]:
    for listener in view.listeners:
        if not _listens(view, listener):
            yield Finding(listener.cookie, f"the listener {listener.name} does not listen any more")


def _queues(view: View) -> Iterator[Queue]:
    for listener in view.listeners:
        if _listens(view, listener):
            socket = view.sockets[listener.cookie]
            yield Queue(listener, socket.queue, socket.limit)


def as_object(found: Account, *, listed: int | None = None) -> dict[str, Any]:
    """Return the object of ``audit --json``, with *listed* findings of a kind at most; None: all."""
    return {
        "schema": 1,
        "exit_code": found.exit_code,
        "held": found.held,
        "same": found.same,
        "fresh": found.fresh,
        "half_closed": dict(found.half_closed),
        "ended": sum(found.ended.values()),
        "ended_how": dict(found.ended),
        "missing": len(found.missing),
        "over": len(found.over),
        "unheld": len(found.unheld),
        "findings": {
            kind: [_finding_object(finding) for finding in findings[:listed]]
            for kind, findings in (("missing", found.missing), ("over", found.over), ("unheld", found.unheld))
        },
        "listeners": [
            {
                "name": queue.listener.name,
                "address": queue.listener.address,
                "waiting": queue.waiting,
                "limit": queue.limit,
                "is_full": queue.is_full,
            }
            for queue in found.queues
        ],
        "counted": dict(found.counted),
    }


def _finding_object(finding: Finding) -> dict[str, Any]:
    row = finding.held
    return {
        "connection": finding.cookie,
        "reason": finding.reason,
        "worker": None if row is None else row.worker,
        "generation": None if row is None else row.generation,
    }
