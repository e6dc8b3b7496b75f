"""A bad upgrade costs nothing, and the tool says so: who serves, why, and with which exit code."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from clients import Client

if TYPE_CHECKING:
    from copyover.testing import Server, Servers

APPS = Path(__file__).parent / "apps"


def write_release(directory: Path, source: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "app.py").write_text(source, encoding="utf-8")
    return directory


ECHO = """
async def handler(connection):
    async for line in connection.lines():
        connection.state["n"] = connection.state.get("n", 0) + 1
        await connection.write(b"%d " % connection.state["n"] + line + b"\\n")
"""

HANGS = """
import asyncio
async def startup():
    await asyncio.Event().wait()
"""

BROKEN = {
    "raises at import": ('raise RuntimeError("no database")\n', "RuntimeError: no database"),
    "raises in startup": (ECHO + 'async def startup():\n    raise OSError("no cache")\n', "OSError: no cache"),
    "exits": ("import os\nos._exit(7)\n", "exited with 7 before it was ready"),
    "exits in startup": (ECHO + "import os\nasync def startup():\n    os._exit(9)\n", "exited with 9"),
    "kills itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", "was killed by SIGKILL"),
    "has no handler": ("x = 1\n", "has no handler"),
    "is not a handler": ("handler = 3\n", "is of type int"),
    "is not async": ("def handler(connection): pass\n", "no coroutine function"),
    "is a syntax error": ("def handler(:\n", "SyntaxError"),
}


@pytest.fixture
def deployed(copyover_server: Servers, tmp_path: Path) -> tuple[Server, Path]:
    """Start a server whose release is a symlink, as deploys move them."""
    write_release(tmp_path / "good", ECHO)
    current = tmp_path / "current"
    current.symlink_to("good")
    return copyover_server("app:handler", chdir=str(current), config={"timeout_s": 60.0}), current


def deploy(current: Path, release: str) -> None:
    new = current.with_name("new")
    new.symlink_to(release)
    new.rename(current)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_release_that_does_not_start_costs_nothing(deployed: tuple[Server, Path], fault: str) -> None:
    """Exit 3; the sentence says what happened and who serves; the last lines that it wrote are there."""
    server, current = deployed
    server.expect_errors = True
    source, reason = BROKEN[fault]
    write_release(current.parent / "bad", source)
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"1 a\n"
        deploy(current, "bad")
        result = server.reload()
        assert (result.exit_code, result.outcome) == (3, "refused")
        said = f"{result.error}\n" + "\n".join(result.answer["stderr_tail"])
        assert reason in said
        assert f"generation 1 (pid {server.worker_pids()[0]}) still serves every connection" in str(result.error)
        assert result.answer["connections"] == {"moved": 0, "kept": 0, "ended": 0, "lost": 0, "closed": 0}
        assert client.ask(b"b\n") == b"2 b\n"
        deploy(current, "good")
        assert server.reload().assert_lossless().moved == 1
        assert client.ask(b"c\n") == b"3 c\n"


def test_a_release_that_is_not_ready_in_time_is_refused(deployed: tuple[Server, Path]) -> None:
    """The deadline is the holder's; it names the phase."""
    server, current = deployed
    server.expect_errors = True
    write_release(current.parent / "bad", ECHO + HANGS)
    deploy(current, "bad")
    result = server.reload(timeout_s=1.5)
    assert (result.exit_code, result.outcome) == (3, "refused")
    assert "was not ready within 1.5 s (still booting)" in str(result.error)


def test_a_release_that_cannot_read_the_states_is_refused(deployed: tuple[Server, Path]) -> None:
    """Schemas are compared before anything moves."""
    server, current = deployed
    write_release(
        current.parent / "newer",
        ECHO + "import copyover\nhandler = copyover.Application(handler=handler, schema=2)\n",
    )
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"1 a\n"
        deploy(current, "newer")
        result = server.reload()
        assert result.exit_code == 3
        assert "reads states of schema 2, the live connections have schema 1" in str(result.error)
        assert client.ask(b"b\n") == b"2 b\n"


@pytest.mark.parametrize("how_many", ["one", "all"])
def test_a_state_that_the_replacement_cannot_decode_stays(deployed: tuple[Server, Path], how_many: str) -> None:
    """The replacement gives the record back, the very coroutine goes on; if it reads none at all, all rolls back."""
    server, current = deployed
    source = ECHO + (
        "import copyover\n"
        "def decode(encoded, schema):\n"
        "    if b'1' in encoded: raise ValueError('not this one')\n"
        "    return {'n': 7}\n"
        "handler = copyover.Application(handler=handler, decode=decode)\n"
    )
    write_release(current.parent / "odd", source)
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"1 a\n"
        deploy(current, "odd")
        with Client(server.address) as other:
            assert other.ask(b"a\n") == b"1 a\n"
            if how_many == "one":
                assert other.ask(b"b\n") == b"2 b\n"
            result = server.reload()
            if how_many == "one":
                assert (result.exit_code, result.moved, result.kept, result.lost) == (0, 1, 1, 0)
                assert "ValueError: not this one" in result.answer["kept"][0]["reason"]
                assert other.ask(b"c\n") == b"8 c\n"
            else:
                assert (result.exit_code, result.outcome, result.lost) == (3, "rolled-back", 0)
                assert "could read none of the 2 states" in str(result.error)
                assert "ValueError: not this one" in str(result.error)
                assert other.ask(b"b\n") == b"2 b\n"
        assert client.ask(b"b\n") == b"2 b\n"


def test_an_interpreter_without_copyover_is_refused_with_the_pip_command(
    copyover_server: Servers, tmp_path: Path
) -> None:
    """Named: the interpreter, the version that is needed, the command that installs it."""
    write_release(tmp_path / "app", ECHO)
    server = copyover_server("app:handler", chdir=str(tmp_path / "app"), python=sys.executable)
    venv.create(tmp_path / "app" / ".venv", with_pip=False)
    server.configure(python=None)
    result = server.reload()
    assert result.exit_code == 3
    python = tmp_path / "app" / ".venv" / "bin" / "python"
    assert f"{python} does not have copyover" in str(result.error)
    assert f"{python} -m pip install copyover==" in str(result.error)


def test_an_interpreter_that_speaks_another_wire_is_refused(copyover_server: Servers, tmp_path: Path) -> None:
    """No version in common: refused before anything moves, with both versions and the pip command."""
    write_release(tmp_path / "app", ECHO)
    server = copyover_server("app:handler", chdir=str(tmp_path / "app"))
    server.expect_errors = True
    shim = tmp_path / "python-of-tomorrow"
    program = (
        "import runpy, copyover.wire as wire; wire.WIRE_VERSIONS = (7, 9); "
        "runpy.run_module('copyover.worker', run_name='__main__')"
    )
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -P -c "{program}"\n', encoding="utf-8")
    shim.chmod(0o755)
    server.configure(python=str(shim))
    result = server.reload()
    assert result.exit_code == 3
    assert "speaks wire [7, 9]" in str(result.error)
    assert "this holder has copyover" in str(result.error)
    assert "-m pip install copyover==" in str(result.error)


def test_a_second_reload_meanwhile_is_told_that_it_is_busy(deployed: tuple[Server, Path]) -> None:
    """Exit 5, and the first is not disturbed."""
    server, current = deployed
    server.expect_errors = True
    write_release(current.parent / "bad", ECHO + HANGS)
    deploy(current, "bad")
    assert server.reload(no_wait=True, timeout_s=30).exit_code == 0
    result = server.reload()
    assert (result.exit_code, result.outcome) == (5, "busy")
    blocked_by = server.status()["phase"]["blocked_by"]
    assert blocked_by[0]["reason"] == "not ready yet"
    assert server.status()["phase"]["deadline_in_s"] > 0


def test_sighup_reloads_and_one_that_comes_meanwhile_is_remembered(deployed: tuple[Server, Path]) -> None:
    """SIGHUP is a reload; however many come during one, one more follows."""
    server, _ = deployed
    for _ in range(5):
        os.kill(server.pid, signal.SIGHUP)
    while server.status()["generation"] < 2:
        assert server.status()["is_serving"]
    server.stop()
    assert server.log.count("event=reload outcome=done") in (2, 3)


def test_a_replacement_that_dies_in_the_move_returns_everything(deployed: tuple[Server, Path]) -> None:
    """Dead before it served: all go back to the very coroutines, and the exit code says that nothing was lost."""
    server, current = deployed
    server.expect_errors = True
    fatal = ECHO + (
        "import copyover, os\n"
        "def import_shared(shared):\n"
        "    os._exit(11)\n"
        "handler = copyover.Application(handler=handler, export_shared=dict, import_shared=import_shared)\n"
    )
    sharing = ECHO + "import copyover\nhandler = copyover.Application(handler=handler, export_shared=dict)\n"
    write_release(current.parent / "sharing", sharing + "\n")
    write_release(current.parent / "fatal", fatal)
    deploy(current, "sharing")
    assert server.reload().outcome == "done"
    clients = [Client(server.address) for _ in range(50)]
    for client in clients:
        assert client.ask(b"a\n") == b"1 a\n"
        client.send(b"half")
    deploy(current, "fatal")
    result = server.reload()
    assert (result.exit_code, result.outcome, result.lost) == (3, "rolled-back", 0)
    assert "exited with 11, while moving" in str(result.error)
    for client in clients:
        assert client.ask(b" b\n") == b"2 half b\n"
        client.socket.close()


def test_an_incumbent_that_dies_in_the_move_is_told_by_exit_4(copyover_server: Servers) -> None:
    """Who had moved goes on with the replacement; who was in the middle of a message is lost, and that is told."""
    config = {"boundary_s": 60.0, "gather_s": 0.1}
    server = copyover_server("handlers:two_parts", chdir=APPS, move="together", config=config)
    incumbent = server.worker_pids()[0]
    with Client(server.address) as busy, Client(server.address) as idle, ThreadPoolExecutor(1) as deploy_script:
        assert busy.ask(b"3\n") == b"go on\n"
        reload = deploy_script.submit(server.reload)
        while [row["worker"] for row in server.connections()] != [1, 2]:  # one has moved, one is busy
            assert not reload.done()
        os.kill(incumbent, signal.SIGKILL)
        result = reload.result(60)
        assert (result.exit_code, result.outcome) == (4, "done")
        assert result.answer["connections"] == {"moved": 1, "kept": 0, "ended": 0, "lost": 1, "closed": 0}
        with pytest.raises(ConnectionResetError):
            busy.receive(1)
        assert idle.ask(b"1\n") == b"go on\n"


def test_a_replacement_that_is_killed_in_the_move_is_told_truthfully(copyover_server: Servers) -> None:
    """Whom it served in the middle of a message is lost and counted, exit 4; all others go on with the incumbent."""
    config = {"boundary_s": 60.0, "gather_s": 0.1}
    server = copyover_server("handlers:two_parts", chdir=APPS, move="together", config=config)
    with contextlib.ExitStack() as stack:
        busy, idle, unlucky = (stack.enter_context(Client(server.address)) for _ in range(3))
        deploy_script = stack.enter_context(ThreadPoolExecutor(1))
        assert busy.ask(b"3\n") == b"go on\n"
        reload = deploy_script.submit(server.reload)
        while [row["worker"] for row in server.connections()] != [1, 2, 2]:
            assert not reload.done()
        assert unlucky.ask(b"9\n") == b"go on\n"
        os.kill(server.worker_pids()[1], signal.SIGKILL)
        busy.send(b"abc")  # comes to its boundary in the incumbent, which is waited for
        assert busy.line() == b"got abc\n"
        result = reload.result(60)
        assert (result.exit_code, result.outcome, result.lost) == (4, "rolled-back", 1)
        assert "was killed by SIGKILL, while moving; 1 connections were lost" in str(result.error)
        with pytest.raises(ConnectionResetError):
            unlucky.receive(1)
        assert busy.ask(b"1\n") == b"go on\n"
        assert idle.ask(b"1\n") == b"go on\n"


def test_an_incumbent_that_stalls_in_the_move_is_killed_at_last(copyover_server: Servers) -> None:
    """SIGSTOP cannot hold a change open for ever: past the deadlines the stalled worker is killed, and it is told."""
    config = {"boundary_s": 5.0, "gather_s": 0.1}
    server = copyover_server("handlers:two_parts", chdir=APPS, move="rolling", config=config)
    incumbent = server.worker_pids()[0]
    with Client(server.address) as busy, ThreadPoolExecutor(1) as deploy_script:
        assert busy.ask(b"3\n") == b"go on\n"
        reload = deploy_script.submit(server.reload, timeout_s=3)
        while server.connections()[0]["state"] != "freezing":
            assert not reload.done()
        os.kill(incumbent, signal.SIGSTOP)
        result = reload.result(90)
        assert (result.exit_code, result.lost) == (4, 1)
        with pytest.raises(ConnectionResetError):
            busy.receive(1)
    with Client(server.address) as client:
        assert client.ask(b"1\n") == b"go on\n"
    assert server.reload().outcome == "done"


def test_a_holder_that_is_killed_in_a_cut_leaves_its_clients_served(copyover_server: Servers) -> None:
    """What has not left the incumbent goes on there, and fresh clients are accepted; nobody can reload any more."""
    config = {"boundary_s": 60.0, "gather_s": 60.0}
    server = copyover_server("handlers:two_parts", chdir=APPS, move="together", config=config)
    server.expect_errors = True
    with Client(server.address) as busy, Client(server.address) as idle, ThreadPoolExecutor(1) as deploy_script:
        assert busy.ask(b"3\n") == b"go on\n"
        reload = deploy_script.submit(server.reload)
        while [row["state"] for row in server.connections()] != ["freezing", "freezing"]:
            assert not reload.done()
        server.kill()
        assert reload.result(60).exit_code == 1  # what became of it is unknown
        assert idle.ask(b"1\n") == b"go on\n"
        busy.send(b"abc")
        assert busy.line() == b"got abc\n"
        with Client(server.address) as fresh:
            assert fresh.ask(b"1\n") == b"go on\n"


def test_a_crash_restart_uses_the_pinned_release(deployed: tuple[Server, Path]) -> None:
    """A symlink that a deploy has moved takes effect at the reload, not at the next crash."""
    server, current = deployed
    write_release(current.parent / "bad", "raise SystemExit(4)\n")
    deploy(current, "bad")
    os.kill(server.worker_pids()[0], signal.SIGKILL)
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"1 a\n"
    assert server.status()["workers"][0]["release"]["directory"].endswith("good")


def test_a_stop_lets_messages_finish(copyover_server: Servers) -> None:
    """SIGTERM drains: who is in the middle of a message finishes it, who is at a boundary is ended."""
    server = copyover_server("handlers:two_parts", chdir=APPS)
    with Client(server.address) as busy, Client(server.address) as idle:
        assert busy.ask(b"3\n") == b"go on\n"
        while len(server.connections()) < 2:
            assert server.status()["is_serving"]
        os.kill(server.pid, signal.SIGTERM)
        assert idle.receive(1) == b""
        busy.send(b"abc")
        assert busy.line() == b"got abc\n"
        assert busy.receive(1) == b""
    assert server.stop() == 0


def test_stderr_is_the_real_one_once_ready(copyover_server: Servers, tmp_path: Path) -> None:
    """Before READY the holder reads what a worker writes; afterwards nothing hangs on the holder's pipe."""
    source = "import sys\nprint('before', file=sys.stderr)\n" + ECHO
    server = copyover_server("app:handler", chdir=str(write_release(tmp_path / "app", source)))
    assert "before\n" in server.log
    target = Path(f"/proc/{server.worker_pids()[0]}/fd/2").readlink()
    assert target == Path(f"/proc/{server.pid}/fd/2").readlink()
    assert not str(target).startswith("pipe:")


def test_startup_and_shutdown_run_once_in_each_worker(copyover_server: Servers, tmp_path: Path) -> None:
    """READY is the application's word: startup has returned; shutdown runs in a worker that retires."""
    source = ECHO + (
        "async def startup():\n    print('starting', flush=True)\n"
        "async def shutdown():\n    print('ending', flush=True)\n"
    )
    server = copyover_server("app:handler", chdir=str(write_release(tmp_path / "app", source)))
    server.reload().assert_lossless()
    server.stop()
    assert server.output.count("starting") == server.output.count("ending") == 2


def test_orphans_are_reaped(tmp_path: Path) -> None:
    """The holder may be PID 1: what is orphaned to it does not stay a zombie."""
    # PR_SET_CHILD_SUBREAPER survives execve: orphans come to the holder as they would to PID 1. prctl(2)
    program = (
        "import ctypes, os, sys; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    source = ECHO + (
        "import os, sys\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0:\n"
        "        print('orphan', os.getpid(), flush=True)\n"
        "        os.execlp('true', 'true')\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    app = str(write_release(tmp_path / "app", source))
    arguments = ["-m", "copyover.cli", "run", "--listen", "127.0.0.1:0", "--chdir", app, "app:handler"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"COPYOVER_RUNTIME_DIR": str(tmp_path / "r")},
        text=True,
    ) as holder:
        assert holder.stdout is not None
        orphan = int(holder.stdout.readline().split()[1])
        assert holder.stdout.readline().startswith("ready ")
        try:
            pidfd = os.pidfd_open(orphan)
        except ProcessLookupError:
            pass  # reaped before we looked
        else:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(30_000)
            os.close(pidfd)
            deadline_s = time.monotonic() + 30
            while Path(f"/proc/{orphan}").exists():  # dead; until it is reaped it is a zombie
                assert time.monotonic() < deadline_s
        holder.send_signal(signal.SIGTERM)
        assert holder.wait(30) == 0
