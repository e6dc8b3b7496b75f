"""The worker processes of a holder, where a real one cannot be brought to do it."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from copyover import events, messages, reload, slots
from copyover.channel import Channel, pair
from copyover.config import Config
from copyover.holder import crew as crews
from copyover.holder import report
from copyover.holder.crew import Crew, Generation
from copyover.holder.hand import Hand
from copyover.holder.listening import Listening
from copyover.holder.loop import Loop
from copyover.holder.recovery import SlotFile
from copyover.release import Release

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path


RELEASE = Release(directory="/", python="python", application="app:app", app_dir="/")


class Stuck:
    """A process in the kernel: SIGKILL does not end it before *free*."""

    is_reaped = False

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._pidfd, self._end = os.pipe2(os.O_CLOEXEC)
        self.kills = 0

    def fileno(self) -> int:
        return self._pidfd

    def set_oom_score(self, above_ours: int) -> None:
        pass

    def kill(self) -> None:
        self.kills += 1

    def free(self) -> None:
        os.close(self._end)

    def reap(self) -> str:
        os.close(self._pidfd)
        return "was killed by SIGKILL"


def crew_of(
    loop: Loop,
    machine: reload.Machine,
    path: Path,
    told: list[events.Event],
    note: Callable[[str, Mapping[str, Any], int], None] = lambda *_: None,
) -> Crew:
    """Return a crew whose files are in *path*, and which tells only the list."""
    crew = Crew(
        loop,
        machine,
        Listening(),
        path,
        environment={"COPYOVER_INSTANCE": "0"},
        user=None,
        tell=told.append,
        settle=lambda: None,
        note=note,
    )
    crew.generations[1] = Generation(RELEASE, Config(app="app:app"))
    return crew


def test_a_worker_that_cannot_be_reaped_is_reported_and_nothing_moves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Said once, with what to do; status shows it; it is not dead before its pidfd says so, however often killed."""
    stuck = Stuck()
    monkeypatch.setattr("copyover.process.spawn", lambda *_, **__: stuck)
    monkeypatch.setattr(crews, "REAP_S", 0.01)
    told: list[events.Event] = []
    noted: list[tuple[str, dict[str, Any]]] = []

    def note(event: str, fields: Mapping[str, Any], _: int) -> None:
        noted.append((event, dict(fields)))

    loop, machine = Loop(lambda: None), reload.Machine()
    crew = crew_of(loop, machine, tmp_path, told, note)
    machine.handle(events.Reload(asker=7, generation=1, workers=1, move="together", timeout_s=60.0), 0.0)
    crew.spawn(1, 1, 0.0)
    while 1 not in crew.hands:
        loop.turn()
    crew.kill(1)
    crew.kill(1)
    while noted[-1][0] != "unreapable":
        loop.turn()
    crew.kill(1)
    loop.set_timer("later", 0.03, lambda: note("later", {}, 0))
    while noted[-1][0] != "later":
        loop.turn()
    assert [event for event, _ in noted] == ["started", "unreapable", "later"]
    assert noted[1][1]["worker"] == 1
    assert "its connections wait until it does" in noted[1][1]["advice"]
    assert stuck.kills == 3
    assert told == []
    assert report.status(machine, crew.hands, now_s=0.0, deadline_s=None)["workers"][0]["state"] == "unreapable"
    stuck.free()
    while not told:
        loop.turn()
    assert [type(event) for event in told] == [events.Reaped, events.Died]
    assert crew.hands == {}
    loop.close()


def drain(channel: Channel) -> None:
    """Take all that has come."""
    while True:
        try:
            channel.receive()
        except BlockingIOError:
            return


@attrs.frozen
class Busy:
    """A worker that spoke a moment ago, which the crew lets gather what it says."""

    crew: Crew
    loop: Loop
    hand: Hand
    worker: Channel
    told: list[events.Event]


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Busy]:
    monkeypatch.setattr(crews, "REST_S", time.monotonic())
    told: list[events.Event] = []
    loop = Loop(lambda: None)
    crew = crew_of(loop, reload.Machine(), tmp_path, told)
    stuck = Stuck()
    ours, theirs = pair()
    header = slots.shape(0, 0, worker=1, generation=1)
    hand = Hand(
        *(1, 1, RELEASE),
        child=stuck,  # type: ignore[arg-type]  # as a process, so far as it is one
        channel=Channel(ours),
        slots=SlotFile.make(tmp_path, "0", header),
        tail=None,
        started_s=0.0,
    )
    hand.hello = messages.Hello(wire=[1, 1], record=[1, 1], copyover="", python="", pid=1, worker=1, instance="0")
    crew.attend(hand)
    worker = Channel(theirs)
    worker.send(messages.Release())
    while len(told) < 1:
        loop.turn()
    yield Busy(crew, loop, hand, worker, told)
    loop.close()
    worker.close()
    hand.close()
    stuck.free()
    stuck.reap()


def test_what_a_busy_worker_says_gathers_until_somebody_asks(busy: Busy) -> None:
    """While nothing moves it is heard now and then; an operator's question is answered with what came by then."""
    busy.worker.send(messages.Release())
    busy.loop.set_timer("later", 0.03, lambda: busy.told.append(events.TimerFired("later")))
    while len(busy.told) < 2:
        busy.loop.turn()
    assert [type(event) for event in busy.told] == [events.FromWorker, events.TimerFired]
    busy.crew.hear_all()
    assert [type(event) for event in busy.told] == [events.FromWorker, events.TimerFired, events.FromWorker]


def test_what_waits_for_a_busy_worker_leaves_once_it_reads(busy: Busy) -> None:
    """A full channel is watched for room, also where the worker was let be and somebody asks meanwhile."""
    push = messages.Push(cookie=(1,), act=(0,), pushed=(bytes(60_000),))
    while not busy.hand.channel.has_backlog:
        busy.crew.send(1, push, ())
    busy.crew.hear_all()
    turns = 0
    while busy.hand.channel.has_backlog:
        drain(busy.worker)
        busy.loop.set_timer("tick", 0.05, lambda: None)  # without it a loop that waits for nothing would never turn
        busy.loop.turn()
        turns += 1
        assert turns < 100
