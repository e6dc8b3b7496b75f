"""The worker processes of a holder, where a real one cannot be brought to do it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from copyover import events, reload
from copyover.config import Config
from copyover.holder import crew as crews
from copyover.holder import report
from copyover.holder.crew import Crew, Generation
from copyover.holder.listening import Listening
from copyover.holder.loop import Loop
from copyover.release import Release

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pytest


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
    crew = Crew(
        loop,
        machine,
        Listening(),
        tmp_path,
        environment={"COPYOVER_INSTANCE": "0"},
        user=None,
        tell=told.append,
        settle=lambda: None,
        note=note,
    )
    release = Release(directory="/", python="python", application="app:app", app_dir="/")
    crew.generations[1] = Generation(release, Config(app="app:app"))
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
