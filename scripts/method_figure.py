"""Draw docs/images/method.svg: a small lattice, who sees whom in it and how strongly, and the recursion that says so.

`python scripts/method_figure.py`, with the default model on the CPU. Every number in it is of a real run.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import tempo_mlx

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "method.svg"
PROMPT, STEPS, THRESHOLD = "She opened the door and", 3, 0.09
INK, PALE, BLUE, RED = "#1f2328", "#6e7781", "#0a7f8c", "#b13a1e"
ROW, COLUMN, BOX = 46, 160, 114  # of the lattice
CELL = 44  # of the matrix
RECURSION = [
    (
        "P(i|j) = w(i) P(j|i) / sum over i' of w(i') P(j|i')",
        "how likely i, of the set before, is j's own past",
    ),
    (
        "gamma_j(m) = sum over i of P(i|j) gamma_i(m)",
        "so: how likely j's own past used m, of any earlier set",
    ),
    ("bias_j(m) = log gamma_j(m)", "is added to j's attention scores: 0 is full sight, -inf none"),
]


def gammas(run: tempo_mlx.Run) -> dict[int, dict[int, float]]:
    """Of each member, by slot: how likely its own past used each member before it, and itself."""
    found: dict[int, dict[int, float]] = {}
    for step in run.steps:
        for token in step.tokens:
            if token.slot is None:
                continue
            mine = {token.slot: 1.0}
            for slot, past, _ in token.parents:
                for seen, gamma in found[slot].items():
                    mine[seen] = mine.get(seen, 0.0) + past * gamma
            found[token.slot] = mine
    return found


def text(x: float, y: float, said: str, ink: str = INK, size: int = 15, anchor: str = "middle") -> str:
    style = f'fill="{ink}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text x="{x:.0f}" y="{y:.0f}" {style}>{escape(said)}</text>'


def lattice(run: tempo_mlx.Run) -> list[str]:
    """A column for each set, best first, and an edge for each likely parent."""
    places = {token.slot: (30 + step.step * COLUMN, 76 + row * ROW)
              for step in run.steps for row, token in enumerate(step.tokens)}  # fmt: skip
    edges, boxes = [], []
    for step in run.steps:
        boxes.append(text(30 + step.step * COLUMN + BOX / 2, 58, f"set {step.step}", PALE, 13))
        for token in step.tokens:
            x, y = places[token.slot]
            boxes.append(
                f'<rect x="{x}" y="{y}" width="{BOX}" height="32" rx="5" fill="#fff" stroke="{INK}"/>'
            )
            boxes.append(text(x + 10, y + 21, token.text.replace(" ", "·"), size=15, anchor="start"))
            boxes.append(text(x + BOX - 8, y + 21, f"{token.probability:.2f}", PALE, 12, "end"))
            for slot, past, _ in token.parents:
                fx, fy = places[slot]
                ends = f'x1="{fx + BOX}" y1="{fy + 16}" x2="{x}" y2="{y + 16}"'
                width, opacity = 0.6 + 4 * past, 0.15 + 0.85 * past
                edges.append(
                    f'<line {ends} stroke="{BLUE}" stroke-width="{width:.1f}" stroke-opacity="{opacity:.2f}"/>'
                )
    return edges + boxes


def matrix(run: tempo_mlx.Run, left: float) -> list[str]:
    """A row for each member, best first of each set; a column for each member that it may see."""
    members = [token for step in run.steps for token in step.tokens]
    seen, parts = gammas(run), []
    for column, token in enumerate(members):
        x = left + (column + 0.5) * CELL
        name = text(x, 70, token.text.replace(" ", "·"), size=13, anchor="start")
        parts.append(f'<g transform="rotate(-35 {x:.0f} 70)">{name}</g>')
    for row, token in enumerate(members):
        y = 80 + row * 34
        parts.append(text(left - 8, y + 22, token.text.replace(" ", "·"), size=13, anchor="end"))
        for column, other in enumerate(members):
            gamma = seen[token.slot].get(other.slot, 0.0)
            place = f'x="{left + column * CELL:.0f}" y="{y}" width="{CELL - 2}" height="32"'
            parts.append(f'<rect {place} fill="{BLUE}" fill-opacity="{gamma:.2f}" stroke="#d0d7de"/>')
            if gamma >= 0.005:
                ink = "#ffffff" if gamma > 0.8 else INK
                parts.append(text(left + (column + 0.5) * CELL - 1, y + 21, f"{gamma:.2f}", ink, 12))
    return parts


def picture(run: tempo_mlx.Run) -> str:
    left, count = 3 * COLUMN + 120, sum(len(step.tokens) for step in run.steps)
    width, below = left + count * CELL + 30, 80 + count * 34 + 40
    parts = [
        text(30, 26, f"A lattice after “{PROMPT}”", RED, 16, "start"),
        text(left - 75, 26, "gamma: what each row sees of the members", RED, 16, "start"),
    ]
    parts += lattice(run) + matrix(run, left)
    for line, (formula, meaning) in enumerate(RECURSION):
        parts.append(text(30, below + line * 26, formula, size=15, anchor="start"))
        parts.append(text(450, below + line * 26, meaning, PALE, 14, "start"))
    height = below + 26 * len(RECURSION)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="DejaVu Sans, Helvetica, Arial, sans-serif">\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def run(model: tempo_mlx.LoadedModel) -> tempo_mlx.Run:
    return tempo_mlx.generate(model, PROMPT, max_tokens=STEPS, threshold=THRESHOLD)


if __name__ == "__main__":
    PICTURE.write_text(picture(run(tempo_mlx.load("smollm2-135m", device="cpu"))), "utf-8")
