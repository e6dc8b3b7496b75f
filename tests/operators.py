"""
A holder as tests ask it, straight through its control socket: no interpreter is started for a question.

It judges nothing; it waits under one generous deadline.
"""

from __future__ import annotations

import json
import socket
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DEADLINE_S = 60.0


class Operator:
    """Whoever commands the holder whose control socket is *path*."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self, do: str, **wishes: Any) -> dict[str, Any]:
        """
        Return the last answer to one request.

        Raises:
            ConnectionError: the holder went away before it.

        """
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(self._path))  # waits where the backlog is full; with a time-out it would not. unix(7)
            caller.settimeout(DEADLINE_S)
            caller.sendall(json.dumps({"do": do, **wishes}).encode() + b"\n")
            with caller.makefile("rb") as answers:
                lines = [json.loads(line) for line in answers]
        if not lines or "progress" in lines[-1]:
            raise ConnectionError("the holder went away before it answered")
        answer: dict[str, Any] = lines[-1]
        return answer.get("result", answer)  # type: ignore[no-any-return]  # it is an object too

    def status(self) -> dict[str, Any]:
        return self.ask("status")

    def reload(self, **wishes: Any) -> dict[str, Any]:
        return self.ask("reload", **wishes)

    def wait_until(self, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """
        Return the first status of which *is_so* holds.

        Raises:
            TimeoutError: there was none; with the last.

        """
        deadline_s = time.monotonic() + DEADLINE_S
        while not is_so(status := self.status()):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the holder did not settle: {json.dumps(status)}")
        return status

    def wait_settled(self) -> dict[str, Any]:
        """Return its status once one generation serves, alone and at full strength, and no change is under way."""
        return self.wait_until(_is_settled)


def _is_settled(status: dict[str, Any]) -> bool:
    is_calm = status["phase"]["name"] == "serving" and status["is_serving"]
    return is_calm and all(
        worker["state"] == "ready" and worker["generation"] == status["generation"] for worker in status["workers"]
    )
