"""Where settings come from besides the command line: a file, the environment and `.env`.

Precedence: flag, environment (TEMPO_<NAME>; the process's own before `.env`), file, default. What a user
gives by flag or file is explicit: it must be usable. The environment is weaker: it sets defaults, which are
dropped where the chosen decoder has no use for them (see config.resolve).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tempo_mlx.config import GenerateConfig, LoadConfig, OutputConfig
from tempo_mlx.errors import ConfigError
from tempo_mlx.resolution import Shortcuts, resolve
from tempo_mlx.settings import Checked, Setting, canonical, settings_of, suggestion

C = TypeVar("C", bound=Checked)
PREFIX = "TEMPO_"
OTHER_NAMES = frozenset({"TEMPO_BLAS"})  # read elsewhere (blas.py)


@dataclass(frozen=True)
class Given:
    """Settings by name as one source after the other gave them."""

    flags: Mapping[str, object]
    environment: Mapping[str, object]
    file: Mapping[str, object]

    def with_flags(self, **flags: object) -> Given:
        """The same with further flags."""
        return replace(self, flags={**self.flags, **flags})

    def make(self, config: type[C]) -> C:
        """`config` with what was given for it; everything else at its default."""
        merged = {**self.file, **self.environment, **self.flags}
        return config(**{name: merged[name] for name in settings_of(config) if name in merged})

    def generation(self) -> GenerateConfig:
        """The generation settings in force."""
        names = {*settings_of(GenerateConfig), *settings_of(Shortcuts)}
        ambient = {n: v for n, v in self.environment.items() if n in names and n not in self.flags}
        explicit = {n: v for n, v in {**self.file, **self.flags}.items() if n in names and n not in ambient}
        return resolve(explicit, ambient)


def load_settings(
    file: str | None,
    environ: Mapping[str, str],
    flags: Mapping[str, object],
    *,
    configs: Sequence[type] = (LoadConfig, GenerateConfig, Shortcuts, OutputConfig),
    elsewhere: Callable[[], Sequence[type]] = tuple,
    dotenv: Path = Path(".env"),
) -> Given:
    """All settings of `configs` that a user gave.

    elsewhere: further tables whose names in the environment belong to other commands (called only when a
    name is met that `configs` do not have).

    Raises ConfigError, naming the key and where it stands, for an unknown key or a value out of range.
    """
    settings: dict[str, Setting] = {}
    for config in configs:
        settings.update(settings_of(config))
    return Given(
        canonical(flags, settings),
        _from_environment({**_read_dotenv(dotenv), **environ}, settings, elsewhere),
        _from_file(Path(file), settings) if file is not None else {},
    )


def _from_environment(
    environ: Mapping[str, str], settings: Mapping[str, Setting], elsewhere: Callable[[], Sequence[type]]
) -> dict[str, object]:
    result: dict[str, object] = {}
    for name, setting in settings.items():
        source = next((key for key in setting.environment if environ.get(key)), None)
        if source is not None:
            result[name] = setting.parse(environ[source], source)
    known = {key for setting in settings.values() for key in setting.environment} | OTHER_NAMES
    unknown = sorted(key for key in environ if key.startswith(PREFIX) and key not in known)
    if unknown:
        known |= {
            key for config in elsewhere() for s in settings_of(config).values() for key in s.environment
        }
        for key in unknown:
            if key not in known:
                raise ConfigError(
                    f"The environment variable {key} is not a setting; {suggestion(key, known)}"
                )
    return result


def _read_dotenv(path: Path) -> dict[str, str]:
    """`.env` of the current directory, without expansion; {} if there is none."""
    if not path.is_file():
        return {}
    import dotenv

    try:
        values = dotenv.dotenv_values(path, interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); mend or remove it.") from error
    if any(key in OTHER_NAMES for key in values):
        raise ConfigError(f"{path} sets TEMPO_BLAS, which names code to load; set it in the environment.")
    return {key: value for key, value in values.items() if value is not None}


def _from_file(path: Path, settings: Mapping[str, Setting]) -> dict[str, object]:
    try:
        values = _read_file(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The settings file {path} cannot be read: {_reason(error)}.") from error
    except ValueError as error:
        raise ConfigError(
            f"The settings file {path} is malformed: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"The settings file {path} must hold names and values, such as threshold = 0.1.")
    try:
        return canonical({str(key).replace("-", "_"): value for key, value in values.items()}, settings)
    except ConfigError as error:
        raise ConfigError(f"In {path}: {error}") from error


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"


def _read_file(path: Path) -> Any:
    """The file's content; raises ValueError where it is malformed."""
    text = path.read_text("utf-8")
    if path.suffix == ".toml":
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        return tomllib.loads(text)
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(str(error)) from error
    raise ConfigError(f"The settings file {path} is of no kind known; name it .toml, .yaml or .json.")
