"""What this worker may do, tried on request: one JSON object a line, in both directions."""

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import copyover


def identity() -> dict[str, Any]:
    mask = os.umask(0o22)
    os.umask(mask)
    names = {name: os.environ.get(name) for name in ("USER", "LOGNAME", "HOME")}
    return {"uid": os.getresuid(), "gid": os.getresgid(), "groups": sorted(os.getgroups()), "umask": mask, **names}


def attempt(asked: dict[str, Any]) -> Any:
    match asked:
        case {"do": "identity"}:
            return identity()
        case {"do": "connect", "path": path}:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
        case {"do": "read", "path": path}:
            return Path(path).read_text(encoding="utf-8")
        case {"do": "list", "path": path}:
            return [entry.name for entry in Path(path).iterdir()]
        case {"do": "signal", "pid": pid}:
            os.kill(pid, signal.SIGTERM)
    return "done"


async def rights(connection: copyover.Connection[dict[str, Any]]) -> None:
    async for line in connection.lines():
        try:
            answer = attempt(json.loads(line))
        except OSError as problem:
            answer = type(problem).__name__
        await connection.write(json.dumps(answer).encode() + b"\n")
