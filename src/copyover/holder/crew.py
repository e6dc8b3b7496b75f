"""
All workers of the holder: started, heard, killed and buried; what they say comes out as events.

What their messages mean is decided in reload.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import selectors
import time
from typing import TYPE_CHECKING, Any

import attrs

from copyover import events, messages, process, slots, succession
from copyover.change import Phase
from copyover.channel import RETRY_S, Backlog
from copyover.entries import Standing
from copyover.errors import ChangeRefused, ChannelClosed, CopyoverError, WireError
from copyover.holder import memory
from copyover.holder.hand import Hand, check_lend
from copyover.holder.recovery import Orphan, SlotFile, is_current, recover

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from copyover.channel import Packet
    from copyover.config import Config
    from copyover.holder.listening import Listening
    from copyover.holder.loop import Loop
    from copyover.release import Release
    from copyover.reload import Machine
    from copyover.users import User

PACKETS_A_TURN = 64
REST_S = 0.005  # between two looks at what a busy worker says of connections that come and go
REASONS_TOLD = 10
REAP_S = 10.0
UNREAPABLE_ADVICE = (
    "it was killed and does not end; its connections wait until it does: see its state and wchan in /proc, and which "
    "disk or network file system does not answer"
)


@attrs.define
class Generation:
    """What the workers of one generation are started from, and what the last of them that died wrote."""

    release: Release
    config: Config
    last_words: list[str] = attrs.field(factory=list)

    def left(self) -> succession.Generation:
        return succession.Generation(release=self.release, config=self.config, last_words=list(self.last_words))

    @classmethod
    def inherit(cls, left: succession.Generation) -> Generation:
        return cls(left.release, left.config, list(left.last_words))


class Crew:
    """
    The worker processes.

    *tell* takes an event; *settle* has it handled, and what that queues; *note* writes down what happened.
    """

    def __init__(
        self,
        loop: Loop,
        machine: Machine,
        listening: Listening,
        directory: Path,
        *,
        environment: dict[str, str],
        user: User | None,
        tell: Callable[[events.Event], None],
        settle: Callable[[], None],
        note: Callable[[str, Mapping[str, Any], int], None],
    ) -> None:
        self._loop = loop
        self._listening = listening
        self._directory = directory
        self._environment = environment
        self._user = user
        self._machine = machine
        self._tell = tell
        self._settle = settle
        self._note = note
        self.hands: dict[int, Hand] = {}
        self.generations: dict[int, Generation] = {}
        self.protocol_errors = 0
        self._is_oom_refused = False

    # ---- starting

    def spawn(self, worker: int, generation: int, after_s: float) -> None:
        self._loop.set_timer(f"spawn {worker}", after_s, lambda: self._start(worker, generation))

    def _start(self, worker: int, generation: int) -> None:
        try:
            release = self.generations[generation].release
            slot_file = self._make_slots(worker, generation)
            hand = Hand.start(worker, generation, release, self._environment, slots=slot_file, user=self._user)
        except (CopyoverError, OSError) as problem:
            self._note("not-started", {"worker": worker, "problem": str(problem)}, logging.ERROR)
            self._tell(events.Died(worker, str(problem)))
            return
        if generation != self._machine.holdings.generation:
            self._set_oom_score(hand, process.EXPENDABLE)
        self.attend(hand)
        self._note("started", {"worker": worker, "pid": hand.pid, "generation": generation}, logging.INFO)

    def _make_slots(self, worker: int, generation: int) -> SlotFile:
        size = self.generations[generation].config.slot_bytes
        if size is None:  # the worker, which knows what it serves, may give its file another shape
            size = slots.DEFAULT_BYTES
        header = slots.shape(size, process.descriptor_limit(), worker=worker, generation=generation)
        return SlotFile.make(self._directory, self._environment["COPYOVER_INSTANCE"], header)

    def attend(self, hand: Hand) -> None:
        """Watch a worker that lives."""
        self.hands[hand.worker] = hand
        self._loop.watch(hand.child, lambda: self._bury(hand))
        self._loop.watch(hand.channel, lambda: self._receive(hand))
        if hand.tail is not None:
            self._loop.watch(hand.tail, lambda: self._read_tail(hand))
        hand.channel.on_backlog = lambda backlog: self._watch_channel(hand, backlog)

    def _watch_channel(self, hand: Hand, backlog: Backlog) -> None:
        self._loop.cancel_timer(f"hear {hand.worker}")  # it would watch for input alone
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if backlog is Backlog.FULL else 0)
        self._loop.watch(hand.channel, lambda: self._receive(hand), mask)
        if backlog is Backlog.SCARCE:
            self._loop.set_timer(f"flush {hand.worker}", RETRY_S, lambda: self._receive(hand))
        else:
            self._loop.cancel_timer(f"flush {hand.worker}")

    def forget_generations(self, newest: int) -> None:
        """Keep those that have a worker, and the newest."""
        alive = {hand.generation for hand in self.hands.values()} | {newest}
        self.generations = {number: kept for number, kept in self.generations.items() if number in alive}

    def favour(self, generation: int) -> None:
        """It serves from now on: its workers are no more expendable than the holder."""
        for hand in self.hands.values():
            if hand.generation == generation:
                self._set_oom_score(hand, 0)

    def _set_oom_score(self, hand: Hand, above_ours: int) -> None:
        try:
            hand.child.set_oom_score(above_ours)
        except OSError as problem:  # a preference of the kernel's and nothing more
            if not self._is_oom_refused:
                self._is_oom_refused = True
                self._note("oom-score-not-set", {"worker": hand.worker, "problem": str(problem)}, logging.WARNING)

    # ---- succession

    def left(self) -> tuple[list[tuple[int, succession.Generation]], list[succession.Hand]]:
        """Return what the successor needs to know of all generations and processes."""
        generations = [(number, generation.left()) for number, generation in self.generations.items()]
        return generations, [hand.left() for hand in self.hands.values()]

    def inherit(self, estate: succession.Estate) -> None:
        """Take the generations and processes of a predecessor over."""
        self.protocol_errors = estate.protocol_errors
        self.generations = {number: Generation.inherit(left) for number, left in estate.generations}
        said = {worker.id: worker.abilities for worker in estate.held.workers}
        for hand in estate.hands:
            self.attend(Hand.inherit(hand, self.generations[hand.generation].release, said[hand.worker]))

    def find_backlog(self) -> int | None:
        """Return a worker that has not taken all that was sent to it, if there is one."""
        return next((worker for worker, hand in self.hands.items() if hand.channel.has_backlog), None)

    # ---- talking

    def send(self, worker: int, message: messages.Message, descriptors: Iterable[int]) -> None:
        hand = self.hands.get(worker)
        if hand is not None:
            with contextlib.suppress(ChannelClosed):  # it is dying; its pidfd tells
                hand.channel.send(message, tuple(descriptors))

    def _receive(self, hand: Hand) -> None:
        heard = 0
        try:
            if hand.channel.has_backlog:
                hand.channel.flush()
            while heard < PACKETS_A_TURN:
                self._take_packet(hand, hand.channel.receive())
                self._settle()
                heard += 1
                if hand.worker not in self.hands:
                    return  # what it said ended them all
        except BlockingIOError:
            if heard:
                self._rest_if_busy(hand)
        except ChannelClosed:
            self._stop_hearing(hand)  # not its death: that is for the pidfd to say
        except (WireError, ChangeRefused) as problem:
            self._note("refused", {"worker": hand.worker, "problem": str(problem)}, logging.ERROR)
            self.protocol_errors += 1
            self._tell(events.FromWorker(hand.worker, messages.Failed(reason=str(problem), status=3)))
            self._stop_hearing(hand)
            self._kill(hand)

    def _rest_if_busy(self, hand: Hand) -> None:
        """
        Let what a busy worker says gather for a moment: while nothing moves, it waits for no answer.

        What it has sent counts already: descriptors on their way live, and are read when it is dead. unix(7)
        """
        before_s, hand.heard_s = hand.heard_s, time.monotonic()
        is_busy = hand.heard_s - before_s < 2 * REST_S
        is_calm = self._machine.phase is Phase.SERVING and not self._machine.holdings.is_nearly_full
        if is_busy and is_calm and not hand.channel.has_backlog:
            self._loop.unwatch(hand.channel)
            self._loop.set_timer(f"hear {hand.worker}", REST_S, lambda: self._hear_again(hand))

    def hear_all(self) -> None:
        """Take what they have said by now: whoever asks is told the truth."""
        for hand in list(self.hands.values()):
            if self._loop.cancel_timer(f"hear {hand.worker}"):
                self._hear_again(hand)

    def _hear_again(self, hand: Hand) -> None:
        self._loop.watch(hand.channel, lambda: self._receive(hand))
        self._receive(hand)

    def _stop_hearing(self, hand: Hand) -> None:
        self._loop.unwatch(hand.channel)
        self._loop.cancel_timer(f"flush {hand.worker}")
        self._loop.cancel_timer(f"hear {hand.worker}")

    def _take_packet(self, hand: Hand, packet: Packet) -> None:
        with packet:
            message = packet.message
            if hand.hello is None:
                options = self.generations[hand.generation].config.worker_options
                listeners, names = self._listening.of(hand.generation), self._listening.names_for(hand.generation)
                hand.welcome(messages.expect(message, messages.Hello), listeners, names, options)
                return
            if isinstance(message, messages.Ready):
                hand.ready = message
            if isinstance(message, messages.Lend):
                check_lend(message, packet.descriptors, listeners=self._listening.names)
            self._tell(events.FromWorker(hand.worker, message, packet.take()))

    def break_with(self, worker: int) -> None:
        """It broke the protocol: its word cannot be trusted for any connection."""
        self.protocol_errors += 1
        if worker in self.hands:
            self._kill(self.hands[worker])

    # ---- ending

    def kill(self, worker: int) -> None:
        if worker in self.hands:
            self._kill(self.hands[worker])
        elif self._loop.cancel_timer(f"spawn {worker}"):
            self._tell(events.Died(worker, "was not started any more"))

    def _kill(self, hand: Hand) -> None:
        hand.child.kill()
        if not hand.child.is_reaped and not hand.is_unreapable and self._loop.deadline_s(f"reap {hand.worker}") is None:
            self._loop.set_timer(f"reap {hand.worker}", REAP_S, lambda: self._report_unreapable(hand))

    def _report_unreapable(self, hand: Hand) -> None:
        """SIGKILL did not end it: it is in the kernel (state D), may still write, and so nothing of it may move."""
        hand.is_unreapable = True
        stuck = {"worker": hand.worker, "pid": hand.pid, "generation": hand.generation, "advice": UNREAPABLE_ADVICE}
        self._note("unreapable", stuck, logging.ERROR)

    def end_all(self) -> None:
        """Kill and reap all at once: nothing ever served."""
        for hand in self.hands.values():
            self._loop.unwatch(hand.child)
            hand.child.kill()
            hand.child.reap()
            hand.close()
        self.hands.clear()

    def _bury(self, hand: Hand) -> None:
        """Reap, read its channel to the end, and only then say that it is dead."""
        self._loop.unwatch(hand.child)
        self._loop.cancel_timer(f"reap {hand.worker}")
        how = hand.child.reap()
        for packet in hand.remaining():
            # The hello of a worker that died at once: there is nobody to welcome, or to refuse.
            with contextlib.suppress(WireError, ChangeRefused):
                self._take_packet(hand, packet)
                self._settle()
        self._tell(events.Reaped(hand.worker))
        self._settle()
        self._loop.fire_due("spawn ")  # the next interpreter boots while we look at what is left
        self._note_last_words(hand)
        words = hand.in_words(how)
        if hand.tail is not None:
            self._loop.unwatch(hand.tail)
        recovered, ended = self._recover(hand)
        del self.hands[hand.worker]
        self._stop_hearing(hand)  # only now: what it had sent may have been answered
        hand.close()
        self._tell(events.Died(hand.worker, words, recovered, ended))
        self._settle()
        process.reap_orphans()
        self._loop.set_timer("memory", memory.AFTER_S, memory.give_back)

    def _recover(self, hand: Hand) -> tuple[dict[int, messages.Record | None], frozenset[int]]:
        """Say what its slots and the kernel tell of what it had; of the first few that are reset, why."""
        ledger = self._machine.ledger
        cookies = ledger.find(Standing.SERVED, Standing.FREEZING, Standing.THAWING, owners=(hand.worker,))
        descriptors = dict(zip(cookies, ledger.column("descriptor", cookies), strict=True))
        listeners = ledger.column("listener", cookies)
        policies = {listener: self._policy(listener) for listener in set(listeners)}
        on_crash = map(policies.__getitem__, listeners)
        orphans = list(map(Orphan, cookies, ledger.column("epoch", cookies), descriptors.values(), on_crash))
        found = recover(hand.slots.fileno(), orphans)
        # What it was given and nobody has used since goes on as it was given, whatever its handler made of it.
        recovered: dict[int, messages.Record | None] = {
            cookie: record
            for cookie, record in found.records.items()
            if not _is_as_given(record, ledger.record(cookie))
        }
        reset: dict[int, str] = {}
        for cookie, reason in found.reset.items():
            given = ledger.record(cookie)
            if given is None or not is_current(descriptors[cookie], given):
                recovered[cookie] = None
                reset[cookie] = reason
        for cookie, reason in itertools.islice((reset | found.interrupted).items(), REASONS_TOLD):
            self._note("not-exact", {"connection": cookie, "reason": reason}, logging.INFO)
        return recovered, found.ended

    def _policy(self, listener: int) -> str:
        generation = self.generations.get(self._machine.holdings.generation)
        default = generation.config.on_crash if generation else "reset"
        return self._listening.policies.get(listener) or default

    # ---- what they wrote

    def _read_tail(self, hand: Hand) -> None:
        if hand.tail is not None and not hand.tail.read():
            self._loop.unwatch(hand.tail)
            hand.drop_tail()

    def _note_last_words(self, hand: Hand) -> None:
        if hand.tail is not None:
            hand.tail.drain()
        self.generations[hand.generation].last_words = list(hand.lines)

    def last_words(self, generation: int) -> list[str]:
        """Return what a generation wrote before it was ready; of one that is gone, what its last worker wrote."""
        for hand in self.hands.values():
            if hand.generation == generation and hand.ready is None:
                self._note_last_words(hand)
        return self.generations[generation].last_words if generation in self.generations else []


def _is_as_given(record: messages.Record, given: messages.Record | None) -> bool:
    """Whether nobody has used a connection since its worker was given it: not a byte, and no FIN of ours."""
    if given is None:
        return False
    is_open = not (record.flags ^ given.flags) & messages.RecordFlag.WRITE_CLOSED
    return is_open and (record.received, record.sent) == (given.received, given.sent)
