"""
How an audit is taken: it asks the holder, then the kernel, and asks both again before anybody is accused.

It runs in the process of the command line. What the answers mean is decided in comparison.
"""

from __future__ import annotations

import itertools
import socket
import time
from typing import TYPE_CHECKING, Any

from copyover import comparison, console, sockdiag
from copyover.comparison import Held, Listening, Plight, View
from copyover.errors import AuditImpossible
from copyover.sockets import network_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from copyover.comparison import Account, Socket

ANSWER_S = 10.0
PATIENCE_S = 1.0  # what a worker says of an end, and what it lends, reaches the holder long before
TURNS_AT_OUR_PORTS = 4  # then the whole machine's sockets, which may be many
COOKIES_A_REQUEST = 2000  # a request has 64 KiB at most


def look(name: str) -> View:
    """
    Return what the holder *name* and the kernel say now.

    Raises:
        AuditImpossible: one of them does not answer, or the holder's sockets are of another network namespace.
        HolderAbsent: nobody listens on its control socket.

    """
    told = _ask(name)
    _check_network(told["listeners"])
    listeners = _listeners(told)
    return View(listeners, _held(told), _dump(listeners, is_everywhere=False), told["counters"])


def compare(name: str, before: View | None = None) -> Account:
    """
    Say what became of what was held *before*; without a before, how all fares that is held.

    Connections come and end between the ledger's answer and the kernel's. So whatever looks wrong is asked for again,
    until nothing is left to accuse or PATIENCE_S are over.

    Raises:
        AuditImpossible, HolderAbsent: as look.

    """
    first = look(name)
    before = before or first
    doubtful = comparison.doubts(before, first)
    found = comparison.account(before, first)
    sockets = first.sockets
    deadline_s = time.monotonic() + PATIENCE_S
    for turn in itertools.count():
        if not doubtful:
            break
        # The ledger after the dump: what ended before the dump has told so by now, or its descriptor does.
        told = _ask_about(name, doubtful)
        later = View(_listeners(told), _held(told), sockets, told["counters"])
        found = comparison.account(before, comparison.corrected(first, doubtful, later))
        if not (found.missing or found.unheld) or time.monotonic() > deadline_s:
            break
        # A dump walks tables that change meanwhile and may miss a row; and TPROXY gives connections other ports.
        sockets = _dump(later.listeners, is_everywhere=turn >= TURNS_AT_OUR_PORTS)
    return found


def _ask_about(name: str, cookies: Collection[int]) -> dict[str, Any]:
    """Return the ledger's rows of *cookies*, with how their descriptors fare."""
    ordered = sorted(cookies)
    told = _ask(name, connections=ordered[:COOKIES_A_REQUEST])
    for begin in range(COOKIES_A_REQUEST, len(ordered), COOKIES_A_REQUEST):
        more = _ask(name, connections=ordered[begin : begin + COOKIES_A_REQUEST])
        for column, values in more["connections"].items():
            told["connections"][column] += values
    return told


def _ask(name: str, **more: Any) -> dict[str, Any]:
    try:
        with console.call(name, {"do": "ledger", **more}, patience_s=ANSWER_S) as answers:
            for answer in answers:
                if "denied" in answer:
                    raise console.Denied(str(answer["denied"]))
                if "result" not in answer:
                    raise AuditImpossible(f"{answer.get('error')}: it is older than this command")
                told: dict[str, Any] = answer["result"]
                return told
    except TimeoutError as late:
        raise AuditImpossible(f"the holder {name!r} lives and does not answer; is it stopped (SIGSTOP)?") from late
    raise AuditImpossible("the holder went away before it answered")


def _listeners(told: dict[str, Any]) -> tuple[Listening, ...]:
    return tuple(
        Listening(row["name"], row["address"], row["cookie"], row["family"], row["port"]) for row in told["listeners"]
    )


def _held(told: dict[str, Any]) -> dict[int, Held]:
    columns = told["connections"]
    rows: Iterable[tuple[Any, ...]] = zip(
        *(columns[key] for key in ("listener", "worker", "generation", "epoch", "state")),
        [Plight(word) for word in columns["plight"]] if "plight" in columns else [None] * len(columns["connection"]),
        strict=True,
    )
    return dict(zip(columns["connection"], map(Held._make, rows), strict=True))


def _dump(listeners: Iterable[Listening], *, is_everywhere: bool) -> dict[int, Socket]:
    return sockdiag.dump({(each.family, 0 if is_everywhere else each.port) for each in listeners})


def _check_network(listeners: Iterable[dict[str, Any]]) -> None:
    """Without this, all that lives in another namespace would be called missing."""
    with socket.socket(socket.AF_UNIX) as probe:
        ours = network_of(probe)
    if ours is None:
        raise AuditImpossible("this kernel does not name network namespaces; Linux 5.14 does")
    for row in listeners:
        if row["network"] != ours:
            raise AuditImpossible(
                f"the listener {row['name']} is in another network namespace than this command; run it in there, most "
                f"often: nsenter --net=/proc/PID/ns/net copyover audit, with the holder's PID"
            )
