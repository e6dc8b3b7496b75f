"""
What the limits of a machine allow a server to hold, and in which sentence more is refused.

It reads no limit and refuses nothing itself: numbers come in, a sentence goes out.
"""

from __future__ import annotations

import attrs

RESERVED_DESCRIPTORS = 1024  # listeners, channels, callers, and lends under way when the holder is full
# Of one process. Its table has 8 bytes for each in the kernel, and is grown to that at the start.
MOST_DESCRIPTORS = 1 << 20


@attrs.frozen(kw_only=True)
class Demand:
    """What a server is to hold. *slot_bytes*: what a slot takes at least, 0 without slots."""

    connections: int
    workers: int
    worker_connections: int | None
    slot_bytes: int


@attrs.frozen(kw_only=True)
class Found:
    """What there is. *slots_bytes*: what all slots together may take, None without a limit."""

    descriptors: int  # RLIMIT_NOFILE, the hard one: of the holder, and of each worker, which inherit it
    most_descriptors: int  # fs.nr_open: what that can be raised to
    slots_bytes: int | None


def capacity(descriptors: int) -> int:
    """Return how many connections can be kept: each is a descriptor here, and for a moment another in a channel."""
    return descriptors - min(RESERVED_DESCRIPTORS, descriptors // 2)


def shortfall(demand: Demand, found: Found) -> str | None:
    """Return what the limits do not hold and what to raise; None if they hold it."""
    wanted = demand.connections
    most = capacity(MOST_DESCRIPTORS)
    if wanted > most:
        return (
            f"{wanted} are to be held, and one holder keeps {most} at most: have several, "
            "each on addresses of its own or all on one with ?reuse_port=1"
        )
    if wanted > capacity(found.descriptors):
        needed = wanted + min(RESERVED_DESCRIPTORS, wanted)
        first = ""
        if needed > found.most_descriptors:
            first = f", and before that fs.nr_open, which is {found.most_descriptors}"
        return (
            f"{wanted} are to be held, and the hard RLIMIT_NOFILE of {found.descriptors} allows for "
            f"{capacity(found.descriptors)}: raise it to {needed} (LimitNOFILE=, --ulimit nofile=){first}"
        )
    if demand.worker_connections is not None and demand.workers * demand.worker_connections < wanted:
        return (
            f"{wanted} are to be held, and {demand.workers} workers with worker_connections = "
            f"{demand.worker_connections} accept {demand.workers * demand.worker_connections}: raise one of these"
        )
    # While a reload moves them, both generations have slots.
    needed = 2 * wanted * demand.slot_bytes
    if found.slots_bytes is not None and needed > found.slots_bytes:
        return (
            f"{wanted} are to be held, their slots take {_mib(needed)} in a reload, and the runtime directory has room "
            f"for {_mib(found.slots_bytes)}: mount it larger, or set slot_bytes lower, 0 for none"
        )
    return None


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"
