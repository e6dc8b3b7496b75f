"""
What a new holder makes of what the workers of a dead one report: who owns each connection, and which generation serves.

The highest epoch wins, a tombstone beats all, and a change of which no worker has seen the commit is rolled back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from copyover import messages
from copyover.entries import Entry, Standing
from copyover.events import Close
from copyover.holdings import Strength, Worker
from copyover.messages import Doing, Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from copyover.events import Report, Row
    from copyover.holdings import Holdings

_STANDINGS = {Doing.SERVES: Standing.SERVED, Doing.WAITS: Standing.THAWING, Doing.FROZE: Standing.PARKED}


@attrs.frozen
class Finding:
    """Which generation serves; the replacement of a change that was under way, or 0, and the listeners it added."""

    serving: int
    unfinished: int = 0
    added: frozenset[int] = frozenset()
    withdrawn: frozenset[int] = frozenset()  # what the serving generation does not know


def find(reports: Sequence[Report]) -> Finding:
    """Say which generation is to serve. *reports* are those of all workers that live, at least one."""
    staying = [report for report in reports if not report.is_leaving]
    generations = sorted({report.generation for report in staying})
    if not generations:
        return Finding(max(report.generation for report in reports))
    newest = generations[-1]
    is_committed = any(report.is_committed for report in staying if report.generation == newest)
    known = _known(reports)
    if is_committed or len(generations) == 1:
        return Finding(newest, withdrawn=known - _known(reports, newest))
    unknown = known - _known(reports, generations[-2])
    return Finding(generations[-2], newest, _known(reports, newest) & unknown, unknown)


def _known(reports: Iterable[Report], generation: int | None = None) -> frozenset[int]:
    sought = (report.listeners for report in reports if generation in (None, report.generation))
    return frozenset[int]().union(*sought)


def take(holdings: Holdings, reports: Sequence[Report]) -> None:
    """Fill empty holdings with what the workers have; descriptors of which there are two are closed."""
    for report in reports:
        strength = Strength.RETIRING if report.is_leaving else Strength.READY
        holdings.workers[report.worker] = Worker(report.worker, report.generation, strength, report.abilities)
    tombstones = {cookie for report in reports for cookie in report.tombstones}
    copies: dict[int, list[tuple[int, Row]]] = {}
    for report in reports:
        for row in report.rows:
            copies.setdefault(row.cookie, []).append((report.worker, row))
    for cookie, found in copies.items():
        if cookie in tombstones:
            _close(holdings, [row for _, row in found])
            holdings.drop((worker, cookie) for worker, row in found if row.doing is Doing.FROZE)
        else:
            _enter(holdings, sorted(found, key=_precedence))


def _precedence(found: tuple[int, Row]) -> tuple[int, bool]:
    """Order copies; the last one counts. A frozen copy and a served one of one epoch cannot both be the newest."""
    _, row = found
    return row.epoch, row.doing is not Doing.FROZE


def _enter(holdings: Holdings, copies: Sequence[tuple[int, Row]]) -> None:
    *older, (owner, newest) = copies
    waiting, ceder = _origins(holdings, copies)
    is_on_its_way = newest.doing is not Doing.SERVES or bool(waiting)
    holdings.ledger.restore(
        Entry(
            newest.cookie,
            newest.descriptor,
            newest.listener,
            owner,
            epoch=newest.epoch,
            kind=Kind(newest.record.kind),
            standing=_STANDINGS[newest.doing],
            staged_in=(owner if newest.doing is not Doing.FROZE else waiting[-1] if waiting else 0) * is_on_its_way,
            origin=waiting[0] if waiting else 0,
            record=None if newest.doing is Doing.SERVES else newest.record,
            # The coroutine that froze first goes on only where certainly nobody has served it since.
            was_adopted=is_on_its_way and (newest.doing is Doing.SERVES or not _is_untouched(copies)),
            is_ceded=ceder != 0,
        )
    )
    _close(holdings, [row for _, row in older])
    if newest.doing is not Doing.SERVES and not newest.is_current:
        holdings.lose([newest.cookie])  # whoever served it since died with the holder: to go on here would repeat bytes


def _origins(holdings: Holdings, copies: Sequence[tuple[int, Row]]) -> tuple[list[int], int]:
    """
    Return the workers whose coroutines wait for a connection, and which of them ceded it, or 0.

    A retiring worker waits for what it ceded alone; once another has frozen or served it, its copy is dropped.
    """
    waiting = [worker for worker, row in copies if row.doing is Doing.FROZE]
    retiring = [worker for worker in waiting if holdings.workers[worker].strength is Strength.RETIRING]
    if len(waiting) == 1 and retiring and copies[-1][1].doing is not Doing.SERVES:
        return waiting, waiting[0]
    holdings.drop((worker, copies[-1][1].cookie) for worker in retiring)
    return [worker for worker in waiting if worker not in retiring], 0


def _is_untouched(copies: Sequence[tuple[int, Row]]) -> bool:
    """Whether nobody can have served a connection since it was frozen first: one has frozen it, for who has it."""
    frozen = [row for _, row in copies if row.doing is Doing.FROZE]
    return len(frozen) <= 1 and copies[-1][1].epoch - copies[0][1].epoch <= 1


def _close(holdings: Holdings, rows: Iterable[Row]) -> None:
    holdings.effects.extend(Close((row.descriptor,)) for row in rows)


def let_enter(holdings: Holdings, workers: Iterable[int]) -> dict[int, int]:
    """Tell those of *workers* who were given a record to serve from it; return these connections, and whose each is."""
    cookies = holdings.ledger.find(Standing.THAWING, owners=set(workers))
    given = dict(zip(cookies, holdings.ledger.column("owner", cookies), strict=True))
    for worker in dict.fromkeys(given.values()):
        holdings.send(worker, messages.Enter(cut=True))
        holdings.send(worker, messages.Enter(cut=False))
    return given
