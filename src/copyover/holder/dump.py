"""
What the holder writes down at SIGUSR1: all that it knows, but no byte of a client and no state.

It reads the machine and changes nothing; the file appears whole or not at all.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from copyover.holder.chronicle import utc

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from copyover.change import Change
    from copyover.entries import Entry
    from copyover.holder.hand import Hand
    from copyover.holdings import Worker
    from copyover.reload import Machine

MOST_DUMPS = 10


def content(machine: Machine, hands: Mapping[int, Hand], timers: Mapping[str, float]) -> dict[str, Any]:
    """Return what the machine knows; *timers* has the seconds that are left of each."""
    return {
        "phase": machine.phase.value,
        "change": None if machine.change is None else _change(machine.change),
        "generation": machine.holdings.generation,
        "wanted_workers": machine.holdings.wanted,
        "workers": [_worker(worker, hands.get(worker.id)) for worker in machine.holdings.workers.values()],
        "ledger": list(map(_entry, machine.ledger.entries())),
        "tombstones": sorted(machine.ledger.tombstones),
        "kept": {str(cookie): reason for cookie, reason in machine.holdings.kept.items()},
        "timers": {name: round(left_s, 3) for name, left_s in timers.items()},
        "counters": dict(machine.holdings.counters),
    }


def write(directory: Path, found: Mapping[str, Any]) -> Path:
    """
    Write a dump, 0600, and remove the oldest beyond the tenth.

    Raises:
        OSError: it cannot be written.

    """
    now = utc()
    path = directory / f"dump-{now:%Y%m%dT%H%M%S.%fZ}.json"
    unfinished = path.with_suffix(".unfinished")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            # Not json.dump, and no indent: the encoder in C takes a third of the time, and the holder waits.
            file.write(json.dumps({"schema": 1, "time": now.isoformat(), **found}, ensure_ascii=False))
        unfinished.rename(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    for old in sorted(directory.glob("dump-*.json"))[:-MOST_DUMPS]:
        old.unlink(missing_ok=True)
    return path


def _change(change: Change) -> dict[str, Any]:
    move, asked = change.move, change.asked
    return {
        "from_generation": change.from_generation,
        "to_generation": asked.generation,
        "move": asked.move,
        "timeout_s": asked.timeout_s,
        "incumbents": move.incumbents,
        "replacements": move.replacements,
        "is_backwards": move.is_backwards,
        "open": sorted(move.open),
        "moved": move.moved,
        "ended": move.ended,
        "lost": move.lost,
        "phases_ms": change.phases_ms,
        "reason": change.reason,
    }


def _worker(worker: Worker, hand: Hand | None) -> dict[str, Any]:
    return {
        "worker": worker.id,
        "pid": None if hand is None else hand.pid,
        "generation": worker.generation,
        "state": worker.strength.value,
        "lent": worker.lent,
        "staged": worker.staged,
        "staged_acked": worker.staged_acked,
        "accept_offs": worker.offs,
        "accept_offs_acked": worker.offs_acked,
        "is_off": worker.is_off,
        "has_gathered": worker.has_gathered,
        "has_entered": worker.has_entered,
        "unanswered_freezes": sorted(worker.unanswered),
        "still_to_freeze": len(worker.queue),
        "channel_has_backlog": hand is not None and hand.channel.has_backlog,
        "last_lines": [] if hand is None else list(hand.lines),
    }


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "connection": entry.cookie,
        "owner": entry.owner,
        "epoch": entry.epoch,
        "standing": entry.standing.value,
        "listener": entry.listener,
        "passage": {
            "staged_in": entry.staged_in,
            "origin": entry.origin,
            "has_record": entry.record is not None,
            "is_given": entry.is_given,
            "was_adopted": entry.was_adopted,
            "kept_because": entry.kept_because,
            "pushed": len(entry.pushed),
            "unfit": sorted(entry.unfit),
            "since_s": entry.since_s,
        }
        if entry.has_passage
        else None,
    }
