"""A connection's keep-alive times: one timer for all of them, which fires when the last has run out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from copyover.adapters.keep_alive import KeepAlive

IDLE_S = 5.0


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time is told; *armed* are the times that its timers stand at."""

    def __init__(self) -> None:
        self.now_s = 100.0
        super().__init__()

    def time(self) -> float:
        return self.now_s

    @property
    def armed(self) -> list[float]:
        timers: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        return [timer.when() for timer in timers if not timer.cancelled()]

    async def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        for _ in range(3):
            await asyncio.sleep(0)


Scene = Callable[[Clock, KeepAlive, list[str]], Coroutine[Any, Any, None]]


@pytest.fixture(name="play")
def _play() -> Callable[[Scene], None]:
    def run(scene: Scene) -> None:
        clock = Clock()
        try:
            clock.run_until_complete(scene(clock, KeepAlive(clock), []))
        finally:
            clock.close()

    return run


def test_a_time_runs_out(play: Callable[[Scene], None]) -> None:
    """Once, when it is over and not before; what is left of it is told meanwhile."""

    async def scene(clock: Clock, idle: KeepAlive, said: list[str]) -> None:
        idle.call_later(IDLE_S, lambda: said.append("over"))
        await clock.pass_time(IDLE_S - 1)
        assert not said
        assert idle.left_s == 1.0
        await clock.pass_time(1)
        assert said == ["over"]
        assert not clock.armed

    play(scene)


def test_a_request_gives_it_up(play: Callable[[Scene], None]) -> None:
    """The timer looks once more, and that is all."""

    async def scene(clock: Clock, idle: KeepAlive, said: list[str]) -> None:
        idle.call_later(IDLE_S, lambda: said.append("over")).cancel()
        assert idle.left_s is None
        await clock.pass_time(3 * IDLE_S)
        assert (said, clock.armed) == ([], [])

    play(scene)


def test_requests_do_not_make_timers(play: Callable[[Scene], None]) -> None:
    """One stands for all of them, and the last time is as long as the first."""

    async def scene(clock: Clock, idle: KeepAlive, said: list[str]) -> None:
        for _ in range(4):
            idle.call_later(IDLE_S, lambda: said.append("over")).cancel()
            await clock.pass_time(1)
        idle.call_later(IDLE_S, lambda: said.append("over"))
        assert clock.armed == [105.0]
        await clock.pass_time(IDLE_S - 1)
        assert not said
        assert (idle.left_s, clock.armed) == (1.0, [109.0])
        await clock.pass_time(1)
        assert said == ["over"]

    play(scene)


def test_a_connection_that_halts_or_ends_leaves_no_timer(play: Callable[[Scene], None]) -> None:
    """And the next time has one again."""

    async def scene(clock: Clock, idle: KeepAlive, said: list[str]) -> None:
        idle.call_later(IDLE_S, lambda: said.append("over"))
        idle.stop()
        assert (idle.left_s, clock.armed) == (None, [])
        idle.stop()
        await clock.pass_time(2 * IDLE_S)
        idle.call_later(1.0, lambda: said.append("again"))
        await clock.pass_time(1)
        assert said == ["again"]

    play(scene)
