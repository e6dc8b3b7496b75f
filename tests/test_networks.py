"""Links that go down and peers that vanish: two network namespaces, a veth pair, and the kernel as witness."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from pyroute2 import IPRoute, netns
from pyroute2.netlink.exceptions import NetlinkError

from clients import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

    from copyover.testing import Server, Servers

APPS = "tests/apps"
SERVER, CLIENT = "10.213.7.1", "10.213.7.2"
SERVERS_LINK, CLIENTS_LINK = "co-server", "co-client"

# It lives in a network of its own until its standard input ends; the network ends with it and leaves nothing behind.
ANCHOR = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x40000000) != 0:  # CLONE_NEWNET
    sys.exit(os.strerror(ctypes.get_errno()))
print("ready", flush=True)
sys.stdin.read()
"""


@attrs.frozen
class Networks:
    """Two namespaces, by the pids of the processes that hold them, joined by a veth pair."""

    server: int
    client: int

    @contextlib.contextmanager
    def inside(self, pid: int) -> Iterator[None]:
        """Let this thread's new sockets and processes be of the namespace."""
        netns.pushns(f"/proc/{pid}/ns/net")
        try:
            yield
        finally:
            netns.popns()

    def links(self, pid: int) -> IPRoute:
        with self.inside(pid):
            return IPRoute()

    def connect(self, server: Server) -> Client:
        with self.inside(self.client):
            return Client(server.address)

    def set_server_link(self, state: str) -> None:
        with self.links(self.server) as links:
            links.link("set", index=links.link_lookup(ifname=SERVERS_LINK)[0], state=state)

    def vanish(self) -> None:
        """Take the client's end out of the world: no packet comes or goes any more, and nobody says so."""
        with self.links(self.client) as links:
            links.link("del", index=links.link_lookup(ifname=CLIENTS_LINK)[0])


@contextlib.contextmanager
def anchor() -> Iterator[int]:
    """Give the pid of a process in a network namespace of its own."""
    command = [sys.executable, "-c", ANCHOR]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != b"ready\n":
            pytest.skip(f"network namespaces are not permitted here: {process.stderr.read().decode().strip()}")
        yield process.pid  # leaving the block closes its standard input, and waits for its end


@pytest.fixture
def networks() -> Iterator[Networks]:
    """Give two joined networks, or skip with the reason."""
    with anchor() as server, anchor() as client:
        both = Networks(server, client)
        try:
            with both.links(server) as links:
                links.link("add", ifname=SERVERS_LINK, kind="veth", peer={"ifname": CLIENTS_LINK, "net_ns_pid": client})
            for pid, name, address in ((server, SERVERS_LINK, SERVER), (client, CLIENTS_LINK, CLIENT)):
                with both.links(pid) as links:
                    [index] = links.link_lookup(ifname=name)
                    links.addr("add", index=index, address=address, prefixlen=24)
                    links.link("set", index=index, state="up")
        except (NetlinkError, OSError) as refused:
            pytest.skip(f"a veth pair is not permitted here: {refused}")
        yield both


@pytest.fixture
def run_inside(networks: Networks, copyover_server: Servers) -> Any:
    """Give a function that starts a server in the first network."""

    def start(app: str, *, chdir: str = APPS, **settings: Any) -> Server:
        with networks.inside(networks.server):
            return copyover_server(app, chdir=chdir, listen=[f"{SERVER}:0"], **settings)

    return start


def audit_inside(networks: Networks, server: Server) -> dict[str, Any]:
    with networks.inside(networks.server):
        return server.audit()


def reload_inside(networks: Networks, server: Server) -> dict[str, Any]:
    with networks.inside(networks.server):
        return server.reload().assert_lossless().answer


def counts(found: dict[str, Any]) -> dict[str, int]:
    return {key: found[key] for key in ("same", "ended", "missing", "over", "unheld")}


CLEAN = {"same": 0, "ended": 0, "missing": 0, "over": 0, "unheld": 0}


@pytest.mark.parametrize("move", ["together", "rolling"])
def test_a_link_that_goes_down_and_up_across_a_reload_costs_no_byte(
    networks: Networks, run_inside: Any, move: str
) -> None:
    """What was on its way arrives when the link is back, once and in order, from the replacement."""
    server = run_inside("echo:echo", move=move)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(networks.connect(server)) for _ in range(5)]
        for client in clients:
            assert client.ask(b"before\n") == b"before\n"
            client.send(b"half a ")
        networks.set_server_link("down")
        for number, client in enumerate(clients):
            client.send(b"line %d\n" % number)
        result = reload_inside(networks, server)
        assert result["connections"]["moved"] == 5
        assert counts(result["audit"]) == CLEAN | {"same": 5}
        networks.set_server_link("up")
        for number, client in enumerate(clients):
            assert client.line() == b"half a line %d\n" % number
            assert client.ask(b"after\n") == b"after\n"
        assert counts(audit_inside(networks, server)) == CLEAN | {"same": 5}


def test_a_peer_that_vanishes_while_nobody_serves_it_has_ended(
    networks: Networks, run_inside: Any, tmp_path: Path
) -> None:
    """Time alone tells of a lost link: the audit says so when the kernel does, the replacement when it serves."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    (tmp_path / "app.py").write_text(UNTIL_THE_GATE_OPENS.format(gate=str(gate)), encoding="utf-8")
    server = run_inside("app:app", chdir=str(tmp_path))
    with networks.connect(server) as client, networks.connect(server) as idle, networks.inside(networks.server):
        Path("/proc/sys/net/ipv4/tcp_retries2").write_text("2", encoding="ascii")  # of this namespace; some seconds
        assert idle.ask(b"0\n") == b"end\n"
        client.send(b"300\n")
        assert client.receive(8) == bytes(8)
        with ThreadPoolExecutor(1) as deploy_script:
            reloading = deploy_script.submit(server.reload)
            while {row["state"] for row in server.connections()} != {"thawing"}:
                assert not reloading.done()
            networks.vanish()
            while (found := server.audit())["over"] != 1:
                assert counts(found) == CLEAN | {"same": 2}
            assert counts(found) == CLEAN | {"same": 1, "over": 1}
            assert "reset from outside or timed out" in found["findings"]["over"][0]["reason"]
            gate.write_bytes(b"")
            result = reloading.result().assert_lossless()
        assert result.answer["audit"]["missing"] == 0
        while len(server.connections()) > 1:
            assert server.status()["is_serving"]
        assert counts(server.audit()) == CLEAN | {"same": 1}  # it has nothing to send: nobody knows that it is alone


UNTIL_THE_GATE_OPENS = """
import copyover

async def flood(connection):
    async for line in connection.lines():
        for _ in range(int(line)):
            await connection.write(bytes(65536))
        await connection.write(b"end\\n")

def wait(_):
    open({gate!r}).read()

app = copyover.Application(handler=flood, export_shared=list, import_shared=wait)
"""


def test_an_audit_from_another_network_accuses_nobody(networks: Networks, run_inside: Any) -> None:
    """The kernel shows each network its own sockets: elsewhere an audit is refused, and a reload goes without."""
    server = run_inside("echo:echo")
    with networks.connect(server) as client:
        assert client.ask(b"x\n") == b"x\n"
        refused = server._run("audit")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "is in another network namespace than this command" in refused.stderr
        result = server.reload().assert_lossless()
        assert "is in another network namespace" in result.answer["audit"]["skipped"]
        assert "no audit: the listener 10.213.7.1:0 is in another network namespace" in result.stderr
        assert client.ask(b"y\n") == b"y\n"
