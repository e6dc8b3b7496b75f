"""
What a phase waits for, as an operator needs to know it: which worker or connection, where it stands, for how long.

It reads the machine and changes nothing.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

from copyover.change import Phase
from copyover.entries import Standing
from copyover.holdings import Strength
from copyover.sockets import peer_of_descriptor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from copyover.change import Change
    from copyover.entries import Entry
    from copyover.holder.hand import Hand
    from copyover.holdings import Worker
    from copyover.reload import Machine

SHOWN = 10
LINES_SHOWN = 3

IN_WORDS = {
    Standing.SERVED: "served on until it is its turn to be stopped",
    Standing.FREEZING: "asked to stop at a boundary, and has reached none yet",
    Standing.PARKED: "stopped; its record is in the holder and no worker was given it",
    Standing.THAWING: "given to this worker, which has not said that it serves it",
}


def blocked_by(machine: Machine, hands: Mapping[int, Hand], now_s: float) -> list[dict[str, Any]]:
    """Return the first ten that the phase waits for: workers, then connections, the longest first."""
    change, workers = machine.change, machine.holdings.workers
    waits: list[tuple[Worker, str]] = []
    slow: Iterable[Entry] = ()
    if machine.phase is Phase.STOPPING:
        waits = [(w, f"has not left; {machine.ledger.owned[w.id]} connections") for w in workers.values()]
    elif change is not None and machine.phase is Phase.BOOTING:
        booting = [workers[w] for w in change.move.replacements if w in workers]
        waits = [(worker, "not ready yet") for worker in booting if worker.strength is Strength.BOOTING]
    elif change is not None and machine.phase is Phase.STAGING:
        waits = [
            (worker, f"has built {worker.staged_acked} of {worker.staged} connections")
            for worker in change.move.living_replacements()
            if worker.staged_acked < worker.staged
        ]
    elif change is not None:
        waits = _owing(machine, change)
        slow = [machine.ledger.entry(cookie) for cookie in change.move.open if cookie in machine.ledger]
    found = [_worker(worker, reason, hands, now_s) for worker, reason in waits[:SHOWN]]
    longest = heapq.nsmallest(SHOWN - len(found), slow, key=lambda entry: entry.since_s)
    return found + [_connection(entry, hands, now_s) for entry in longest]


def _owing(machine: Machine, change: Change) -> list[tuple[Worker, str]]:
    """Return the workers whose answers a move waits for."""
    move = change.move
    owing = [(w, "was killed and is not reaped") for w in machine.holdings.workers.values() if _is_dying(w)]
    sources = move.living_replacements() if move.is_backwards else move.living_incumbents()
    owing += [(w, "has not said that it accepts nothing more") for w in sources if not w.is_off]
    if move.has_cut and not move.is_backwards:
        owing += [(w, "has not closed its cut") for w in sources if w.is_off and not w.has_gathered]
    return owing


def _is_dying(worker: Worker) -> bool:
    return worker.strength is Strength.DYING


def _worker(worker: Worker, reason: str, hands: Mapping[int, Hand], now_s: float) -> dict[str, Any]:
    hand = hands.get(worker.id)
    return {
        "worker": worker.id,
        "pid": None if hand is None else hand.pid,
        "generation": worker.generation,
        "for_s": None if hand is None else round(now_s - hand.started_s, 3),
        "reason": reason,
        "last_lines": [] if hand is None else list(hand.lines)[-LINES_SHOWN:],
    }


def _connection(entry: Entry, hands: Mapping[int, Hand], now_s: float) -> dict[str, Any]:
    hand, refused = hands.get(entry.owner), entry.kept_because
    return {
        "connection": entry.cookie,
        "peer": peer_of_descriptor(entry.descriptor),
        "worker": entry.owner,
        "pid": None if hand is None else hand.pid,
        "standing": entry.standing.value,
        "for_s": round(now_s - entry.since_s, 3),
        "reason": IN_WORDS[entry.standing] if refused is None else f"{IN_WORDS[entry.standing]}; {refused}",
    }
