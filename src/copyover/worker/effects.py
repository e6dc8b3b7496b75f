"""
What an agent wants done: its effects, to be performed in order.

It holds the vocabulary only; the agent decides, the runtime performs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from copyover import messages


@attrs.frozen
class Send:
    """*cookies* names the descriptors that go along."""

    message: messages.Message
    cookies: tuple[int, ...] = ()


@attrs.frozen
class Build:
    """Make paused connections of the descriptors that came with the message."""

    cookies: Sequence[int]
    listeners: Sequence[int]


@attrs.frozen
class Catch:
    """These of a freeze are just being entered: answer with ``caught`` and which of them stand at a boundary."""

    freeze: messages.Freeze
    cookies: tuple[int, ...]


@attrs.frozen
class Halt:
    """Ask these to stop at a boundary; answer with ``halted`` for those that stand at one, then and later."""

    batch: int
    cookies: tuple[int, ...]


@attrs.frozen
class LetGoOn:
    """Serve these on, here: nobody is left to take them."""

    cookies: tuple[int, ...]


@attrs.frozen
class Withdraw:
    """Let these go on; answer with ``withdrawn`` and why they never stopped."""

    cookies: tuple[int, ...]


@attrs.frozen
class Export:
    """Take the records of these; with *is_cut* the shared state too. Answer with ``exported``."""

    batch: int
    cookies: tuple[int, ...]
    is_cut: bool


@attrs.frozen
class Restore:
    """Give these their records, or with UNSERVED wake their own; answer with ``restored``."""

    cookies: Sequence[int]
    records: tuple[messages.Record, ...]


@attrs.frozen
class ImportShared:
    """Give the application the shared states that the cut came with; if it fails, nothing after it is performed."""

    shared: Sequence[bytes]


@attrs.frozen
class Serve:
    """
    Enter these, whose ``adopted`` is queued already.

    With *is_cut* no input is read and nothing is sent before all are entered; then answer with ``entered``.
    """

    cookies: tuple[int, ...]
    is_cut: bool


@attrs.frozen
class Deliver:
    """Do what somebody in another worker did to these connections; *pushed* are the bytes of those to be sent."""

    cookies: tuple[int, ...]
    acts: tuple[int, ...]
    pushed: tuple[bytes, ...]


@attrs.frozen
class Discard:
    """Close our copies and let their coroutines sleep: somebody else serves them, or nobody."""

    cookies: tuple[int, ...]


@attrs.frozen
class Accept:
    is_on: bool


@attrs.frozen
class Report:
    """A new holder asks for all: tell it who we are, then answer with ``recalled``."""


@attrs.frozen
class MoveBegins:
    """No garbage collection from here to MoveEnds."""


@attrs.frozen
class MoveEnds:
    pass


@attrs.frozen
class Retire:
    """Finish what is still served, for at most *drain_s*, then go."""

    drain_s: float


@attrs.frozen
class StopServing:
    """Close each connection at its boundary, the rest after *drain_s*, then go."""

    drain_s: float


@attrs.frozen
class SetTimer:
    name: str
    after_s: float


Effect = (
    Send
    | Build
    | Catch
    | Halt
    | LetGoOn
    | Withdraw
    | Export
    | Restore
    | ImportShared
    | Serve
    | Deliver
    | Discard
    | Accept
    | Report
    | MoveBegins
    | MoveEnds
    | Retire
    | StopServing
    | SetTimer
)
