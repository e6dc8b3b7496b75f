"""
Gives memory back that a change or a recovery took: the holder outlives both by months.

It knows nothing of what it was taken for.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

AFTER_S = 2.0  # since a worker was buried: what it left has found another by then, mostly


def give_back() -> None:
    """Return to the kernel what is free; glibc keeps it, as far as anything lies above it. malloc_trim(3)"""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
