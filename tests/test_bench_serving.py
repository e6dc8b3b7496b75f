"""scripts/bench: the parts that look at a server while it serves and after a death. Their figures fail nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benches import run_bench

if TYPE_CHECKING:
    from pathlib import Path

LOOPS = ("asyncio", "uvloop")


def measured(directory: Path, *parts: str, path: str | None = None) -> dict[str, dict[str, Any]]:
    """Run the parts with small numbers, and return what they found, by name."""
    _, told = run_bench(directory, "--repeats", "1", "--only", *parts, path=path)
    return {part["name"]: part for part in told["parts"]}


def names(part: dict[str, Any]) -> set[str]:
    return {figure["name"] for figure in part["figures"]}


def test_what_a_request_a_connection_and_a_death_cost_is_measured_on_each_loop(tmp_path: Path) -> None:
    """With clients that compare each answer, servers side by side, and a worker and a holder that are killed."""
    found = measured(tmp_path, "steady", "memory", "recovery")
    assert not found["memory"]["skipped"]
    assert not found["recovery"]["skipped"]
    for loop in LOOPS:
        assert {
            f"CPU a request with slots against without, {loop}",
            f"CPU a request against Streams on {loop}",
            f"CPU a short connection against a worker that accepts alone, {loop}",
        } <= names(found["steady"])
        assert {f"holder, a connection, {loop}", f"worker, a connection, {loop}"} <= names(found["memory"])
        assert {
            f"60 connections of a killed worker served again, {loop}",
            f"a holder after a killed one can reload 60 connections, {loop}",
        } <= names(found["recovery"])


def test_without_its_tools_a_part_says_so(tmp_path: Path) -> None:
    """No wrk, no strace: that is not measured, and the exit status is 0."""
    assert "there is no wrk here" in measured(tmp_path, "http", path=str(tmp_path))["http"]["skipped"]
    found = measured(tmp_path, "steady", path=str(tmp_path))["steady"]
    assert "there is no strace here" in found["skipped"]
    assert {f"CPU a request, {loop}" for loop in LOOPS} <= names(found)
