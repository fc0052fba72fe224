"""Where settings come from besides the command line: a file, the environment and `.env`.

Precedence: flag, environment (TEMPO_<NAME>; the process's own before `.env`), file, default. What a user
gives by flag or file is explicit: it must be usable. The environment is weaker: it sets defaults, which are
dropped where the chosen decoder has no use for them (see resolution.py). It is also everybody's: what others may have
meant for themselves, such as DEVICE=cuda:0, is ignored with a note.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tempo_mlx.config import GenerateConfig
from tempo_mlx.errors import ConfigError
from tempo_mlx.files import at_home, fault_of_json, reason_of
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.output_config import OutputConfig
from tempo_mlx.resolution import Shortcuts, resolve
from tempo_mlx.settings import Checked, Setting, canonical, settings_of, shown, suggestion

C = TypeVar("C", bound=Checked)
PREFIX = "TEMPO_"
OTHER_NAMES = frozenset({"TEMPO_BLAS"})  # read elsewhere (blas.py)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """Settings by name as one source after the other gave them."""

    flags: Mapping[str, object]
    environment: Mapping[str, object]
    file: Mapping[str, object]

    @property
    def quiet(self) -> bool:
        """Whether nothing is to be said besides the text."""
        return bool({**self.file, **self.environment, **self.flags}.get("quiet"))

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

    Raises ConfigError, naming the key and where it stands, for an unknown key or a value out of range; in the
    environment only a value of ours, TEMPO_X, can be wrong: the rest is ignored, with a warning in the log.
    """
    settings: dict[str, Setting] = {}
    for config in configs:
        settings.update(settings_of(config))
    given = Given(
        canonical(flags, settings),
        _from_environment(environment := {**_read_dotenv(dotenv), **environ}, settings),
        _from_file(Path(file), settings) if file is not None else {},
    )
    for note in _foreign(environment, settings, given.flags, elsewhere) if not given.quiet else ():
        log.warning("%s", note)
    return given


def _from_environment(environ: Mapping[str, str], settings: Mapping[str, Setting]) -> dict[str, object]:
    result: dict[str, object] = {}
    for name, setting in settings.items():
        source = next((key for key in setting.environment if _is_ours(key, environ, setting)), None)
        if source is not None:
            result[name] = setting.parse(environ[source], source)
    return result


def _is_ours(key: str, environ: Mapping[str, str], setting: Setting) -> bool:
    """Whether the environment sets `setting` by the name `key`: TEMPO_X always does, DEVICE only to what can be."""
    text = environ.get(key)
    if not text or key.startswith(PREFIX):
        return bool(text)
    try:
        setting.parse(text)
    except ConfigError:
        return False
    place = Path(text)
    is_path = place.is_absolute() or text[0] in ".~" or place.suffix == ".gguf" or len(place.parts) > 2
    if setting.name != "model" or not is_path:
        return True
    with suppress(OSError):  # too long a name
        return at_home(text).exists()
    return False


def _foreign(
    environ: Mapping[str, str],
    settings: Mapping[str, Setting],
    given: Mapping[str, object],
    elsewhere: Callable[[], Sequence[type]],
) -> list[str]:
    """What the environment holds that is ours by name only, in sentences; not where it would not count anyway."""
    notes = []
    for setting in settings.values():
        for key in setting.environment:
            if environ.get(key) and setting.name not in given and not _is_ours(key, environ, setting):
                wanted = "an existing model" if setting.name == "model" else setting.values_text
                notes.append(
                    f"The environment's {key} ({shown(environ[key])}) is ignored, since it is not {wanted}; "
                    f"{setting.environment[0]} is ours alone."
                )
    known = {key for setting in settings.values() for key in setting.environment} | OTHER_NAMES
    unknown = sorted(key for key in environ if key.startswith(PREFIX) and key not in known)
    if unknown:
        others = (settings_of(config).values() for config in elsewhere())
        known |= {key for table in others for setting in table for key in setting.environment}
        unknown = [key for key in unknown if key not in known]
    notes += [
        f"The environment's {key} is not a setting, and is ignored; {suggestion(key, known)}"
        for key in unknown
    ]
    return notes


def _read_dotenv(path: Path) -> dict[str, str]:
    """`.env` of the current directory, without expansion; {} if there is none."""
    if not path.is_file():
        return {}
    import dotenv

    try:
        values = dotenv.dotenv_values(path, interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s is ignored: %s.", path, _reason(error))  # it may be others' alone
        return {}
    if any(key in OTHER_NAMES for key in values):
        raise ConfigError(f"{path} sets TEMPO_BLAS, which names code to load; set it in the environment.")
    return {key: value for key, value in values.items() if value is not None}


def _from_file(path: Path, settings: Mapping[str, Setting]) -> dict[str, object]:
    try:
        values = _read_file(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The settings file {path} cannot be read: {_reason(error)}.") from error
    except RecursionError:
        raise ConfigError(f"The settings file {path} is nested too deeply to be one.") from None
    except ValueError as error:
        fault = fault_of_json(error) if path.suffix == ".json" else " ".join(str(error).split())
        raise ConfigError(f"The settings file {path} is malformed: {fault}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"The settings file {path} must hold names and values, such as threshold = 0.1.")
    try:
        return canonical({str(key).replace("-", "_"): value for key, value in values.items()}, settings)
    except ConfigError as error:
        raise ConfigError(f"In {path}: {error}") from error


def _reason(error: Exception) -> str:
    return reason_of(error) if isinstance(error, OSError) else "it is not UTF-8 text"


def _read_file(path: Path) -> Any:
    """The file's content; raises ValueError where it is malformed."""
    text = path.read_text("utf-8-sig")
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
            found = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(str(error)) from error
        return {} if found is None else found  # of nothing but comments, as in TOML
    raise ConfigError(f"The settings file {path} is of no kind known; name it .toml, .yaml or .json.")
