"""Live connections over a reload: every byte, every kind of client."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from clients import Client

if TYPE_CHECKING:
    from copyover.testing import Servers

APPS = "tests/apps"
BOTH_MOVES = pytest.mark.parametrize("move", ["together", "rolling"])


@BOTH_MOVES
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_pipelined_lines_cut_at_random_places_arrive_once_and_in_order(
    copyover_server: Servers, move: str, loop: str
) -> None:
    """No byte is lost or repeated, under load, on both loops, with clients coming and going meanwhile."""
    if loop == "uvloop":
        pytest.importorskip("uvloop", reason="the extra uvloop is not installed")
    server = copyover_server("echo:echo", chdir=APPS, loop=loop, move=move, workers=2)
    with server.swarm(clients=40, churn=8, seed=5) as swarm:
        for _ in range(4):
            server.reload().assert_lossless()
            swarm.wait_round()
    swarm.report.assert_lossless()


@BOTH_MOVES
def test_a_partial_message_travels_unread(copyover_server: Servers, move: str) -> None:
    """At a boundary half a message may have come: it goes along."""
    server = copyover_server("handlers:frames", chdir=APPS, move=move)
    with Client(server.address) as client:
        client.send(b"\x03abc\x05he")
        assert client.receive(6) == b"1:abc;"
        assert server.reload().assert_lossless().moved == 1
        client.send(b"llo")
        assert client.receive(8) == b"2:hello;"


@BOTH_MOVES
def test_a_two_part_message_is_not_cut_in_the_middle(copyover_server: Servers, move: str) -> None:
    """A connection in the middle of a message waits for its boundary; then it follows, within the same reload."""
    server = copyover_server("handlers:two_parts", chdir=APPS, move=move, config={"boundary_s": 60.0})
    with Client(server.address) as client, Client(server.address) as other:
        assert client.ask(b"5\n") == b"go on\n"
        assert server.reload(no_wait=True).exit_code == 0
        while not server.status()["phase"]["blocked_by"]:
            assert server.status()["generation"] == 1
        assert other.ask(b"2\n") == b"go on\n"  # whoever serves it
        other.send(b"ok")
        assert other.line() == b"got ok\n"
        client.send(b"12345")
        assert client.line() == b"got 12345\n"
        while server.status()["last_reload"]["generation"]["to"] != 2:
            assert server.status()["is_serving"]
        result = server.status()["last_reload"]
        assert result["connections"] == {"moved": 2, "kept": 0, "ended": 0, "lost": 0, "closed": 0}
        assert client.ask(b"1\n") == b"go on\n"


@BOTH_MOVES
def test_megabytes_unsent_travel_to_a_slow_reader(copyover_server: Servers, move: str) -> None:
    """A writer that waits for a slow reader is released by the freeze; what is unsent goes along, exactly."""
    server = copyover_server("handlers:flood", chdir=APPS, move=move)
    with Client(server.address) as client:
        client.send(b"300\n")  # 19.7 MB, far more than the kernel's buffers
        assert client.receive(8) == b"00000000"
        for _ in range(2):
            assert server.reload().assert_lossless().moved == 1
        expected = b"".join(b"%08d" % piece * 8192 for piece in range(300))[8:]
        assert client.receive(len(expected)) == expected
        assert client.line() == b"end\n"
        assert client.ask(b"0\n") == b"end\n"


@BOTH_MOVES
def test_a_half_closed_client_gets_its_answer(copyover_server: Servers, move: str) -> None:
    """The client's FIN is seen again after the move, and so is what came before it."""
    server = copyover_server("handlers:until_end", chdir=APPS, move=move)
    with Client(server.address) as early, Client(server.address) as late:
        for client in (early, late):
            client.send(b"abc\nde")
        while len(server.connections()) < 2:
            assert server.status()["is_serving"]
        server.reload().assert_lossless()
        late.end()
        assert late.line() == b"5 bytes in lines\n"
        assert late.receive(1) == b""
        early.end()
        assert early.line() == b"5 bytes in lines\n"


def test_a_handler_that_never_reaches_a_boundary_keeps_its_connection(copyover_server: Servers) -> None:
    """What cannot stop stays in its generation, alive, counted with its reason; fresh connections are the new one's."""
    server = copyover_server("handlers:never", chdir=APPS, config={"gather_s": 0.1, "boundary_s": 0.3})
    with Client(server.address) as busy, Client(server.address) as idle:
        assert busy.ask(b"x\n") == b"busy\n"
        assert idle.ask(b"x\ndone\n") == b"busy\n"
        assert idle.line() == b"free\n"
        result = server.reload()
        assert result.exit_code == 0
        assert (result.moved, result.kept, result.lost) == (1, 1, 0)
        assert "in the middle of a message, since its read_until()" not in result.answer["kept"][0]["reason"]
        assert "since its write()" in result.answer["kept"][0]["reason"]
        assert server.status()["connections"]["kept"] == 1
        assert [row["generation"] for row in server.connections()] == [1, 2]
        busy.send(b"done\n")
        assert busy.line() == b"free\n"
        assert idle.ask(b"x\n") == b"busy\n"
        busy.end()
        assert busy.receive(1) == b""
        while len(server.worker_pids()) > 1:  # the retired worker goes when its last connection has ended
            assert server.status()["is_serving"]


def test_a_kept_connection_is_closed_at_the_drain_limit(copyover_server: Servers) -> None:
    """The drain limit is a limit: what is left is closed, and counted as expired."""
    config = {"gather_s": 0.1, "boundary_s": 0.2, "drain_timeout_s": 0.5}
    server = copyover_server("handlers:pinned", chdir=APPS, config=config)
    with Client(server.address) as client:
        assert client.ask(b"x\n") == b"x\n"
        result = server.reload()
        assert result.answer["kept"][0]["reason"] == "a transaction is open"
        assert client.receive(1) == b""
    while server.status()["counters"]["expired"] != 1:
        assert server.status()["is_serving"]


def test_pushes_reach_everybody_after_a_consistent_cut(copyover_server: Servers) -> None:
    """Rooms in memory stay whole: shared state travels, and a broadcast after the move finds every member."""
    server = copyover_server("handlers:room", chdir=APPS, move="together")
    clients = [Client(server.address) for _ in range(30)]
    for number, client in enumerate(clients):
        client.send(b"hello %d\n" % number)
        for member in clients:
            assert member.line() == b"hello %d\n" % number
    for generation in range(2, 5):
        server.reload().assert_lossless()
        clients[generation].send(b"round %d\n" % generation)
        for member in clients:
            assert member.line() == b"round %d\n" % generation
    assert clients[0].ask(b"history\n").count(b",") == 32
    for client in clients:
        client.socket.close()


def test_whole_lines_that_travel_unread_reach_everybody(copyover_server: Servers, tmp_path: Path) -> None:
    """Input of a cut is read once all are entered, also that which came in a record: nobody misses a broadcast."""
    config = {"gather_s": 60.0, "boundary_s": 60.0}
    server = copyover_server("slow_room:chat", chdir=APPS, move="together", config=config)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    wait = b"wait %s\n" % str(gate).encode()
    with Client(server.address) as first, Client(server.address) as second, ThreadPoolExecutor(1) as deploy_script:
        second.send(b"zero\n")
        assert first.line() == second.line() == b"zero\n"
        first.send(wait + b"two\nthree\n")
        assert first.line() == second.line() == wait
        reload = deploy_script.submit(server.reload)
        while [row["state"] for row in server.connections()] != ["freezing", "freezing"]:
            assert not reload.done()
        gate.open("wb").close()  # it comes to its boundary with two lines unread
        assert reload.result(60).assert_lossless().moved == 2
        for expected in (b"two\n", b"three\n"):
            assert first.line() == second.line() == expected


def test_a_straggler_speaks_to_those_that_have_moved(copyover_server: Servers) -> None:
    """A broadcast of one that is late reaches everybody, and costs its sender nothing."""
    config = {"gather_s": 0.1, "boundary_s": 30.0}
    server = copyover_server("slow_room:straggle", chdir=APPS, move="together", config=config)
    with Client(server.address) as slow, Client(server.address) as other:
        slow.send(b"zero\n")
        assert slow.line() == other.line() == b"zero\n"
        slow.send(b"wait\n")
        assert slow.line() == other.line() == b"wait\n"
        server.reload(no_wait=True)
        while [row["worker"] for row in server.connections()] != [1, 2]:
            assert server.status()["is_serving"]
        slow.send(b"late\n")  # still served by the incumbent, which has let go of the other
        assert slow.line() == other.line() == b"said: late\n"
        while server.status()["generation"] != 2:
            assert server.status()["is_serving"]
        assert server.status()["last_reload"]["connections"] == {
            "moved": 2,
            "kept": 0,
            "ended": 0,
            "lost": 0,
            "closed": 0,
        }
        other.send(b"now\n")
        assert slow.line() == other.line() == b"now\n"


def test_a_straggler_may_end_those_that_have_moved(copyover_server: Servers) -> None:
    """A kick reaches its client wherever the connection is, and costs the one who kicks nothing."""
    config = {"gather_s": 0.1, "boundary_s": 30.0}
    server = copyover_server("slow_room:straggle", chdir=APPS, move="together", config=config)
    with Client(server.address) as slow, Client(server.address) as other, ThreadPoolExecutor(1) as deploy_script:
        slow.send(b"wait\n")
        assert slow.line() == other.line() == b"wait\n"
        reload = deploy_script.submit(server.reload)
        while [row["worker"] for row in server.connections()] != [1, 2]:
            assert not reload.done()
        slow.send(b"kick\n")
        assert slow.line() == other.line() == b"said: kick\n"
        assert other.receive(1) == b""
        assert reload.result(60).assert_lossless().moved == 2
        slow.send(b"now\n")
        assert slow.line() == b"now\n"


@BOTH_MOVES
def test_a_time_out_of_the_incumbent_does_not_reach_a_client_that_moved(copyover_server: Servers, move: str) -> None:
    """The clock of a frozen coroutine may run out: the client hears nothing of it."""
    config = {"gather_s": 0.1, "boundary_s": 5.0}
    server = copyover_server("handlers:idle_timeout", chdir=APPS, move=move, config=config)
    server.expect_errors = True  # the time-out of the one that stays is its handler's failure
    with Client(server.address) as idle, Client(server.address) as stays:
        assert stays.ask(b"stay\n") == b"stay\n"
        assert idle.ask(b"x\n") == b"x\n"
        result = server.reload(no_audit=True)  # takes longer than the time-out, because one stays
        assert (result.exit_code, result.moved, result.lost) == (0, 1, 0)
        assert idle.is_quiet()
        assert idle.ask(b"still here\n") == b"still here\n"


def test_closing_anothers_connection_ends_its_handler(copyover_server: Servers) -> None:
    """A kick is an end like any other: FIN to the client, and the handler's clean-up runs."""
    server = copyover_server("handlers:kick", chdir=APPS)
    with Client(server.address) as first, Client(server.address) as second:
        while len(server.connections()) < 2:
            assert server.status()["is_serving"]
        first.send(b"x\n")
        assert second.receive(1) == b""
        first.line()
        second.socket.close()
        while len(server.connections()) > 1:
            assert server.status()["is_serving"]
        assert first.ask(b"x\n") == b"1 left\n"


def test_a_state_is_exact_also_when_it_is_empty(copyover_server: Servers) -> None:
    """What a factory gives to fresh connections is not given again after a move."""
    server = copyover_server("handlers:spend", chdir=APPS)
    with Client(server.address) as client:
        assert client.ask(b"x\n") == b"['lives']\n"
        assert client.ask(b"clear\n") == b"[]\n"
        server.reload().assert_lossless()
        assert client.ask(b"x\n") == b"[]\n"


def test_long_lines_after_short_reads(copyover_server: Servers) -> None:
    """A small read does not make the buffer too small for the next line."""
    server = copyover_server("handlers:mixed", chdir=APPS)
    with Client(server.address) as client:
        for size in (10, 300_000, 65_536):
            client.send(b"x" * size + b"\n1234")
            assert client.line() == b"%d 4\n" % size


def test_shared_state_that_cannot_be_exported_rolls_back(copyover_server: Servers) -> None:
    """A cut without its shared state is no consistent cut: everything returns, the very coroutines go on."""
    server = copyover_server("handlers:room_that_cannot_share", chdir=APPS, move="together")
    server.expect_errors = True
    with Client(server.address) as client:
        assert client.ask(b"one\n") == b"one\n"
        result = server.reload()
        assert (result.outcome, result.exit_code, result.lost) == ("rolled-back", 3, 0)
        assert "the cache is being rebuilt" in str(result.error)
        assert "generation 1" in str(result.error)
        assert client.ask(b"two\n") == b"two\n"
        assert client.ask(b"history\n") == b"one,two\n"


def test_idle_waits_for_something_else_and_moves(copyover_server: Servers) -> None:
    """A handler that waits for a queue moves, and waits anew in the replacement."""
    server = copyover_server("handlers:mailbox", chdir=APPS)
    with Client(server.address) as owner:
        assert owner.ask(b"anna\n") == b"open\n"
        assert server.reload().assert_lossless().moved == 1
        with Client(server.address) as sender:
            assert sender.ask(b"anna hi\n") == b"sent\n"
        assert owner.line() == b"hi\n"


def test_a_state_that_is_a_class_travels(copyover_server: Servers) -> None:
    """Attrs classes are states; factories are found."""
    server = copyover_server("handlers:make_tally", chdir=APPS)
    with Client(server.address) as client:
        assert client.ask(b"x\n") == b"1\n"
        server.reload().assert_lossless()
        assert client.ask(b"x\n") == b"2\n"


def test_a_state_that_does_not_serialise_keeps_its_connection(copyover_server: Servers) -> None:
    """Never a state that comes out other than it went in: the connection stays, with the reason."""
    server = copyover_server("handlers:unserialisable", chdir=APPS)
    with Client(server.address) as client, Client(server.address) as other:
        assert client.ask(b"x\n") == b"x\n"
        result = server.reload()
        assert (result.exit_code, result.kept, result.lost) == (0, 1, 0)
        assert "state['when'] is of type set" in result.answer["kept"][0]["reason"]
        assert client.ask(b"still here\n") == b"still here\n"
        assert other.ask(b"x\n") == b"x\n"


def test_abort_is_a_true_reset(copyover_server: Servers) -> None:
    """The client learns of an abort at once, though the holder has a dup of the socket."""
    server = copyover_server("handlers:aborts", chdir=APPS)
    for _ in range(2):
        with Client(server.address) as client:
            assert client.ask(b"x\n") == b"x\n"
            client.send(b"abort\n")
            with pytest.raises(ConnectionResetError):
                client.receive(1)
        server.reload().assert_lossless()


def test_an_endless_line_ends_its_connection_only(copyover_server: Servers) -> None:
    """A limit is a limit: the connection is closed, the log says why in one sentence."""
    server = copyover_server("echo:echo", chdir=APPS, config={"line_bytes": 1000})
    with Client(server.address) as client, Client(server.address) as other:
        client.send(b"x" * 5000)
        assert client.receive(1) == b""
        assert other.ask(b"fine\n") == b"fine\n"
    assert "a line is longer than 1000 bytes" in server.log


def test_a_broken_handler_resets_its_connection_only(copyover_server: Servers) -> None:
    """What the handler did not answer is not answered silently: the client sees a reset, the log a traceback."""
    server = copyover_server("handlers:raises", chdir=APPS)
    server.expect_errors = True
    with Client(server.address) as client, Client(server.address) as other:
        client.send(b"x\n")
        with pytest.raises(ConnectionResetError):
            client.receive(10)
        server.reload().assert_lossless()
        assert other.is_quiet()
    assert "the handler is broken" in server.log


def test_unix_and_ipv6_listeners_move_too(copyover_server: Servers, tmp_path: Path) -> None:
    """Each kind of socket, each by its name."""
    path = Path("/tmp") / f"co-{tmp_path.name[:40]}.sock"
    listen = ["web=tcp://127.0.0.1:0", "six=tcp://[::1]:0", f"local=unix://{path}?mode=0660"]
    server = copyover_server("handlers:on_listener", chdir=APPS, listen=listen)
    assert path.stat().st_mode & 0o777 == 0o660
    clients = [Client(address) for address in server.addresses]
    for _ in range(2):
        for name, client in zip((b"web", b"six", b"local"), clients, strict=True):
            assert client.ask(b"x\n") == name + b" x\n"
        assert server.reload().assert_lossless().moved == 3
    for client in clients:
        client.socket.close()
    server.stop()
    assert not path.exists()


def test_fifty_reloads_leave_nothing_behind(copyover_server: Servers) -> None:
    """The holder outlives every deploy: its descriptors and memory are flat after fifty."""
    server = copyover_server("handlers:tally", chdir=APPS, loop="asyncio")
    clients = [Client(server.address) for _ in range(20)]

    def memory_kib() -> int:
        status = Path(f"/proc/{server.pid}/status").read_text(encoding="ascii")
        return int(status.split("VmRSS:")[1].split()[0])

    def settled_descriptors() -> int:
        while len(server.worker_pids()) > 1:
            assert server.status()["is_serving"]
        return server.descriptors()

    before, memory = 0, 0
    for number in range(1, 51):
        move = "rolling" if number % 2 else "together"
        assert server.reload(move=move).assert_lossless().moved == 20
        for client in clients:
            assert client.ask(b"x\n") == b"%d\n" % number
        if number == 10:
            before, memory = settled_descriptors(), memory_kib()
    assert settled_descriptors() == before
    assert memory_kib() < memory + 1024
    for client in clients:
        client.socket.close()
    while server.connections():
        assert server.status()["is_serving"]
    assert settled_descriptors() == before - 20


@BOTH_MOVES
def test_five_thousand_live_connections(copyover_server: Servers, move: str) -> None:
    """A full house moves, with the half line that each has sent."""
    server = copyover_server("handlers:tally", chdir=APPS, workers=2)
    clients = [Client(server.address) for _ in range(5000)]
    for generation in (1, 2):
        for client in clients:
            client.send(b"ha")
        result = server.reload(move=move).assert_lossless()
        assert (result.moved, result.kept) == (5000, 0)
        for client in clients:
            client.send(b"lf\n")
        for client in clients:
            assert client.line() == b"%d\n" % generation
    for client in clients:
        client.socket.close()
