"""
One fault at every packet of a reload: what its clients may notice, what the command says, what is left behind.

Between the holder and each worker stands a relay (relay.py), which commits the fault; neither of them has a hook.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

import relay
from copyover.testing import Server
from crowd import Crowd
from operators import DEADLINE_S, Operator

if TYPE_CHECKING:
    from collections.abc import Iterator

APPS = Path(__file__).parent / "apps"
CLIENTS = {"idle": 3, "half": 2, "busy": 3, "parts": 2}
MOVES = ("together", "rolling")

# ---- what is promised

NOBODY: frozenset[str] = frozenset()
IN_A_MESSAGE = frozenset({"half", "busy", "parts"})  # input was read since the last boundary: the policy is reset


@attrs.frozen
class Promise:
    """Whom a fault may cost its connection (by a reset, never by a wrong byte), and what the command may exit with."""

    may_be_reset: frozenset[str] = NOBODY
    exit_codes: frozenset[int] = frozenset({0, 3})


# A worker that is killed, or that broke the protocol and is killed for it.
KILLED = Promise(may_be_reset=IN_A_MESSAGE, exit_codes=frozenset({0, 3, 4}))
COSTS_NOTHING = Promise()

PROMISES = {
    ("incumbent", "kill"): KILLED,
    ("incumbent", "pause"): COSTS_NOTHING,
    ("incumbent", "truncate"): KILLED,
    ("incumbent", "repeat"): KILLED,
    ("incumbent", "reorder"): KILLED,
    ("incumbent", "pause-holder"): COSTS_NOTHING,
    ("incumbent", "kill-holder"): COSTS_NOTHING,
    ("replacement", "kill"): KILLED,
    ("replacement", "pause"): COSTS_NOTHING,
    ("replacement", "truncate"): KILLED,
    ("replacement", "repeat"): KILLED,
    ("replacement", "reorder"): KILLED,
    ("replacement", "pause-holder"): COSTS_NOTHING,
    ("replacement", "kill-holder"): COSTS_NOTHING,
}

# ---- the points


class Site:
    """A server behind relays and its crowd, for as many points as it survives."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        python = relay.install(directory)
        settings = {"app": "faults:handler", "chdir": str(APPS), "listen": ["127.0.0.1:0"], "python": python}
        limits = {"timeout_s": 3.0, "boundary_s": 1.0, "drain_timeout_s": 2.0, "loop": "asyncio"}
        self.server = Server("test", settings | limits)
        self.operator = Operator(self.server.directory / "test" / "control.sock")
        self.crowd = Crowd(self.server.address, CLIENTS)
        self.reload().assert_done()  # the first generation has accepted its connections, later ones were given them
        self.descriptors = self.count_descriptors()

    def reload(self, **wishes: Any) -> Reloaded:
        return Reloaded(self.operator.reload(**wishes))

    def reload_or_run_again(self, move: str) -> Reloaded | None:
        """Reload; if the holder dies meanwhile, or right after, run it again. None if it did not come to an answer."""
        try:
            reloaded = self.reload(move=move)
            self.operator.wait_settled()
        except OSError:  # no socket, or nobody behind it
            self.server.kill()
            self.server.run()
            return None
        return reloaded

    def count_descriptors(self) -> dict[str, int]:
        """Return how many descriptors each process has, once one generation serves."""
        workers = self.operator.wait_settled()["workers"]
        [relay_pid] = [worker["pid"] for worker in workers]
        children = Path(f"/proc/{relay_pid}/task/{relay_pid}/children").read_text(encoding="ascii")
        pids = {"holder": self.server.pid, "relay": relay_pid, "worker": int(children)}
        return {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items()}  # noqa: PTH208

    def assert_descriptors(self) -> None:
        """No process has more descriptors than before, nor fewer."""
        deadline_s = time.monotonic() + DEADLINE_S
        while (found := self.count_descriptors()) != self.descriptors:
            assert time.monotonic() < deadline_s, f"{found} descriptors, {self.descriptors} before"

    def end(self) -> None:
        self.crowd.end()
        self.server.discard()


@attrs.frozen
class Reloaded:
    """What a reload answered."""

    answer: dict[str, Any]

    @property
    def exit_code(self) -> int:
        return int(self.answer["exit_code"])

    def assert_done(self) -> None:
        assert (self.answer["outcome"], self.answer["connections"]["lost"]) == ("done", 0), self.answer


class Sites:
    """Keeps one site over many points, and makes another when a point broke it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._numbers = itertools.count(1)
        self._site: Site | None = None
        self.points = 0

    def site(self) -> Site:
        if self._site is None:
            self._site = Site(self._root / f"site{next(self._numbers)}")
        return self._site

    def abandon(self) -> str:
        """End the site; return its log."""
        site, self._site = self._site, None
        if site is None:
            return ""
        site.end()
        return site.server.log


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    kept = Sites(tmp_path_factory.mktemp("relays"))
    yield kept
    kept.abandon()


def commit(site: Site, fault: relay.Fault, move: str) -> bool:
    """Reload with *fault*, and see that every promise held; False if the reload has fewer packets."""
    promise = PROMISES[fault.process, fault.fault]
    before = dict(site.crowd.tally.resets)
    relay.arm(site.directory, fault)
    reloaded = site.reload_or_run_again(move)
    site.operator.wait_settled()
    is_committed = relay.disarm(site.directory)
    site.operator.wait_settled()
    site.crowd.wait_round()
    if not is_committed:
        assert reloaded is not None
        reloaded.assert_done()
        return False
    reset = {kind: count - before.get(kind, 0) for kind, count in site.crowd.tally.resets.items()}
    beyond = {kind: count for kind, count in reset.items() if count and kind not in promise.may_be_reset}
    assert not beyond, (beyond, reloaded)
    if reloaded is not None:
        lost = reloaded.answer["connections"]["lost"]
        assert reloaded.exit_code in promise.exit_codes, reloaded.answer
        assert (reloaded.exit_code == 4) == (lost > 0), reloaded.answer
        assert lost <= sum(reset.values()), reloaded.answer
    if reloaded is None or reloaded.answer["outcome"] != "done":  # else the next point's reload shows the same
        site.reload(move=move).assert_done()
        site.crowd.wait_round()
    site.assert_descriptors()
    return True


@pytest.mark.parametrize("direction", relay.DIRECTIONS)
@pytest.mark.parametrize(("process", "fault"), PROMISES)
@pytest.mark.parametrize("move", MOVES)
def test_a_fault_at_every_packet(sites: Sites, move: str, process: str, fault: str, direction: str) -> None:
    """Whatever happens at whichever packet, each client gets what the promise of this fault says, and no less."""
    for n in itertools.count(1):
        point = relay.Fault(fault, process, direction, n)
        try:
            is_there = commit(sites.site(), point, move)
        except BaseException as problem:
            problem.add_note(f"{point}, {move}; the log of the server:\n{sites.abandon()}")
            raise
        if not is_there:  # the reload is over, and with nothing amiss: a plain one works
            assert n > 2, "a reload has packets"
            return
        sites.points += 1


def test_there_were_enough_points(sites: Sites, request: pytest.FixtureRequest) -> None:
    """The whole of a reload was covered: two hundred points and more."""
    whole = [item for item in request.session.items if item.originalname == "test_a_fault_at_every_packet"]  # type: ignore[attr-defined]
    if len(whole) < len(MOVES) * len(PROMISES) * len(relay.DIRECTIONS):
        pytest.skip("only some of them were asked for")
    assert sites.points >= 200
