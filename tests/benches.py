"""scripts/bench as tests run it: with small numbers, and with the programs that they let it find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent.parent / "scripts" / "bench"
DEADLINE_S = 180.0


def run_bench(directory: Path, *arguments: str, path: str | None = None) -> tuple[str, dict[str, Any]]:
    """Run it; it writes into *directory*, and finds programs on *path*. Return what it printed, and its JSON."""
    places = ["--json", str(directory / "b.json"), "--charts", str(directory)]
    done = subprocess.run(
        [sys.executable, str(BENCH), "--quick", *arguments, *places],
        env=os.environ if path is None else {**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((directory / "b.json").read_text(encoding="utf-8"))
