"""
How many connections this holder can keep, and whether that is what its configuration asks for.

It reads the limits of process, kernel and file system; what they allow for is decided in limits.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from copyover import directory as directories
from copyover import limits, process, slots
from copyover.errors import ConfigError
from copyover.listeners import BACKLOG

if TYPE_CHECKING:
    from copyover.config import Config
    from copyover.directory import Directory

log = logging.getLogger("copyover.holder")


def take() -> int:
    """Raise the limit of descriptors, and return how many connections can be kept under it; both are logged."""
    descriptors = process.raise_descriptor_limit()
    capacity = limits.capacity(descriptors)
    log.info("event=limits descriptors=%d connections=%d", descriptors, capacity)
    allowed = _kernel("net/core/somaxconn")
    if allowed is not None and allowed < BACKLOG:  # the kernel says nothing of it. listen(2)
        advice = f"clients beyond that are not answered while nobody accepts: sysctl net.core.somaxconn={BACKLOG}"
        log.warning("event=backlog-cut wanted=%d allowed=%d advice=%r", BACKLOG, allowed, advice)
    return capacity


def check(config: Config, directory: Directory) -> None:
    """
    See whether the limits hold what *config* asks for.

    Raises:
        ConfigError: they do not; the sentence says which, and what to raise.

    """
    if config.connections is None:
        return
    demand = limits.Demand(
        connections=config.connections,
        workers=config.workers,
        worker_connections=config.worker_connections,
        slot_bytes=_slot_bytes(config),
    )
    descriptors = process.descriptor_limit()
    found = limits.Found(
        descriptors=descriptors,
        most_descriptors=_kernel("fs/nr_open") or limits.MOST_DESCRIPTORS,
        slots_bytes=directories.room_bytes(directory),
    )
    shortfall = limits.shortfall(demand, found)
    if shortfall is not None:
        raise ConfigError(shortfall, key="connections")


def _slot_bytes(config: Config) -> int:
    """Return what a slot takes at least; what is served, where nobody said it, the workers find out later."""
    if config.slot_bytes is not None:
        return slots.least_bytes(config.slot_bytes)
    return slots.least_bytes(slots.DEFAULT_BYTES)


def _kernel(name: str) -> int | None:
    try:
        return int(Path("/proc/sys", name).read_text(encoding="ascii"))
    except OSError:  # a container may hide it
        return None
