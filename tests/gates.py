"""
Gates at which an application under test waits (see apps/gated.py), and the files in which it notes things down.

They judge nothing; who waits here waits for the application, under the test's own deadline.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DEADLINE_S = 30.0


class Gate:
    """A FIFO: whoever waits at it is let go by ``open``; a context manager that opens it at last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        os.mkfifo(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            self.open()

    def wait_reached(self) -> None:
        """Return once somebody waits at the gate; it stays closed."""
        self._descriptor = os.open(self.path, os.O_WRONLY)  # waits for a reader. fifo(7)

    def open(self) -> None:
        if self._descriptor is None:
            self.wait_reached()
        assert self._descriptor is not None
        with contextlib.suppress(BrokenPipeError):  # who waited was killed
            os.write(self._descriptor, b"\n")
        os.close(self._descriptor)
        self._descriptor = None


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def wait_until(is_so: Callable[[], object], what: str) -> None:
    """
    Return once *is_so* holds.

    Raises:
        TimeoutError: it did not; *what* it was about.

    """
    deadline_s = time.monotonic() + DEADLINE_S
    while not is_so():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited {DEADLINE_S:g} s in vain: {what}")
