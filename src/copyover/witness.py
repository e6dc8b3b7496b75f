"""
The audit of one change, beside it and never in its way.

It says what was there before and what became of it. Whatever befalls it, the change is made and its own answer told.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from copyover.comparison import View

FINDINGS_SHOWN = 10


class Witness:
    """Looks when it is made, and again when it is asked to testify; one that is not *present* loads nothing."""

    def __init__(self, name: str, *, is_present: bool) -> None:
        self._name = name
        self._before: View | None = None
        self._excuse = ""
        if is_present:
            with self._excused():
                from copyover import audit  # noqa: PLC0415  # 110 ms, before the change is asked for

                self._before = audit.look(name)

    def testify(self) -> dict[str, Any]:
        """Return the key ``audit`` of the result of a change."""
        if self._before is not None:
            with self._excused():
                from copyover import audit, comparison  # noqa: PLC0415  # see above

                try:
                    return comparison.as_object(audit.compare(self._name, self._before), listed=FINDINGS_SHOWN)
                except KeyboardInterrupt:  # the change has been made: its answer is still to be told
                    self._excuse = "it was interrupted"
        return {"skipped": self._excuse}

    @contextlib.contextmanager
    def _excused(self) -> Iterator[None]:
        try:
            yield
        except Exception as problem:  # noqa: BLE001  # not the operator's concern while a change is under way
            self._excuse = str(problem) or type(problem).__name__
