"""Other listeners by a reload: added, removed, renamed, and taken back; nobody who connected is dropped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from clients import DEADLINE_S, Client

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from copyover.testing import Server, Servers

APPS = "tests/apps"
Where = tuple[str, int] | str

KINDS = ["127.0.0.1", "[::1]", "unix"]


@pytest.fixture(params=KINDS)
def removable(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return an address of each kind, to be removed."""
    if request.param == "[::1]":
        with socket.socket(socket.AF_INET6) as probe:
            try:
                probe.bind(("::1", 0))
            except OSError:
                pytest.skip("no IPv6 address here")
    return f"unix://{tmp_path}/x.sock" if request.param == "unix" else f"{request.param}:0"


def places(server: Server, state: str = "serving") -> dict[str, Where]:
    """Return where clients find each listener, by its name."""
    found: dict[str, Where] = {}
    for listener in server.status()["listeners"]:
        if listener["state"] == state:
            parts = urlsplit(listener["address"])
            where = parts.path if parts.scheme == "unix" else (str(parts.hostname), int(parts.port or 0))
            found[listener["name"]] = where
    return found


def names(server: Server) -> list[str]:
    return [listener["name"] for listener in server.status()["listeners"]]


def plain_socket(where: Where, timeout_s: float) -> socket.socket:
    family = socket.AF_UNIX if isinstance(where, str) else socket.AF_INET6 if ":" in where[0] else socket.AF_INET
    made = socket.socket(family)
    made.settimeout(timeout_s)
    return made


def is_refused(where: Where) -> bool:
    with plain_socket(where, DEADLINE_S) as client:
        try:
            client.connect(where)
        except (ConnectionRefusedError, FileNotFoundError):
            return True
    return False


def wait_ended(server: Server, name: str) -> None:
    while name in names(server):
        assert server.status()["is_serving"]


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# ---- added and removed


@pytest.mark.parametrize("move", ["together", "rolling"])
def test_an_added_listener_is_served_by_the_new_generation(copyover_server: Servers, move: str) -> None:
    """At the address that the answer names; who was connected goes on, under the name that it came by."""
    server = copyover_server("handlers:on_listener", chdir=APPS, listen=["web=127.0.0.1:0"], move=move)
    with Client(server.address) as early:
        assert early.ask(b"a\n") == b"web a\n"
        server.configure(listen=["web=127.0.0.1:0", "admin=127.0.0.1:0"])
        result = server.reload().assert_lossless()
        assert result.moved == 1
        assert result.answer["listeners"]["removed"] == []
        assert [listener["name"] for listener in result.answer["listeners"]["added"]] == ["admin"]
        found = places(server)
        assert found["web"] == server.address  # port 0 in an entry that stayed is no new port
        assert result.answer["listeners"]["added"][0]["address"] == "tcp://{}:{}".format(*found["admin"])
        for name, where in found.items():
            with Client(where) as late:
                assert late.ask(b"b\n") == name.encode() + b" b\n"
        assert early.ask(b"c\n") == b"web c\n"


def test_a_removed_listener_takes_nobody_new_and_its_connections_live_on(
    copyover_server: Servers, removable: str
) -> None:
    """Over further reloads too, under their name; its address is free."""
    listen = ["web=127.0.0.1:0", f"gone={removable}"]
    server = copyover_server("handlers:on_listener", chdir=APPS, listen=listen)
    where = places(server)["gone"]
    with Client(where) as client:
        assert client.ask(b"a\n") == b"gone a\n"
        server.configure(listen=listen[:1])
        result = server.reload().assert_lossless()
        assert [listener["name"] for listener in result.answer["listeners"]["removed"]] == ["gone"]
        wait_ended(server, "gone")
        assert is_refused(where)
        assert client.ask(b"b\n") == b"gone b\n"
        assert server.reload().assert_lossless().moved == 1
        assert client.ask(b"c\n") == b"gone c\n"
        assert [row["listener"] for row in server.connections()] == ["gone"]
        with Client(server.address) as other:
            assert other.ask(b"d\n") == b"web d\n"


def test_who_waits_in_the_backlog_of_a_removed_listener_is_served(copyover_server: Servers, removable: str) -> None:
    """However long nobody accepts: it is closed once it is empty, and none is reset."""
    listen = ["web=127.0.0.1:0", f"gone={removable}"]
    config = {"gather_s": 120.0, "boundary_s": 120.0, "timeout_s": 120.0}
    server = copyover_server("handlers:two_parts", chdir=APPS, listen=listen, config=config, move="together")
    where = places(server)["gone"]
    server.configure(listen=listen[:1])
    with ThreadPoolExecutor(1) as deploy_script, contextlib.ExitStack() as clients:
        with Client(server.address) as busy:
            assert busy.ask(b"5\n") == b"go on\n"
            reload = deploy_script.submit(server.reload)
            while [row["state"] for row in server.connections()] != ["freezing"]:  # then the incumbent accepts no more
                assert not reload.done()
            waiting = [clients.enter_context(Client(where)) for _ in range(20)]
            for client in waiting:
                client.send(b"2\nok")
            replacement = next(w["pid"] for w in server.status()["workers"] if w["generation"] == 2)
            clients.enter_context(stopped(replacement))
        # The one connection has ended, so that nothing is to be adopted: committed, and nobody accepts.
        assert reload.result(60).assert_lossless().ended == 1
        assert places(server, "ending") == {"gone": where}
        with plain_socket(where, 0.3) as late, pytest.raises((TimeoutError, FileNotFoundError)):
            late.connect(where)
        os.kill(replacement, signal.SIGCONT)
        for client in waiting:
            assert client.receive(13) == b"go on\ngot ok\n"
        wait_ended(server, "gone")
        assert is_refused(where)
        for client in waiting:
            client.send(b"3\nyes")
            assert client.receive(14) == b"go on\ngot yes\n"


def test_a_changed_address_is_another_listener_of_that_name(copyover_server: Servers) -> None:
    """Clients of the former one go on; new ones find the new one only."""
    server = copyover_server("handlers:on_listener", chdir=APPS, listen=["web=127.0.0.1:0"])
    with Client(server.address) as early:
        assert early.ask(b"a\n") == b"web a\n"
        server.configure(listen=["web=127.0.0.2:0"])
        answer = server.reload().assert_lossless().answer["listeners"]
        assert [listener["name"] for listener in (*answer["added"], *answer["removed"])] == ["web", "web"]
        where = places(server)["web"]
        assert where[0] == "127.0.0.2"
        with Client(where) as late:
            assert late.ask(b"b\n") == b"web b\n"
            while len(server.status()["listeners"]) > 1:
                assert server.status()["is_serving"]
            assert is_refused(server.address)
            server.reload().assert_lossless()
            assert (early.ask(b"c\n"), late.ask(b"d\n")) == (b"web c\n", b"web d\n")


def test_an_address_under_another_name_is_the_same_socket(copyover_server: Servers) -> None:
    """At no moment a client finds nobody there."""
    server = copyover_server("handlers:on_listener", chdir=APPS, listen=["web=127.0.0.1:0"])
    host, port = server.address
    with Client(server.address) as early, ThreadPoolExecutor(1) as deploy_script:
        assert early.ask(b"a\n") == b"web a\n"
        server.configure(listen=[f"shop={host}:{port}"])
        reload = deploy_script.submit(server.reload)
        while not reload.done():
            with Client(server.address) as visitor:
                assert visitor.ask(b"b\n") in (b"web b\n", b"shop b\n")
        answer = reload.result().assert_lossless().answer["listeners"]
        assert [listener["name"] for listener in answer["added"]] == ["shop"]
        assert [listener["name"] for listener in answer["removed"]] == ["web"]
        assert places(server) == {"shop": server.address}
        with Client(server.address) as late:
            assert late.ask(b"c\n") == b"shop c\n"
        assert early.ask(b"d\n") == b"web d\n"


def test_a_listener_that_comes_back_at_once_is_the_same_socket(copyover_server: Servers) -> None:
    """Two reloads in a row: the second finds the removed one while its last handshakes are waited for."""
    server = copyover_server("handlers:on_listener", chdir=APPS, listen=["web=127.0.0.1:0", "admin=127.0.0.1:0"])
    where = places(server)["admin"]
    back = "back={}:{}".format(*where)
    with Client(where) as early:
        assert early.ask(b"a\n") == b"admin a\n"
        server.configure(listen=["web=127.0.0.1:0"])
        server.reload().assert_lossless()
        server.configure(listen=["web=127.0.0.1:0", back])
        server.reload().assert_lossless()
        with Client(where) as late:
            assert late.ask(b"b\n") == b"back b\n"
        assert early.ask(b"c\n") == b"admin c\n"
        server.configure(listen=["web=127.0.0.1:0"])
        server.reload().assert_lossless()
        wait_ended(server, "back")
        assert is_refused(where)


def test_no_client_of_a_listener_that_stays_notices(copyover_server: Servers) -> None:
    """Others come and go beside it, reload after reload."""
    server = copyover_server("echo:echo", chdir=APPS, listen=["web=127.0.0.1:0"])
    before = [server.descriptors(pid) for pid in (server.pid, *server.worker_pids())]
    with server.swarm(clients=10, churn=3) as swarm:
        for others in (["a=127.0.0.1:0"], ["b=127.0.0.1:0", "a=127.0.0.1:0"], ["b=127.0.0.1:0"], []):
            server.configure(listen=["web=127.0.0.1:0", *others])
            server.reload().assert_lossless()
            swarm.wait_round()
    swarm.report.assert_lossless()
    for name in ("a", "b"):
        wait_ended(server, name)
    while [server.descriptors(pid) for pid in (server.pid, *server.worker_pids())] != before:
        assert server.status()["is_serving"]


def test_a_worker_that_is_restarted_has_the_listeners_of_now(copyover_server: Servers) -> None:
    """Not those that the holder began with."""
    server = copyover_server("handlers:on_listener", chdir=APPS, listen=["web=127.0.0.1:0"])
    server.configure(listen=["admin=127.0.0.1:0"])
    server.reload().assert_lossless()
    before = server.worker_pids()
    os.kill(before[-1], signal.SIGKILL)
    with Client(places(server)["admin"]) as client:
        assert client.ask(b"a\n") == b"admin a\n"


# ---- unix sockets


def test_unix_listeners_are_added_and_removed_with_their_files(copyover_server: Servers, tmp_path: Path) -> None:
    """The file is there while clients are wanted, no longer."""
    server = copyover_server("handlers:on_listener", chdir=APPS, listen=["web=127.0.0.1:0"])
    path = tmp_path / "x.sock"
    server.configure(listen=["web=127.0.0.1:0", f"local=unix://{path}?mode=0600"])
    server.reload().assert_lossless()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with Client(str(path)) as client:
        assert client.ask(b"a\n") == b"local a\n"
        server.configure(listen=["web=127.0.0.1:0"])
        server.reload().assert_lossless()
        assert list(tmp_path.iterdir()) == []
        assert client.ask(b"b\n") == b"local b\n"


@pytest.mark.parametrize("entry", ["other=unix://{}", "local=unix://{}?mode=0600"])
def test_a_path_that_changes_hands_is_never_without_a_socket(
    copyover_server: Servers, tmp_path: Path, entry: str
) -> None:
    """Another name, or another mode: the new socket takes the path at the commit, and keeps it."""
    path = tmp_path / "x.sock"
    server = copyover_server("handlers:on_listener", chdir=APPS, listen=[f"local=unix://{path}"])
    before = path.stat().st_ino
    with Client(str(path)) as early, ThreadPoolExecutor(1) as deploy_script:
        assert early.ask(b"a\n") == b"local a\n"
        server.configure(listen=[entry.format(path)])
        reload = deploy_script.submit(server.reload)
        while not reload.done():
            with Client(str(path)) as visitor:
                assert visitor.ask(b"b\n").endswith(b" b\n")
        reload.result().assert_lossless()
        assert path.stat().st_ino != before
        assert list(tmp_path.iterdir()) == [path]
        with Client(str(path)) as late:
            assert late.ask(b"c\n") == entry.partition("=")[0].encode() + b" c\n"
        assert early.ask(b"d\n") == b"local d\n"
        server.reload().assert_lossless()
        assert path.exists()


def test_a_refused_successor_leaves_the_path_alone(copyover_server: Servers, tmp_path: Path) -> None:
    """The incumbent's clients find it where it was."""
    path = tmp_path / "x.sock"
    server = copyover_server("handlers:on_listener", chdir=APPS, listen=[f"local=unix://{path}"])
    server.configure(listen=[f"other=unix://{path}"], app="handlers:nothing_of_that_name")
    server.reload().assert_refused()
    assert list(tmp_path.iterdir()) == [path]
    with Client(str(path)) as client:
        assert client.ask(b"a\n") == b"local a\n"


# ---- refused and rolled back


def test_an_address_in_use_refuses_the_reload(copyover_server: Servers) -> None:
    """With the exit code of that error; what was bound before it is closed, and nothing else has changed."""
    server = copyover_server("handlers:on_listener", chdir=APPS, listen=["web=127.0.0.1:0"])
    with socket.create_server(("127.0.0.1", 0)) as other, socket.create_server(("127.0.0.1", 0)) as free:
        free_port = free.getsockname()[1]
        free.close()
        taken_port = other.getsockname()[1]
        server.configure(listen=[f"first=127.0.0.1:{free_port}", f"second=127.0.0.1:{taken_port}"])
        result = server.reload().assert_refused()
        assert result.exit_code == 12
        assert f"another process listens on 127.0.0.1:{taken_port}" in str(result.error)
        assert "generation 1 (pid" in str(result.error)
        assert result.answer["listeners"] == {"added": [], "removed": []}
        assert is_refused(("127.0.0.1", free_port))
    assert places(server) == {"web": server.address}
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"web a\n"
    assert server.reload().outcome == "done"  # the address is free by now


def test_an_address_that_cannot_be_is_refused_with_its_code(copyover_server: Servers) -> None:
    """14, as at the start; the incumbent serves."""
    server = copyover_server("echo:echo", chdir=APPS)
    server.configure(listen=["192.0.2.1:1"])
    assert server.reload().assert_refused().exit_code == 14
    server.configure(listen=["web=127.0.0.1:0", "web=127.0.0.2:0"])
    result = server.reload().assert_refused()
    assert result.exit_code == 3
    assert "listen: has one name twice among web, web" in str(result.error)


def test_a_refused_reload_takes_its_listeners_with_it(copyover_server: Servers) -> None:
    """Nobody would accept there."""
    server = copyover_server("handlers:on_listener", chdir=APPS, listen=["web=127.0.0.1:0"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server.configure(listen=[f"late=127.0.0.1:{port}"], app="handlers:nothing_of_that_name")
    server.reload().assert_refused()
    assert is_refused(("127.0.0.1", port))
    assert places(server) == {"web": server.address}
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"web a\n"


@pytest.mark.parametrize("removable", ["127.0.0.1", "unix"], indirect=True)
def test_a_roll_back_closes_what_came_by_an_added_listener(copyover_server: Servers, removable: str) -> None:
    """In the orderly way, counted and told; what came by a listener that stays, or was to go, returns."""
    listen = ["web=127.0.0.1:0", "gone=127.0.0.1:0"]
    config = {"boundary_s": 120.0, "timeout_s": 120.0}
    server = copyover_server("handlers:two_parts", chdir=APPS, listen=listen, workers=2, move="rolling", config=config)
    before = places(server)
    server.configure(listen=["web=127.0.0.1:0", f"late={removable}"])
    with Client(server.address) as busy, ThreadPoolExecutor(1) as deploy_script, contextlib.ExitStack() as clients:
        assert busy.ask(b"5\n") == b"go on\n"
        reload = deploy_script.submit(server.reload)
        while server.status()["phase"]["name"] != "moving":
            assert not reload.done()
        added = places(server, "added")["late"]
        # A worker of the replacement that serves nobody: its death will lose nothing and turn the move back.
        idle = next(w["pid"] for w in server.status()["workers"] if w["generation"] == 2)
        os.kill(idle, signal.SIGSTOP)
        came = [clients.enter_context(Client(added)) for _ in range(3)]
        stay = [clients.enter_context(Client(where)) for where in before.values()]
        for client in (*came, *stay):
            assert client.ask(b"3\n") == b"go on\n"
            client.send(b"abc")
            assert client.line() == b"got abc\n"
        came[0].send(b"2\nx")  # in the middle of a message, and bytes that nobody will read
        assert {row["listener"] for row in server.connections()} == {"web", "gone", "late"}
        os.kill(idle, signal.SIGKILL)
        busy.send(b"12345")
        result = reload.result(60)
        assert (result.exit_code, result.outcome, result.lost) == (3, "rolled-back", 0)
        assert result.closed == 3
        assert "3 connections of listeners that it had added were closed" in str(result.error)
        came[0].line()
        for client in came:
            assert client.receive(1) == b""
        assert busy.line() == b"got 12345\n"
        for client in (busy, *stay):
            assert client.ask(b"1\n") == b"go on\n"
        assert is_refused(added)
        assert places(server) == before


# ---- from one holder to the next


@pytest.mark.parametrize("way", ["upgrade", "takeover"])
def test_another_holder_knows_the_listeners_and_what_has_left(
    copyover_server: Servers, tmp_path: Path, way: str
) -> None:
    """Numbers and names, what is served and what is ending; the next reload changes them as any."""
    path = tmp_path / "x.sock"
    listen = ["web=127.0.0.1:0", "gone=127.0.0.1:0", f"local=unix://{path}"]
    server = copyover_server("handlers:on_listener", chdir=APPS, listen=listen)
    gone = places(server)["gone"]
    with Client(gone) as early:
        assert early.ask(b"a\n") == b"gone a\n"
        server.configure(listen=["web=127.0.0.1:0", "more=127.0.0.1:0", listen[2]])
        server.reload().assert_lossless()
        before = places(server)
        if way == "upgrade":
            assert server._run("upgrade").returncode == 0
        else:
            server.kill()
            server.run()
        assert places(server) == before
        wait_ended(server, "gone")
        assert is_refused(gone)
        assert [row["listener"] for row in server.connections()] == ["gone"]
        result = server.reload().assert_lossless()
        assert result.answer["listeners"] == {"added": [], "removed": []}
        assert places(server) == before
        server.configure(listen=["web=127.0.0.1:0", "last=127.0.0.1:0"])
        server.reload().assert_lossless()
        for name, where in places(server).items():
            with Client(where) as late:
                assert late.ask(b"b\n") == name.encode() + b" b\n"
        assert early.ask(b"c\n") == b"gone c\n"
        assert not path.exists()


def test_a_holder_that_is_killed_leaves_no_listener_of_a_change(copyover_server: Servers) -> None:
    """The next one rolls back: what came by an added listener is closed, and the listener with it."""
    config = {"boundary_s": 120.0, "timeout_s": 120.0}
    server = copyover_server(
        "handlers:two_parts", chdir=APPS, listen=["web=127.0.0.1:0"], move="rolling", config=config
    )
    server.configure(listen=["web=127.0.0.1:0", "late=127.0.0.1:0"])
    with Client(server.address) as busy:
        assert busy.ask(b"5\n") == b"go on\n"
        server.reload(no_wait=True)
        while server.status()["phase"]["name"] != "moving":
            assert server.status()["is_serving"]
        added = places(server, "added")["late"]
        with Client(added) as came:
            assert came.ask(b"3\n") == b"go on\n"
            server.kill()
            server.run()
            busy.send(b"12345")
            assert busy.line() == b"got 12345\n"
            assert came.receive(1) == b""
        while server.status()["phase"]["name"] != "serving":
            assert server.status()["is_serving"]
        assert is_refused(added)
        assert list(places(server)) == ["web"]
        assert busy.ask(b"1\n") == b"go on\n"
