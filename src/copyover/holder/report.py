"""
What the holder tells of itself: results and status as JSON objects, failures as sentences.

It reads the machine and changes nothing.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

import attrs

from copyover.entries import Standing
from copyover.errors import AddressInUse, BadAddress, PermissionRefused
from copyover.events import Outcome, Result
from copyover.holder.blocking import blocked_by
from copyover.holdings import Strength
from copyover.messages import Kind
from copyover.sockets import cookie_of, network_of, place_of_descriptor, plight_of_descriptor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from copyover.entries import Entry
    from copyover.holder.hand import Hand
    from copyover.holder.listening import Changes
    from copyover.holdings import Worker
    from copyover.listeners import Listener
    from copyover.reload import Machine

SCHEMA = 1
_ADDRESS_CODES = frozenset(kind.exit_code for kind in (AddressInUse, PermissionRefused, BadAddress))


def exit_code(result: Result) -> int:
    """Return what ``reload`` exits with: the truth about this change."""
    if result.lost:
        return 4
    if result.outcome is Outcome.REFUSED and result.status in _ADDRESS_CODES:
        return result.status
    return {Outcome.DONE: 0, Outcome.BUSY: 5}.get(result.outcome, 3)


def cancel_code(result: Result) -> int:
    """Return what ``cancel`` exits with: 0 if the change was undone."""
    return 4 if result.lost else 3 if result.outcome is Outcome.DONE else 0


def result_object(result: Result, hands: Mapping[int, Hand], tail: Sequence[str], changes: Changes) -> dict[str, Any]:
    """Return the object of ``reload --json``."""
    return {
        "schema": SCHEMA,
        "outcome": result.outcome.value,
        "exit_code": exit_code(result),
        "generation": {"from": result.from_generation, "to": result.to_generation},
        "serving_generation": result.serving_generation,
        "connections": {name: getattr(result, name) for name in ("moved", "kept", "ended", "lost", "closed")},
        "listeners": attrs.asdict(changes),
        "kept": [{"connection": cookie, "reason": reason} for cookie, reason in result.kept_reasons],
        "pause_ms": percentiles(result.pauses_us),
        "phases_ms": result.phases_ms,
        "error": _error(result, hands),
        "stderr_tail": list(tail),
    }


def _error(result: Result, hands: Mapping[int, Hand]) -> str | None:
    if result.error is None:
        return None
    if result.serving_generation == 0 or result.outcome is Outcome.BUSY:  # in a bake the other generation serves
        return result.error
    pids = [str(hand.pid) for hand in hands.values() if hand.generation == result.serving_generation]
    served = "every connection" if result.lost == 0 else "the others"
    lost = f"; {result.lost} connections were lost" if result.lost else ""
    if result.closed:
        lost += f"; {result.closed} connections of listeners that it had added were closed"
    if not pids:
        return f"{result.error}{lost}; no worker of generation {result.serving_generation} lives, it is being restarted"
    return f"{result.error}{lost}; generation {result.serving_generation} (pid {', '.join(pids)}) still serves {served}"


def percentiles(pauses_us: Sequence[int]) -> dict[str, float]:
    ordered = sorted(pauses_us)
    if not ordered:
        return {"p50": 0.0, "p99": 0.0, "max": 0.0}

    def at(share: float) -> float:
        return round(ordered[min(int(len(ordered) * share), len(ordered) - 1)] / 1000, 3)

    return {"p50": at(0.5), "p99": at(0.99), "max": at(1.0)}


def progress(machine: Machine) -> dict[str, Any]:
    """Return how far the change is."""
    change = machine.change
    return {
        "phase": machine.phase.value,
        "moved": change.move.moved if change else 0,
        "open": len(change.move.open) if change else 0,
    }


def status(machine: Machine, hands: Mapping[int, Hand], *, now_s: float, deadline_s: float | None) -> dict[str, Any]:
    """Return the part of ``status --json`` that the machine knows."""
    owned = machine.ledger.owned
    return {
        "generation": machine.holdings.generation,
        "phase": {
            "name": machine.phase.value,
            "deadline_in_s": None if deadline_s is None else round(max(deadline_s - now_s, 0.0), 3),
            "blocked_by": blocked_by(machine, hands, now_s),
        },
        "workers": [
            {
                "worker": worker.id,
                "pid": hands[worker.id].pid if worker.id in hands else None,
                "generation": worker.generation,
                "state": _state(worker, hands.get(worker.id)),
                "release": {
                    "directory": hands[worker.id].release.directory,
                    "python": hands[worker.id].release.python,
                    "application": hands[worker.id].release.application,
                }
                if worker.id in hands
                else None,
                "connections": owned[worker.id],
                "is_full": worker.is_full,
            }
            for worker in machine.holdings.workers.values()
        ],
        "retiring": _retiring(machine),
        "connections": {
            "live": len(machine.ledger),
            "parked": len(machine.ledger.parked()),
            "kept": len(machine.holdings.kept),
        },
        "limits": {
            "connections": machine.holdings.capacity,
            "worker_connections": machine.holdings.quotas.connections,
            "is_full": machine.holdings.is_full,
        },
        "counters": dict(sorted(machine.holdings.counters.items())),
    }


def _retiring(machine: Machine) -> list[dict[str, Any]]:
    """Return each retiring generation with what keeps it alive, by kind and reason, the most first."""
    holdings = machine.holdings
    retiring = {w.id: w.generation for w in holdings.workers.values() if w.strength is Strength.RETIRING}
    found: dict[int, collections.Counter[tuple[str, str]]] = {
        number: collections.Counter() for number in retiring.values()
    }
    for worker, generation in retiring.items():
        served = machine.ledger.find(Standing.SERVED, owners=(worker,))
        for cookie, kind in zip(served, machine.ledger.column("kind", served), strict=True):
            found[generation][kind_name(kind), holdings.kept.get(cookie, "")] += 1
    return [
        {
            "generation": generation,
            "kept": [
                {"kind": kind, "reason": reason, "connections": number}
                for (kind, reason), number in counted.most_common()
            ],
        }
        for generation, counted in sorted(found.items())
    ]


def kind_name(kind: int) -> str:
    return Kind(kind).name.lower()


def _state(worker: Worker, hand: Hand | None) -> str:
    return "unreapable" if hand is not None and hand.is_unreapable else worker.strength.value


def is_serving(machine: Machine) -> bool:
    return any(
        worker.strength is Strength.READY and worker.generation == machine.holdings.generation
        for worker in machine.holdings.workers.values()
    )


def connection_object(entry: Entry, machine: Machine, listener: str, peer: str | None) -> dict[str, Any]:
    """Return one row of ``connections --json``."""
    worker = machine.holdings.workers.get(entry.owner)
    return {
        "connection": entry.cookie,
        "listener": listener,
        "peer": peer,
        "worker": entry.owner,
        "generation": worker.generation if worker else None,
        "kind": kind_name(entry.kind),
        "state": entry.standing.value,
        "kept": machine.holdings.kept.get(entry.cookie),
    }


def ledger_object(machine: Machine, listeners: Mapping[int, Listener], only: object) -> dict[str, Any]:
    """
    Return what an audit compares with the kernel's account: the ledger in columns, thousands of rows long.

    *only* is a list of cookies, or anything else for all. How descriptors fare is told for such a choice alone: it
    costs the holder two system calls a row.
    """
    ledger, workers = machine.ledger, machine.holdings.workers
    cookies = list(ledger)
    former = {
        listener: descriptor
        for listener, descriptor in zip(
            ledger.column("listener", cookies), ledger.column("descriptor", cookies), strict=True
        )
        if listener not in listeners
    }
    if type(only) is list:
        cookies = [cookie for cookie in only if type(cookie) is int and cookie in ledger]
    owners = ledger.column("owner", cookies)
    columns: dict[str, list[Any]] = {
        "connection": cookies,
        "listener": ledger.column("listener", cookies),
        "worker": owners,
        "generation": [workers[owner].generation if owner in workers else 0 for owner in owners],
        "epoch": ledger.column("epoch", cookies),
        "state": [ledger.standing(cookie).value for cookie in cookies],
    }
    if type(only) is list:
        descriptors = ledger.column("descriptor", cookies)
        columns["plight"] = list(map(plight_of_descriptor, descriptors, cookies))
    return {
        "listeners": [{"number": number, **_listener_object(listener)} for number, listener in listeners.items()],
        # Connections outlive their listener: where they are must be looked for, too.
        "former": [place_of_descriptor(descriptor) for descriptor in former.values()],
        "counters": {key: machine.holdings.counters[key] for key in ("accepted", "ended", "expired", "lost")},
        "connections": columns,
    }


def _listener_object(listener: Listener) -> dict[str, Any]:
    name = listener.socket.getsockname()
    return {
        "name": listener.name,
        "address": listener.url,
        "cookie": cookie_of(listener.socket),
        "network": network_of(listener.socket),
        "family": int(listener.socket.family),
        "port": name[1] if isinstance(name, tuple) else 0,
    }
