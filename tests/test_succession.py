"""What a holder leaves to its successor: all of it, or a refusal."""

from __future__ import annotations

import collections
import itertools
import json
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copyover import events, messages, succession
from copyover.change import Phase
from copyover.config import Config
from copyover.entries import Entry
from copyover.errors import ChangeRefused
from copyover.events import Quotas
from copyover.holdings import Holdings, Strength, Worker
from copyover.ledger import Ledger
from copyover.listeners import Address, parse
from copyover.release import Release
from copyover.reload import Machine
from copyover.users import User

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READY = messages.Ready(application="app:main", loop="asyncio", writes=1, reads=[1], shares=False, interface="handler")
HELLO = messages.Hello(wire=[1, 1], record=[1, 1], copyover="0.1.0", python="3.11.2", pid=17, worker=1, instance="x")
COUNTS = st.integers(0, 1 << 32)


def machine_of(*, workers: int = 2, connections: int = 3) -> Machine:
    machine = Machine()
    holdings = machine.holdings
    holdings.generation, holdings.wanted = 4, workers
    for _ in range(workers):
        number = next(holdings.worker_numbers)
        holdings.workers[number] = Worker(number, 4, Strength.READY, READY)
    for place in range(connections):
        machine.ledger.lend(1 + place % workers, [100 + place], [30 + place], [place % 2], [0])
    return machine


def generation() -> succession.Generation:
    release = Release(directory="/d", python="/p", application="a:b", app_dir="/d")
    return succession.Generation(release=release, config=Config(app="a:b"), last_words=["a line"])


def estate_of(machine: Machine) -> succession.Estate:
    """Leave that machine, and of everything else one, or two."""
    return succession.Estate(
        format=1,
        departure=succession.Departure(copyover="0.1.0", python="3.11.2", asker=5, left_s=7.5, signals_blocked=[]),
        told={"file": None, "flags": {"app": "app:main"}},
        lock=3,
        instance="x" * 32,
        newest=4,
        started_s=1.25,
        last_reload={"outcome": "done"},
        protocol_errors=2,
        timers={"healthy": 9.5},
        desk=succession.Desk(
            control=4,
            next_caller=9,
            denied=1,
            group=6,
            callers=[succession.Caller(number=5, descriptor=5, heard=b'{"d', unsent=b"\xff\n", is_done=False)],
        ),
        listening=succession.Listeners(
            listeners=[
                succession.Listener(
                    number=0,
                    name="web",
                    descriptor=6,
                    path=None,
                    address=parse("web=127.0.0.1:0"),
                    file=None,
                    removed_s=2.5,
                ),
                succession.Listener(
                    number=1,
                    name="near",
                    descriptor=7,
                    path="/run/near",
                    address=parse("near=unix:///run/near?mode=0660"),
                    file=(1, 2),
                    removed_s=3.5,
                ),
            ],
            names=[(0, "web", None), (1, "near", "resume")],
            are_passed=False,
        ),
        generations=[(4, generation())],
        previous=generation(),
        hands=[
            succession.Hand(
                worker=worker.id,
                generation=4,
                pid=200 + worker.id,
                pidfd=8 + 4 * worker.id,
                channel=9 + 4 * worker.id,
                slots=11 + 4 * worker.id,
                slots_path=f"/run/worker-{worker.id}",
                wire=1,
                started_s=2.5,
                hello=HELLO,
                tail=succession.Tail(descriptor=10 + 4 * worker.id, partial=b"Trace"),
                lines=["a line"],
            )
            for worker in machine.holdings.workers.values()
        ],
        held=succession.hold(machine.holdings),
        user=User(name="web", uid=33, gid=33, groups=(33, 40), home="/var/www"),
        noted=[{"number": 7, "event": "phase", "fields": {"phase": "serving"}}],
        followers=[5],
    )


def picture(machine: Machine) -> dict[str, Any]:
    """All that lives on of a machine, comparable; capacity is counted anew, numbers may be skipped."""
    skipped = {"ledger", "effects", "capacity", "batches", "worker_numbers"}
    found = {name: value for name, value in vars(machine.holdings).items() if name not in skipped}
    return found | {"entries": list(machine.ledger.entries()), "owned": +machine.ledger.owned}


workers = st.builds(
    Worker,
    id=st.integers(1, 5),
    generation=COUNTS,
    strength=st.sampled_from([Strength.BOOTING, Strength.READY, Strength.RETIRING]),
    abilities=st.none() | st.just(READY),
    lent=COUNTS,
    staged=COUNTS,
    staged_acked=COUNTS,
    offs=COUNTS,
    offs_acked=COUNTS,
    is_off=st.just(False),
    has_gathered=st.just(False),
    has_entered=st.just(False),
    shared=st.just(()),
    unanswered=st.builds(set),
    queue=st.builds(collections.deque),
)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    machine = Machine()
    holdings = machine.holdings
    holdings.workers = {one.id: one for one in draw(st.lists(workers, min_size=1, unique_by=lambda one: one.id))}
    holdings.generation, holdings.wanted, holdings.failures = draw(COUNTS), draw(COUNTS), draw(COUNTS)
    holdings.is_full = draw(st.booleans())
    holdings.counters.update(draw(st.dictionaries(st.text(), COUNTS)))
    holdings.worker_numbers, holdings.batches = itertools.count(draw(COUNTS)), itertools.count(draw(COUNTS))
    for cookie in draw(st.sets(st.integers(0, 2**64 - 1))):
        owner, descriptor, listener = draw(st.sampled_from(sorted(holdings.workers))), draw(COUNTS), draw(COUNTS)
        epoch = draw(COUNTS) % 2**32
        machine.ledger.restore(Entry(cookie, descriptor % 2**31, listener % 2**31, owner, epoch=epoch))
    holdings.kept = {cookie: draw(st.text()) for cookie in machine.ledger if draw(st.booleans())}
    return machine


@given(machines())
def test_what_is_left_comes_back_as_it_was(machine: Machine) -> None:
    """Over bytes and back a machine knows what it knew, and its numbers are never used twice."""
    before = picture(machine)
    held = succession.hold(machine.holdings)
    estate = succession.decode(succession.encode(attrs.evolve(estate_of(machine_of()), held=held)))
    revived = succession.revive(estate.held, 1000)
    assert picture(revived) == before
    assert revived.phase is Phase.SERVING
    assert revived.holdings.capacity == 1000
    assert next(revived.holdings.worker_numbers) == held.next_worker < next(machine.holdings.worker_numbers)
    assert next(revived.holdings.batches) == held.next_batch < next(machine.holdings.batches)


def test_every_part_of_an_estate_comes_back_as_it_was() -> None:
    """Callers, listeners, processes, timers: nothing is lost between two programs."""
    estate = estate_of(machine_of())
    succession.check(estate)
    assert succession.decode(succession.encode(estate)) == estate
    assert sorted(estate.descriptors()) == [3, 4, 5, 6, 7, *range(12, 20), 30, 31, 32]


PASSAGE = (
    *("_staged_in", "_origin", "_was_adopted", "_since_s", "_of_passage"),
    *("records", "pushed", "kept_because", "_unfit", "_ceded"),
)

# What is not in an estate, with the reason: an attribute that is new must be left, or stand here.
STAYS = {
    Machine: {
        "holdings": "is left as held",
        "parking": "nothing is parked when a holder leaves",
        "phase": "is serving",
        "change": "is none",
        "_is_remembered": "is done at the end of a change",
        "_stop_wanted": "the same",
        "_now_s": "of one event",
    },
    Holdings: {
        "capacity": "counted anew from the limits of the process",
        "ledger": "is left as entries",
        "effects": "of one event",
        "worker_numbers": "is left as next_worker",
        "batches": "is left as next_batch",
    },
    Ledger: {
        **{f"_{name}": "is left as entries" for name in ("rows", *succession.COLUMNS) if name != "cookie"},
        **dict.fromkeys(PASSAGE, "of a move"),
        "_standing": "all are served when a holder leaves",
        "tombstones": "of a move",
        "is_moving": "of a move",
        "now_s": "of one event",
        "owned": "counted anew",
    },
    Entry: {
        **dict.fromkeys(
            [name.strip("_") for name in PASSAGE if name not in {"records", "_ceded", "_of_passage"}], "of a move"
        ),
        "record": "of a move",
        "is_ceded": "of a move",
        "standing": "all are served when a holder leaves",
    },
    Worker: dict.fromkeys(succession.OF_THE_MOVE, "of a move"),
}


def test_no_attribute_is_forgotten() -> None:
    """Who adds one to the holder's mind decides here whether it lives on."""
    machine = machine_of()
    held = {field.name for field in attrs.fields(succession.Held)}
    assert set(vars(machine)) == set(STAYS[Machine])
    assert set(vars(machine.holdings)) == set(STAYS[Holdings]) | held - {"next_worker", "next_batch", "entries"}
    assert set(vars(machine.ledger)) == set(STAYS[Ledger])
    assert {field.name for field in attrs.fields(Entry)} == set(STAYS[Entry]) | set(succession.COLUMNS)
    left = json.loads(succession.encode(estate_of(machine)))["held"]["workers"][0]
    assert {field.name for field in attrs.fields(Worker)} == set(STAYS[Worker]) | set(left)


# ---- what is refused

FREE = {"told", "last_reload", "counters", "timers", "noted", "uvicorn"}  # objects whose keys are anybody's


def may_be_new(path: tuple[str | int, ...], key: str) -> bool:
    """Whether *key* of the object at *path* has a default."""
    kinds: dict[str | int, type] = {"config": Config, "workers": Worker, "address": Address, "quotas": Quotas}
    kind = next((kinds[part] for part in path[-2:] if part in kinds), None)
    return kind is not None and any(f.name == key and f.default is not attrs.NOTHING for f in attrs.fields(kind))


def full() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succession.encode(estate_of(machine_of())))
    return found


def paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Find each object of an estate."""
    if isinstance(value, dict):
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        if key not in FREE:
            yield from paths(one, (*path, key))


def at(value: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def read(found: object) -> succession.Estate:
    estate = succession.decode(json.dumps(found).encode())
    succession.check(estate)
    return estate


every_object = pytest.mark.parametrize(
    "path", list(paths(full())), ids=lambda path: ".".join(map(str, path)) or "estate"
)


@every_object
def test_a_field_that_is_missing_is_refused(path: tuple[str | int, ...]) -> None:
    """Nothing is guessed; only what has a default may be new."""
    for key in at(full(), path):
        found = full()
        del at(found, path)[key]
        if may_be_new(path, key):
            read(found)
        else:
            with pytest.raises(ChangeRefused):
                read(found)


@every_object
def test_a_field_that_is_unknown_or_of_another_type_is_refused(path: tuple[str | int, ...]) -> None:
    """What a successor does not understand wholly it does not take."""
    for key, value in at(full(), path).items():
        found = full()
        at(found, path)[key] = "wrong" if type(value) is float else 1.5
        with pytest.raises(ChangeRefused):
            read(found)
    found = full()
    at(found, path)["tomorrow"] = 1
    with pytest.raises(ChangeRefused, match="tomorrow"):
        read(found)


def without_worker(estate: dict[str, Any]) -> None:
    del estate["held"]["workers"][1]


def without_generation(estate: dict[str, Any]) -> None:
    estate["held"]["generation"] = 3


def one_listener(estate: dict[str, Any]) -> None:
    del estate["listening"]["names"][1]


def one_descriptor_twice(estate: dict[str, Any]) -> None:
    estate["lock"] = estate["desk"]["control"]


def cut_column(estate: dict[str, Any]) -> None:
    estate["held"]["entries"]["epoch"] = "AAAA"


def short_column(estate: dict[str, Any]) -> None:
    estate["held"]["entries"]["epoch"] = "AAAAAAAAAAA="


def one_connection_twice(estate: dict[str, Any]) -> None:
    estate["held"]["entries"]["cookie"] = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"


def another_wire(estate: dict[str, Any]) -> None:
    estate["hands"][0]["wire"] = 99


def another_record(estate: dict[str, Any]) -> None:
    estate["hands"][0]["hello"]["record"] = [98, 99]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (without_worker, "connection 101 of worker 2, whom it does not have"),
        (without_generation, "does not have generation 3, which serves"),
        (one_listener, "a connection of listener 1, which has no name"),
        (one_descriptor_twice, "names one descriptor twice"),
        (cut_column, "column epoch of 3 bytes is cut short"),
        (short_column, "do not add up"),
        (one_connection_twice, "connection 0 was lent twice"),
        (another_wire, r"worker 1 \(pid 201, copyover 0.1.0\) speaks wire 99 .* reload with a release"),
        (another_record, r"speaks wire 1 and record \[98, 99\]"),
    ],
)
def test_a_state_that_contradicts_itself_or_us_is_refused(
    spoil: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    """The child finds it, not the successor."""
    found = full()
    spoil(found)
    with pytest.raises(ChangeRefused, match=sentence):
        read(found)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "format None, this release reads 1 to 1"),
        (b'{"format": 2}', "format 2, this release reads 1 to 1"),
        (b'{"format": true}', "format True"),
        (b'{"format": 1}', "required field missing"),
    ],
)
def test_what_is_no_state_of_ours_is_refused(data: bytes, sentence: str) -> None:
    """Another format is another format."""
    with pytest.raises(ChangeRefused, match=sentence):
        succession.decode(data)


# ---- when a holder may leave


def test_a_holder_leaves_when_nothing_is_on_its_way() -> None:
    """A change under way, a connection that moves, a worker that dies: each is waited for."""
    machine = machine_of()
    assert succession.obstacle(machine) is None
    machine.ledger.freeze([101])
    assert succession.obstacle(machine) == "connection 101 is freezing"
    machine = machine_of()
    machine.holdings.kill(2)
    assert succession.obstacle(machine) == "worker 2 was killed and has not ended yet"
    machine = machine_of(connections=0)
    machine.handle(events.Reload(asker=1, generation=5, workers=1, move="together", timeout_s=60.0), 0.0)
    assert succession.obstacle(machine) == "another change is under way (booting)"
    assert succession.obstacle(Machine()) == "the first generation is being started"
