"""Draws the learning curve of a recorded run as SVG. The picture of README.md is made by it.

    python -m tests.bench.curve runs/quickstart/0/metrics.csv .github/quickstart.svg

Every point is a row of the file. No point is interpolated, smoothed or left out. Train and held-out values are drawn on the
same axes: steps from 0, rewards from 0 to 1.
"""

import csv
import sys
from pathlib import Path

METRIC = "reward/correct"
WIDTH, HEIGHT = 720, 280
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 40, 44
GRAY, BLUE, RED = "#808080", "#1f77b4", "#d62728"  # readable on GitHub's light and dark pages

Points = list[tuple[int, float]]


def read_points(file: Path, metric: str) -> Points:
    """Pairs of step and value of a metric, from the rows that have it."""
    with file.open() as stream:
        return [(int(row["step"]), float(row[metric])) for row in csv.DictReader(stream) if row.get(metric)]


def svg(train: Points, held_out: Points) -> str:
    """The picture: a line with a dot per training step, a larger dot with its value per held-out measurement."""
    last = max(step for step, _ in train + held_out)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value

    ticks = sorted({round(last * part / 5) for part in range(6)})
    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in train)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f"<title>{METRIC} of a recorded run, from step {min(s for s, _ in train)} to step {last}</title>",
        *(_grid(y(value / 4), f"{value / 4:.2f}") for value in range(5)),
        *(_label(x(step), HEIGHT - BOTTOM + 18, str(step)) for step in ticks),
        _label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "optimizer step"),
        f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="2"/>',
        *(_dot(x(step), y(value), 3, BLUE) for step, value in train),
        *(_dot(x(step), y(value), 6, RED) for step, value in held_out),
        *(_held_out_value(x(step), y(value), value, step == last) for step, value in held_out),
        _dot(LEFT + 8, 18, 3, BLUE) + _label(LEFT + 18, 22, f"{METRIC}, training rollouts", "start"),
        _dot(LEFT + 248, 18, 6, RED) + _label(LEFT + 260, 22, "the same, held-out questions, greedy", "start"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _grid(height: float, text: str) -> str:
    rule = f'<line x1="{LEFT}" y1="{height:.1f}" x2="{WIDTH - RIGHT}" y2="{height:.1f}" stroke="{GRAY}" opacity="0.3"/>'
    return rule + _label(LEFT - 8, height + 4, text, "end")


def _label(left: float, top: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}" fill="{GRAY}">{text}</text>'


def _dot(left: float, top: float, radius: int, colour: str) -> str:
    return f'<circle cx="{left:.1f}" cy="{top:.1f}" r="{radius}" fill="{colour}"/>'


def _held_out_value(left: float, top: float, value: float, is_last: bool) -> str:
    anchor, shift = ("end", -10) if is_last else ("start", 10)
    return _label(left + shift, top - 8, f"{value:.3f}", anchor)


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    target.write_text(svg(read_points(source, METRIC), read_points(source, f"validation/{METRIC}")))


if __name__ == "__main__":
    main()
