"""Which listeners there are, for which generation, under which number."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from copyover.errors import AddressInUse, BadAddress
from copyover.holder import listening as room
from copyover.holder.listening import HANDSHAKE_S, Listening
from copyover.listeners import parse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from copyover.listeners import Address


def addresses(*texts: str) -> list[Address]:
    return [parse(text) for text in texts]


WEB, ADMIN, SHOP = addresses("web=127.0.0.1:0", "admin=127.0.0.1:0", "shop=127.0.0.1:0")


@pytest.fixture
def listening() -> Iterator[Listening]:
    """Generation 1 serves on web and admin."""
    made = Listening()
    made.begin([WEB, ADMIN])
    yield made
    made.close()


def where(listening: Listening, number: int) -> tuple[str, int]:
    host, port = listening.live[number].socket.getsockname()
    return host, port


def names_of(listening: Listening, generation: int) -> dict[int, str]:
    return {number: listener.name for number, listener in listening.of(generation).items()}


def test_a_list_that_stays_changes_nothing(listening: Listening) -> None:
    """Whatever its order; port 0 is the port that it was."""
    before = dict(listening.live)
    listening.propose(2, [ADMIN, WEB], ())
    assert listening.added(2) == frozenset()
    changes = listening.commit(2, 0.0)
    assert (listening.live, changes.added, changes.removed) == (before, (), ())


def test_only_the_replacement_learns_of_what_is_added(listening: Listening) -> None:
    """It accepts from what is going too; the incumbent is as it was, restarted workers of it included."""
    listening.propose(2, [WEB, SHOP], ())
    assert listening.added(2) == {2}
    assert listening.added(1) == frozenset()
    assert names_of(listening, 2) == {0: "web", 1: "admin", 2: "shop"} == listening.names_for(2)
    assert names_of(listening, 1) == {0: "web", 1: "admin"} == listening.names_for(1)
    assert [(listed.name, state) for listed, state in listening.listed()] == [
        ("web", "serving"),
        ("admin", "serving"),
        ("shop", "added"),
    ]
    changes = listening.commit(2, 0.0)
    assert [listed.name for listed in changes.added] == ["shop"]
    assert [listed.name for listed in changes.removed] == ["admin"]
    assert names_of(listening, 2) == {0: "web", 1: "admin", 2: "shop"}  # admin's backlog is still served
    assert listening.names_for(2)[1] == "admin"


def test_what_is_withdrawn_is_closed_for_whoever_has_it(listening: Listening) -> None:
    """Also for a replacement that has a copy; its number is not given again."""
    listening.propose(2, [SHOP, WEB, ADMIN], ())
    copy = listening.of(2)[2].socket.dup()
    address = copy.getsockname()
    listening.withdraw(2)
    listening.withdraw(2)
    with copy, pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    listening.propose(3, [SHOP, WEB, ADMIN], ())
    assert listening.added(3) == {3}


def test_a_failure_leaves_nothing_bound(listening: Listening) -> None:
    """Neither what came before it in the list, nor a name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    taken = parse("other={}:{}".format(*where(listening, 0)))
    with pytest.raises(AddressInUse):
        listening.propose(2, [parse(f"first=127.0.0.1:{port}"), WEB, taken], ())
    with pytest.raises(BadAddress):
        listening.propose(2, addresses("first=127.0.0.1:0", "far=192.0.2.1:1"), ())
    assert listening.added(2) == frozenset()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert names_of(listening, 2) == {0: "web", 1: "admin"}


def test_two_names_for_one_address_that_is_renamed_are_one_too_many(listening: Listening) -> None:
    """The first gets the socket, the second finds it taken."""
    place = "{}:{}".format(*where(listening, 0))
    with pytest.raises(AddressInUse):
        listening.propose(2, addresses(f"a={place}", f"b={place}"), ())


def test_a_removed_listener_ends_when_its_backlog_is_served(listening: Listening) -> None:
    """Not before: whoever waits is accepted; nor before handshakes that had begun can have come to their end."""
    address = where(listening, 1)
    accepting = listening.live[1].socket.dup()
    with accepting, socket.create_connection(address) as client:
        listening.propose(2, [WEB], ())
        listening.commit(2, 10.0)
        listening.end_served(10.0 + 2 * HANDSHAKE_S)
        assert list(listening.ending) == [1]
        with socket.socket() as late:
            late.settimeout(0.2)
            with pytest.raises(TimeoutError):
                late.connect(address)
        accepted, _ = accepting.accept()
        with accepted:
            accepted.sendall(b"hello")
            assert client.recv(9) == b"hello"
            listening.end_served(10.0 + HANDSHAKE_S / 2)
            assert list(listening.ending) == [1]
            listening.end_served(10.0 + HANDSHAKE_S)
            assert not listening.ending
            assert names_of(listening, 2) == {0: "web"}
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address)
            with socket.create_server(address):  # the address is free, though somebody has a copy
                client.sendall(b"on")
                accepted.setblocking(True)
                assert accepted.recv(9) == b"on"


def test_an_address_that_is_taken_back_and_withdrawn_goes_on_ending(listening: Listening) -> None:
    """Clients are let in while the change lasts, and no longer."""
    address = where(listening, 1)
    listening.propose(2, [WEB], ())
    listening.commit(2, 0.0)
    listening.propose(3, [WEB, parse("back={}:{}".format(*address))], ())
    assert names_of(listening, 3) == {0: "web", 2: "back"}
    listening.end_served(100.0)
    assert list(listening.ending) == [1]
    with socket.create_connection(address):
        listening.of(3)[2].socket.accept()[0].close()
    listening.withdraw(3)
    with socket.socket() as late:
        late.settimeout(0.2)
        with pytest.raises(TimeoutError):
            late.connect(address)
    listening.end_served(100.0)
    assert not listening.ending


def test_closing_takes_the_files_of_a_proposal_too(tmp_path: Path) -> None:
    """A successor that never took its place included."""
    listening = Listening()
    listening.begin(addresses(f"a=unix://{tmp_path}/x.sock"))
    listening.propose(2, addresses(f"b=unix://{tmp_path}/x.sock", f"c=unix://{tmp_path}/y.sock"), ())
    assert len(list(tmp_path.iterdir())) == 3
    listening.close()
    assert list(tmp_path.iterdir()) == []


def test_a_proposal_that_nobody_took_up_gives_way(listening: Listening) -> None:
    """The holder was told to stop at that moment; the next is not in its way."""
    listening.propose(2, [WEB, ADMIN, SHOP], ())
    listening.propose(3, [WEB, ADMIN, SHOP], ())
    assert listening.added(2) == frozenset()
    assert listening.added(3) == {3}


def test_numbers_are_used_again_only_when_all_were_used(listening: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the lowest that neither a listener nor a connection bears."""
    monkeypatch.setattr(room, "NUMBERS", 4)
    for generation, others in enumerate(([SHOP], [], [SHOP]), 2):
        listening.propose(generation, [WEB, *others], ())
        listening.commit(generation, 0.0)
        listening.end_served(100.0)
    assert list(listening.live) == [0, 3]
    listening.propose(5, [WEB, SHOP, ADMIN], {1})
    assert listening.added(5) == {2}
    assert listening.names_for(5)[2] == "admin"


def test_what_a_service_manager_passed_stays(
    listening: Listening, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the file says meanwhile; that it is passed over is in the log, once a change."""
    passed = list(listening.live.values())
    monkeypatch.setattr("copyover.listeners.take_passed", lambda: passed)
    other = Listening()
    other.begin([WEB])
    for generation in (2, 3, 4):
        other.propose(generation, [WEB] if generation == 2 else [SHOP], ())
        other.commit(generation, 0.0)
    assert list(other.live.values()) == passed
    assert caplog.text.count("event=listen-passed-over") == 1
