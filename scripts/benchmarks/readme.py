"""
The README's figures: what is written there between two marks is what the script has measured, and nothing else.

It shows the figures that have a goal; all others are in bench.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.report import VERDICTS, machine_text, shown, spread

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.figures import Part

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


def markdown(parts: Sequence[Part], facts: dict[str, Any], command: str) -> str:
    """Return what stands between the marks."""
    lines = [
        f"Measured on {facts['at'][:10]} by `{command}`: {machine_text(facts)}.",
        "Medians, and the least and the most of the repeats.",
        "",
        "| figure | median | spread | goal | |",
        "|---|---|---|---|---|",
    ]
    for part in parts:
        rows = [figure for figure in part.figures if figure.goal is not None]
        if rows:
            lines.append(f"| **{part.title}** | | | | |")
        for figure in rows:
            goal = figure.goal.text if figure.goal else ""
            measured = f"{shown(figure.value)} {figure.unit} | {spread(figure)}"
            lines.append(f"| {figure.name} | {measured} | {goal} | {VERDICTS[figure.is_met]} |")
    lines += ["", *(f"Not measured: {part.skipped}." for part in parts if part.skipped)]
    return "\n".join(lines).rstrip()


def write(path: Path, text: str) -> None:
    """
    Put *text* between the marks of the file.

    Raises:
        ValueError: the marks are not there, once each and in order.

    """
    whole = path.read_text(encoding="utf-8")
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"{path} needs one line {BEGIN} and after it one line {END}")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
