"""Draw what a person sees: docs/images/terminal-phrases.png and terminal-ask.png.

`python scripts/terminal_images.py [NAME ...]`. Each command runs on a terminal of its own (pty), drawn by pyte and
pillow. Needs the dev extra, pillow, and DejaVu Sans Mono (matplotlib brings it).
"""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import matplotlib
import pyte
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
PICTURES = {
    "terminal-phrases": ["generate", "Deep in the forest, a mysterious creature"],
    "terminal-ask": ["ask", "What is the capital of France? Answer with one word.", "-n", "12"],
}
COLUMNS, SIZE = 100, 28
INK, PAPER, DIM = "#1f2328", "#ffffff", "#8b949e"
COLOURS = {"cyan": "#0a7f8c", "green": "#1a7f37", "brown": "#9a6700", "magenta": "#8250df", "red": "#cf222e"}


class Dimming(pyte.Screen):
    """pyte leaves dim out; here it is a cell in italics, which nothing else is."""

    def select_graphic_rendition(self, *attributes: int, **options: object) -> None:
        changed = [3 if a == 2 else 23 if a == 22 else a for a in attributes]
        super().select_graphic_rendition(*changed)


def record(command: list[str]) -> pyte.Screen:
    """The screen after the command, tall enough for all of it."""
    screen = Dimming(COLUMNS, 60)
    stream = pyte.ByteStream(screen)
    stream.feed(f"$ tempo-mlx {' '.join(w if ' ' not in w else repr(w) for w in command)}\r\n".encode())
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 60, COLUMNS, 0, 0))
    environ = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tempo_mlx", *command], stdin=slave, stdout=slave, stderr=slave, env=environ
    )
    os.close(slave)
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:
            break
        stream.feed(data)
    process.wait()
    return screen


def draw(screen: pyte.Screen, path: Path) -> None:
    """The lines that hold anything."""
    height = max(index for index, line in enumerate(screen.display) if line.strip()) + 1
    regular = ImageFont.truetype(FONTS / "DejaVuSansMono.ttf", SIZE)
    bold = ImageFont.truetype(FONTS / "DejaVuSansMono-Bold.ttf", SIZE)
    wide, high = regular.getlength("m"), int(SIZE * 1.35)
    image = Image.new("RGB", (int(wide * COLUMNS) + 2 * SIZE, high * height + 2 * SIZE), PAPER)
    pen = ImageDraw.Draw(image)
    for y in range(height):
        for x in range(COLUMNS):
            cell = screen.buffer[y][x]
            if not cell.data.strip():
                continue
            ink = COLOURS.get(cell.fg, INK)
            if cell.italics:
                ink = DIM if cell.fg == "default" else faded(ink)
            place = (SIZE + x * wide, SIZE + y * high)
            pen.text(place, cell.data, fill=ink, font=bold if cell.bold else regular)
    image.quantize(64).save(path, optimize=True)


def faded(ink: str) -> str:
    """Half way to the paper."""
    return "#" + "".join(f"{(int(ink[i : i + 2], 16) + 255) // 2:02x}" for i in (1, 3, 5))


if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        draw(record(PICTURES[name]), ROOT / "docs" / "images" / f"{name}.png")
