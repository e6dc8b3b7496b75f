"""What an operator sees at three in the morning: transitions, what a phase waits for, and all that the holder knows."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from clients import DEADLINE_S, Client
from copyover import directory as directories
from copyover.holder import control
from copyover.holder.chronicle import MOST_KEPT, Chronicle
from copyover.holder.dump import MOST_DUMPS
from copyover.holder.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Iterator

    from copyover.testing import Server, Servers

APPS = Path(__file__).parent / "apps"


def command(server: Server, *arguments: str) -> tuple[list[str], dict[str, str]]:
    argv = [sys.executable, "-P", "-m", "copyover.cli", arguments[0], server.name, *arguments[1:]]
    return argv, os.environ | {"COPYOVER_RUNTIME_DIR": str(server.directory)}


@contextlib.contextmanager
def following(server: Server) -> Iterator[tuple[subprocess.Popen[str], Iterator[dict[str, Any]]]]:
    """Run ``copyover events --follow``; yield it with what it prints."""
    argv, environment = command(server, "events", "--follow")
    with subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdout is not None
        yield process, map(json.loads, process.stdout)


# ---- transitions


def test_the_last_thousand_are_kept() -> None:
    """The oldest goes; numbers count on, so that a reader sees what it has missed."""
    chronicle = Chronicle()
    heard: list[dict[str, Any]] = []
    chronicle.on_event = heard.append
    for number in range(MOST_KEPT + 5):
        chronicle.note("phase", {"n": number, "nothing": None})
    assert [noted["fields"]["n"] for noted in chronicle.kept] == list(range(5, MOST_KEPT + 5))
    assert chronicle.kept[0]["number"] == 6
    assert heard[-1] is chronicle.kept[-1]
    assert heard[-1]["fields"] == {"n": MOST_KEPT + 4}


def test_events_prints_what_has_happened(copyover_server: Servers) -> None:
    """One JSON object a line, in order, each with both times: the log's transitions for programs."""
    server = copyover_server("echo:echo", chdir=APPS)
    server.reload().assert_lossless()
    argv, environment = command(server, "events", "--json")
    printed = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout
    noted = [json.loads(line) for line in printed.splitlines()]
    assert [one["number"] for one in noted] == list(range(1, len(noted) + 1))
    assert all(one["time"].endswith("+00:00") for one in noted)
    times = [one["monotonic_s"] for one in noted]
    assert times == sorted(times)
    phases = [one["fields"]["phase"] for one in noted if one["event"] == "phase"]
    assert phases == ["booting", "staging", "moving", "serving"] * 2
    assert [one["fields"]["worker"] for one in noted if one["event"] == "started"] == [1, 2]


def test_events_follow_until_the_holder_has_stopped(copyover_server: Servers) -> None:
    """What was before comes first, then each as it happens; a stop is the end, and no failure."""
    server = copyover_server("echo:echo", chdir=APPS)
    with following(server) as (process, events):
        assert next(one for one in events if one["event"] == "reload")["fields"]["generation"] == 1
        server.reload().assert_lossless()
        assert next(one for one in events if one["event"] == "reload")["fields"]["generation"] == 2
        server.stop()
        assert list(events)[-1]["fields"] == {"phase": "stopped"}
        assert process.wait(DEADLINE_S) == 0


def test_events_tell_when_the_holder_went_away(copyover_server: Servers) -> None:
    """Exit 1, and a sentence: an end without a stop must not look like one."""
    server = copyover_server("echo:echo", chdir=APPS)
    with following(server) as (process, events):
        next(events)
        server.kill()
        for _ in events:
            continue
        assert process.wait(DEADLINE_S) == 1
        assert process.stderr is not None
        assert "the holder went away" in process.stderr.read()


def test_events_go_on_over_an_upgrade(copyover_server: Servers) -> None:
    """Another program is the holder, and a follower misses nothing: numbers count on."""
    server = copyover_server("echo:echo", chdir=APPS)
    with following(server) as (process, events):
        first = next(events)
        argv, environment = command(server, "upgrade")
        subprocess.run(argv, env=environment, capture_output=True, check=True)
        server.reload().assert_lossless()
        seen = [first]
        while not (seen[-1]["event"] == "reload" and seen[-1]["fields"]["generation"] == 2):
            seen.append(next(events))
        assert [one["number"] for one in seen] == list(range(1, len(seen) + 1))
        assert "upgraded" in [one["event"] for one in seen]
        server.stop()
        assert process.wait(DEADLINE_S) == 0


def test_ctrl_c_ends_following(copyover_server: Servers) -> None:
    """It is how one stops looking: exit 0, and nothing else happens."""
    server = copyover_server("echo:echo", chdir=APPS)
    with following(server) as (process, events):
        next(events)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0
    assert server.status()["is_serving"]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[tuple[control.Desk, Loop]]:
    loop = Loop(lambda: None)
    directory = directories.Directory(tmp_path)
    desk = control.Desk(directory, control.listen(directory), loop.watch, loop.unwatch)
    yield desk, loop
    desk.close()
    loop.close()


def test_a_follower_that_reads_nothing_is_hung_up_on(desk: tuple[control.Desk, Loop], tmp_path: Path) -> None:
    """The holder never waits for it, and keeps no more than its limit for it."""
    clerk, loop = desk
    callers: list[int] = []
    clerk.open(lambda caller, _: callers.append(caller))
    noted = {"event": {"fields": {"reason": "x" * 1000}}}
    with socket.socket(socket.AF_UNIX) as follower:
        follower.connect(str(tmp_path / "control.sock"))
        follower.sendall(b'{"do": "events", "follow": true}\n')
        while not callers:
            loop.turn()
        (caller,) = callers
        told = 0
        while clerk.is_present(caller):
            clerk.reply(caller, noted)
            told += len(json.dumps(noted))
            assert told < 2 * control.MOST_UNREAD
        assert told > control.MOST_UNREAD


# ---- what blocks


def test_status_names_the_connections_that_block_a_move(copyover_server: Servers) -> None:
    """Who, from where, in which process, how far, for how long."""
    server = copyover_server("handlers:two_parts", chdir=APPS, config={"boundary_s": 60.0, "gather_s": 0.2})
    with Client(server.address) as client:
        assert client.ask(b"2\n") == b"go on\n"
        (worker,) = server.status()["workers"]
        (row,) = server.connections()
        server.reload(no_wait=True)
        while not any("connection" in found for found in server.status()["phase"]["blocked_by"]):
            assert server.status()["generation"] == 1
        phase = server.status()["phase"]
        blocked_by = [found for found in phase["blocked_by"] if "connection" in found]
        (found,) = blocked_by
        assert phase["name"] == "moving"
        assert phase["deadline_in_s"] > 0
        assert (found["connection"], found["peer"]) == (row["connection"], row["peer"])
        assert (found["worker"], found["pid"]) == (worker["worker"], worker["pid"])
        assert found["standing"] == "freezing"
        assert found["reason"] == "asked to stop at a boundary, and has reached none yet"
        assert 0 < found["for_s"] < DEADLINE_S
        argv, environment = command(server, "status")
        shown = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout
        assert f"waits for connection {row['connection']} from {row['peer']}, worker 1 (pid {worker['pid']})" in shown
        client.send(b"ok")
        assert client.line() == b"got ok\n"


def test_status_quotes_a_worker_that_does_not_become_ready(copyover_server: Servers, tmp_path: Path) -> None:
    """What it wrote last is most often the reason."""
    source = (APPS / "echo.py").read_text(encoding="utf-8")
    (tmp_path / "echo.py").write_text(source, encoding="utf-8")
    server = copyover_server("echo:echo", chdir=tmp_path)
    slow = "import asyncio, sys\nasync def startup():\n    print('waiting for the database', file=sys.stderr)\n"
    (tmp_path / "echo.py").write_text(slow + "    await asyncio.Event().wait()\n" + source, encoding="utf-8")
    server.reload(no_wait=True)
    while not server.status()["phase"]["blocked_by"][0]["last_lines"]:
        assert server.status()["phase"]["name"] == "booting"
    (found,) = server.status()["phase"]["blocked_by"]
    assert found["last_lines"] == ["waiting for the database"]
    assert (found["worker"], found["generation"], found["reason"]) == (2, 2, "not ready yet")
    os.kill(found["pid"], 0)


# ---- dumps


def dumps(server: Server) -> list[Path]:
    return sorted((server.directory / server.name).glob("dump-*"))


def test_sigusr1_writes_down_all_that_the_holder_knows(copyover_server: Servers) -> None:
    """0600, whole, in the runtime directory, its path in the log; the ledger, and nothing that a client said."""
    server = copyover_server("handlers:two_parts", chdir=APPS, config={"boundary_s": 60.0})
    with Client(server.address) as client:
        assert client.ask(b"12\n") == b"go on\n"
        server.reload(no_wait=True)
        while server.status()["phase"]["name"] != "moving":
            assert server.status()["generation"] == 1
        os.kill(server.pid, signal.SIGUSR1)
        server.status()  # a request is read after a signal that came before it
        (path,) = dumps(server)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        found = json.loads(path.read_text(encoding="utf-8"))
        (row,) = found["ledger"]
        assert (row["connection"], row["owner"]) == (server.connections()[0]["connection"], 1)
        assert (row["standing"], row["passage"]["staged_in"]) == ("freezing", 2)
        assert found["phase"] == "moving"
        assert found["change"]["open"] == [row["connection"]]
        assert [worker["worker"] for worker in found["workers"]] == [1, 2]
        assert 0 < found["timers"]["change"] <= 60
        assert found["counters"]["accepted"] == 1
        assert found["events"][-1]["event"] == "phase"
        assert f"event=dumped path={path}" in server.log
        client.send(b"123456789012")
        assert client.line() == b"got 123456789012\n"


def test_old_dumps_are_removed(copyover_server: Servers) -> None:
    """The directory lies in memory: the newest ten are kept."""
    server = copyover_server("echo:echo", chdir=APPS)
    seen: set[Path] = set()
    for _ in range(MOST_DUMPS + 2):
        os.kill(server.pid, signal.SIGUSR1)
        server.status()
        seen |= set(dumps(server))
    assert len(seen) == MOST_DUMPS + 2
    assert dumps(server) == sorted(seen)[-MOST_DUMPS:]
