"""Logging of server and worker: to stderr, one record per line, as text or JSON. Prompts only on request."""

from __future__ import annotations

import json
import logging
import logging.config
import time
from typing import Any

STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


class Formatter(logging.Formatter):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def format(self, record: logging.LogRecord) -> str:
        extra: dict[str, Any] = {k: v for k, v in vars(record).items() if k not in STANDARD and v is not None}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        trace = self.formatException(record.exc_info) if record.exc_info else None
        if self.kind == "json":
            line = {"time": stamp, "level": record.levelname.lower(), "logger": record.name,
                    "message": record.getMessage(), **extra}  # fmt: skip
            if trace:
                line["exception"] = trace
            return json.dumps(line, default=str)
        fields = "".join(
            f" {k}={v if isinstance(v, int | float) else json.dumps(str(v))}" for k, v in extra.items()
        )
        message = record.getMessage().replace("\n", "\\n").replace("\r", "\\r")
        return f"{stamp} {record.levelname.lower()} {message}{fields}" + (f"\n{trace}" if trace else "")


def configuration(level: str, kind: str) -> dict[str, Any]:
    """For logging.config.dictConfig, and for uvicorn's log_config."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": Formatter, "kind": kind}},
        "handlers": {
            "stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}
        },
        "loggers": {
            "tempo_mlx": {"handlers": ["stderr"], "level": level.upper(), "propagate": False},
            "uvicorn": {
                "handlers": ["stderr"],
                "level": "DEBUG" if level == "debug" else "WARNING",
                "propagate": False,
            },
        },
    }


def configure(level: str, kind: str) -> None:
    logging.config.dictConfig(configuration(level, kind))
