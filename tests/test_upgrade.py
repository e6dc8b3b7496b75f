"""The holder becomes another program: same pid, same descriptors, and no client notices."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from clients import Client

if TYPE_CHECKING:
    from collections.abc import Callable

    from copyover.testing import Server, Servers

APPS = "tests/apps"
SRC = Path(__file__).parent.parent / "src"


class Upgraded:
    """What ``copyover upgrade --json`` said."""

    def __init__(self, server: Server, python: Path | str | None = None) -> None:
        arguments = [] if python is None else ["--python", str(python)]
        done = server._run("upgrade", "--json", *arguments)
        self.exit_code = done.returncode
        self.answer: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
        self.stderr = done.stderr

    def assert_done(self) -> Upgraded:
        assert (self.exit_code, self.answer.get("outcome")) == (0, "done"), f"{self.answer}\n{self.stderr}"
        return self

    def assert_refused(self, *words: str) -> Upgraded:
        """The sentence says what is wrong, and who serves."""
        assert (self.exit_code, self.answer.get("outcome")) == (3, "refused"), f"{self.answer}\n{self.stderr}"
        for word in (*words, "serves on as it was"):
            assert word in self.answer["error"]
        return self


def children(pid: int) -> set[int]:
    """Return the children of a process, zombies too."""
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()))


def state_of(pid: int) -> str:
    """Return one letter. proc_pid_stat(5)"""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]


def wait_lent(server: Server, count: int) -> None:
    while len(server.connections()) < count:
        assert server.status()["is_serving"]


def interpreter(path: Path, script: str) -> Path:
    """Make an interpreter that does something else first; ``$4`` is --check or --resume."""
    path.write_text(f'#!/bin/sh\n{script}\nexec {sys.executable} "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def another(tmp_path: Path) -> Callable[..., Path]:
    """Give the interpreter of an environment with another release of copyover, made by replacing words of this one."""

    def make(name: str, **changes: tuple[str, str]) -> Path:
        root = tmp_path / name
        shutil.copytree(SRC / "copyover", root / "copyover")
        changes = {"__init__": ('__version__ = "0.1.0"', f'__version__ = "{name}"'), **changes}
        for room, (old, new) in changes.items():
            file = root / "copyover" / f"{room}.py"
            text = file.read_text(encoding="utf-8")
            assert old in text
            file.write_text(text.replace(old, new), encoding="utf-8")
        return interpreter(tmp_path / f"python-{name}", f"export PYTHONPATH={root}")

    return make


# ---- what stays


def test_no_client_notices_an_upgrade(copyover_server: Servers) -> None:
    """Under load and over several upgrades: pid, workers and bytes stay, nothing leaks, and a reload works at once."""
    server = copyover_server("echo:echo", chdir=APPS, workers=2)
    with server.swarm(clients=20, seed=3) as swarm:
        wait_lent(server, 20)
        for generation in range(1, 4):
            workers = server.worker_pids()
            before = [server.descriptors(pid) for pid in (server.pid, *workers)]
            done = Upgraded(server).assert_done()
            assert done.answer["pid"] == server.pid
            assert (done.answer["connections"], done.answer["workers"]) == (20, 2)
            assert f"(pid {server.pid})" in done.stderr
            swarm.wait_round()
            assert server.worker_pids() == workers
            assert children(server.pid) == set(workers)
            assert [server.descriptors(pid) for pid in (server.pid, *workers)] == before
            server.reload().assert_lossless()
            assert server.status()["generation"] == generation + 1
            while len(server.worker_pids()) > 2:  # the incumbent leaves
                assert server.status()["is_serving"]
            assert sum(map(server.descriptors, server.worker_pids())) == sum(before[1:])  # a worker inherits nothing
    swarm.report.assert_lossless()
    assert server.stop() == 0


def test_clients_that_come_and_go_meanwhile_are_served(copyover_server: Servers) -> None:
    """Workers accept on; what they lend and release meanwhile is heard by the successor."""
    server = copyover_server("echo:echo", chdir=APPS, workers=2)
    with server.swarm(clients=10, churn=10, seed=4) as swarm:
        for _ in range(3):
            Upgraded(server).assert_done()
            swarm.wait_round()
    swarm.report.assert_lossless()
    while server.status()["connections"]["live"]:
        assert server.status()["is_serving"]
    counters = server.status()["counters"]
    assert counters["accepted"] == counters["ended"] >= 20


def test_another_release_of_copyover_goes_on_with_the_workers_of_this_one(
    copyover_server: Servers, another: Callable[..., Path]
) -> None:
    """The wire is what they share: the holder goes up and down again, with workers of either release."""
    server = copyover_server("echo:echo", chdir=APPS)
    python = another("0.2.0")
    with server.swarm(clients=10, seed=5) as swarm:
        done = Upgraded(server, python).assert_done()
        assert (done.answer["from"]["copyover"], done.answer["to"]["copyover"]) == ("0.1.0", "0.2.0")
        assert server.status()["copyover"] == "0.2.0"
        swarm.wait_round()
        server.reload().assert_lossless()
        back = Upgraded(server, interpreter(python.with_name("back"), "unset PYTHONPATH")).assert_done()
        assert (back.answer["from"]["copyover"], back.answer["to"]["copyover"]) == ("0.2.0", "0.1.0")
        swarm.wait_round()
        server.reload().assert_lossless()
    swarm.report.assert_lossless()


def test_what_the_holder_remembers_lives_on(copyover_server: Servers) -> None:
    """Counters, the last reload, its age, and what the one before was: the successor knows all of it."""
    server = copyover_server("echo:echo", chdir=APPS)
    server.reload().assert_lossless()
    before = server.status()
    Upgraded(server).assert_done()
    after = server.status()
    assert after.pop("uptime_s") > before.pop("uptime_s")
    assert after == before
    assert server._run("rollback").returncode == 0
    assert server.status()["generation"] == 3


def test_who_speaks_with_the_holder_meanwhile_is_answered(copyover_server: Servers) -> None:
    """An operator who had said half a request says the other half to the successor."""
    server = copyover_server("echo:echo", chdir=APPS)
    with socket.socket(socket.AF_UNIX) as operator:
        operator.settimeout(30.0)
        operator.connect(str(server.directory / server.name / "control.sock"))
        operator.sendall(b'{"do": "sta')
        assert server.status()["is_serving"]  # it was heard before this
        Upgraded(server).assert_done()
        operator.sendall(b'tus"}\n')
        assert json.loads(operator.makefile().readline())["result"]["pid"] == server.pid


# ---- what happens meanwhile


def test_a_signal_while_the_holder_is_away_is_not_lost(copyover_server: Servers, tmp_path: Path) -> None:
    """Neither program has a handler then; SIGHUP does not kill, and is done once."""
    script = '[ "$4" = --resume ] && kill -HUP $$ && kill -HUP $$'
    server = copyover_server("echo:echo", chdir=APPS)
    with server.swarm(clients=5, seed=6) as swarm:
        Upgraded(server, interpreter(tmp_path / "python", script)).assert_done()
        while server.status()["counters"]["reloads_done"] < 2:
            assert server.pid == server.status()["pid"]
        swarm.wait_round()
        Upgraded(server).assert_done()
        assert server.status()["generation"] == 2
    swarm.report.assert_lossless()


def test_a_stop_while_the_holder_is_away_is_done_by_the_successor(copyover_server: Servers, tmp_path: Path) -> None:
    """SIGTERM then is as good as a moment later."""
    server = copyover_server("echo:echo", chdir=APPS)
    Upgraded(server, interpreter(tmp_path / "python", '[ "$4" = --resume ] && kill -TERM $$'))
    assert server.stop() == 0
    assert "event=upgraded" in server.log
    assert "phase=stopped" in server.log


def test_a_reload_that_comes_first_is_not_disturbed(copyover_server: Servers, tmp_path: Path) -> None:
    """Asked for during the check, it is done before the holder leaves."""
    server = copyover_server("echo:echo", chdir=APPS)
    with server.swarm(clients=5, seed=7) as swarm:
        Upgraded(server, interpreter(tmp_path / "python", '[ "$4" = --check ] && kill -HUP $PPID')).assert_done()
        assert server.status()["generation"] == 2
        assert server.log.index("event=reload outcome=done generation=2") < server.log.index("event=upgraded")
    swarm.report.assert_lossless()


def test_a_signal_just_before_the_holder_leaves_is_not_lost(copyover_server: Servers, tmp_path: Path) -> None:
    """Caught and not yet handled, it is nowhere but in the old program: that handles it, and only then leaves."""
    server = copyover_server("echo:echo", chdir=APPS)
    (worker,) = server.worker_pids()
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    python = interpreter(tmp_path / "python", f'[ "$4" = --check ] && cat {gate} && kill -STOP $PPID')
    with socket.socket(socket.AF_UNIX) as operator:
        operator.settimeout(30.0)
        operator.connect(str(server.directory / server.name / "control.sock"))
        operator.sendall(json.dumps({"do": "upgrade", "python": str(python)}).encode() + b"\n")
        while not (checking := children(server.pid) - {worker}):
            assert server.status()["is_serving"]
        assert server.status()["is_serving"]  # by now it waits for the child's end
        gate.write_text("", encoding="utf-8")
        while state_of(*checking) != "Z":  # the holder, stopped, finds it dead and the signal at once
            continue
        os.kill(server.pid, signal.SIGHUP)
        os.kill(server.pid, signal.SIGCONT)
        assert json.loads(operator.makefile().readline())["result"]["outcome"] == "done"
    assert server.status()["generation"] == 2


def test_a_worker_that_dies_meanwhile_is_buried_and_restarted(copyover_server: Servers, tmp_path: Path) -> None:
    """Its death is a readable pidfd to the successor, too; nobody stays a zombie."""
    server = copyover_server("echo:echo", chdir=APPS)
    (worker,) = server.worker_pids()
    Upgraded(server, interpreter(tmp_path / "python", f'[ "$4" = --resume ] && kill -KILL {worker}')).assert_done()
    while not server.status()["is_serving"] or server.worker_pids() == [worker]:
        assert server.status()["pid"] == server.pid
    assert "was killed by SIGKILL" in server.log
    os.kill(server.worker_pids()[0], signal.SIGKILL)  # and one that the successor has started itself
    while server.status()["counters"]["restarts"] < 2 or not server.status()["is_serving"]:
        assert server.status()["pid"] == server.pid
    assert children(server.pid) == set(server.worker_pids())
    with Client(server.address) as client:
        assert client.ask(b"17 x\n") == b"17 x\n"


def test_a_restart_that_is_due_later_is_done_by_the_successor(copyover_server: Servers) -> None:
    """Timers live on: a worker that has died often is started again after its pause."""
    server = copyover_server("echo:echo", chdir=APPS)
    for restarts in range(1, 6):  # 0, 0.2, 0.4, 0.8 and 1.6 s
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        while server.status()["counters"].get("restarts") != restarts:
            assert server.status()["pid"] == server.pid
        if restarts < 5:
            while not server.status()["is_serving"]:
                assert server.status()["pid"] == server.pid
    Upgraded(server).assert_done()
    while not server.status()["is_serving"]:
        assert server.status()["pid"] == server.pid
    assert server.status()["counters"]["restarts"] == 5


# ---- what is refused


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'no such thing' >&2; exit 7", ["exited with 7: no such thing"]),
        ("exit 0", ["no copyover"]),
        ("echo '[1]'; exit 0", ["no copyover"]),
        ("kill -KILL $$", ["was killed by SIGKILL"]),
        ("set -- -m copyover.nothing", ["exited with 1", "No module named copyover.nothing"]),
        ('[ "$4" = --check ] && rm "$0"', ["could be run and cannot be any more: No such file"]),
    ],
)
def test_a_program_that_cannot_go_on_is_refused(
    copyover_server: Servers, tmp_path: Path, script: str, words: list[str]
) -> None:
    """Nothing is done that the child could not read; everything is as before, and a good upgrade follows."""
    server = copyover_server("echo:echo", chdir=APPS)
    with server.swarm(clients=5, seed=8) as swarm:
        wait_lent(server, 5)
        before = server.descriptors(), server.status()["workers"]
        Upgraded(server, interpreter(tmp_path / "python", script)).assert_refused(*words)
        assert (server.descriptors(), server.status()["workers"]) == before
        assert children(server.pid) == set(server.worker_pids())
        swarm.wait_round()
        server.reload().assert_lossless()
        Upgraded(server).assert_done()
    swarm.report.assert_lossless()


def test_an_interpreter_that_is_none_is_refused(copyover_server: Servers, tmp_path: Path) -> None:
    """A path that leads nowhere, a directory, a file that cannot run."""
    server = copyover_server("echo:echo", chdir=APPS)
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\x7fELF")
    garbage.chmod(0o755)
    Upgraded(server, "/nowhere/python").assert_refused("there is no interpreter /nowhere/python")
    Upgraded(server, tmp_path).assert_refused("there is no interpreter")
    Upgraded(server, garbage).assert_refused("garbage")
    assert server._run("upgrade", "--python", "").returncode == 2


def test_a_release_that_does_not_speak_with_the_workers_is_refused(
    copyover_server: Servers, another: Callable[..., Path]
) -> None:
    """An upgrade must not cut the holder off from the workers that serve."""
    server = copyover_server("echo:echo", chdir=APPS)
    python = another("9.0.0", wire=("WIRE_VERSIONS = (1, 1)", "WIRE_VERSIONS = (2, 3)"))
    refused = Upgraded(server, python).assert_refused("copyover 9.0.0", "speaks wire 1 and record [1, 1]")
    assert "reload with a release" in refused.answer["stderr_tail"][-1]
    assert server.status()["copyover"] == "0.1.0"


def test_a_release_with_another_format_is_refused(copyover_server: Servers, another: Callable[..., Path]) -> None:
    """Also on the way down, from a newer release to an older one."""
    server = copyover_server("echo:echo", chdir=APPS)
    newer = another("2.0.0", succession=("FORMATS = (1, 1)", "FORMATS = (1, 2)"))
    Upgraded(server, newer).assert_done()
    back = interpreter(newer.with_name("back"), "unset PYTHONPATH")
    Upgraded(server, back).assert_refused("the state has format 2, this release reads 1 to 1")
    assert server.status()["copyover"] == "2.0.0"


def test_an_upgrade_during_a_reload_is_busy(copyover_server: Servers, tmp_path: Path) -> None:
    """One change at a time, exit 5; the reload is not disturbed."""
    gate = tmp_path / "gate"
    app = tmp_path / "gated.py"
    app.write_text("import os\nasync def echo(connection):\n    await connection.boundary()\n", encoding="utf-8")
    server = copyover_server("gated:echo", chdir=tmp_path)
    os.mkfifo(gate)
    app.write_text(app.read_text(encoding="utf-8") + f"open({str(gate)!r}).read()\n", encoding="utf-8")
    assert server.reload(no_wait=True).exit_code == 0
    busy = Upgraded(server)
    assert (busy.exit_code, busy.answer["outcome"]) == (5, "busy")
    assert "another change is under way (booting)" in busy.answer["error"]
    gate.write_text("", encoding="utf-8")
    while server.status()["generation"] != 2:
        assert server.status()["is_serving"]
    Upgraded(server).assert_done()


def test_an_upgrade_during_an_upgrade_is_busy(copyover_server: Servers, tmp_path: Path) -> None:
    """The second is told; the first goes through."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    python = interpreter(tmp_path / "python", f'[ "$4" = --check ] && cat {gate}')
    server = copyover_server("echo:echo", chdir=APPS)
    with socket.socket(socket.AF_UNIX) as operator:
        operator.settimeout(30.0)
        operator.connect(str(server.directory / server.name / "control.sock"))
        operator.sendall(json.dumps({"do": "upgrade", "python": str(python)}).encode() + b"\n")
        while "event=upgrade-checked-by" not in server.log:
            assert server.status()["is_serving"]
        busy = Upgraded(server)
        assert (busy.exit_code, busy.answer["outcome"]) == (5, "busy")
        assert "another upgrade is under way" in busy.answer["error"]
        gate.write_text("", encoding="utf-8")
        assert json.loads(operator.makefile().readline())["result"]["outcome"] == "done"


def test_patience_has_an_end(copyover_server: Servers, another: Callable[..., Path], tmp_path: Path) -> None:
    """A program that hangs is killed, with what it started; a change that does not end is busy, not waited for."""
    gate = tmp_path / "gate"
    app = tmp_path / "gated.py"
    app.write_text("async def echo(connection):\n    await connection.boundary()\n", encoding="utf-8")
    server = copyover_server("gated:echo", chdir=tmp_path)
    impatient = another("0.2.0", **{"holder/upgrade": ("PATIENCE_S = 30.0", "PATIENCE_S = 1.0")})
    Upgraded(server, impatient).assert_done()
    before = server.descriptors(), children(server.pid)
    hanging = interpreter(tmp_path / "python", f"mkfifo {gate}-of-nobody; cat {gate}-of-nobody")
    Upgraded(server, hanging).assert_refused("had not read the state within 1 s")
    assert (server.descriptors(), children(server.pid)) == before
    os.mkfifo(gate)
    app.write_text(app.read_text(encoding="utf-8") + f"open({str(gate)!r}).read()\n", encoding="utf-8")
    busy = Upgraded(server, interpreter(tmp_path / "python", '[ "$4" = --check ] && kill -HUP $PPID'))
    assert (busy.exit_code, busy.answer["outcome"]) == (5, "busy")
    assert "another change is under way (booting), still so after 1 s" in busy.answer["error"]
    gate.write_text("", encoding="utf-8")
    while server.status()["generation"] != 2:
        assert server.status()["is_serving"]


@pytest.mark.parametrize("python", [1, "", "a\0b", [], True])
def test_a_request_that_is_none_is_refused(copyover_server: Servers, python: object) -> None:
    """Whatever comes over the control socket, the holder serves on."""
    server = copyover_server("echo:echo", chdir=APPS)
    with socket.socket(socket.AF_UNIX) as operator:
        operator.settimeout(30.0)
        operator.connect(str(server.directory / server.name / "control.sock"))
        operator.sendall(json.dumps({"do": "upgrade", "python": python}).encode() + b"\n")
        assert json.loads(operator.makefile().readline()) == {"error": "python: should be the path of an interpreter"}
    assert server.status()["is_serving"]


def test_upgrade_without_a_holder_exits_with_6(copyover_server: Servers) -> None:
    """As all commands do."""
    server = copyover_server("echo:echo", chdir=APPS)
    assert server.stop() == 0
    assert Upgraded(server).exit_code == 6
