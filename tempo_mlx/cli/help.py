"""--help that is never cut: options in groups, each name whole, in as many columns as the terminal has."""

from __future__ import annotations

import copy
import shutil
import textwrap
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

WIDEST = 100  # longer lines are hard to read
LEAST = 20  # of which words are still read
NAMES = 26  # columns of names that stand beside their help; longer ones stand above it


class Command(TyperCommand):
    """A command whose options are listed by group."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or kind, []).append(record)
        for name in sorted(groups, key=lambda name: {"Arguments": 0, "Options": 2}.get(name, 1)):
            _write_group(formatter, name, groups[name])


class Group(TyperGroup):
    """Commands, one a line."""

    command_class = Command

    def format_options(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        rows = [(name, command.get_short_help_str(300)) for name, command in commands if not command.hidden]
        _write_group(formatter, "Commands", rows)
        records = (parameter.get_help_record(ctx) for parameter in self.get_params(ctx))
        _write_group(formatter, "Options", [record for record in records if record is not None])


def _write_group(formatter: Any, name: str, rows: list[tuple[str, str]]) -> None:
    """Names beside their help, or above it where they are long or the terminal is narrow."""
    width = formatter.width - 2
    beside = min(NAMES, max(len(names) for names, _ in rows)) if width >= 60 else 0
    formatter.write(f"\n{name}:\n")
    for names, said in rows:
        lines = textwrap.wrap(said, max(width - beside - 4, 20), break_on_hyphens=False) or [""]
        indent = " " * (beside + 4 if beside else 6)
        if len(names) > beside:
            for line in textwrap.wrap(names, width, subsequent_indent="    ", break_on_hyphens=False):
                formatter.write(f"  {line}\n")
        else:
            formatter.write(f"  {names:<{beside}}  {lines.pop(0)}\n")
        formatter.write("".join(f"{indent}{line}\n" for line in lines))


def print_all_help(ctx: typer.Context, wanted: bool) -> None:
    """Print the help of a command with the options that --help leaves out; those of no group stay hidden."""
    if not wanted:
        return
    command = copy.copy(ctx.command)
    command.params = [copy.copy(parameter) for parameter in command.params]
    for parameter in command.params:
        if getattr(parameter, "rich_help_panel", None):
            parameter.hidden = False  # type: ignore[attr-defined]
    typer.echo(command.get_help(ctx))
    raise typer.Exit


def columns() -> int:
    """How wide help may be."""
    return max(min(shutil.get_terminal_size().columns, WIDEST), LEAST)
