"""What a change took of memory goes back to the kernel."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from copyover.holder import memory

BLOCKS, BLOCK_BYTES = 400, 64 << 10  # of malloc's heap, and not mapped one by one


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc gives back in its own way")
def test_memory_is_given_back_although_something_lies_above_it() -> None:
    """Freed alone it would stay with the process for ever."""
    blocks = [b"x" * BLOCK_BYTES for _ in range(BLOCKS)]
    above = blocks.pop()
    blocks.clear()
    freed = resident_bytes()
    memory.give_back()
    assert resident_bytes() < freed - BLOCKS * BLOCK_BYTES // 2
    assert above


def test_a_libc_that_cannot_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a kindness, and nothing depends on it."""
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    memory.give_back()
