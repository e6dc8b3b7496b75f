"""scripts/bench: what it says is what it measured. The figures themselves are no test: they fail nothing."""

from __future__ import annotations

import math
import shutil
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import attrs
import pytest
from benchmarks import charts, readme, report
from benchmarks.figures import THOROUGH, Figure, Goal, Part, Series, at_least, at_most
from benchmarks.running import Crowd
from demo_running import DemoError

from benches import run_bench

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parent.parent
DEADLINE_S = 120.0
SVG = "{http://www.w3.org/2000/svg}"


@attrs.frozen
class Run:
    """What one run of the script left behind."""

    stdout: str
    json: dict[str, Any]
    svg: Path
    readme: str

    def part(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(part for part in self.json["parts"] if part["name"] == name)
        return found


def bench(directory: Path, *arguments: str, path: str | None = None) -> Run:
    """Run the script; it writes into *directory*, and finds programs on *path*."""
    shutil.copy(ROOT / "README.md", directory)
    stdout, told = run_bench(directory, *arguments, "--readme", str(directory / "README.md"), path=path)
    return Run(stdout, told, directory / "bench.svg", (directory / "README.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("bench")
    return bench(directory, "--only", "descriptors", "pause", "--connections", "20", "--repeats", "1")


# ---- figures


def test_a_figure_is_the_median_of_its_repeats_and_says_how_far_they_spread() -> None:
    """One repeat in which something else ran changes nothing but the spread."""
    figure = Figure("pause", (3.0, 900.0, 1.0), "ms")
    assert (figure.value, figure.spread) == (3.0, (1.0, 900.0))


@pytest.mark.parametrize(
    ("values", "goal", "is_met"),
    [
        ((1.0, 2.0, 9.0), at_most(2, "ms"), True),
        ((1.0, 2.1, 2.2), at_most(2, "ms"), False),
        ((0.6, 0.1, 0.7), at_least(0.6), True),
        ((0.59, 0.1, 0.7), at_least(0.6), False),
        ((1.0,), None, None),
    ],
)
def test_a_goal_is_met_by_the_median(values: tuple[float, ...], goal: Goal | None, is_met: object) -> None:
    """The goal itself is met, whatever is beyond is missed, and where there is no goal nothing is said."""
    assert Figure("any", values, "ms", goal).is_met is is_met


def test_a_figure_that_nobody_measured_is_none() -> None:
    """No values would be a figure out of nothing."""
    with pytest.raises(ValueError, match="values"):
        Figure("any", (), "ms")


def test_no_more_connections_than_a_process_can_hold() -> None:
    """Where descriptors are few, less is measured instead of nothing; 20 000 are enough for all of it."""
    assert attrs.evolve(THOROUGH.within(20_000), room=THOROUGH.room) == THOROUGH
    assert THOROUGH.within(6200).connections == (100, 1000, 5000)
    assert THOROUGH.within(1900).linear == (800,)


@pytest.mark.parametrize(
    ("value", "text"),
    [(4996123.0, "5 000 000"), (17_710.0, "17 700"), (1234.0, "1 230"), (671.1, "671"), (59.2, "59.2"), (8.3, "8.30")],
)
def test_numbers_are_shown_with_three_digits(value: float, text: str) -> None:
    """More digits would claim what no noisy machine can say."""
    assert report.shown(value) == text


# ---- the script


@pytest.mark.timeout(DEADLINE_S)
def test_every_figure_is_a_number_and_is_printed(run: Run) -> None:
    """bench.json has each value of each figure, above 0; the table on the terminal has each figure."""
    assert run.json["schema"] == 1
    for part in run.json["parts"]:
        assert part["figures"]
        for figure in part["figures"]:
            assert len(figure["values"]) == 1
            assert all(isinstance(value, float) and math.isfinite(value) and value > 0 for value in figure["values"])
            assert figure["name"].split(":")[0] in run.stdout
    assert [part["name"] for part in run.json["parts"]] == ["descriptors", "pause"]


def test_the_machine_is_told(run: Run) -> None:
    """A figure without its machine means nothing."""
    machine = run.json["machine"]
    assert machine["kernel"].startswith("Linux ")
    assert machine["python"].endswith("{}.{}.{}".format(*sys.version_info[:3]))
    assert machine["cores"] >= 1
    assert machine["packages"]["copyover"] is not None


def test_descriptors_are_compared_with_c_and_with_the_recipe(run: Run) -> None:
    """Both ratios are those of the rates beside them, and a missed goal is shown as missed."""
    values = {figure["name"]: figure["values"][0] for figure in run.part("descriptors")["figures"]}
    ours = values["our channel"]
    recipe = values["send_handle and an ack, one by one"]
    assert values["our channel against the recipe"] == pytest.approx(ours / recipe)
    if shutil.which("cc"):
        assert values["our channel against C"] == pytest.approx(ours / values["C, 253 a message"])


def test_without_a_compiler_the_part_says_so(tmp_path: Path) -> None:
    """What cannot be measured here is named, in the table too, and the rest is measured."""
    found = bench(tmp_path, "--only", "descriptors", "--repeats", "1", path=str(tmp_path))
    assert "no C compiler" in found.part("descriptors")["skipped"]
    assert "no C compiler" in found.stdout
    assert "no C compiler" in found.readme
    assert not [figure for figure in found.part("descriptors")["figures"] if "against C" in figure["name"]]


def test_each_loop_and_each_move_has_its_pause(run: Run) -> None:
    """The clients' waits are in it, with and without a reload."""
    names = {figure["name"] for figure in run.part("pause")["figures"]}
    for move in ("rolling", "together"):
        for loop in ("asyncio", "uvloop"):
            whose = f"20 connections, {move}, {loop}: "
            assert {name.removeprefix(whose) for name in names if name.startswith(whose)} == {
                *("pause p50", "pause p99", "pause max", "clients' longest wait, p99"),
                "clients' longest wait against that without a reload, p99",
            }


def test_the_readme_gets_the_table_between_its_marks(run: Run) -> None:
    """What stands around the marks stays as it was, and the command that measured it is named."""
    original = (ROOT / "README.md").read_text(encoding="utf-8")
    assert run.readme.partition(readme.BEGIN)[0] == original.partition(readme.BEGIN)[0]
    assert run.readme.partition(readme.END)[2] == original.partition(readme.END)[2]
    table = run.readme.partition(readme.BEGIN)[2].partition(readme.END)[0]
    assert "`scripts/bench --only descriptors pause --quick --connections 20 --repeats 1`" in table
    assert "| our channel against the recipe | " in table


def test_the_chart_has_a_point_for_each_measurement(run: Run) -> None:
    """Two loops, two moves, one number of connections."""
    assert len(ET.parse(run.svg).getroot().findall(f".//{SVG}circle")) == 4


def test_a_wrong_answer_is_no_measurement(capfd: pytest.CaptureFixture[str]) -> None:
    """The clients compare every answer: one byte that differs ends them, and with them the run."""

    def answer_wrongly() -> None:
        with listener.accept()[0] as client:
            client.sendall(client.recv(1000).replace(b"request", b"requesT"))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=answer_wrongly)
        server.start()
        with pytest.raises(DemoError, match="went away"):
            Crowd(listener.getsockname(), connections=1)
        server.join(DEADLINE_S)
    assert "got b'requesT 1 of connection" in capfd.readouterr().err


# ---- what is drawn and written


def drawn(series: Sequence[Series]) -> ET.Element:
    return ET.fromstring(charts.draw(series))


def test_points_lie_on_the_paper_in_the_order_of_their_values() -> None:
    """More connections are further right, a longer pause is higher, and all of them are between the axes."""
    lines = [
        Series("pause", "rolling, a <loop> & more", ((100, 1.5), (1000, 3.0), (15000, 80.0))),
        Series("time", "together", ((1000, 10.0), (18000, 180.0))),
    ]
    root = drawn(lines)
    across = [float(point.attrib["cx"]) for point in root.findall(f".//{SVG}circle")]
    up = [float(point.attrib["cy"]) for point in root.findall(f".//{SVG}circle")]
    assert across[:3] == sorted(across[:3])
    assert up[:3] == sorted(up[:3], reverse=True)
    assert all(charts.LEFT < x < charts.WIDTH - charts.RIGHT for x in across)
    assert all(charts.TOP < y < charts.HEIGHT - charts.BOTTOM for y in up)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"rolling, a <loop> & more", "connections", "ms"} <= set(texts)


def test_a_single_point_is_drawn() -> None:
    """One number of connections is a chart, too."""
    assert len(drawn([Series("time", "rolling", ((1000, 10.0),))]).findall(f".//{SVG}circle")) == 1


@pytest.mark.parametrize(
    "text", ["nothing", f"{readme.END}{readme.BEGIN}", f"{readme.BEGIN}{readme.BEGIN}{readme.END}"]
)
def test_a_readme_without_its_marks_is_left_alone(tmp_path: Path, text: str) -> None:
    """A table must never overwrite prose."""
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="needs one line"):
        readme.write(path, "| a table |")
    assert path.read_text(encoding="utf-8") == text


def test_the_readme_shows_what_has_a_goal_and_its_verdict() -> None:
    """Met and missed, side by side; what has no goal is in bench.json."""
    part = Part(
        "whole",
        "The whole",
        (
            Figure("cheap", (9.0,), "µs", at_most(10, "µs")),
            Figure("dear", (11.0,), "µs", at_most(10, "µs")),
            Figure("beside", (8.0,), "µs"),
        ),
    )
    facts = {"at": "2026-01-02T03:04:05+00:00", "cores": 2, "processor": "p", "kernel": "k", "python": "y"}
    lines = readme.markdown([part], facts, "scripts/bench").splitlines()
    assert "| cheap | 9.00 µs | 9.00 to 9.00 | ≤ 10 µs | met |" in lines
    assert "| dear | 11.0 µs | 11.0 to 11.0 | ≤ 10 µs | missed |" in lines
    assert not [line for line in lines if "beside" in line]
