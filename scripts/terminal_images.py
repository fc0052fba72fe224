"""Draw what a person sees: docs/images/terminal-phrases.png, terminal-ask.png, and a recording of both, terminal.gif.

`python scripts/terminal_images.py [NAME ...]`, in the directory where the .gguf file of the question is (it is not of
this repository). Commands run on a terminal (pty), drawn by pyte and pillow. Needs the dev extra, pillow, and DejaVu
Sans Mono (matplotlib brings it).
"""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pyte
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
TEXT = ["generate", "Deep in the forest, a mysterious creature"]
QUESTION = ["ask", "What is the capital of France? Answer with one word.", "-n", "12"]
QUESTION += ["-m", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"]
PICTURES = {
    "terminal-phrases.png": [TEXT],
    "terminal-ask.png": [QUESTION],
    "terminal.gif": [[*TEXT, "-n", "60"], QUESTION],
}
COLUMNS, SIZE, SMALL = 100, 28, 15  # SMALL: of the recording
LONGEST, LAST = 400, 6000  # milliseconds that a frame of the recording is shown at most, and the last one is
INK, PAPER, DIM = "#1f2328", "#ffffff", "#8b949e"
COLOURS = {"cyan": "#0a7f8c", "green": "#1a7f37", "brown": "#9a6700", "magenta": "#8250df", "red": "#cf222e"}


class Dimming(pyte.Screen):
    """pyte leaves dim out; here it is a cell in italics, which nothing else is."""

    def select_graphic_rendition(self, *attributes: int, **options: object) -> None:
        changed = [3 if a == 2 else 23 if a == 22 else a for a in attributes]
        super().select_graphic_rendition(*changed)


Frame = tuple[float, list[dict[int, pyte.screens.Char]]]  # when, and its lines


def record(commands: list[list[str]]) -> list[Frame]:
    """The screen whenever it changed; it is tall enough for all that is printed."""
    screen = Dimming(COLUMNS, 60)
    stream = pyte.ByteStream(screen)
    frames: list[Frame] = []
    for command in commands:
        typed = f"$ tempo-mlx {' '.join(w if ' ' not in w else repr(w) for w in command)}"
        if len(typed) > COLUMNS:  # broken before the last option, as people do
            typed = " \\\r\n    -".join(typed.rsplit(" -", 1))
        stream.feed(f"{typed}\r\n".encode())
        for data in output(command):
            stream.feed(data)
            frames.append((time.monotonic(), [dict(screen.buffer[y]) for y in range(screen.cursor.y + 1)]))
    return frames


def output(command: list[str]) -> Iterator[bytes]:
    """What the command prints on a terminal, as it comes."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 60, COLUMNS, 0, 0))
    environ = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tempo_mlx", *command], stdin=slave, stdout=slave, stderr=slave, env=environ
    )
    os.close(slave)
    while True:
        try:
            yield os.read(master, 65536)
        except OSError:
            break
    process.wait()


def drawn(lines: list[dict[int, pyte.screens.Char]], size: int, height: int) -> Image.Image:
    regular = ImageFont.truetype(FONTS / "DejaVuSansMono.ttf", size)
    bold = ImageFont.truetype(FONTS / "DejaVuSansMono-Bold.ttf", size)
    wide, high = regular.getlength("m"), int(size * 1.35)
    image = Image.new("RGB", (int(wide * COLUMNS) + 2 * size, high * height + 2 * size), PAPER)
    pen = ImageDraw.Draw(image)
    for y, line in enumerate(lines):
        for x, cell in line.items():
            if not cell.data.strip() or "\u2800" <= cell.data <= "\u28ff":  # braille spins; the font has none
                continue
            ink = COLOURS.get(cell.fg, INK)
            if cell.italics:
                ink = DIM if cell.fg == "default" else faded(ink)
            pen.text(
                (size + x * wide, size + y * high), cell.data, fill=ink, font=bold if cell.bold else regular
            )
    return image


def save(frames: list[Frame], path: Path) -> None:
    """The last screen, or all of them."""
    height = max(len([line for line in lines if line]) for _, lines in frames)
    if path.suffix == ".png":
        drawn(frames[-1][1], SIZE, height).quantize(64).save(path, optimize=True)
        return
    moments = [moment for moment, _ in frames]
    shown = [min(LONGEST, round(1000 * (b - a))) for a, b in itertools.pairwise(moments)]
    palette = drawn(frames[-1][1], SMALL, height).quantize(32)
    pictures = [drawn(lines, SMALL, height).quantize(palette=palette, dither=0) for _, lines in frames]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=[*shown, LAST], loop=0, optimize=True
    )


def faded(ink: str) -> str:
    """Half way to the paper."""
    return "#" + "".join(f"{(int(ink[i : i + 2], 16) + 255) // 2:02x}" for i in (1, 3, 5))


if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        save(record(PICTURES[name]), ROOT / "docs" / "images" / name)
