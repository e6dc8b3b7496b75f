"""
One reload under way: its phase, what was asked for, what it took so far, and the result.

It keeps the account; what happens next is decided in reload.
"""

from __future__ import annotations

import enum
import itertools
from typing import TYPE_CHECKING

from copyover.events import Outcome, Result

if TYPE_CHECKING:
    from copyover.events import Reload
    from copyover.move import Move

KEPT_SHOWN = 10


class Phase(enum.Enum):
    SERVING = "serving"
    BOOTING = "booting"
    STAGING = "staging"
    MOVING = "moving"
    BAKING = "baking"
    ROLLING_BACK = "rolling-back"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Change:
    """One reload under way: what was asked for, its move, and what it took so far."""

    def __init__(self, asked: Reload, from_generation: int, now_s: float, move: Move) -> None:
        self.asked = asked
        self.from_generation = from_generation
        self.move = move
        self.phases_ms: dict[str, float] = {}
        self.reason: str | None = None
        self.status = 0
        self.is_proven = False  # its health command has succeeded
        self._phase_began_s = now_s

    def leave_phase(self, phase: Phase, now_s: float) -> float:
        """Note how long the phase took, in ms, and return it."""
        spent_ms = round((now_s - self._phase_began_s) * 1000, 3)
        self.phases_ms[phase.value] = self.phases_ms.get(phase.value, 0.0) + spent_ms  # a phase may come twice
        self._phase_began_s = now_s
        return spent_ms

    def result(self, outcome: Outcome, serving_generation: int) -> Result:
        move = self.move
        return Result(
            outcome=outcome,
            from_generation=self.from_generation,
            to_generation=self.asked.generation,
            serving_generation=serving_generation,
            moved=move.moved if outcome is Outcome.DONE else 0,
            kept=len(move.kept),
            ended=move.ended,
            lost=move.lost,
            kept_reasons=tuple(itertools.islice(move.kept.items(), KEPT_SHOWN)),
            pauses_us=tuple(move.pauses_us),
            phases_ms=self.phases_ms,
            error=self.reason,
            status=self.status,
        )
