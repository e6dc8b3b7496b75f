"""
How a holder starts: configuration, directory, lock, listeners, then the loop.

Run by ``copyover run`` as ``python -P -m copyover.holder JSON``; every failure is one sentence and an exit code.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from typing import TYPE_CHECKING

from copyover import config as configs
from copyover import directory as directories
from copyover import listeners, process
from copyover.errors import ConfigError, CopyoverError
from copyover.holder.daemon import Daemon
from copyover.holder.requests import Requests

if TYPE_CHECKING:
    from copyover.config import Config


def main(text: str) -> int:
    """Run a holder; *text* is a JSON object with ``file`` (copyover.toml or null) and ``flags``."""
    told = json.loads(text)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    bound: list[listeners.Listener] = []
    try:
        config = configs.load(told["file"], told["flags"])
        directory = directories.of(config.name)
        directories.prepare(directory, is_shared=config.user is not None or config.control_group is not None)
        directories.take_lock(directory, config.name)
        limit = process.raise_descriptor_limit()
        bound.extend(_listen(config))
        daemon = Daemon(lambda: configs.load(told["file"], told["flags"]), config, directory, bound, limit)
        gc.collect()
        gc.freeze()
        code = daemon.run(Requests(daemon).answer)
    except CopyoverError as problem:
        print(f"copyover: {problem}", file=sys.stderr)  # noqa: T201
        return problem.exit_code
    finally:
        listeners.close_all(bound)
    if daemon.failure is not None:
        print(f"copyover: {daemon.failure}", file=sys.stderr)  # noqa: T201
    return code


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
    sys.exit(main(sys.argv[1]))
