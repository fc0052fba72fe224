from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from tempo_mlx.decode.step import Edge, Member, Removal, Step
from tempo_mlx.report import terminal
from tempo_mlx.report.checks import FINISH_REASONS
from tempo_mlx.report.listing import run_bits
from tempo_mlx.report.safe import printable
from tempo_mlx.report.styles import SHADES, Bit, drawn, shade
from tempo_mlx.report.summary import ENDINGS, summary
from tempo_mlx.report.terminal import LivePrinter, PlainPrinter, Printer, make_branch_printer
from tempo_mlx.report.text import Label, make_label
from tempo_mlx.report.views import Look, SetsView, ViewName
from tests.runs import WORDS, ByteTokenizer, make_run, members, sky_run, sky_steps, step

pyte = pytest.importorskip("pyte")

WIDTH, HEIGHT = 40, 8


class Screen(io.StringIO):
    """A terminal: what is written to it is drawn on an emulated screen with history."""

    def __init__(self) -> None:
        super().__init__()
        self.screen = pyte.HistoryScreen(WIDTH, HEIGHT, history=10_000)
        self.stream = pyte.Stream(self.screen)

    def write(self, text: str) -> int:
        self.stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """Everything a user can see by scrolling back, without blank lines at the end."""
        top = [
            "".join(line[column].data for column in range(WIDTH)).rstrip() for line in self.screen.history.top
        ]
        lines = top + [line.rstrip() for line in self.screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def text(self) -> str:
        return " ".join(self.lines())


def console(file: io.StringIO, **options: Any) -> Console:
    options = {"force_terminal": True, "color_system": "truecolor", "no_color": False, **options}
    return Console(file=file, width=WIDTH, height=HEIGHT, legacy_windows=False, _environ={}, **options)


def make_printer(
    out: Console,
    err: Console,
    tokenizer: ByteTokenizer,
    *,
    prompt: str,
    prompt_length: int,
    window: int | None,
    view: ViewName = "sets",
    stop: Sequence[str] = (),
    label: Label | None = None,
) -> Printer:
    look = Look(view, label=label, removed=out.is_terminal)
    shown = look.view_of(tokenizer, window, stop)
    return terminal.make_printer(out, err, shown, prompt=prompt, prompt_length=prompt_length)


def decode(printer: Printer, steps: list[Step]) -> None:
    for s in steps:
        printer.add(s)
    printer.finish()


@pytest.fixture(autouse=True)
def redraw_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "REFRESH_SECONDS", 0.0)


def long_steps(count: int = 120, removals: bool = True) -> list[Step]:
    """Sets of one or three words; two steps later the third of each three is removed."""
    steps: list[Step] = []
    slot = 3
    for index in range(count):
        words = {1: 0.5, 3: 0.25, 4: 0.2} if index % 3 == 0 else {5: 0.9}
        steps.append(step(index, members(words, slot, [slot - 1] if index else [])))
        slot += len(words)
        if removals and index % 3 == 0 and index + 2 < count:
            gone = steps[index].tokens[2]
            gone.removed_after, gone.removed_why = index + 1, Removal("posterior", 0.0, 0.1)
    return steps


def test_a_long_text_scrolls_and_every_line_is_there_once() -> None:
    screen = Screen()
    out = console(screen)
    printer = make_printer(out, out, WORDS, prompt="The sky", prompt_length=3, window=8)
    assert isinstance(printer, LivePrinter)
    steps = long_steps()
    decode(printer, steps)
    expected = "The sky" + " [was/blue/clear] today today" * 40
    assert screen.text().split() == expected.split()
    assert len(screen.lines()) > HEIGHT * 2
    assert all(len(line) <= WIDTH for line in screen.lines())


def test_while_decoding_the_status_is_the_last_line_and_text_is_never_doubled() -> None:
    screen = Screen()
    out = console(screen)
    printer = make_printer(out, out, WORDS, prompt="The sky", prompt_length=3, window=8)
    for index, s in enumerate(long_steps()):
        printer.add(s)
        *text, status = screen.lines()
        assert f"step {index + 1} |" in status
        assert " ".join(text).count("The sky") == 1
        words = [word for word in " ".join(text).split() if word == "today"]
        assert len(words) == sum(1 for i in range(index + 1) if i % 3) or len(screen.lines()) >= HEIGHT
    printer.finish()
    assert "step" not in screen.text()


def test_what_is_drawn_stays_until_the_rest_can_be() -> None:
    """The end of a text can take a while to be read."""
    screen, seen = Screen(), []
    out = console(screen)

    class Slow(SetsView):
        def finish(self) -> list[Bit]:
            seen.append(screen.text())
            return super().finish()

    printer = LivePrinter(out, Slow(Look("sets"), WORDS, 8, ()), "The sky", None)
    decode(printer, sky_steps())
    assert "The sky [was" in seen[0] and seen[0].count("The sky") == screen.text().count("The sky") == 1


def test_status_counts_width_and_slots() -> None:
    clock = iter([10.0, 10.5, 11.0, 11.5]).__next__
    status = terminal.StatusLine(3, clock)
    steps = sky_steps()
    steps[3].removed = (6,)
    for s in steps:
        status.add(s)
    assert (
        status.text().plain == "step 4 | 2.0 steps/s | 2 tokens at once | 9 in the cache"
    )  # 3 + 2 + 3 + 1 + 1 - 1


def test_a_removal_is_struck_through_in_place() -> None:
    screen = Screen()
    out = console(screen)
    printer = make_printer(out, out, WORDS, prompt="", prompt_length=3, window=8)
    steps = sky_steps()
    clear = steps[1].tokens[1]
    clear.removed_after, why, clear.removed_why = None, clear.removed_why, None
    printer.add(steps[0])
    printer.add(steps[1])
    assert styles(screen, "clear") == {(False, "cyan")} or styles(screen, "clear") == {(False, "brown")}
    clear.removed_after, clear.removed_why = 2, why
    printer.add(steps[2])
    assert {strike for strike, _ in styles(screen, "clear")} == {True}
    assert {strike for strike, _ in styles(screen, "blue")} == {False}
    assert screen.text().count("clear") == 1
    printer.finish()
    assert {strike for strike, _ in styles(screen, "clear")} == {True}


def styles(screen: Screen, word: str) -> set[tuple[bool, str]]:
    for row, line in enumerate(screen.screen.display):
        if word in line:
            column = line.index(word)
            cells = [screen.screen.buffer[row][column + offset] for offset in range(len(word))]
            return {(cell.strikethrough, cell.fg) for cell in cells}
    raise AssertionError(f"{word} is not on the screen")


def test_alternatives_are_coloured_by_probability_and_single_tokens_are_not() -> None:
    screen = Screen()
    console(screen).print(drawn(run_bits(sky_run(), Look("sets", removed=True))))
    assert styles(screen, "was") != styles(screen, "ish")
    assert styles(screen, "today") == {(False, "default")}


def test_a_pipe_gets_plain_settled_text() -> None:
    pipe = io.StringIO()
    out = console(pipe, force_terminal=False)
    errors = io.StringIO()
    printer = make_printer(
        out, console(errors, force_terminal=False), WORDS, prompt="The sky", prompt_length=3, window=8
    )
    assert isinstance(printer, PlainPrinter)
    steps = long_steps(count=30)
    written = []
    for s in steps:
        printer.add(s)
        written.append(pipe.getvalue())
    printer.finish()
    assert pipe.getvalue() == make_run(steps).text + "\n"
    assert all(pipe.getvalue().startswith(part) for part in written)
    assert written[-1], "something is streamed before the end"
    assert "\x1b" not in pipe.getvalue()
    assert errors.getvalue() == ""


def test_a_pipe_shows_the_status_on_a_terminal_of_stderr() -> None:
    pipe, screen = io.StringIO(), Screen()
    printer = make_printer(
        console(pipe, force_terminal=False), console(screen), WORDS, prompt="", prompt_length=3, window=0
    )
    printer.add(sky_steps()[0])
    assert "2 tokens at once" in screen.text()
    printer.finish()
    assert screen.text() == ""


def test_without_colour_text_is_redrawn_in_place_and_nothing_is_coloured() -> None:
    file = io.StringIO()
    out = console(file, no_color=True)
    decode(make_printer(out, out, WORDS, prompt="", prompt_length=3, window=0), sky_steps())
    assert not re.search(r"\x1b\[[\d;]*3\d", file.getvalue()), "a colour"
    assert re.search(r"\x1b\[[\d;]*m", file.getvalue()), "dim"


def test_a_terminal_that_cannot_go_back_gets_lines_broken_at_words(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Screen()
    out = Console(file=file, width=WIDTH, height=HEIGHT, _environ={"TERM": "dumb"}, force_terminal=True)
    steps = long_steps(count=30, removals=False)
    decode(make_printer(out, out, WORDS, prompt="The sky", prompt_length=3, window=0), steps)
    lines = file.lines()
    assert all(len(line) <= WIDTH for line in lines) and len(lines) > 5
    assert " ".join(lines).split() == ("The sky" + " [was/blue/clear] today today" * 10).split()


def test_labels_are_shown() -> None:
    pipe = io.StringIO()
    out = console(pipe, force_terminal=False)
    label = make_label(True, True)
    decode(make_printer(out, out, WORDS, prompt="", prompt_length=3, window=0, label=label), sky_steps()[:1])
    assert pipe.getvalue() == " [was(1, 0.50)/is(2, 0.40)]\n"
    screen = Screen()
    decode(
        make_printer(console(screen), out, WORDS, prompt="", prompt_length=3, window=0, label=label),
        sky_steps()[:1],
    )
    assert screen.lines() == [" [was(1, 0.50)/is(2, 0.40)]"]


def test_a_model_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b[2J\x07\x9bb\r\n\tc\x7f") == "a␛[2J␇\ufffdb␍\n\tc␡"
    screen = Screen()
    console(screen).print(drawn(run_bits(make_run([step(0, members({1: 0.9}, 3))]), Look("sets"))))
    assert "was" in screen.text()


def test_finish_after_an_interruption_keeps_what_there_is() -> None:
    screen = Screen()
    out = console(screen)
    printer = make_printer(out, out, WORDS, prompt="The sky", prompt_length=3, window=8)
    for s in sky_steps()[:2]:
        printer.add(s)
    printer.finish()
    assert screen.lines() == ["The sky [was/is][ blue/ clear/ish]"]


def test_a_low_terminal_shows_the_end_and_loses_nothing() -> None:
    screen = Screen()
    out = console(screen)
    printer = make_printer(out, out, WORDS, prompt="The sky", prompt_length=3, window=None)
    steps = long_steps(removals=False)
    for s in steps:
        printer.add(s)
        assert len(screen.lines()) <= HEIGHT
    printer.finish()
    assert screen.text().split() == ("The sky" + " [was/blue/clear] today today" * 40).split()


def branching_steps() -> list[Step]:
    """`today` splits into ` today was...` and ` today is...`; the first ends, the second goes on."""

    def grow(index: int, *children: tuple[int, int | None, int, int]) -> Step:
        edges = {slot: (Edge(slot, 1.0, 0.5),) for *_, slot in children}
        return step(
            index,
            [
                Member(
                    token,
                    0.5,
                    slot,
                    None if slot is None else 1.0,
                    edges[parent] if index else (),
                    branch=branch,
                )
                for token, slot, branch, parent in children
            ],
        )

    steps = [
        grow(0, (5, 3, 0, 0)),
        grow(1, (1, 4, 0, 3), (2, 5, 1, 3)),
        grow(2, (0, None, 0, 4), (3, 6, 1, 5)),
    ]
    return [*steps, *(grow(i, (3, 4 + i, 1, 3 + i)) for i in range(3, 12))]


def test_texts_of_a_tree_grow_on_lines_of_their_own() -> None:
    screen = Screen()
    printer = make_branch_printer(console(screen), WORDS, prompt_length=3)
    assert printer is not None
    steps = branching_steps()
    printer.add(steps[0])
    assert screen.lines()[0] == "·  today"
    printer.add(steps[1])
    assert screen.lines()[:2] == ["·  today was", "·  today is"]
    printer.add(steps[2])
    assert screen.lines()[:2] == ["·  today was<eos>", "·  today is blue"]
    for s in steps[3:]:
        printer.add(s)
    first, second, status = screen.lines()
    assert first == "·  today was<eos>"
    assert second.startswith("· …") and second.endswith(" blue blue") and WIDTH - 5 < len(second) <= WIDTH
    assert status.startswith("step 12")
    printer.finish()
    assert screen.text() == ""


def test_texts_of_a_tree_are_not_streamed_into_a_pipe() -> None:
    assert make_branch_printer(console(io.StringIO(), force_terminal=False), WORDS, prompt_length=3) is None


def test_the_summary_names_what_happened() -> None:
    assert summary(sky_run()) == (
        "4 steps | 10.0 steps/s | 8 tokens, 2.0 a step | 1 of them removed | first token after 0.1 s | "
        "reached its length"
    )
    assert set(ENDINGS) == set(FINISH_REASONS)


def test_the_summary_of_texts_side_by_side_speaks_of_no_removal() -> None:
    """There a token goes when no text under way has it any more: nobody asked for that."""
    assert "removed" not in summary(sky_run(decoder="tree"))


@pytest.mark.parametrize(
    ("section", "timing", "words"),
    [
        (
            {"mean_layers": 28.25, "agreement": 0.875, "accepted": 3, "exits": [{"left": 9}]},
            {},
            "87.5% of audited early choices agreed, 28.2 layers a step, 3 steps run ahead",
        ),
        (
            {"mean_layers": 12.0, "agreement": None, "accepted": 0, "exits": [{"left": 0}, {"left": 9}]},
            {},
            "early choices not audited, 12.0 layers a step",
        ),
        (
            {"mean_layers": 30.0, "agreement": None, "exits": [{"left": 0}]},
            {},
            "nothing left early, 30.0 layers a step",
        ),
        ({"mean_layers": None, "agreement": None, "exits": []}, {}, "nothing left early"),
        ({"lossless": True}, {"early_exit_accepted": 7}, "early exit, lossless, 7 steps run ahead"),
        ({"lossless": True}, {"early_exit_accepted": 0}, "early exit, lossless"),
    ],
)
def test_the_summary_of_a_run_that_could_leave_early(
    section: dict[str, Any], timing: dict[str, Any], words: str
) -> None:
    run = replace(sky_run(), early_exit=section, timing=timing)
    assert words in summary(run).split(" | ")


@pytest.mark.parametrize(
    ("value", "colour"), [(0.7, "green"), (0.6, "green"), (0.1, "magenta"), (-1.0, "red")]
)
def test_every_number_has_a_shade(value: float, colour: str) -> None:
    """Also one that no honest run holds: `show --tree` draws what a file says."""
    assert shade(value, SHADES) == colour


def test_figures_that_are_no_numbers_are_left_out() -> None:
    run = replace(sky_run(), timing={"tokens_per_second": "fast", "prefill_seconds": []})
    assert "steps/s" not in summary(run) and "first token" not in summary(run)
