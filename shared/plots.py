"""Two plots as SVG, for reports and benchmarks: points with intervals, and curves. Text is escaped;
nothing is loaded. Pure.

Colours of text and lines are the page's (`currentColor`), so that a plot inside a page follows its
light or dark; alone in a file it brings its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = (
    "#4269d0",
    "#e0a30a",
    "#ff725c",
    "#3fa796",
    "#3ca951",
    "#f06aa3",
    "#a463f2",
    "#5fa0e8",
    "#9c6b4e",
    "#8a9099",
)
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 900, 64, 250, 24, 52
LEGEND_ROW, LEGEND_NAME = 20, 34  # pixels, characters
_ALONE = (
    "<style>svg{background:#fff;color:#1c1e21}@media (prefers-color-scheme: dark){svg{background:#15171a;color:#e4e6e8}}"
    "</style>"
)


@dataclass(frozen=True, slots=True)
class Point:
    name: str
    family: str  # one colour and one row of the legend
    x: float
    y: float
    low: float
    high: float
    title: str = ""


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, as a person would choose them."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 and their tens between `low` and `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = [m * 10.0**p for p in range(first, last + 1) for m in (1, 2, 5)]
    return [v for v in every if low * 0.999 <= v <= high * 1.001]


class _Frame:
    """Axes, grid and legend; gives places of values."""

    def __init__(self, rows: int, label: str, *, alone: bool) -> None:
        self.height = max(420, TOP + BOTTOM + rows * LEGEND_ROW)
        self.w, self.h = WIDTH - LEFT - RIGHT, self.height - TOP - BOTTOM
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img" '
            f'aria-label="{escape(label, {chr(34): "&quot;"})}" font-family="system-ui, sans-serif" font-size="12" '
            'fill="currentColor">'
        ]
        if alone:
            self.parts.append(_ALONE)

    def axes(
        self,
        x: Callable[[float], float],
        y: Callable[[float], float],
        x_ticks: Mapping[float, str],
        y_ticks: Mapping[float, str],
        x_label: str,
        y_label: str,
    ) -> None:
        bottom, middle = TOP + self.h, TOP + self.h / 2
        for value, text in y_ticks.items():
            at = y(value)
            self.line(LEFT, at, LEFT + self.w, at, "currentColor", "0.15")
            self.parts.append(
                f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(text)}</text>'
            )
        for value, text in x_ticks.items():
            at = x(value)
            self.line(at, TOP, at, bottom, "currentColor", "0.08")
            self.parts.append(
                f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(text)}</text>'
            )
        self.line(LEFT, bottom, LEFT + self.w, bottom, "currentColor", "0.5")
        self.parts.append(
            f'<text x="{LEFT + self.w / 2}" y="{self.height - 12}" text-anchor="middle">{escape(x_label)}</text>'
        )
        self.parts.append(
            f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{escape(y_label)}</text>'
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, colour: str, opacity: str = "1"
    ) -> None:
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-opacity="{opacity}"/>'
        )

    def legend(self, families: Sequence[str]) -> None:
        for i, family in enumerate(families):
            y = TOP + 8 + LEGEND_ROW * i
            shown = family if len(family) <= LEGEND_NAME else family[: LEGEND_NAME - 1] + "…"
            self.parts.append(mark(i, WIDTH - RIGHT + 24, y, family))
            self.parts.append(f'<text x="{WIDTH - RIGHT + 36}" y="{y + 4}">{escape(shown)}</text>')

    def text(self) -> str:
        return "\n".join([*self.parts, "</svg>\n"])


def mark(index: int, x: float, y: float, title: str) -> str:
    """The sign of the index-th family: another shape when the colours begin anew."""
    colour = COLOURS[index % len(COLOURS)]
    said = f"<title>{escape(title)}</title>"
    if index // len(COLOURS) % 2:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}">{said}</rect>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}">{said}</circle>'


def scatter(points: Sequence[Point], *, x_label: str, y_label: str, alone: bool = False) -> str:
    """Shares (y) with their intervals against x, which begins at 0; one colour for each family."""
    families = list(dict.fromkeys(p.family for p in points))
    frame = _Frame(len(families), f"{y_label} against {x_label}", alone=alone)
    most = max((p.x for p in points), default=1.0) * 1.08 or 1.0
    least = max(min((p.low for p in points), default=0.0) - 0.02, 0.0)

    def x(value: float) -> float:
        return LEFT + value / most * frame.w

    def y(value: float) -> float:
        return TOP + (1 - (value - least) / (1 - least + 1e-9)) * frame.h

    x_ticks = {v: f"{v:g}" for v in nice_ticks(0, most)}
    y_ticks = {v: f"{100 * v:g}%" for v in nice_ticks(least, 1)}
    frame.axes(x, y, x_ticks, y_ticks, x_label, y_label)
    for p in points:
        index = families.index(p.family)
        colour = COLOURS[index % len(COLOURS)]
        frame.line(x(p.x), y(p.low), x(p.x), y(p.high), colour)
        for end in (p.low, p.high):
            frame.line(x(p.x) - 3, y(end), x(p.x) + 3, y(end), colour)
        frame.parts.append(mark(index, x(p.x), y(p.y), p.title or p.name))
    frame.legend(families)
    return frame.text()


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    alone: bool = False,
) -> str:
    """Shares from 0 to 1 (y) over positive values (x, on a logarithmic scale)."""
    frame = _Frame(len(lines), f"{y_label} over {x_label}", alone=alone)
    values = [max(x, 1e-3) for line in lines.values() for x, _ in line] or [1.0]
    low, high = min(values) / 1.1, max(values) * 1.1
    span = math.log(high / low)

    def x(value: float) -> float:
        return LEFT + math.log(max(value, low) / low) / span * frame.w

    def y(value: float) -> float:
        return TOP + (1 - value) * frame.h

    ticks = log_ticks(low, high)
    x_ticks = {v: f"{v:g}" for v in (ticks if len(ticks) > 2 else nice_ticks(low, high))}
    frame.axes(x, y, x_ticks, {v / 4: f"{25 * v}%" for v in range(5)}, x_label, y_label)
    for i, (name, line) in enumerate(lines.items()):
        path = " ".join(f"{x(value):.1f},{y(share):.1f}" for value, share in line)
        dashes = ' stroke-dasharray="5 3"' if i // len(COLOURS) % 2 else ""
        frame.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="1.8"{dashes}>'
            f"<title>{escape(name)}</title></polyline>"
        )
    frame.legend(list(lines))
    return frame.text()
