"""
What the holder's mind takes in and gives out: events, effects, and the result of a change.

It holds the vocabulary only; what an event means is decided in reload.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from copyover import messages


class Outcome(enum.Enum):
    DONE = "done"
    REFUSED = "refused"
    ROLLED_BACK = "rolled-back"
    BUSY = "busy"


BY_BOOT = -1  # who asks for the first generation
BY_SIGNAL = 0  # nobody waits for the answer

# ---- events


@attrs.frozen
class Quotas:
    """How much of the holder one worker may take; *connections* None is all that there is."""

    connections: int | None = None
    record_bytes: int = 1 << 30


@attrs.frozen
class Reload:
    """
    Somebody asks for a new generation; the answer is a Finished with the same *asker*.

    *move* is ``together``: all connections are one cut; ``rolling``: none is; or ``auto``: all but those of HTTP are.
    """

    asker: int
    generation: int
    workers: int
    move: str
    timeout_s: float
    gather_s: float = 1.0
    boundary_s: float = 5.0
    drain_s: float = 3600.0
    max_retiring: int = 2
    bake_s: float = 0.0
    needs_health: bool = False  # commit only after a health command has succeeded
    is_one_way: bool = False  # states that the incumbent cannot read are no reason to refuse
    added: frozenset[int] = frozenset()  # the listeners that the incumbent does not have
    quotas: Quotas = Quotas()
    is_remembered: bool = False  # a SIGHUP while another change is under way is done after it, once


@attrs.frozen
class FromWorker:
    """A message came; *descriptors* names those that came with it."""

    worker: int
    message: messages.Message
    descriptors: Sequence[int] = ()


@attrs.frozen
class Reaped:
    """The worker is dead, and its channel is read to the end; what it left is looked at next, and a Died follows."""

    worker: int


@attrs.frozen
class Died:
    """
    The worker is reaped and its channel is read to the end.

    *recovered*: what its slots and the kernel's counters say of its connections: the record from which one resumes, or
    None where nobody can go on. One that is missing left no trace: the record that it was given, if any, stands.
    *ended*: those that the kernel has closed already.
    """

    worker: int
    how: str
    recovered: Mapping[int, messages.Record | None] = attrs.field(factory=dict)
    ended: frozenset[int] = frozenset()


@attrs.frozen
class Row:
    """
    One connection as a worker reports it to a new holder; *descriptor* is its copy, ours now.

    *is_current*: nobody has used the connection since the record was taken, as far as the kernel can tell.
    """

    cookie: int
    epoch: int
    listener: int
    doing: messages.Doing
    record: messages.Record
    is_current: bool
    descriptor: int


@attrs.frozen
class Report:
    """All that one worker has, reported to a new holder."""

    worker: int
    generation: int
    abilities: messages.Ready
    is_committed: bool
    is_leaving: bool
    rows: Sequence[Row]
    tombstones: Sequence[int]
    listeners: frozenset[int] = frozenset()  # the numbers of those that it knows by name


@attrs.frozen
class Reunited:
    """
    All workers of a holder that died have reported, or are dead.

    *asked* is how a roll-back of what was under way is to be done, and how many workers are to serve.
    """

    asked: Reload
    reports: Sequence[Report]


@attrs.frozen
class CancelAsked:
    """Somebody wants the change under way undone; the answer is the Finished of that change."""

    reason: str


@attrs.frozen
class Checked:
    """The health command has ended; *problem* is None if it succeeded."""

    problem: str | None


@attrs.frozen
class TimerFired:
    name: str


@attrs.frozen
class StopAsked:
    drain_s: float


Event = Reload | Reunited | CancelAsked | FromWorker | Reaped | Died | Checked | TimerFired | StopAsked


# ---- effects


@attrs.frozen
class Send:
    worker: int
    message: messages.Message
    descriptors: Sequence[int] = ()


@attrs.frozen
class Spawn:
    worker: int
    generation: int
    after_s: float = 0.0


@attrs.frozen
class Kill:
    worker: int


@attrs.frozen
class Close:
    """The connections have ended: close our copies."""

    descriptors: tuple[int, ...]


@attrs.frozen
class Reset:
    """Nobody can serve them: tell the clients with a true RST, and close our copies."""

    descriptors: tuple[int, ...]


@attrs.frozen
class CheckHealth:
    """Run the health command of the change again and again, or stop it."""

    is_on: bool


@attrs.frozen
class SetTimer:
    """Fire once; *after_s* None takes the timer back."""

    name: str
    after_s: float | None


@attrs.frozen
class Note:
    """One line for the log."""

    event: str
    fields: dict[str, Any]


@attrs.frozen
class Result:
    """How a change ended."""

    outcome: Outcome
    from_generation: int
    to_generation: int
    serving_generation: int
    moved: int = 0
    kept: int = 0
    ended: int = 0
    lost: int = 0
    closed: int = 0
    kept_reasons: tuple[tuple[int, str], ...] = ()
    pauses_us: tuple[int, ...] = ()
    phases_ms: dict[str, float] = attrs.field(factory=dict)
    error: str | None = None
    status: int = 0


@attrs.frozen
class Finished:
    asker: int
    result: Result


@attrs.frozen
class AskAgain:
    """A reload was asked for meanwhile: pin the release as it is now, and ask."""


Effect = Send | Spawn | Kill | Close | Reset | CheckHealth | SetTimer | Note | Finished | AskAgain
