"""
The architecture, on one screen: which room may import which.

Change it deliberately: an arrow that is added here is a decision.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

SRC = Path(__file__).parent.parent / "src" / "copyover"

# What a pure room never imports: time and descriptors enter as events and names.
IMPURE = {"asyncio", "fcntl", "logging", "mmap", "os", "pathlib", "select", "selectors", "signal", "socket", "time"}

PURE = {
    "errors",
    "columns",
    "messages",
    "wire",
    "comparison",
    "rows",
    "entries",
    "ledger",
    "events",
    "holdings",
    "move",
    "change",
    "parking",
    "reunion",
    "peace",
    "undoing",
    "reload",
    "slots",
    "limits",
    "uvicorn_options",
    "holder.verdict",
    "succession",
    "worker.agent",
    "worker.effects",
    "adapters.framing",
}

ROOMS: dict[str, set[str]] = {
    # ---- what both programs share
    "errors": set(),
    "columns": set(),
    "messages": {"columns", "errors"},
    "wire": {"columns", "errors", "messages"},
    "channel": {"errors", "messages", "wire"},
    "slots": {"errors", "messages"},
    "sockets": {"slots"},
    # ---- the holder's mind
    "rows": set(),
    "entries": {"columns", "errors", "messages", "rows"},
    "ledger": {"columns", "entries", "errors", "messages"},
    "events": {"messages"},
    "holdings": {"entries", "errors", "events", "ledger", "messages"},
    "move": {"entries", "events", "holdings", "messages"},
    "change": {"events", "move"},
    "parking": {"entries", "events", "holdings", "messages"},
    "reunion": {"entries", "events", "holdings", "messages"},
    "peace": {"change", "errors", "events", "holdings", "ledger", "messages", "move", "parking"},
    "undoing": {"change", "errors", "events", "messages", "peace"},
    "reload": {
        *("change", "errors", "events", "holdings", "messages", "move", "peace", "reunion", "undoing"),
    },
    # ---- from one holder to the next
    "succession": {
        *("change", "config", "entries", "errors", "events", "holdings", "listeners", "messages", "release", "reload"),
        *("users", "wire"),
    },
    # ---- the holder
    "users": {"errors"},
    "limits": set(),
    "process": {"errors", "limits", "users"},
    "listeners": {"errors", "sockets"},
    "uvicorn_options": set(),
    "config": {"errors", "listeners", "slots", "uvicorn_options"},
    "directory": {"errors"},
    "release": {"config", "errors"},
    "holder": set(),
    "holder.loop": set(),
    "holder.verdict": {"messages", "slots"},
    "holder.recovery": {"errors", "holder.verdict", "messages", "slots", "sockets"},
    "holder.listening": {"listeners", "sockets", "succession"},
    "holder.capacity": {"config", "directory", "errors", "limits", "listeners", "process", "slots"},
    "holder.hand": {
        *("", "channel", "directory", "errors", "listeners", "messages", "process", "release", "sockets"),
        *("succession", "users", "wire", "holder.recovery"),
    },
    "holder.crew": {
        *("change", "channel", "config", "entries", "errors", "events", "messages", "process", "release"),
        *("reload", "slots", "succession", "users"),
        *("holder.hand", "holder.listening", "holder.loop", "holder.memory", "holder.recovery"),
    },
    "holder.takeover": {
        *("channel", "directory", "errors", "events", "messages", "process", "release", "reunion", "sockets"),
        *("users", "wire", "holder.hand", "holder.recovery"),
    },
    "holder.memory": set(),
    "holder.health": {"errors", "events", "holder.loop", "process"},
    "holder.control": {"directory", "errors", "succession"},
    "holder.chronicle": set(),
    "holder.blocking": {"change", "entries", "holder.hand", "holdings", "reload", "sockets"},
    "holder.dump": {"change", "entries", "holder.chronicle", "holder.hand", "holdings", "reload"},
    "holder.report": {
        *("entries", "errors", "events", "holdings", "listeners", "messages", "reload", "sockets"),
        *("holder.blocking", "holder.hand", "holder.listening"),
    },
    "holder.daemon": {
        *("change", "channel", "config", "directory", "errors", "events", "process", "reload", "release", "sockets"),
        *("users", "holder.capacity", "holder.chronicle", "holder.control", "holder.crew", "holder.dump"),
        *("holder.hand", "holder.health", "holder.listening", "holder.loop", "holder.report"),
    },
    "holder.upgrade": {
        *("", "change", "channel", "errors", "process", "succession"),
        *("holder.capacity", "holder.crew", "holder.daemon", "holder.hand", "holder.listening", "holder.report"),
    },
    "holder.requests": {
        *("", "change", "config", "errors", "events", "sockets"),
        *("holder.daemon", "holder.report", "holder.upgrade"),
    },
    "holder.__main__": {
        *("config", "directory", "errors", "events", "reload", "users"),
        *("holder.capacity", "holder.control", "holder.daemon", "holder.listening", "holder.requests"),
        *("holder.takeover", "holder.upgrade"),
    },
    # ---- the worker
    "": {"errors", "worker.application", "worker.connection"},  # for type checkers; loaded at first use
    "worker": set(),
    "worker.poller": set(),
    "worker.transport": {"messages", "sockets", "worker.poller"},
    "worker.snapshot": set(),
    "worker.slot": {"errors", "messages", "slots", "worker.snapshot", "worker.transport"},
    "worker.served": {"errors", "messages", "worker.slot", "worker.transport"},
    "worker.boundary": {"worker.served", "worker.transport"},
    "worker.connection": {"errors", "messages", "worker.boundary", "worker.served", "worker.transport"},
    "worker.application": {"errors", "worker.connection", "worker.served"},
    "worker.host": {"messages", "worker.served", "worker.transport"},
    "worker.handlers": {
        *("errors", "messages", "worker.application", "worker.connection", "worker.host", "worker.served"),
        "worker.transport",
    },
    "worker.adapter": {"messages", "worker.served"},
    "worker.face": {"worker.hosted"},
    "worker.hosted": {
        *("messages", "worker.adapter", "worker.face", "worker.host", "worker.outbox", "worker.served"),
        "worker.transport",
    },
    "worker.outbox": {"worker.hosted"},
    "worker.entrance": {"worker.served", "worker.transport"},
    "worker.accepting": set(),
    "worker.seeking": {"channel", "errors", "messages"},
    "worker.effects": {"messages"},
    "worker.agent": {"errors", "messages", "worker.effects"},
    "worker.runtime": {
        *("channel", "errors", "messages", "sockets"),
        *("worker.accepting", "worker.agent", "worker.effects", "worker.entrance", "worker.host", "worker.poller"),
        *("worker.seeking", "worker.served", "worker.slot", "worker.transport"),
    },
    "worker.__main__": {
        *("", "channel", "errors", "messages", "wire"),
        *("worker.application", "worker.handlers", "worker.host", "worker.poller", "worker.runtime"),
        "worker.seeking",
        *("worker.served", "worker.slot", "adapters.environment", "adapters.uvicorn"),  # adapters at their first use
    },
    # ---- what an ASGI application says, and the servers whose connections move
    "asgi": {"errors"},
    "adapters": set(),
    "adapters.environment": {"errors"},
    "adapters.versions": {"errors"},
    "adapters.framing": set(),
    "adapters.deflate": set(),
    "adapters.keep_alive": set(),
    "adapters.visit": {"asgi", "worker.application", "worker.served", "worker.snapshot"},
    "adapters.http": {
        *("asgi", "adapters.framing", "adapters.keep_alive", "adapters.uvicorn", "adapters.visit", "messages"),
        *("worker.adapter", "worker.hosted", "worker.transport"),
    },
    "adapters.httptools": {"adapters.http", "adapters.uvicorn"},
    "adapters.websocket": {
        *("adapters.deflate", "adapters.framing", "adapters.uvicorn", "adapters.visit", "messages"),
        *("worker.adapter", "worker.face", "worker.served", "worker.transport"),
    },
    "adapters.uvicorn": {
        *("adapters.http", "adapters.httptools", "adapters.versions", "adapters.visit", "adapters.websocket"),
        *("asgi", "errors", "messages", "worker.application", "worker.host", "worker.hosted", "worker.served"),
        *("worker.adapter", "worker.outbox", "worker.transport"),
    },
    # ---- the operator's side, and the user's tests
    "console": {"directory", "errors", "sockets"},
    "flags": {"errors", "uvicorn_options"},
    "cli": {"audit", "comparison", "config", "console", "directory", "errors", "flags", "witness"},
    "witness": {"audit", "comparison"},
    "audit": {"comparison", "console", "errors", "sockdiag", "sockets"},
    "comparison": set(),
    "sockdiag": {"comparison", "errors"},
    "verifying": {"errors"},
    "swarm": {"verifying"},
    "testing": {"swarm", "verifying"},
}


def room_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {room_of(path): path for path in SRC.rglob("*.py")}


def imports_of(path: Path) -> set[str]:
    """Return the full names of all modules that the file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            inner = {f"{base}.{alias.name}" for alias in node.names}
            rooms = {name for name in inner if name.startswith("copyover") and name.removeprefix("copyover.") in FILES}
            found |= rooms or {base}
            if rooms and len(rooms) < len(inner):
                found.add(base)
    return found


def rooms_of(path: Path) -> set[str]:
    own = {name for name in imports_of(path) if name.split(".")[0] == "copyover"}
    return {name.removeprefix("copyover").removeprefix(".") for name in own}


def test_every_room_is_in_the_plan() -> None:
    """A file that nobody planned is no room."""
    assert set(FILES) == set(ROOMS)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_what_the_plan_says(room: str) -> None:
    """The plan is the source's structure: no arrow more, and none that is not there."""
    assert rooms_of(FILES[room]) == ROOMS[room]


@pytest.mark.parametrize("room", sorted(PURE))
def test_a_pure_room_does_no_io(room: str) -> None:
    """What is decided can be tried without a socket, a clock or a log."""
    assert not {name.split(".")[0] for name in imports_of(FILES[room])} & IMPURE


def test_holder_and_worker_are_two_programs() -> None:
    """They share a wire and nothing else."""
    for room, path in FILES.items():
        if room.startswith("holder"):
            assert not any(name.startswith("worker") for name in rooms_of(path)), room
        if room.startswith("worker"):
            assert not any(name.startswith("holder") for name in rooms_of(path)), room


@pytest.mark.parametrize("library", ["click", "rich", "cattrs", "pyroute2", "uvloop", "asyncio"])
def test_who_loads_what(library: str) -> None:
    """The worker lives in the user's environment, the holder for years: both load little."""
    allowed = {
        "click": {"cli", "flags"},
        "rich": {"console"},
        "cattrs": {"config", "succession"},
        "pyroute2": {"sockdiag"},
        "uvloop": {"worker.__main__"},
        "asyncio": {room for room in FILES if room.startswith(("worker", "adapters"))} | {"swarm", "verifying"},
    }[library]
    users = {room for room, path in FILES.items() if library in {name.split(".")[0] for name in imports_of(path)}}
    assert users <= allowed


def test_the_holder_loads_no_event_loop() -> None:
    """Importing the package costs the holder neither asyncio nor the worker's library."""
    program = "import sys, copyover.holder.daemon; print([m for m in sys.modules if 'asyncio' in m or 'worker' in m])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_worker_loads_the_standard_library_and_attrs_only() -> None:
    """The worker lives in the user's environment."""
    program = (
        "import sys, copyover.worker.__main__; "
        "print({m.split('.')[0] for m in sys.modules} - sys.stdlib_module_names - {'copyover', 'attr', 'attrs'})"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _PATHS + program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in ("{'__main__'}", "set()")


# -S keeps what the site's .pth files load out of the account.
_PATHS = f"import sys; sys.path[:0] = {[str(SRC.parent), str(Path(attrs.__file__).parent.parent)]!r}; "
