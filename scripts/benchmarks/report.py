"""
How what was measured is told: as a table on a terminal, and as an object of JSON with every single value.

It measures nothing, and judges nothing beyond what a figure's goal says.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.figures import Effort, Figure, Part

SCHEMA = 1
VERDICTS = {None: "", True: "met", False: "missed"}
STYLES = {None: "", True: "green", False: "yellow"}
PACKAGES = ("copyover", "uvloop", "uvicorn", "httptools", "fastapi")


def shown(value: float) -> str:
    """Write a number with three digits that count, and thousands apart."""
    if abs(value) >= 1000:
        return f"{round(value, -max(len(str(int(abs(value)))) - 3, 0)):,.0f}".replace(",", " ")
    decimals = max(2 - len(str(int(abs(value)))) + 1, 0) if abs(value) >= 1 else 3
    return f"{value:.{decimals}f}"


def spread(figure: Figure) -> str:
    least, most = figure.spread
    return f"{shown(least)} to {shown(most)}"


def table(part: Part) -> Table:
    """Return the rows of one part."""
    drawn = Table(
        box=box.SIMPLE_HEAD, title=part.title, title_justify="left", title_style="bold", caption=part.skipped or None
    )
    drawn.add_column("figure")
    for name in ("median", "spread", "goal"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("")
    for figure in part.figures:
        named = Text(figure.name).append(f"\n{figure.note}" if figure.note else "", style="dim")
        verdict = Text(VERDICTS[figure.is_met], style=STYLES[figure.is_met])
        goal = figure.goal.text if figure.goal else ""
        drawn.add_row(named, f"{shown(figure.value)} {figure.unit}", spread(figure), goal, verdict)
    return drawn


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "descriptors": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "load": list(os.getloadavg()),  # of others, as far as it was taken before anything was measured
        "packages": {name: _version(name) for name in PACKAGES},
    }


def machine_text(facts: dict[str, Any]) -> str:
    return f"{facts['cores']} cores ({facts['processor']}), {facts['kernel']}, {facts['python']}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def as_object(parts: Sequence[Part], facts: dict[str, Any], effort: Effort, took_s: float) -> dict[str, Any]:
    """Return the object of bench.json."""
    return {
        "schema": SCHEMA,
        "machine": facts,
        "effort": attrs.asdict(effort),
        "took_s": round(took_s, 1),
        "parts": [_part_object(part) for part in parts],
    }


def _part_object(part: Part) -> dict[str, Any]:
    return {
        "name": part.name,
        "title": part.title,
        "skipped": part.skipped or None,
        "figures": [
            {
                "name": figure.name,
                "unit": figure.unit,
                "median": figure.value,
                "values": list(figure.values),
                "goal": figure.goal.text if figure.goal else None,
                "is_met": figure.is_met,
                "note": figure.note or None,
            }
            for figure in part.figures
        ],
        "series": [attrs.asdict(line) for line in part.series],
    }
