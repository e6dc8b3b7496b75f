"""
Charts of our own: an SVG with a panel for each chart, a line for each series, and a point for each measurement.

It draws what it is given. Both axes are logarithmic, with their units; colours suit light and dark.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.figures import Series

WIDTH, HEIGHT = 460, 380  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 44, 112  # from its edges to those of its axes
LEGEND_LEADING = 19
AXES = {  # what a chart shows, and the unit of its vertical axis
    "pause": ("Pause of a connection in a reload, p99", "ms"),
    "time": ("A reload, from ready to the last one thawed", "ms"),
}
STYLE = """
.paper { fill: #ffffff } .ink { fill: #1f2328 } .faint { fill: #59636e }
.axis { stroke: #59636e; fill: none } .grid { stroke: #d1d9e0; fill: none }
text { font: 12px system-ui, sans-serif } .title { font-size: 14px; font-weight: 600 }
.line { fill: none; stroke-width: 2 }
.s0 { --c: #0550ae } .s1 { --c: #bc4c00 } .s2 { --c: #1a7f37 } .s3 { --c: #8250df }
.line { stroke: var(--c) } .point { fill: var(--c) }
@media (prefers-color-scheme: dark) {
  .paper { fill: #0d1117 } .ink { fill: #f0f6fc } .faint { fill: #9198a1 }
  .axis { stroke: #9198a1 } .grid { stroke: #30363d }
  .s0 { --c: #79c0ff } .s1 { --c: #ffa657 } .s2 { --c: #7ee787 } .s3 { --c: #d2a8ff }
}
"""


@attrs.frozen
class Scale:
    """One logarithmic axis: from values to places on the paper."""

    least: float
    most: float
    begin: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], begin: float, end: float) -> Scale:
        """Return the axis that has all values, with some room at both ends."""
        room = max((max(values) / min(values)) ** 0.05, 1.1)
        return cls(min(values) / room, max(values) * room, begin, end)

    def place(self, value: float) -> float:
        share = math.log(value / self.least) / math.log(self.most / self.least)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Return round numbers on the axis, of each power of ten as many as there is room for."""
        powers = range(math.floor(math.log10(self.least)), math.ceil(math.log10(self.most)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [step * 10.0**power for power in powers for step in steps]
            found = [value for value in found if self.least <= value <= self.most]
            if len(found) <= 8:
                return found
        return found


def draw(series: Sequence[Series]) -> str:
    """Return the whole picture."""
    charts: dict[str, list[Series]] = {}
    for line in series:
        charts.setdefault(line.chart, []).append(line)
    width = WIDTH * max(len(charts), 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{HEIGHT}"/>',
    ]
    for place, (chart, lines) in enumerate(charts.items()):
        parts += [f'<g transform="translate({place * WIDTH} 0)">', *_panel(chart, lines), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _panel(chart: str, lines: list[Series]) -> Iterator[str]:
    title, unit = AXES[chart]
    across = Scale.over([x for line in lines for x, _ in line.points], LEFT, WIDTH - RIGHT)
    up = Scale.over([y for line in lines for _, y in line.points], HEIGHT - BOTTOM, TOP)
    yield f'<text class="ink title" x="{LEFT}" y="24">{escape(title)}</text>'
    yield from _axes(across, up, unit)
    for number, line in enumerate(lines):
        yield from _line(number, [(across.place(x), up.place(y)) for x, y in line.points])
        yield from _legend(number, line.name)


def _axes(across: Scale, up: Scale, unit: str) -> Iterator[str]:
    bottom, right = up.begin, across.end
    for value in up.ticks():
        y = up.place(value)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>'
        yield f'<text class="faint" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_round(value)}</text>'
    for value in across.ticks():
        x = across.place(value)
        yield f'<path class="grid" d="M{x:.1f} {bottom}V{TOP}"/>'
        yield f'<text class="faint" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_round(value)}</text>'
    yield f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>'
    yield f'<text class="ink" x="{(LEFT + right) / 2}" y="{bottom + 38}" text-anchor="middle">connections</text>'
    middle = (TOP + bottom) / 2
    yield f'<text class="ink" transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">{escape(unit)}</text>'


def _line(number: int, places: list[tuple[float, float]]) -> Iterator[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    yield f'<polyline class="line s{number % 4}" points="{path}"/>'
    for x, y in places:
        yield f'<circle class="point s{number % 4}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'


def _legend(number: int, name: str) -> Iterator[str]:
    x = LEFT + number % 2 * (WIDTH - LEFT - RIGHT) / 2
    y = HEIGHT - BOTTOM + 62 + number // 2 * LEGEND_LEADING
    yield f'<path class="line s{number % 4}" d="M{x} {y}h18"/>'
    yield f'<text class="ink" x="{x + 26}" y="{y + 4}">{escape(name)}</text>'


def _round(value: float) -> str:
    return f"{value:g}" if value < 1000 else f"{value:,.0f}".replace(",", "\N{THIN SPACE}")
