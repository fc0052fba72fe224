"""The phrase view on a terminal of 80 and of 120 columns, while the run grows and at its end."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tempo_mlx.cli.thinking import ThinkingPrinter
from tempo_mlx.decode.step import Step
from tempo_mlx.decode.thinking import Splitter
from tempo_mlx.report import terminal
from tempo_mlx.report.phrases import phrases_in
from tempo_mlx.report.styles import raw, styled_phrases
from tempo_mlx.report.terminal import LivePrinter, make_printer
from tempo_mlx.report.views import Look
from tests.runs import ByteTokenizer, make_run, members, step

pyte = pytest.importorskip("pyte")

WORDS = ByteTokenizer([b"<eos>", *(f" word{i}".encode() for i in range(20))])


class Screen(io.StringIO):
    """A terminal, with what has scrolled away."""

    def __init__(self, columns: int, lines: int = 10) -> None:
        super().__init__()
        self.columns = columns
        self.screen = pyte.HistoryScreen(columns, lines, history=10_000)
        self.stream = pyte.Stream(self.screen)

    def write(self, text: str) -> int:
        self.stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def isatty(self) -> bool:
        return True

    def rows(self) -> list[tuple[str, list[bool]]]:
        """Each line, and which of its characters have the hue of alternatives."""
        history = [[line[column] for column in range(self.columns)] for line in self.screen.history.top]
        shown = [[self.screen.buffer[y][x] for x in range(self.columns)] for y in range(self.screen.lines)]
        return [
            ("".join(c.data for c in row).rstrip(), [c.fg == "cyan" for c in row]) for row in history + shown
        ]

    def text(self) -> list[str]:
        lines = [line for line, _ in self.rows()]
        while lines and not lines[-1]:
            lines.pop()
        return lines


def console(screen: Screen) -> Console:
    return Console(
        file=screen, width=screen.columns, height=10, force_terminal=True, color_system="standard",
        legacy_windows=False, _environ={},
    )  # fmt: skip


def forked_steps(count: int) -> list[Step]:
    """Every fourth set has three words, the others one."""
    steps, slot, before = [], 3, []
    for index in range(count):
        ids = {1: 0.5, 2: 0.3, 3: 0.1} if index % 4 == 2 else {4 + index % 16: 0.9}
        rows = {f"t{token}": [p] * len(before) for token, p in ids.items()}
        made = members(ids, slot, before, **rows)
        before = sorted(member.slot for member in made if member.slot is not None)
        slot += len(made)
        steps.append(step(index, made))
    return steps


@pytest.fixture(autouse=True)
def redraw_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "REFRESH_SECONDS", 0.0)


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
@pytest.mark.parametrize("window", [0, 3])
def test_settled_phrases_stay_and_the_tail_is_plain(columns: int, window: int) -> None:
    screen = Screen(columns)
    out = console(screen)
    steps = forked_steps(60)
    printer = make_printer(
        out, out, Look("phrases").view_of(WORDS, window), prompt="The sky", prompt_length=3
    )
    assert isinstance(printer, LivePrinter)
    settled: list[str] = []
    for number, one in enumerate(steps):
        printer.add(one)
        *lines, status = screen.text()
        assert f"step {number + 1} |" in status
        words = " ".join(lines).split()
        brackets = [index for index, word in enumerate(words) if word.startswith("[")]
        kept = words[: brackets[-1] + 1] if brackets else []
        assert kept[: len(settled)] == settled, "what has settled never changes"
        settled = kept
        if number > 12:
            assert brackets, "phrases are there before the end"
    printer.finish()
    run = make_run(steps, WORDS)
    expected = "The sky" + raw(styled_phrases(phrases_in(run.steps, run.final_text)))
    assert " ".join(screen.text()).split() == expected.split()
    assert all(len(line) <= columns for line in screen.text())


@pytest.mark.parametrize("columns", [80, 120])
def test_alternatives_have_one_hue_and_the_best_text_has_none(columns: int) -> None:
    screen = Screen(columns)
    out = console(screen)
    printer = make_printer(out, out, Look("phrases").view_of(WORDS, 0), prompt_length=3)
    for one in forked_steps(12):
        printer.add(one)
    printer.finish()
    for line, hue in screen.rows():
        coloured = "".join(c if h else " " for c, h in zip(line, hue, strict=False)).split()
        assert all(word.strip("/") in ("word1", "word2") for word in coloured)
    assert any("word2" in line and any(hue) for line, hue in screen.rows())


def test_shares_are_shown_where_asked() -> None:
    screen = Screen(120)
    out = console(screen)
    view = Look("phrases", shares=True).view_of(WORDS, 0)
    printer = make_printer(out, out, view, prompt_length=3)
    for one in forked_steps(6):
        printer.add(one)
    printer.finish()
    assert "[word0 0.56/word1 0.33/word2 0.11]" in " ".join(screen.text())
    assert view.legend


def test_a_pipe_gets_the_best_text_alone_as_it_settles() -> None:
    file = io.StringIO()
    out = Console(file=file, width=80, force_terminal=False)
    steps = forked_steps(30)
    printer = make_printer(out, out, Look("text").view_of(WORDS, 0), prompt_length=3)
    written = []
    for one in steps:
        printer.add(one)
        written.append(file.getvalue())
    printer.finish()
    assert file.getvalue() == make_run(steps, WORDS).final_text + "\n"
    assert written[10] and all(file.getvalue().startswith(text) for text in written)


def test_a_pipe_gets_characters_as_they_are_and_ends_before_a_stop_string() -> None:
    tokenizer = ByteTokenizer([b"<eos>", b" a\r", b"\x1b[2J", b"\xe2\x82", b"\xac", b" STOP"])
    steps, before = [], []
    for index, token in enumerate((1, 2, 3, 4, 5)):
        steps.append(step(index, members({token: 0.9}, 3 + index, before)))
        before = [3 + index]
    for stop, expected in (
        ((), " a\r\x1b[2J\u20ac STOP"),
        (("never said",), " a\r\x1b[2J\u20ac STOP"),
        ((" STOP",), " a\r\x1b[2J\u20ac"),
        (("ST",), " a\r\x1b[2J\u20ac "),
    ):
        file = io.StringIO()
        out = Console(file=file, width=80, force_terminal=False)
        printer = make_printer(out, out, Look("text").view_of(tokenizer, 0, stop), prompt_length=3)
        for one in steps:
            printer.add(one)
        printer.finish()
        assert file.getvalue() == expected + "\n"


def test_reasoning_reads_as_text_and_the_answer_as_phrases() -> None:
    tokenizer = ByteTokenizer(
        [b"<eos>", b"<think>", b" Well", b"</think>", b"\n", b" Yes", b" No", b" we", b" go"]
    )
    screen = Screen(80)
    out, err = console(screen), Console(file=io.StringIO(), width=80)
    printer = ThinkingPrinter(out, err, Look("phrases").view_of(tokenizer, 0), Splitter(False))
    before: list[int] = []
    sets = [{1: 0.9}, {2: 0.6, 6: 0.3}, {7: 0.9}, {3: 0.9}, {4: 0.9}, {5: 0.6, 6: 0.3}, {7: 0.9}, {8: 0.9}]
    slot = 3
    for index, ids in enumerate(sets):
        rows = {f"t{token}": [p] * len(before) for token, p in ids.items()}
        made = members(ids, slot, before, **rows)
        before = sorted(member.slot for member in made if member.slot is not None)
        slot += len(made)
        printer.add(step(index, made))
    printer.finish()
    assert err.file.getvalue() == "Well we\n\n"
    assert screen.text() == ["[Yes/No] we go"]
    ((line, hue), *_) = screen.rows()
    assert [c for c, h in zip(line, hue, strict=False) if h] == ["N", "o"]
