"""
How a holder starts: configuration, directory, lock, listeners, or the state of its predecessor; then the loop.

Run by ``copyover run`` as ``python -P -m copyover.holder JSON``; every failure is one sentence and an exit code.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import uuid
from typing import TYPE_CHECKING, Any

from copyover import config as configs
from copyover import directory as directories
from copyover import events, listeners, process, users
from copyover.errors import ConfigError, CopyoverError, HolderExists, UsageError
from copyover.holder import control, takeover, upgrade
from copyover.holder.daemon import Daemon, capacity_for
from copyover.holder.requests import Requests
from copyover.reload import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from copyover.config import Config
    from copyover.directory import Directory


def main(arguments: Sequence[str]) -> int:
    """
    Run a holder; or, for an upgrade, look whether this release could go on from the state of a running one.

    The argument is a JSON object with ``file`` (copyover.toml or null) and ``flags``; or ``--resume`` and ``--check``
    with the number of a descriptor that has such a state.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    bound: Sequence[listeners.Listener] = []
    try:
        match arguments:
            case ["--check", memfd]:
                return upgrade.check(int(memfd))
            case ["--resume", memfd]:
                daemon, begin = upgrade.resume(int(memfd))
            case [told]:
                daemon, begin = _boot(json.loads(told))
            case _:
                raise UsageError("copyover.holder is started by: copyover run")
        bound = daemon.listeners
        gc.collect()
        gc.freeze()
        code = daemon.run(Requests(daemon).answer, begin)
    except CopyoverError as problem:
        print(f"copyover: {problem}", file=sys.stderr)  # noqa: T201
        return problem.exit_code
    finally:
        listeners.close_all(bound)
    if daemon.failure is not None:
        print(f"copyover: {daemon.failure}", file=sys.stderr)  # noqa: T201
    return code


def _boot(told: dict[str, Any]) -> tuple[Daemon, Callable[[], None]]:
    """Make a holder that has nothing yet; its first generation is to be started when it runs."""
    config = configs.load(told["file"], told["flags"])
    directory = directories.of(config.name)
    user = users.find(config.user, config.group)
    group = None if config.control_group is None else users.group_id(config.control_group, key="control_group")
    directories.prepare(directory, is_shared=user is not None or group is not None)
    lock = _take_lock(directory, config.name)
    machine = Machine(capacity_for(process.raise_descriptor_limit()))
    left = takeover.gather(directory, config, user)
    bound = _listen(config) if left is None else left.listeners
    try:
        sock = control.listen(directory, group)
    except CopyoverError:
        listeners.close_all(bound)
        raise
    if left is None:
        directories.draw_key(directory)
    instance = uuid.uuid4().hex if left is None else left.instance
    daemon = Daemon(
        told,
        config,
        machine,
        lock=lock,
        control_socket=sock,
        control_group=group,
        listeners=bound,
        instance=instance,
        user=user,
    )
    if left is None:
        return daemon, lambda: daemon.ask_reload(events.BY_BOOT)
    return daemon, lambda: daemon.take_over(left.hands, left.releases, left.reports)


def _take_lock(directory: Directory, name: str) -> int:
    """Take the name; a holder of it that lives and answers nothing is ended first."""
    try:
        return directories.take_lock(directory, name)
    except HolderExists as exists:
        if exists.pid is None or not takeover.end_stalled(directory, exists.pid):
            raise
    return directories.take_lock(directory, name)


def _listen(config: Config) -> list[listeners.Listener]:
    """Take what the service manager passed, else bind what was asked for."""
    bound = listeners.take_passed()
    if bound:
        return bound
    try:
        for address in config.addresses:
            bound.append(listeners.bind(address))  # those bound before a failure are closed
    except CopyoverError:
        listeners.close_all(bound)
        raise
    names = [listener.name for listener in bound]
    if len(set(names)) != len(names):
        listeners.close_all(bound)
        raise ConfigError(f"has one name twice among {', '.join(names)}", key="listen")
    return bound


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
