"""
What has happened: each transition is logged once, the last of them are kept, and who follows is told.

It decides nothing. The time of the wall clock is written down for people and compared with nothing.
"""

from __future__ import annotations

import collections
import datetime as dt
import itertools
import logging
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

log = logging.getLogger("copyover.holder")

MOST_KEPT = 1000


class Chronicle:
    """The last transitions, the oldest first; *on_event* is called with each new one."""

    def __init__(self) -> None:
        self.kept: collections.deque[dict[str, Any]] = collections.deque(maxlen=MOST_KEPT)
        self.on_event: Callable[[dict[str, Any]], None] = _nobody
        self._numbers = itertools.count(1)

    def inherit(self, noted: Sequence[dict[str, Any]]) -> None:
        """Go on where a predecessor stopped."""
        self.kept.extend(noted)
        self._numbers = itertools.count(noted[-1]["number"] + 1 if noted else 1)

    def note(self, event: str, fields: Mapping[str, Any], level: int = logging.INFO) -> None:
        """Write down one transition; what there is nothing to say of is left out."""
        told = {key: value for key, value in fields.items() if value is not None}
        log.log(level, "event=%s %s", event, " ".join(f"{key}={_value(value)}" for key, value in told.items()))
        noted = {
            "number": next(self._numbers),
            "time": utc().isoformat(timespec="milliseconds"),
            "monotonic_s": round(time.monotonic(), 6),
            "event": event,
            "fields": told,
        }
        self.kept.append(noted)
        self.on_event(noted)


def utc() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _value(value: object) -> str:
    text = str(value)
    return repr(text) if not text or " " in text or '"' in text or "=" in text else text


def _nobody(_: dict[str, Any]) -> None:
    pass
