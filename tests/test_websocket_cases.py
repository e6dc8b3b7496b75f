"""A connection that has just moved does in every case of the protocol what it does under uvicorn alone."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

import attrs
import pytest

from copyover.testing import Servers
from plain_uvicorn import plain_uvicorn
from websocket_cases import CASES, Case
from websocket_client import END, Frame, Op, WebSocketClient, frame

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

APPS = "tests/apps"
APP = "asgi_raw:app"
LAST = b"that was the last"
STALLED = Frame(Op.CLOSE, b"neither an answer nor an end", fin=False)  # no frame that can come

# uvicorn's own pings would come between.
OPTIONS = ("--ws-ping-interval", "1000", "--http")


@attrs.frozen
class Outcome:
    """What was agreed on, what answered the steps, and what answered the last."""

    extensions: str
    answers: tuple[Frame | None, ...]
    frames: tuple[Frame, ...]


class Run:
    """One case on one connection, in two parts: up to a point of the last step, and what is left."""

    def __init__(self, address: tuple[str, int] | str, case: Case) -> None:
        self.case = case
        self._client = WebSocketClient(address, "/echo", offer=case.offer)
        self._answers: list[Frame | None] = []
        self._left = case.steps[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.socket.close()

    def begin(self, *, share: float) -> None:
        """Do all steps but the last, of which only that share is sent."""
        for step in self.case.steps[:-1]:
            self._send(step)
            self._answers.append(self._client.receive_frame())
        now = int(len(self._left) * share)
        self._send(self._left[:now])
        self._left = self._left[now:]

    def finish(self) -> Outcome:
        """Send what is left, and a last message, whose echo ends what answers it; a pong would overtake an echo."""
        self._send(self._left)
        if not self.case.is_cut_short:
            self._send(frame(Op.TEXT, LAST))
        try:
            frames = self._client.frames_until_end(LAST)
        except TimeoutError:  # the others are to be told all the same
            frames = [STALLED]
        return Outcome(self._client.extensions, tuple(self._answers), tuple(frames))

    def _send(self, data: bytes) -> None:
        size = self.case.chop or len(data) or 1
        with contextlib.suppress(ConnectionError):  # it may close at any point: what it says is still read
            for at in range(0, len(data), size):
                self._client.send(data[at : at + size])


def run_all(
    address: tuple[str, int] | str, reload: Callable[[], None] | None = None, *, share: float = 0.0
) -> dict[str, Outcome]:
    """Run each case on a connection of its own; between the two parts of all of them, reload."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(4) as clients:
        runs = [stack.enter_context(Run(address, case)) for case in CASES]
        for run in runs:
            run.begin(share=share)
        if reload is not None:
            reload()
        outcomes = clients.map(Run.finish, runs)
        return {run.case.number: outcome for run, outcome in zip(runs, outcomes, strict=True)}


@pytest.fixture(scope="module")
def reference() -> dict[str, Outcome]:
    """Tell what uvicorn does, without us."""
    with plain_uvicorn(APP, APPS, *OPTIONS, "httptools") as address:
        return run_all(address)


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def moved(request: pytest.FixtureRequest) -> Iterator[tuple[dict[str, Outcome], dict[str, Outcome]]]:
    """Tell what a connection does whose last step came after the move, and one whose last step was cut by it."""
    servers = Servers(request.config.rootpath)
    config = {"uvicorn": {"ws_ping_interval": 1000}}
    try:
        server = servers(APP, chdir=APPS, loop=request.param, config=config)
        server.expect_errors = True  # uvicorn logs the traceback of text that is not UTF-8

        def reload_all() -> None:
            result = server.reload().assert_lossless()
            assert (result.moved, result.kept) == (len(CASES), 0)

        def reload_what_lives() -> None:
            result = server.reload().assert_lossless()
            # Who is in the middle of what fails the connection may stay where it is, to fail there.
            assert result.kept <= len([case for case in CASES if not case.is_right])

        whole = run_all(server.address, reload_all)
        cut = run_all(server.address, reload_what_lives, share=0.5)
        yield whole, cut
    finally:
        problems = servers.end()
    assert problems == []


EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number}-{case.title}"[:60])


def said(frames: tuple[Frame, ...]) -> tuple[Frame | int, ...]:
    """Return the frames, those that close with a code as this code, without what follows from it: the end."""
    codes = tuple([
        int.from_bytes(came.payload[:2], "big") if came.op == Op.CLOSE and came.payload and came != END else came
        for came in frames
    ])  # fmt: skip
    return codes[:-1] if codes[-1:] == (END,) and Op.CLOSE in [came.op for came in frames[:-1]] else codes


@EACH
def test_what_the_reference_does(case: Case, reference: dict[str, Outcome]) -> None:
    """The table is right: uvicorn alone does as the standard says."""
    if case.expect is not None:
        assert said(reference[case.number].frames) == case.expect


@EACH
def test_the_same_after_a_move(
    case: Case, reference: dict[str, Outcome], moved: tuple[dict[str, Outcome], dict[str, Outcome]]
) -> None:
    """The whole of the last step comes after the move: the same frames, the same codes, the same reasons."""
    assert moved[0][case.number] == reference[case.number]


@EACH
def test_the_same_cut_by_a_move(
    case: Case, reference: dict[str, Outcome], moved: tuple[dict[str, Outcome], dict[str, Outcome]]
) -> None:
    """Half of the last step came before the move: nobody can tell."""
    assert moved[1][case.number] == reference[case.number]
