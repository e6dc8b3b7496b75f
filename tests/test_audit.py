"""The audit: what the kernel says of what the ledger has, and who is accused."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink import NETLINK_SOCK_DIAG, NLM_F_ACK, NLM_F_REQUEST
from pyroute2.netlink.diag import SOCK_DESTROY, MarshalDiag, inet_diag_req
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nlsocket import NetlinkSocket

from clients import Client
from copyover import audit, comparison, sockdiag
from copyover.comparison import Held, Listening, Plight, Socket, State, View
from copyover.errors import AuditImpossible
from copyover.sockets import cookie_of, plight_of_descriptor, reset

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from copyover.testing import Server, Servers

APPS = "tests/apps"
READ_AHEAD = 64 << 10

# ---- the comparison

LISTENER = Listening("web", "tcp://127.0.0.1:80", 1, socket.AF_INET, 80)
LOCAL = socket.inet_aton("127.0.0.1") + bytes(12)
EARS = Socket(1, socket.AF_INET, State.LISTEN, 7, 80, LOCAL, 0, 0, 0, 128)


def row(cookie: int, state: State = State.ESTABLISHED, *, inode: int = 9, received: int = 5, acked: int = 5) -> Socket:
    return Socket(cookie, socket.AF_INET, state, inode, 80, LOCAL, received, acked, 0, 0)


def held(plight: Plight | None = None) -> Held:
    return Held(0, 3, 2, 0, "served", plight)


def view(of: Mapping[int, Held], *sockets: Socket, **counters: int) -> View:
    return View((LISTENER,), of, {each.cookie: each for each in (EARS, *sockets)}, counters)


@st.composite
def views(draw: st.DrawFn, cookies: st.SearchStrategy[set[int]]) -> View:
    """Any ledger beside any kernel: the audit must make sense of both."""
    plights = st.one_of(st.none(), st.sampled_from(Plight))
    of = {cookie: held(draw(plights)) for cookie in draw(cookies)}
    states = st.sampled_from(sorted(set(State) - {State.LISTEN}))
    counts = st.integers(0, 2)
    rows = [
        row(cookie, draw(states), inode=draw(st.integers(0, 1)), received=draw(counts), acked=draw(counts))
        for cookie in draw(cookies)
    ]
    return view(of, *rows)


COOKIES = st.sets(st.integers(2, 12))


@given(views(COOKIES), views(COOKIES))
def test_each_connection_gets_exactly_one_verdict(before: View, now: View) -> None:
    """Nobody who was held before is forgotten or counted twice, and so with all who are held now."""
    found = comparison.account(before, now)
    accused = [finding.cookie for finding in (*found.missing, *found.over)]
    assert len(set(accused)) == len(accused)
    before_accused = before.held.keys() & set(accused)
    assert found.same + sum(found.ended.values()) + len(before_accused) == len(before.held)
    assert found.same + found.fresh + len(now.held.keys() & set(accused)) == found.held == len(now.held)
    assert not {finding.cookie for finding in found.unheld} & (before.held.keys() | now.held.keys())
    assert found.exit_code == (4 if found.missing else 0)


@given(views(COOKIES), views(COOKIES), views(COOKIES))
def test_only_doubts_are_looked_at_again_and_without_doubt_nobody_is_accused(
    before: View, now: View, later: View
) -> None:
    """The later look decides on the doubtful alone; what was sound at the first stays so."""
    plain = View(now.listeners, {cookie: held() for cookie in now.held}, now.sockets, now.counters)
    doubtful = comparison.doubts(before, plain)
    if not doubtful:
        found = comparison.account(before, plain)
        assert (found.missing, found.over, found.unheld) == ((), (), ())
    asked = View(later.listeners, {c: r for c, r in later.held.items() if c in doubtful}, later.sockets, {})
    together = comparison.corrected(plain, doubtful, asked)
    sound = plain.held.keys() - doubtful
    assert together.held.keys() == sound | asked.held.keys()
    assert all(together.sockets.get(cookie) == asked.sockets.get(cookie) for cookie in doubtful)
    found = comparison.account(before, together)
    assert found.same + found.fresh >= len(sound)
    assert not sound & {finding.cookie for finding in (*found.missing, *found.over)}


VERDICTS: dict[str, tuple[View, View, str, str]] = {
    "gone while it is held": (view({2: held()}, row(2)), view({2: held()}), "missing", "no such connection"),
    "its counters went back": (
        view({2: held()}, row(2)),
        view({2: held()}, row(2, received=4)),
        "missing",
        "byte counters went back",
    ),
    "what it was acknowledged went back": (
        view({2: held()}, row(2)),
        view({2: held()}, row(2, acked=4)),
        "missing",
        "byte counters went back",
    ),
    "reset on this side": (view({2: held()}, row(2)), view({2: held(Plight.DISSOLVED)}), "missing", "on this side"),
    "another socket": (view({2: held()}, row(2)), view({2: held(Plight.FOREIGN)}, row(2)), "missing", "another socket"),
    "forgotten and alive": (view({2: held()}, row(2)), view({}, row(2)), "missing", "not in the ledger any more"),
    "reset by its client": (view({2: held()}, row(2)), view({2: held(Plight.CLOSED)}), "over", "reset from outside"),
    "reset since the dump": (
        view({2: held()}, row(2)),
        view({2: held(Plight.CLOSED)}, row(2)),
        "over",
        "reset from outside",
    ),
    "finished by both": (
        view({2: held()}, row(2)),
        view({2: held(Plight.CLOSED)}, row(2, State.TIME_WAIT, inode=0)),
        "over",
        "both sides have finished it",
    ),
    "never lent": (view({}), view({}, row(2)), "unheld", "ESTABLISHED at web, and not in the ledger"),
    "left open": (view({}), view({}, row(2, State.FIN_WAIT2)), "unheld", "FIN_WAIT2 at web"),
    "a listener is deaf": (view({}), View((LISTENER,), {}, {}, {}), "missing", "web does not listen"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_what_is_wrong_is_said_with_its_reason(case: str) -> None:
    """One finding of the right kind, whose words help."""
    before, now, kind, words = VERDICTS[case]
    found = comparison.as_object(comparison.account(before, now))
    assert {each: found[each] for each in ("missing", "over", "unheld")} == {
        each: int(each == kind) for each in ("missing", "over", "unheld")
    }
    assert words in found["findings"][kind][0]["reason"]
    assert found["exit_code"] == (4 if kind == "missing" else 0)


ENDINGS = {
    "told, and no trace": (view({}), "gone"),
    "told, our FIN came first": (view({}, row(2, State.TIME_WAIT, inode=0)), "finished"),
    "told, and it still lingers in a process": (view({}, row(2, State.FIN_WAIT2)), "finished"),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_an_end_that_is_told_is_no_accusation(case: str) -> None:
    """The ledger has let go of it: it ended, and the kernel's traces say how."""
    now, how = ENDINGS[case]
    found = comparison.account(view({2: held()}, row(2), ended=3), counting(now, ended=4))
    assert (found.same, dict(found.ended), found.missing, found.unheld) == (0, {how: 1}, (), ())
    assert found.counted == {"ended": 1}


def counting(now: View, **counters: int) -> View:
    return View(now.listeners, now.held, now.sockets, counters)


def test_what_only_waits_to_be_accepted_is_nobodys() -> None:
    """Children in the accept queue have no inode; other addresses of the port are not ours."""
    other = row(3)._replace(local=socket.inet_aton("127.0.0.2") + bytes(12))
    found = comparison.account(view({}), view({}, row(2, inode=0), other))
    assert found.unheld == ()
    wildcard = View((LISTENER,), {}, {1: EARS._replace(local=bytes(16)), 3: other}, {})
    assert [finding.cookie for finding in comparison.account(wildcard, wildcard).unheld] == [3]


def test_half_closed_connections_are_counted_by_state() -> None:
    """Live, and said."""
    now = view({2: held(), 3: held(), 4: held()}, row(2), row(3, State.CLOSE_WAIT), row(4, State.FIN_WAIT2))
    found = comparison.account(now, now)
    assert (found.same, found.half_closed) == (3, {"CLOSE_WAIT": 1, "FIN_WAIT2": 1})


# ---- the kernel's account


@contextlib.contextmanager
def connected(family: int, address: Any) -> Iterator[tuple[socket.socket, socket.socket, socket.socket]]:
    """Give a listener, a client, and the accepted socket."""
    with socket.socket(family) as ears:
        ears.bind(address)
        ears.listen(8)
        with socket.socket(family) as client:
            client.connect(ears.getsockname())
            with ears.accept()[0] as accepted:
                yield ears, client, accepted


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_dump_tells_cookie_state_counters_and_queue(family: int) -> None:
    """Of each socket at a port: the fields that an audit compares, for both families."""
    address = "127.0.0.1" if family == socket.AF_INET else "::1"
    with connected(family, (address, 0)) as (ears, client, accepted), socket.socket(family) as waits:
        port = ears.getsockname()[1]
        waits.connect(ears.getsockname())
        client.sendall(b"12345")
        assert accepted.recv(3) == b"123"
        accepted.sendall(b"1234567")
        assert client.recv(7) == b"1234567"
        dump = sockdiag.dump([(family, port)])
        listening, live = dump.pop(cookie_of(ears)), dump.pop(cookie_of(accepted))
        assert (listening.state, listening.queue, listening.limit) == (State.LISTEN, 1, 8)
        assert (live.state, live.received, live.queue, live.family) == (State.ESTABLISHED, 5, 2, family)
        assert live.local == listening.local == socket.inet_pton(family, address).ljust(16, b"\0")
        assert live.port == listening.port == port
        assert live.inode == os.fstat(accepted.fileno()).st_ino
        [unaccepted] = dump.values()
        assert unaccepted.inode == 0
        client.shutdown(socket.SHUT_WR)
        while sockdiag.dump([(family, port)])[live.cookie].state != State.CLOSE_WAIT:
            assert accepted.fileno() > 0
        client.shutdown(socket.SHUT_RD)
        while (seen := sockdiag.dump([(family, port)])[live.cookie]).acked < 7:
            assert seen.acked >= live.acked


def test_a_dump_tells_unix_sockets_and_which_direction_has_ended(tmp_path: Path) -> None:
    """They stay ESTABLISHED until they are closed: what is shut tells what TCP's states tell."""
    with connected(socket.AF_UNIX, str(tmp_path / "s")) as (ears, client, accepted), socket.socket(socket.AF_UNIX) as w:
        w.connect(ears.getsockname())

        def seen() -> Socket:
            return sockdiag.dump([(socket.AF_UNIX, 0)])[cookie_of(accepted)]

        listening = sockdiag.dump([(socket.AF_UNIX, 0)])[cookie_of(ears)]
        assert (listening.state, listening.queue, listening.limit) == (State.LISTEN, 1, 8)
        assert listening.local == seen().local == os.fsencode(ears.getsockname()) + b"\0"
        assert seen().state == State.ESTABLISHED
        client.shutdown(socket.SHUT_WR)
        assert seen().state == State.CLOSE_WAIT
        accepted.shutdown(socket.SHUT_WR)
        assert seen().state == State.CLOSING


def datagrams(family: int) -> list[bytes]:
    """Return a dump as the kernel sends it."""
    request = sockdiag._unix_request() if family == socket.AF_UNIX else sockdiag._inet_request(family, 0)
    request["header"].update(type=20, flags=0x301, sequence_number=1)
    request.encode()
    found = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as netlink:
        netlink.send(bytes(request.data))
        while True:
            found.append(netlink.recv(1 << 18))
            if struct.unpack_from("=H", found[-1], 4)[0] == 3:  # NLMSG_DONE
                return found


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_our_unpacking_agrees_with_pyroute2s_own(family: int) -> None:
    """The hook reads the same datagrams as the library does, field by field."""
    address = "127.0.0.1" if family == socket.AF_INET else "::1"
    with connected(family, (address, 0)) as (ears, client, _):
        client.sendall(b"abc")
        data = datagrams(family)
        ours = {row.cookie: row for each in data for message in sockdiag.Rows().parse(each) for row in message["rows"]}
        theirs = [m for each in data for m in MarshalDiag().parse(each) if "idiag_cookie" in m]
        assert cookie_of(ears) in ours
    assert len(theirs) == len(ours)
    for message in theirs:
        info = message.get_attr("INET_DIAG_INFO") or {"tcpi_bytes_received": 0, "tcpi_bytes_acked": 0}
        assert ours[message["idiag_cookie"]] == Socket(
            message["idiag_cookie"],
            message["idiag_family"],
            message["idiag_state"],
            message["idiag_inode"],
            message["idiag_sport"],
            socket.inet_pton(family, message["idiag_src"]).ljust(16, b"\0"),
            info["tcpi_bytes_received"],
            info["tcpi_bytes_acked"],
            message["idiag_rqueue"],
            message["idiag_wqueue"],
        )


def test_our_unpacking_of_unix_sockets_agrees_with_pyroute2s_own(tmp_path: Path) -> None:
    """As for TCP."""
    with connected(socket.AF_UNIX, str(tmp_path / "s")) as (ears, _, accepted):
        data = datagrams(socket.AF_UNIX)
        ours = {row.cookie: row for each in data for message in sockdiag.Rows().parse(each) for row in message["rows"]}
        theirs = [m for each in data for m in MarshalDiag().parse(each) if "udiag_cookie" in m]
        assert {cookie_of(ears), cookie_of(accepted)} <= ours.keys()
    assert len(theirs) == len(ours)
    for message in theirs:
        mine = ours[message["udiag_cookie"]]
        assert mine.inode == message["udiag_ino"]
        queue = message.get_attr("UNIX_DIAG_RQLEN")
        assert (mine.queue, mine.limit) == (queue["udiag_rqueue"], queue["udiag_wqueue"])


def test_a_refusal_of_the_kernel_is_said() -> None:
    """Errors are not hidden: no dump is another thing than an empty dump."""
    with pytest.raises(AuditImpossible, match="the kernel does not tell its sockets"):
        sockdiag.dump([(socket.AF_APPLETALK, 0)])


def test_a_descriptor_tells_how_its_connection_fares() -> None:
    """Open, closed by the other side, reset by ours, or another socket: dumps know none of these any more."""
    with connected(socket.AF_INET, ("127.0.0.1", 0)) as (ears, client, accepted), socket.socket() as second:
        second.connect(ears.getsockname())
        with ears.accept()[0] as ours:
            cookie = cookie_of(accepted)
            assert plight_of_descriptor(accepted.fileno(), cookie) == "open"
            assert plight_of_descriptor(ours.fileno(), cookie) == "foreign"
            reset(ours)
            assert plight_of_descriptor(ours.fileno(), cookie_of(ours)) == "dissolved"
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            assert plight_of_descriptor(accepted.fileno(), cookie) == "closed"


# ---- a real server


def in_process(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COPYOVER_RUNTIME_DIR", str(server.directory))
    return server.name


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Keep processes from saying anything."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def steal(pid: int, inode: int) -> socket.socket:
    """Return a dup of another process's socket. pidfd_getfd(2)"""
    pidfd = os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if str(entry.readlink()) == f"socket:[{inode}]":
                taken = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, int(entry.name), 0)
                if taken < 0:
                    pytest.skip(f"pidfd_getfd is not permitted here: {os.strerror(ctypes.get_errno())}")
                return socket.socket(fileno=taken)
    finally:
        os.close(pidfd)
    raise AssertionError(f"process {pid} has no socket {inode}")


def abort(client: Client) -> None:
    """Close with a true RST."""
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.socket.close()


def kinds(found: dict[str, Any]) -> dict[str, int]:
    return {key: found[key] for key in ("same", "ended", "missing", "over", "unheld")}


CLEAN = {"same": 0, "ended": 0, "missing": 0, "over": 0, "unheld": 0}


@pytest.mark.parametrize("move", ["together", "rolling"])
def test_the_kernel_confirms_a_reload(copyover_server: Servers, tmp_path: Path, move: str) -> None:
    """Each connection of each family is the same socket before and after, and the reload's result says so."""
    listen = ["127.0.0.1:0", "[::1]:0", f"unix://{tmp_path}/s"]
    server = copyover_server("echo:echo", chdir=APPS, listen=listen, move=move, workers=2)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(address)) for address in server.addresses for _ in range(5)]
        for client in clients:
            assert client.ask(b"x\n") == b"x\n"
        result = server.reload().assert_lossless()
        assert kinds(result.answer["audit"]) == CLEAN | {"same": 15}
        clients.pop().socket.close()
        while len(server.connections()) > 14:
            assert server.status()["is_serving"]
        found = server.audit()
        assert kinds(found) == CLEAN | {"same": 14}
        assert [row["waiting"] for row in found["listeners"]] == [0, 0, 0]
        assert [row["address"] for row in found["listeners"]] == [
            row["address"] for row in server.status()["listeners"]
        ]


def test_clients_that_come_and_go_are_not_called_missing(copyover_server: Servers) -> None:
    """Ends and beginnings at every moment of looking: asked again, nobody is accused."""
    server = copyover_server("echo:echo", chdir=APPS, workers=2)
    with server.swarm(clients=40, churn=30, seed=3) as swarm:
        for _ in range(3):
            audited = server.reload().assert_lossless().answer["audit"]
            assert (audited["missing"], audited["unheld"]) == (0, 0)
            assert audited["same"] >= 40
            found = server.audit()
            assert (found["missing"], found["unheld"], found["exit_code"]) == (0, 0, 0)
            swarm.wait_round()
    swarm.report.assert_lossless()


def test_what_happens_while_an_audit_looks_is_no_accusation(
    copyover_server: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the ledger's answer and the dump one ends and one comes, and the dump misses a third: asked again."""
    server = copyover_server("echo:echo", chdir=APPS)
    name = in_process(server, monkeypatch)
    dump, dumps = sockdiag.dump, []
    with contextlib.ExitStack() as stack:
        stays, ends = (stack.enter_context(Client(server.address)) for _ in range(2))
        assert (stays.ask(b"x\n"), ends.ask(b"x\n")) == (b"x\n", b"x\n")
        [missed] = [row for row in server.connections() if row["peer"].endswith(str(stays.socket.getsockname()[1]))]

        def racing(places: set[tuple[int, int]]) -> dict[int, Socket]:
            dumps.append(places)
            if len(dumps) > 1:
                return dump(places)
            ends.socket.close()
            while len(server.connections()) > 1:
                assert server.status()["is_serving"]
            assert stack.enter_context(Client(server.address)).ask(b"x\n") == b"x\n"
            return {cookie: row for cookie, row in dump(places).items() if cookie != missed["connection"]}

        before = audit.look(name)
        monkeypatch.setattr(sockdiag, "dump", racing)
        found = comparison.as_object(audit.compare(name, before))
    assert kinds(found) == CLEAN | {"same": 1, "ended": 1}
    assert found["fresh"] == 1
    assert len(dumps) == 2


def test_a_client_that_resets_has_ended(copyover_server: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its worker has said so it is over, then it has ended; no exit code accuses anybody."""
    server = copyover_server("echo:echo", chdir=APPS)
    name = in_process(server, monkeypatch)
    with Client(server.address) as stays, Client(server.address) as leaves:
        assert (stays.ask(b"x\n"), leaves.ask(b"x\n")) == (b"x\n", b"x\n")
        before = audit.look(name)
        with stopped(server.worker_pids()):
            abort(leaves)
            found = server.audit()
            assert kinds(found) == CLEAN | {"same": 1, "over": 1}
            assert found["exit_code"] == 0
            assert "reset from outside" in found["findings"]["over"][0]["reason"]
        while len(server.connections()) > 1:
            assert server.status()["is_serving"]
        ended = comparison.as_object(audit.compare(name, before))
        assert kinds(ended) == CLEAN | {"same": 1, "ended": 1}
        assert (ended["ended_how"], ended["counted"]["ended"]) == ({"gone": 1}, 1)


def test_a_connection_that_somebody_destroys_has_ended_too(copyover_server: Servers) -> None:
    """What ``ss -K`` kills is over while its worker cannot say so, and then it has ended."""
    server = copyover_server("echo:echo", chdir=APPS)
    with Client(server.address) as client:
        assert client.ask(b"x\n") == b"x\n"
        [found] = server.connections()
        with stopped(server.worker_pids()):
            destroy(server.address, client.socket.getsockname(), found["connection"])
            assert kinds(server.audit()) == CLEAN | {"over": 1}
        with pytest.raises(ConnectionResetError):
            client.receive(1)
        while server.connections():
            assert server.status()["is_serving"]
        assert kinds(server.audit()) == CLEAN


def destroy(local: tuple[str, int], remote: tuple[str, int], cookie: int) -> None:
    """Close an IPv4 connection in the kernel, as ss -K does."""
    request = inet_diag_req()
    request["sdiag_family"], request["sdiag_protocol"] = socket.AF_INET, socket.IPPROTO_TCP
    request["idiag_states"], request["idiag_cookie"] = 1 << State.ESTABLISHED, cookie
    for key, (host, port) in (("s", local), ("d", remote)):
        request[f"idiag_{key}port"] = port
        request["idiag_src" if key == "s" else "idiag_dst"] = (*struct.unpack(">I", socket.inet_aton(host)), 0, 0, 0)
    with NetlinkSocket(NETLINK_SOCK_DIAG) as netlink:
        netlink.set_marshal(sockdiag.Rows())
        try:
            list(netlink.nlm_request(request, SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK))
        except NetlinkError as refused:
            pytest.skip(f"SOCK_DESTROY is not permitted here: {refused}")


def test_what_is_reset_behind_everybodys_back_is_missing(copyover_server: Servers, tmp_path: Path) -> None:
    """A reload in which a held connection is reset on this side, and nobody tells, exits with 4 and names it."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    app = tmp_path / "app.py"
    app.write_text(
        "import asyncio\n"
        "async def deaf(connection):\n"
        "    await connection.write(await connection.read_until(b'\\n'))\n"
        "    await asyncio.Event().wait()\n",
        encoding="utf-8",
    )
    server = copyover_server(
        "app:deaf", chdir=str(tmp_path), config={"gather_s": 0.1, "boundary_s": 0.2, "stop_timeout_s": 0.1}
    )
    with app.open("a", encoding="utf-8") as more:
        more.write(f"async def startup():\n    open({str(gate)!r}).read()\n")
    with Client(server.address) as client, ThreadPoolExecutor(1) as deploy_script:
        assert client.ask(b"x\n") == b"x\n"
        connection = wait_deaf(server, client)
        reloading = deploy_script.submit(server.reload)
        while server.status()["phase"]["name"] != "booting":
            assert not reloading.done()
        with steal(server.pid, connection.inode) as dup:
            reset(dup)
        gate.write_text("", encoding="utf-8")
        result = reloading.result()
    assert (result.exit_code, result.answer["exit_code"], result.outcome, result.lost) == (4, 4, "done", 0)
    assert kinds(result.answer["audit"]) == CLEAN | {"missing": 1}
    [finding] = result.answer["audit"]["findings"]["missing"]
    assert finding["connection"] == connection.cookie
    assert "reset on this side" in finding["reason"]
    assert f"missing: connection {connection.cookie}: it was reset on this side" in result.stderr
    assert server._run("audit").returncode == 4


def wait_deaf(server: Server, client: Client) -> Socket:
    """Fill the worker's read-ahead, so that it looks at the socket no more."""
    client.send(bytes(2 * READ_AHEAD))
    [row] = server.connections()
    place = (socket.AF_INET, server.address[1])
    while True:
        seen = sockdiag.dump([place])[row["connection"]]
        if seen.received - seen.queue >= READ_AHEAD:
            return seen


def test_what_nobody_holds_and_what_waits_is_said(copyover_server: Servers) -> None:
    """A connection that a process accepted and never lent is unheld; those in the backlog are its queue."""
    server = copyover_server("echo:echo", chdir=APPS)
    dump = sockdiag.dump([(socket.AF_INET, server.address[1])])
    [ears] = [row for row in dump.values() if row.state == State.LISTEN]
    with stopped(server.worker_pids()), contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(Client(server.address))
        with steal(server.pid, ears.inode) as listener, listener.accept()[0]:
            found = server.audit()
        assert kinds(found) == CLEAN | {"unheld": 1}
        assert found["exit_code"] == 0
        assert "ESTABLISHED at 127.0.0.1:0, and not in the ledger" in found["findings"]["unheld"][0]["reason"]
        assert found["listeners"][0]["waiting"] == 3
        assert found["listeners"][0]["limit"] == min(4096, int(Path("/proc/sys/net/core/somaxconn").read_text()))


def test_the_table_is_for_people_and_the_audit_can_be_left_out(copyover_server: Servers) -> None:
    """Each way of asking has its answer; what was not audited says why."""
    server = copyover_server("echo:echo", chdir=APPS)
    with Client(server.address) as client:
        assert client.ask(b"x\n") == b"x\n"
        shown = server._run("audit")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert "1 held: 1 are the kernel's live sockets; 0 ended meanwhile, 0 over, 0 missing" in shown.stdout
        assert "  audit: 1 are the same sockets, 0 ended, 0 missing, 0 unheld" in server.reload().stderr
        assert "audit" not in server.reload(no_audit=True).answer
        assert "audit" not in server.reload(no_wait=True).answer
    while server.status()["generation"] != 4:
        assert server.status()["is_serving"]


def test_a_holder_that_does_not_know_the_request_stops_no_reload(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A command that is newer than the holder says that there was no audit, and does its work."""
    monkeypatch.setenv("COPYOVER_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "old").mkdir()
    with socket.socket(socket.AF_UNIX) as desk, ThreadPoolExecutor(1) as holder:
        desk.bind(str(tmp_path / "old" / "control.sock"))
        desk.listen()
        holder.submit(answer_once, desk, {"error": "this holder does not know 'ledger'"})
        with pytest.raises(AuditImpossible, match="does not know 'ledger': it is older than this command"):
            audit.look("old")


def answer_once(desk: socket.socket, answer: dict[str, Any]) -> None:
    with desk.accept()[0] as caller, caller.makefile("rb") as lines:
        assert json.loads(lines.readline())["do"] == "ledger"
        caller.sendall(json.dumps(answer).encode() + b"\n")


def test_more_doubts_than_a_request_can_name_are_asked_in_parts(
    copyover_server: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request has a limit, a server has not; strange cookies are nobody's and harm nothing."""
    server = copyover_server("echo:echo", chdir=APPS)
    name = in_process(server, monkeypatch)
    monkeypatch.setattr(audit, "COOKIES_A_REQUEST", 2)
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            assert stack.enter_context(Client(server.address)).ask(b"x\n") == b"x\n"
        cookies = [row["connection"] for row in server.connections()]
        told = audit._ask_about(name, [*cookies, 1 << 63])
        assert sorted(told["connections"]["connection"]) == sorted(cookies)
        assert told["connections"]["plight"] == ["open"] * 5
        strange = audit._ask(name, connections=[None, "x", {}, [1], -1, True])
        assert strange["connections"]["connection"] == []
