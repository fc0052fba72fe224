"""Command line options made from the settings table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from types import MappingProxyType
from typing import Annotated, Any

import typer

from tempo_mlx.cli.help import print_all_help
from tempo_mlx.errors import ConfigError
from tempo_mlx.resolution import ACCEPTED, REFUSED
from tempo_mlx.settings import Setting, by_audience, settings_of

ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Read settings from a .toml, .yaml or .json file.",
        rich_help_panel="Input",
    ),
]

NO_DEFAULTS: Mapping[str, str] = MappingProxyType({})

# What --help shows of those that a command has; --help-all shows the rest.
EVERYDAY = (
    *("model", "max_tokens", "temperature", "threshold", "branches", "chat", "system", "system_file"),
    *("stop", "seed", "view", "json_output_file", "quiet"),
)


def settings_but(*configs: type, leave: Collection[str]) -> list[str]:
    """The names of all settings of `configs` but those."""
    return [name for config in configs for name in settings_of(config) if name not in leave]


def with_settings(
    *configs: type,
    only: Collection[str] | None = None,
    original: bool = False,
    everyday: Collection[str] | None = None,
    defaults: Mapping[str, str] = NO_DEFAULTS,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every setting of `configs`.

    The command's function gets what was given as `flags`: a dict of checked values by setting name.
    only: the names of those settings that the command has a use for.
    everyday: those that --help shows, where that is not all; --help-all shows the others.
    defaults: what help says where the command's own differ.
    original: also take the flags of the original tool that have no setting (config.ACCEPTED, REFUSED).
    """
    settings = {name: setting for config in configs for name, setting in settings_of(config).items()}
    if only is not None:
        settings = {name: settings[name] for name in only}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
        options = [
            _parameter(
                setting,
                hidden=everyday is not None and setting.name not in everyday,
                default=defaults.get(setting.name, setting.default_text),
            )
            for setting in by_audience(settings.values())
        ]
        if everyday is not None:
            options.append(_help_all())
        if original:
            options += [_original(flag) for flag in (*ACCEPTED, *REFUSED)]

        @wraps(command)
        def run(**values: Any) -> None:
            flags = {
                name: value if isinstance(value, bool) else _parse(setting, value)
                for name, setting in settings.items()
                if (value := values[name]) is not None and value != []
            }
            command(flags=flags, **{p.name: values[p.name] for p in own})

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*options, *own)]
        del run.__wrapped__  # typer would read its signature
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parse(setting: Setting, value: str | list[str]) -> Any:
    if isinstance(value, str):
        return setting.parse(value)
    texts = [each for text in value for each in setting.parse(text)] if setting.row.commas else value
    return setting.check(tuple(texts), setting.flag)


def _help_all() -> inspect.Parameter:
    option = typer.Option(
        "--help-all", is_eager=True, callback=print_all_help, expose_value=False, help="Show every option."
    )
    return inspect.Parameter(
        "help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
    )


def _parameter(setting: Setting, hidden: bool, default: str) -> inspect.Parameter:
    on = [alias for alias in setting.row.aliases if alias.startswith("-")]
    off = [f" {alias}" for alias in setting.row.aliases if alias.startswith("/")]
    help_text = setting.row.help + ("" if default == "none" else f" [default: {default}]")
    kind: Any = str | None
    names = [setting.flag, *on]
    metavar = None
    if setting.kind is bool:
        kind = bool | None
        names = [f"{setting.flag}/--no-{setting.flag[2:]}", *on, *off]
    elif setting.many and setting.kind is str:
        kind, metavar = list[str] | None, "TEXT"
    else:
        metavar = metavar_of(setting)
    option = typer.Option(
        *names,
        help=help_text,
        rich_help_panel=setting.row.group,
        metavar=metavar,
        show_default=False,
        hidden=hidden,
    )
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )


def metavar_of(setting: Setting) -> str:
    """What stands for the value in --help: `0..1`, `mix|last|mean`, `INTEGER`, `TEXT`."""
    if not setting.open:
        return "|".join(map(str, setting.choices))
    if setting.kind is str:
        return "TEXT"
    row = setting.row
    low = row.minimum if row.minimum is not None else row.above
    high = row.maximum if row.maximum is not None else row.below
    if setting.kind is float and low is not None and high is not None and high <= 1:
        number = f"{low:g}..{high:g}"
    else:
        number = {int: "INTEGER", float: "NUMBER"}[setting.kind]
    return "|".join([f"{number},..." if setting.many else number, *map(str, setting.choices)])


def _original(flag: str) -> inspect.Parameter:
    """A hidden flag of the original tool: without effect, or refused with the remedy."""

    def refuse(given: bool) -> None:
        if given and flag in REFUSED:
            raise ConfigError(f"{flag} {REFUSED[flag]}.")

    option = typer.Option(flag, hidden=True, callback=refuse)
    name = "original_" + flag.lstrip("-").replace("-", "_")
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
    )


def other_tables() -> tuple[type, ...]:
    """The settings of other commands, whose environment names a command that lacks them must know."""
    from tempo_mlx.server.settings import ServerConfig

    return (ServerConfig,)
