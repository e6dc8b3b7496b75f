"""
Which listeners there are, and for which generation: numbered, added and removed by reloads.

It binds and ends them; workers accept from them, and when a change has come to its end is decided in reload.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING

import attrs

from copyover import listeners, succession
from copyover.listeners import Listener
from copyover.sockets import drop_new_clients, drops_new_clients, take_new_clients

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from copyover.listeners import Address

log = logging.getLogger("copyover.holder")

NUMBERS = 1 << 16  # the wire has 16 bits for one
# A handshake that had begun may still be on its way: long enough for the second time that SYN-ACK is sent. tcp(7)
HANDSHAKE_S = 3.0


@attrs.frozen
class Listed:
    """A listener for the eyes of operators."""

    name: str
    address: str


@attrs.frozen
class Changes:
    """What a reload did to the listeners."""

    added: Sequence[Listed] = ()
    removed: Sequence[Listed] = ()


@attrs.define
class _Proposal:
    """What a generation that is not committed is to listen on, beside what stays."""

    generation: int
    leaving: set[int]
    added: dict[int, Listener] = attrs.field(factory=dict)
    # An address under another name is the same socket: the new number, and the old one.
    shared: dict[int, int] = attrs.field(factory=dict)


class Listening:
    """
    All listeners of a holder.

    Each has a number that no other gets in the holder's life, so that a connection's listener is known by it however
    often the list changes.
    """

    def __init__(self) -> None:
        self.live: dict[int, Listener] = {}  # of the serving generation
        self.ending: dict[int, tuple[Listener, float]] = {}  # removed, since when: nobody new, the backlog is served
        self.names: dict[int, str] = {}  # of all that there ever were
        self.policies: dict[int, str | None] = {}  # what their connections asked for, should a worker be killed
        self._proposal: _Proposal | None = None
        self._are_passed = False
        self._passed_over: Sequence[Address] | None = None

    def begin(self, addresses: Sequence[Address]) -> None:
        """
        Take what the service manager passed, else bind *addresses*; what is bound before a failure stays to be closed.

        Raises:
            AddressInUse, PermissionRefused, BadAddress: one cannot be bound.

        """
        passed = listeners.take_passed()
        self._are_passed = bool(passed)
        self._passed_over = addresses
        for listener in passed:
            self.live[self._number(listener.name, None, ())] = listener
        for address in () if passed else addresses:
            listener = listeners.bind(address)
            self.live[self._number(address.name, address.on_crash, ())] = listener

    def adopt(
        self,
        found: Mapping[int, socket.socket],
        names: Mapping[int, str],
        serving: Collection[int],
        addresses: Sequence[Address],
    ) -> None:
        """
        Take what the workers of a holder that was killed have; what is not of the *serving* generation is ended.

        What differs from *addresses* is for the next reload to change.
        """
        passed = listeners.take_passed()  # a service manager passes what it passed before: the workers have it
        listeners.close_all(passed)
        self._are_passed, self._passed_over = bool(passed), addresses
        asked = {address.name: address for address in addresses}
        for number, name in names.items():
            address = asked.get(name)
            self.names[number], self.policies[number] = name, address.on_crash if address else None
            if number not in found:
                continue
            listener = listeners.recognise(name, found[number], None if passed else address)
            if number not in serving:
                listeners.end(listener)
            elif drops_new_clients(listener.socket):
                self.ending[number] = (listener, 0.0)
            else:
                self.live[number] = listener

    # ---- succession

    def left(self) -> succession.Listeners:
        """Return what the successor needs; nothing is proposed while the holder is upgraded."""
        alive = [(number, listener, None) for number, listener in self.live.items()]
        ending = [(number, listener, since_s) for number, (listener, since_s) in self.ending.items()]
        return succession.Listeners(
            listeners=[
                succession.Listener(
                    number=number,
                    name=listener.name,
                    descriptor=listener.socket.fileno(),
                    path=listener.path,
                    address=listener.address,
                    file=listener.file,
                    removed_s=removed_s,
                )
                for number, listener, removed_s in (*alive, *ending)
            ],
            names=[(number, name, self.policies[number]) for number, name in self.names.items()],
            are_passed=self._are_passed,
        )

    def inherit(self, left: succession.Listeners) -> None:
        """Take the listeners of a predecessor over."""
        self.names = {number: name for number, name, _ in left.names}
        self.policies = {number: policy for number, _, policy in left.names}
        self._are_passed = left.are_passed
        for one in left.listeners:
            listener = Listener(one.name, socket.socket(fileno=one.descriptor), one.path, one.address, one.file)
            if one.removed_s is None:
                self.live[one.number] = listener
            else:
                self.ending[one.number] = (listener, one.removed_s)

    # ---- what a generation sees

    def of(self, generation: int) -> dict[int, Listener]:
        """Return what workers of *generation* accept from: until the commit from what is going, too."""
        ending = {number: listener for number, (listener, _) in self.ending.items()}
        proposal = self._proposal
        if proposal is None or proposal.generation != generation:
            return self.live | ending
        renamed = set(proposal.shared.values())
        everything = self.live | ending | proposal.added
        return {number: listener for number, listener in everything.items() if number not in renamed}

    def all(self) -> dict[int, Listener]:
        """Return every listener, by its number."""
        added = self._proposal.added if self._proposal is not None else {}
        return self.live | added | {number: listener for number, (listener, _) in self.ending.items()}

    def names_for(self, generation: int) -> dict[int, str]:
        """Return the names of all listeners that a connection of *generation* may be of."""
        proposal = self._proposal
        hidden = proposal.added if proposal is not None and proposal.generation != generation else {}
        return {number: name for number, name in self.names.items() if number not in hidden}

    def added(self, generation: int) -> frozenset[int]:
        """Return the numbers of what *generation* has and the serving one has not."""
        proposal = self._proposal
        return frozenset(proposal.added if proposal is not None and proposal.generation == generation else ())

    def listed(self) -> list[tuple[Listed, str]]:
        """Return every listener and its state."""
        added = self._proposal.added if self._proposal is not None else {}
        return [
            *((_listed(listener), "serving") for listener in self.live.values()),
            *((_listed(listener), "added") for listener in added.values()),
            *((_listed(listener), "ending") for listener, _ in self.ending.values()),
        ]

    # ---- changes

    def propose(self, generation: int, addresses: Sequence[Address], referenced: Collection[int]) -> None:
        """
        Bind what *generation* is to have more; *referenced* are the numbers that connections bear.

        Raises:
            AddressInUse, PermissionRefused, BadAddress: one cannot be bound; nothing has changed.

        """
        if self._proposal is not None:  # nobody took it up: the holder was told to stop at that moment
            self.withdraw(self._proposal.generation)
        if self._are_passed:
            self._pass_over(addresses)
            return
        leaving = {number for number, listener in self.live.items() if listener.address not in addresses}
        present = [listener.address for listener in self.live.values()]
        self._proposal = _Proposal(generation, leaving)
        try:
            for address in addresses:
                if address not in present:
                    self._add(self._proposal, address, referenced)
        except Exception:
            self.withdraw(generation)
            raise

    def _pass_over(self, addresses: Sequence[Address]) -> None:
        if addresses != self._passed_over:
            advice = "the service manager has passed the listeners: change its socket unit and restart both"
            log.warning("event=listen-passed-over advice=%r", advice)
        self._passed_over = addresses

    def _add(self, proposal: _Proposal, address: Address, referenced: Collection[int]) -> None:
        leaving = {number: self.live[number] for number in proposal.leaving}
        going = leaving | {number: listener for number, (listener, _) in self.ending.items()}
        free = {number: listener for number, listener in going.items() if number not in proposal.shared.values()}
        same = [number for number, listener in free.items() if listeners.is_at(listener, address)]
        if same:
            listener = Listener(address.name, going[same[0]].socket.dup(), address=address)
        else:
            is_successor = any(listener.path == address.path is not None for listener in leaving.values())
            listener = listeners.bind(address, is_successor=is_successor)
        number = self._number(address.name, address.on_crash, referenced)
        proposal.added[number] = listener
        if same:
            proposal.shared[number] = same[0]
            if same[0] in self.ending:
                take_new_clients(listener.socket)

    def commit(self, generation: int, now_s: float) -> Changes:
        """Make what *generation* has all that there is; what it has not any more lets nobody new in."""
        proposal = self._take(generation)
        if proposal is None:
            return Changes()
        for listener in proposal.added.values():
            _take_place(listener)
        removed = {number: self.live.pop(number) for number in proposal.leaving}
        changes = Changes(tuple(map(_listed, proposal.added.values())), tuple(map(_listed, removed.values())))
        self.live |= proposal.added
        for number in proposal.shared.values():  # the socket lives on under its new number
            listener = removed.pop(number) if number in removed else self.ending.pop(number)[0]
            listener.socket.close()
        for number, listener in removed.items():
            listeners.turn_away(listener)
            self.ending[number] = (listener, now_s)
        self.end_served(now_s)
        return changes

    def withdraw(self, generation: int) -> None:
        """End what was bound for *generation*: it does not serve."""
        proposal = self._take(generation)
        if proposal is None:
            return
        for number, listener in proposal.added.items():
            old = proposal.shared.get(number)
            if old is None:
                listeners.end(listener)
                continue
            if old in self.ending:
                drop_new_clients(listener.socket)
            listener.socket.close()

    def _take(self, generation: int) -> _Proposal | None:
        if self._proposal is None or self._proposal.generation != generation:
            return None
        proposal, self._proposal = self._proposal, None
        return proposal

    def end_served(self, now_s: float) -> None:
        """End those of the removed whose backlog is served, and in which no handshake can be left."""
        renamed = set(self._proposal.shared.values()) if self._proposal is not None else set()
        for number, (listener, since_s) in list(self.ending.items()):
            is_settled = listener.path is not None or now_s - since_s >= HANDSHAKE_S
            if number not in renamed and is_settled and not listeners.has_waiting(listener):
                del self.ending[number]
                log.info("event=listener-ended name=%s address=%s", listener.name, listener.url)
                listeners.end(listener)

    def close(self) -> None:
        """Close all: the holder ends."""
        if self._proposal is not None:
            self.withdraw(self._proposal.generation)
        listeners.close_all([*self.live.values(), *(listener for listener, _ in self.ending.values())])
        self.live.clear()
        self.ending.clear()

    def _number(self, name: str, policy: str | None, referenced: Collection[int]) -> int:
        """Return the next number; when all were used, the lowest that nothing bears."""
        number = max(self.names, default=-1) + 1
        if number >= NUMBERS:
            added = self._proposal.added if self._proposal is not None else {}
            number = min(set(range(NUMBERS)).difference(self.live, self.ending, added, referenced))
        self.names[number], self.policies[number] = name, policy
        return number


def _listed(listener: Listener) -> Listed:
    return Listed(listener.name, listener.url)


def _take_place(listener: Listener) -> None:
    try:
        listeners.take_place(listener)
    except OSError as problem:  # somebody has changed the directory since: the others serve all the same
        log.error("event=no-place address=%s problem=%r", listener.url, str(problem))  # noqa: TRY400  # a sentence
