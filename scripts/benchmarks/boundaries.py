"""
What writing down a boundary costs a worker, in the real connection of a real loop, for several states.

It needs no client and no holder.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
from typing import TYPE_CHECKING, Any

from benchmarks.figures import Effort, Figure
from copyover import slots
from copyover.messages import Record
from copyover.worker.application import Application
from copyover.worker.connection import Connection
from copyover.worker.served import Limits
from copyover.worker.slot import Slots
from copyover.worker.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Callable

    Change = Callable[[dict[str, Any], int], None]

BOUNDARIES, FEW = 50_000, 1000
STATES: dict[str, Change] = {
    "empty": lambda *_: None,
    "three keys, unchanged": lambda state, _: state.update(name="somebody", room="hall", seen=1),
    "three keys, one counts": lambda state, turn: state.update(name="somebody", room="hall", seen=turn),
    "a list in it": lambda state, turn: state.update(name="somebody", log=[turn, turn]),
}


def slot_costs(effort: Effort) -> list[Figure]:
    """Return what a slot costs at each boundary, by the state of the connection."""
    figures, turns = [], FEW if effort.is_quick else BOUNDARIES
    for name, change in STATES.items():
        with_slot, without = [], []
        for _ in range(effort.repeats):
            without.append(asyncio.run(_boundary_us(change, turns, has_slot=False)))
            with_slot.append(asyncio.run(_boundary_us(change, turns, has_slot=True)))
        costs = tuple(saved - plain for saved, plain in zip(with_slot, without, strict=True))
        figures.append(Figure(f"CPU of a slot a boundary, state: {name}", costs, "µs"))
    return figures


async def _boundary_us(change: Change, turns: int, *, has_slot: bool) -> float:
    """Return the microseconds of one turn: the state changes, a boundary is passed."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    application: Application[dict[str, Any]] = Application(handler=_nobody)
    with ours, theirs, tempfile.TemporaryFile() as file:
        header = slots.shape(1024, 10, worker=1, generation=1)
        file.truncate(header.file_bytes)
        os.pwrite(file.fileno(), header.pack(), 0)
        book = Slots(file.fileno(), application.encode_state, is_json=True, schema=1)
        connection: Connection[dict[str, Any]] = Connection(
            loop, Transport(loop, ours), cookie=1, listener="", limits=Limits(), forward=lambda *_: False
        )
        connection.state = {}
        if has_slot:
            connection.slot = book.take(1, 0, Record())
        start_ns = time.process_time_ns()
        for turn in range(turns):
            change(connection.state, turn)
            await connection.boundary()
        return (time.process_time_ns() - start_ns) / turns / 1000


async def _nobody(_: Connection[dict[str, Any]]) -> None:
    pass
