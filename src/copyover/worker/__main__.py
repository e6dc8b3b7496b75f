"""
How a worker starts: greet the holder, load the application, adopt the listeners, say ready, serve.

Run by the holder as ``PYTHON -P -m copyover.worker``; it takes nothing from its command line.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import platform
import select
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

import copyover
from copyover import messages, wire
from copyover.channel import Channel
from copyover.errors import CopyoverError, StartupFailed, WireError
from copyover.worker.application import Application, Asgi, load
from copyover.worker.handlers import Handlers
from copyover.worker.poller import Loop
from copyover.worker.runtime import Equipment, Runtime, leave
from copyover.worker.seeking import Identity
from copyover.worker.served import Limits
from copyover.worker.slot import Slots, register, reshape

if TYPE_CHECKING:
    from collections.abc import Callable

    from copyover.worker.host import Host

log = logging.getLogger("copyover.worker")


def main() -> None:
    try:
        channel = Channel(_inherited_socket("COPYOVER_CHANNEL"))
        stderr = _inherited("COPYOVER_STDERR")
        slots = _inherited("COPYOVER_SLOTS") if "COPYOVER_SLOTS" in os.environ else None
        worker, instance = int(os.environ["COPYOVER_WORKER"]), os.environ["COPYOVER_INSTANCE"]
        # Not for what the application starts.
        home = os.environ.pop("COPYOVER_WORKERS", ""), os.environ.pop("COPYOVER_KEY", "")
    except (KeyError, ValueError, OSError):
        sys.exit("copyover.worker is started by a holder; start that one with: copyover run module:attribute")
    directory = str(Path.cwd())
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname)s %(name)s worker={worker} %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the holder's business
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if slots is not None:
        register(slots)
    hello = _hello(worker, instance)
    channel.send(hello)
    try:
        welcome, descriptors = _await_welcome(channel)
    except WireError as problem:
        log.error("no welcome from the holder: %s", problem)  # noqa: TRY400  # the sentence says it all
        leave(1)
    try:
        application = _load(welcome)
        make_loop, loop_name = _loop_factory(str(welcome.options.get("loop", "auto")))
    except CopyoverError as problem:
        _fail(channel, problem)
    numbered = zip(welcome.listener, descriptors, strict=True)
    listeners = {number: socket.socket(fileno=descriptor) for number, descriptor in numbered}
    with asyncio.Runner(loop_factory=make_loop) as runner:
        start = Start(channel, welcome, hello, stderr, slots, Home(directory, *home), loop_name)
        runner.run(_serve(start, application, listeners))
        leave(0)


@attrs.frozen
class Home:
    """Where this worker runs, and how it comes back to its name when the holder dies."""

    directory: str
    path: str
    key: str


@attrs.frozen
class Start:
    """What a worker was started with. *stderr* and *slots* are descriptors of ours."""

    channel: Channel
    welcome: messages.Welcome
    hello: messages.Hello
    stderr: int
    slots: int | None
    home: Home
    loop: str


async def _serve(start: Start, application: Application[Any] | Asgi, listeners: dict[int, socket.socket]) -> None:
    loop = asyncio.get_running_loop()
    options = start.welcome.options
    try:
        host = _host(loop, application, options)
        await host.start()
    except CopyoverError as problem:  # it refuses the reload
        _fail(start.channel, problem)
    ready = messages.Ready(
        application=start.welcome.application,
        loop=start.loop,
        writes=host.schema,
        reads=host.readable,
        shares=host.shares,
        interface=host.interface,
    )
    identity = _identity(start, ready)
    slots = _slots(start.slots, host, is_shaped=options.get("slot_bytes") is not None)
    equipment = Equipment(identity, slots, host.enters_at_once, float(options.get("reenter_rate") or 0))
    runtime = Runtime(loop, start.channel, host, listeners, equipment)
    loop.add_signal_handler(signal.SIGTERM, runtime.terminate)
    gc.collect()
    gc.freeze()  # what was imported stays: no later collection has to look at it
    runtime.send(ready)
    # Until here stderr is a pipe, so that the holder can quote it; a pipe would break when the holder dies.
    sys.stderr.flush()
    os.dup2(start.stderr, 2)
    os.close(start.stderr)
    await runtime.run()


def _load(welcome: messages.Welcome) -> Application[Any] | Asgi:
    options = welcome.options
    uvicorn = options.get("uvicorn") or {}
    if uvicorn.get("env_file"):  # before the application is imported, which reads it
        from copyover.adapters import environment  # noqa: PLC0415  # only releases with uvicorn have it

        environment.load(uvicorn["env_file"])
    return load(
        welcome.application,
        welcome.app_dir,
        interface=options.get("interface", "auto"),
        is_factory=bool(uvicorn.get("factory")),
    )


def _host(loop: asyncio.AbstractEventLoop, application: Application[Any] | Asgi, options: dict[str, Any]) -> Host:
    limits = _limits(options)
    if isinstance(application, Application):
        if options.get("uvicorn") or options.get("resume"):
            raise StartupFailed(
                "options of uvicorn, or --resume, were given, and the application is a handler of copyover's own, "
                "which uvicorn does not serve: leave them out, or say --interface asgi"
            )
        return Handlers(loop, application, limits)
    from copyover.adapters.uvicorn import Uvicorn  # noqa: PLC0415  # handlers do without

    return Uvicorn(loop, application, limits, options)


def _inherited(name: str) -> int:
    """Take a descriptor that the holder left open for us, and keep it from our own children."""
    descriptor = int(os.environ.pop(name))
    os.set_inheritable(descriptor, False)
    return descriptor


def _inherited_socket(name: str) -> socket.socket:
    return socket.socket(fileno=_inherited(name))


def _hello(worker: int, instance: str) -> messages.Hello:
    return messages.Hello(
        wire=list(wire.WIRE_VERSIONS),
        record=list(wire.RECORD_VERSIONS),
        copyover=copyover.__version__,
        python=platform.python_version(),
        pid=os.getpid(),
        worker=worker,
        instance=instance,
    )


def _identity(start: Start, ready: messages.Ready) -> Identity:
    """Return what a new holder will be told, should this one die."""
    attach = messages.Attach(
        key=start.home.key,
        generation=start.welcome.generation,
        directory=start.home.directory,
        python=sys.executable,
        app_dir=start.welcome.app_dir,
        application=ready.application,
        loop=ready.loop,
        writes=ready.writes,
        reads=ready.reads,
        shares=ready.shares,
        interface=ready.interface,
        is_committed=False,
        is_leaving=False,
        names=start.welcome.names,
    )
    return Identity(start.home.path, start.hello, attach)


def _await_welcome(channel: Channel) -> tuple[messages.Welcome, list[int]]:
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    poll.poll()
    packet = channel.receive()
    welcome = messages.expect(packet.message, messages.Welcome)
    channel.version = welcome.wire
    return welcome, packet.take()


def _loop_factory(name: str) -> tuple[Callable[[], asyncio.AbstractEventLoop], str]:
    """Return how to make the event loop; ``auto`` is uvloop where the release has it."""
    if name in ("auto", "uvloop"):
        try:
            import uvloop  # noqa: PLC0415  # the release may not have it
        except ImportError as missing:
            if name == "uvloop":
                problem = f"loop is uvloop, and {sys.executable} does not have it: pip install uvloop"
                raise StartupFailed(problem) from missing
        else:
            return uvloop.new_event_loop, "uvloop"
    return Loop, "asyncio"


def _limits(options: dict[str, Any]) -> Limits:
    known = {field.name for field in attrs.fields(Limits)}
    return Limits(**{name: value for name, value in options.items() if name in known})


def _slots(descriptor: int | None, host: Host, *, is_shaped: bool) -> Slots | None:
    if descriptor is None:
        return None
    try:
        if host.slot_bytes is not None and not is_shaped:
            reshape(descriptor, host.slot_bytes)
        return Slots(descriptor, host.encode_state, is_json=host.is_json, schema=host.schema)
    except (OSError, WireError) as problem:
        log.warning("event=slots problem=%r", f"connections are not saved: {problem}")
        return None


def _fail(channel: Channel, problem: CopyoverError, cause: BaseException | None = None) -> None:
    """Say why and go; the traceback goes to stderr, which the holder reads until now."""
    cause = cause or problem.__cause__
    if isinstance(problem, StartupFailed) and cause is not None:
        log.error("%s", problem, exc_info=cause)
    reason = " ".join(str(problem).split())  # one sentence, whatever the exception's text was
    channel.send(messages.Failed(reason=reason, status=problem.exit_code))
    leave(problem.exit_code)


if __name__ == "__main__":
    main()
