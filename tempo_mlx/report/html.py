"""A run as one HTML file: the viewer `<tempo-run>` with the run inside, and what that viewer shows on other pages.

The file needs no network and no server; its own content security policy forbids both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files

from tempo_mlx.errors import OutputError
from tempo_mlx.report.phrases import Phrase

BUILT = files("tempo_mlx") / "server" / "web" / "dist"
PLACE = '<script type="application/json"></script>'


def to_html(run_json: str, phrases: Sequence[Phrase] = ()) -> str:
    """The viewer with the run of `run_json` (Run.to_json) in it, and its phrases (Run.phrases), shown first.

    Raises OutputError when the viewer is not there, which is so only in a damaged installation.
    """
    before, place, after = built("standalone.html").partition(PLACE)
    if not place:
        raise OutputError(
            f"{BUILT / 'standalone.html'} has no place for a run; build it again with `make web`."
        )
    inside = to_embed(run_json, phrases).replace("<", "\\u003c")  # the same JSON: "<" occurs in strings only
    return before + place.replace("></", f">{inside}</") + after


def to_embed(run_json: str, phrases: Sequence[Phrase] = ()) -> str:
    """The JSON that `<tempo-run>` shows: the run with its phrases, which are read off it here and nowhere else."""
    shown = json.dumps([asdict(phrase) for phrase in phrases], ensure_ascii=False)
    return f'{{"run":{run_json.strip()},"phrases":{shown}}}'


def built(name: str) -> str:
    """A file of the web page's build. Raises OutputError."""
    try:
        return (BUILT / name).read_text(encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"Cannot read {BUILT / name}: {error.strerror}; build it with `make web`."
        ) from error
