"""Every error a user can cause or meet. The message is one sentence that says what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class TempoError(Exception):
    """Base of all errors this package raises on purpose. `exit_code` is what the command line returns."""

    exit_code = 1

    def as_bad_usage(self) -> Self:
        """The same, where the command line was wrong: it names a file that is not there."""
        self.exit_code = 2
        return self


class ConfigError(TempoError):
    """A setting is unknown, out of range, or does not combine with another."""

    exit_code = 2


class PromptError(TempoError):
    """The prompt is empty, longer than the model's context, or holds what is no token of the model's."""

    exit_code = 2


class ModelError(TempoError):
    """The model's files are missing, malformed, or of a kind that is not supported."""


class DeadEndError(ModelError):
    """A grammar lets nothing follow a text."""


class DownloadError(ModelError):
    """A model could not be fetched, or what arrived is not what was asked for."""


class MemoryLimitError(TempoError):
    """The model, or the run, needs more memory than it was allowed."""


class BackendError(TempoError):
    """The backend or the device asked for is not available on this machine."""


class ComputeError(TempoError):
    """Computing ended before its time; what a run has by then is kept."""


class RankLostError(ComputeError):
    """A process of a run over several ended, or stands still."""


class DeviceError(ComputeError):
    """The device ran out of memory, or one of its programs failed."""


class NumbersError(ComputeError):
    """What the model computed is not finite, and nothing can be chosen of it."""


class RunFileError(TempoError):
    """A run file cannot be read, or contradicts itself."""


class OutputError(TempoError):
    """A result could not be written."""


class SessionError(TempoError):
    """A run that is kept cannot do what was asked of it. `argument`: the one at fault, if one is."""

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class ConflictError(SessionError):
    """It contradicts the run's present state."""


class NotInRunError(SessionError):
    """The run has no such step or slot."""


class ArgumentError(SessionError):
    """An argument names something that such a run cannot be made with."""
