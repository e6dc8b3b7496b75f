"""
How a holder starts: configuration, directory, lock, listeners, or the state of its predecessor; then the loop.

Run by ``copyover run`` as ``python -P -m copyover.holder JSON``; every failure is one sentence and an exit code.
"""

from __future__ import annotations

import gc
import json
import logging
import signal
import sys
import uuid
from typing import TYPE_CHECKING, Any

from copyover import config as configs
from copyover import directory as directories
from copyover import events, users
from copyover.errors import CopyoverError, HolderExists, UsageError
from copyover.holder import capacity, control, takeover, upgrade
from copyover.holder.daemon import ENDING_SIGNALS, Daemon
from copyover.holder.listening import Listening
from copyover.holder.requests import Requests
from copyover.reload import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from copyover.directory import Directory


def main(arguments: Sequence[str]) -> int:
    """
    Run a holder; or, for an upgrade, look whether this release could go on from the state of a running one.

    The argument is a JSON object with ``file`` (copyover.toml or null) and ``flags``; or ``--resume`` and ``--check``
    with the number of a descriptor that has such a state.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    listening = Listening()
    try:
        match arguments:
            case ["--check", memfd]:
                return upgrade.check(int(memfd))
            case ["--resume", memfd]:
                daemon, begin = upgrade.resume(int(memfd), listening)
            case [told]:
                # What comes before they are caught is obeyed then: workers of a dead holder may have to be heard first.
                signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
                daemon, begin = _boot(json.loads(told), listening)
            case _:
                raise UsageError("copyover.holder is started by: copyover run")
        gc.collect()
        gc.freeze()
        code = daemon.run(Requests(daemon).answer, begin)
    except CopyoverError as problem:
        print(f"copyover: {problem}", file=sys.stderr)  # noqa: T201
        return problem.exit_code
    finally:
        listening.close()
    if daemon.failure is not None:
        print(f"copyover: {daemon.failure}", file=sys.stderr)  # noqa: T201
    return code


def _boot(told: dict[str, Any], listening: Listening) -> tuple[Daemon, Callable[[], None]]:
    """Make a holder that has nothing yet; its first generation is to be started when it runs."""
    config = configs.load(told["file"], told["flags"])
    directory = directories.of(config.name)
    user = users.find(config.user, config.group)
    group = None if config.control_group is None else users.group_id(config.control_group, key="control_group")
    directories.prepare(directory, is_shared=user is not None or group is not None)
    lock = _take_lock(directory, config.name)
    machine = Machine(capacity.take())
    capacity.check(config, directory)
    left = takeover.gather(directory, user)
    if left is None:
        listening.begin(config.addresses)
        directories.draw_key(directory)
    else:
        listening.adopt(left.listeners, left.names, left.serving, config.addresses)
    sock = control.listen(directory, group)
    instance = uuid.uuid4().hex if left is None else left.instance
    daemon = Daemon(
        told,
        config,
        machine,
        lock=lock,
        control_socket=sock,
        control_group=group,
        listening=listening,
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
