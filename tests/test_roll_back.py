"""Back to the incumbent: from a bake, by an operator, or because the replacement breaks in the middle."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

from clients import Client
from gates import Gate
from operators import Operator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from copyover.testing import ReloadResult, Server, Servers

COUNT = """
async def handler(connection):
    async for line in connection.lines():
        connection.state["n"] = connection.state.get("n", 0) + 1
        await connection.write(b"%d " % connection.state["n"] + line + b" of RELEASE\\n")
"""

ROOM = """
import asyncio

everybody = set()


async def handler(connection):
    everybody.add(connection)
    if connection.state.get("slow"):
        SLOWLY
    async for line in connection.lines():
        if line == b"slow":
            connection.state["slow"] = True
            await connection.write(b"yes\\n")
        elif line == b"who":
            await connection.write(b"RELEASE\\n")
        else:
            for one in everybody:
                one.push(line + b" of RELEASE\\n")
"""

BOTH_MOVES = pytest.mark.parametrize("move", ["together", "rolling"])


class Deployment:
    """A server whose release is a symlink that deploys move."""

    def __init__(self, servers: Servers, root: Path, source: str = COUNT, **config: Any) -> None:
        self.root = root
        self.current = root / "current"
        self.deploy("one", source)
        self.server: Server = servers("app:handler", chdir=str(self.current), config=config)

    def deploy(self, name: str, source: str = COUNT) -> None:
        (self.root / name).mkdir(exist_ok=True)
        (self.root / name / "app.py").write_text(source.replace("RELEASE", name), encoding="utf-8")
        new = self.root / "new"
        new.symlink_to(name)
        new.rename(self.current)

    def worker_of(self, generation: int) -> int:
        """Return the pid of that generation's first worker."""
        return next(int(w["pid"]) for w in self.server.status()["workers"] if w["generation"] == generation)

    def wait_phase(self, phase: str) -> None:
        """Return once the holder is in that phase, however short: no interpreter is started to look."""
        operator = Operator(self.server.directory / self.server.name / "control.sock")
        operator.wait_until(lambda status: status["phase"]["name"] == phase)


@contextlib.contextmanager
def reloading(server: Server, **flags: Any) -> Iterator[Callable[[], ReloadResult]]:
    """Reload beside the test; what is given waits for the result."""
    results: list[ReloadResult] = []
    thread = threading.Thread(target=lambda: results.append(server.reload(**flags)))
    thread.start()

    def result() -> ReloadResult:
        thread.join(60)
        return results[0]

    yield result
    thread.join(60)


def client_of(server: Server, release: bytes) -> Client:
    """Return a client whom that release has accepted."""
    while True:
        client = Client(server.address)
        if client.ask(b"who\n") == release:
            return client
        with client:
            client.end()


@BOTH_MOVES
def test_a_bake_that_holds_commits(copyover_server: Servers, tmp_path: Path, move: str) -> None:
    """The health command succeeds again and again; then the incumbent goes, and the result says how long it took."""
    deployment = Deployment(copyover_server, tmp_path, move=move)
    server, marks = deployment.server, tmp_path / "marks"
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"1 a of one\n"
        deployment.deploy("two")
        result = server.reload(
            bake=1.5, health=f"echo $COPYOVER_NAME $COPYOVER_GENERATION >> {shlex.quote(str(marks))}"
        )
        result.assert_lossless()
        assert result.answer["phases_ms"]["baking"] >= 1400
        assert set(marks.read_text().splitlines()) == {f"{server.name} 2"}
        assert client.ask(b"b\n") == b"2 b of two\n"


@BOTH_MOVES
def test_a_failing_health_command_brings_everything_back(copyover_server: Servers, tmp_path: Path, move: str) -> None:
    """Exit 3, and who serves; what the replacement served and accepted goes on with its newest state."""
    deployment = Deployment(copyover_server, tmp_path, move=move)
    server, sick = deployment.server, tmp_path / "sick"
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"1 a of one\n"
        deployment.deploy("two")
        with reloading(server, bake=50, health=f"test ! -e {shlex.quote(str(sick))}") as result:
            deployment.wait_phase("baking")
            assert client.ask(b"b\n") == b"2 b of two\n"
            with Client(server.address) as late:
                assert late.ask(b"c\n") == b"1 c of two\n"
                sick.touch()
                refused = result().assert_refused()
                assert "the health command exited with 1" in str(refused.error)
                assert "generation 1" in str(refused.error)
                assert client.ask(b"d\n") == b"3 d of one\n"
                assert late.ask(b"e\n") == b"2 e of one\n"


@BOTH_MOVES
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_replacement_that_breaks_in_the_bake_costs_nothing(
    copyover_server: Servers, tmp_path: Path, move: str, fault: signal.Signals
) -> None:
    """Killed or stalled after it has served: its connections go back with their last boundary, exactly."""
    deployment = Deployment(copyover_server, tmp_path, move=move, boundary_s=0.5)
    server = deployment.server
    with Client(server.address) as client, Client(server.address) as idle:
        assert client.ask(b"a\n") == b"1 a of one\n"
        deployment.deploy("two")
        sick = tmp_path / "sick"
        with reloading(server, bake=50, health=f"test ! -e {shlex.quote(str(sick))}") as result:
            deployment.wait_phase("baking")
            assert client.ask(b"b\n") == b"2 b of two\n"
            os.kill(deployment.worker_of(2), fault)
            sick.touch()  # who only stands still is found out by that
            refused = result().assert_refused()
            assert refused.answer["serving_generation"] == 1
        assert client.ask(b"c\n") == b"3 c of one\n"
        assert idle.ask(b"d\n") == b"1 d of one\n"
        assert [worker["generation"] for worker in server.status()["workers"]] == [1]


def test_cancel_undoes_a_change_under_way(copyover_server: Servers, tmp_path: Path) -> None:
    """The one who reloads is told 3, the one who cancels 0; without a change there is nothing to cancel."""
    deployment = Deployment(copyover_server, tmp_path)
    server = deployment.server
    nothing = server.command("cancel", "--json")
    assert (nothing.exit_code, nothing.error) == (3, "no change is under way; generation 1 serves")
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"1 a of one\n"
        deployment.deploy("two")
        with reloading(server, bake=50) as result:
            deployment.wait_phase("baking")
            assert server.command("cancel", "--json").exit_code == 0
            assert "cancelled by an operator" in str(result().assert_refused().error)
        assert client.ask(b"b\n") == b"2 b of one\n"


@pytest.mark.parametrize("top", ["await asyncio.sleep(0.8)", "await asyncio.Event().wait()"], ids=["slow", "hangs"])
def test_what_is_pushed_to_those_that_are_being_entered_goes_back_with_them(
    copyover_server: Servers, tmp_path: Path, top: str
) -> None:
    """
    A handler of the cut is at its top, perhaps for ever, and a fresh client speaks to all: after it all have that.

    Once, and at once; the incumbent's coroutine goes on with each, and the release that was taken back keeps nobody.
    """
    deployment = Deployment(copyover_server, tmp_path, ROOM.replace("SLOWLY", "pass"), move="together")
    server = deployment.server
    with Client(server.address) as one, Client(server.address) as slow:
        assert one.ask(b"who\n") == b"one\n"
        assert slow.ask(b"slow\n") == b"yes\n"
        deployment.deploy("two", ROOM.replace("SLOWLY", top))
        with reloading(server, bake=50) as result, client_of(server, b"two\n") as fresh:
            assert fresh.ask(b"hello\n") == b"hello of two\n"
            assert server.command("cancel", "--json").exit_code == 0
            assert result().assert_refused().kept == 0
            assert fresh.ask(b"back\n") == b"back of one\n"
            for client in (one, slow):
                assert client.line() == b"hello of two\n"
                assert client.line() == b"back of one\n"
                assert client.ask(b"who\n") == b"one\n"


def test_cancel_ends_a_release_that_hangs(copyover_server: Servers, tmp_path: Path) -> None:
    """Nobody has to wait for the deadline of a start that will never end."""
    deployment = Deployment(copyover_server, tmp_path)
    deployment.deploy("hangs", "import asyncio\nasync def startup():\n    await asyncio.Event().wait()\n" + COUNT)
    with reloading(deployment.server) as result:
        deployment.wait_phase("booting")
        assert deployment.server.command("cancel", "--json").exit_code == 0
        result().assert_refused()


def test_roll_back_by_hand_after_the_commit_is_a_reload_to_the_release_before(
    copyover_server: Servers, tmp_path: Path
) -> None:
    """The release as it was pinned, whatever the symlink says now; and once more, forth again."""
    deployment = Deployment(copyover_server, tmp_path)
    server = deployment.server
    assert server.command("rollback", "--json").exit_code == 3  # there is none before the first
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"1 a of one\n"
        deployment.deploy("two")
        server.reload().assert_lossless()
        assert client.ask(b"b\n") == b"2 b of two\n"
        back = server.command("rollback", "--json").assert_lossless()
        assert (back.answer["generation"], back.moved) == ({"from": 2, "to": 3}, 1)
        assert client.ask(b"c\n") == b"3 c of one\n"
        server.command("rollback", "--json").assert_lossless()
        assert client.ask(b"d\n") == b"4 d of two\n"


def test_roll_back_by_hand_while_it_bakes(copyover_server: Servers, tmp_path: Path) -> None:
    """While the incumbent lives it takes everything back: no interpreter is started."""
    deployment = Deployment(copyover_server, tmp_path)
    deployment.deploy("two")
    with reloading(deployment.server, bake=50) as result:
        deployment.wait_phase("baking")
        assert deployment.server.command("rollback", "--json").answer["serving_generation"] == 1
        result().assert_refused()


def test_a_schema_that_the_incumbent_cannot_read_needs_one_way(copyover_server: Servers, tmp_path: Path) -> None:
    """Refused before anything moves, with what to do; said to be meant, it goes."""
    deployment = Deployment(copyover_server, tmp_path)
    server = deployment.server
    codec = "schema=2, reads={1}, decode=lambda data, schema: json.loads(data)"
    newer = f"import copyover, json\n{COUNT}app = copyover.Application(handler=handler, {codec})\n"
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"1 a of one\n"
        deployment.deploy("two", newer)
        server.configure(app="app:app")
        refused = server.reload().assert_refused()
        assert "writes states of schema 2, the incumbent reads 1" in str(refused.error)
        server.reload(one_way=True).assert_lossless()
        assert client.ask(b"b\n") == b"2 b of two\n"


EXHAUSTED = {
    "descriptors": """
import os, resource
async def startup():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    while len(os.listdir("/proc/self/fd")) < 60:
        os.dup(0)
""",
    "memory": """
import resource
async def startup():
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4096, used + 4096))
    global hoard
    hoard = []
    try:
        while True:
            hoard.append(bytes(512))
    except MemoryError:
        pass
""",
}


@pytest.mark.parametrize("what", EXHAUSTED)
def test_a_replacement_without_descriptors_or_memory_is_refused(
    copyover_server: Servers, tmp_path: Path, what: str
) -> None:
    """It cannot build what is staged in it; the incumbent never noticed."""
    deployment = Deployment(copyover_server, tmp_path, slot_bytes=0)
    server = deployment.server
    server.expect_errors = True
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server.address)) for _ in range(30)]
        assert {client.ask(b"a\n") for client in clients} == {b"1 a of one\n"}
        deployment.deploy("two", EXHAUSTED[what] + COUNT)
        server.reload(timeout_s=20).assert_refused()
        assert {client.ask(b"b\n") for client in clients} == {b"2 b of one\n"}


SLOW = """
import asyncio
from pathlib import Path

async def handler(connection):
    tops = connection.state["tops"] = connection.state.get("tops", 0) + 1
    if connection.resumed:
        await connection.write(b"again\\n")
        if gate := connection.state.get("gate"):
            await asyncio.get_running_loop().run_in_executor(None, Path(gate).read_bytes)
    heard = 0
    async for line in connection.lines():
        heard += 1
        if line.startswith(b"gate "):
            connection.state["gate"] = line[5:].decode()
        await connection.write(b"%d %d\\n" % (tops, heard))
"""


def test_a_replacement_that_dies_while_it_enters_leaves_no_trace(copyover_server: Servers, tmp_path: Path) -> None:
    """Neither of who has reached a boundary there nor of who has not: the very coroutines go on."""
    (tmp_path / "app.py").write_text(SLOW, encoding="utf-8")
    server = copyover_server("app:handler", chdir=str(tmp_path), move="together")
    with Client(server.address) as quick, Client(server.address) as slow, Gate(tmp_path / "gate") as gate:
        assert quick.ask(b"a\n") == b"1 1\n"
        assert slow.ask(b"gate %s\n" % str(gate.path).encode()) == b"1 1\n"
        (incumbent,) = server.worker_pids()
        with reloading(server) as wait_result:
            gate.wait_reached()
            (replacement,) = set(server.worker_pids()) - {incumbent}
            os.kill(replacement, signal.SIGKILL)
            assert wait_result().outcome == "rolled-back"
        assert server.worker_pids() == [incumbent]
        for client in (quick, slow):
            assert client.ask(b"b\n") == b"1 2\n"
            assert client.is_quiet()
