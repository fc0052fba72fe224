"""A run as one HTML file: the web page's viewer, built into a single file, with the run inside.

The file needs no network and no server; its own content security policy forbids both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files

from tempo_mlx.errors import OutputError
from tempo_mlx.report.phrases import Phrase

PLACES = {name: f'<script type="application/json" id="{name}"></script>' for name in ("run", "phrases")}


def to_html(run_json: str, phrases: Sequence[Phrase] = ()) -> str:
    """The viewer with the run of `run_json` (Run.to_json) in it, and its phrases (Run.phrases), shown first.

    Raises OutputError when the viewer is not there, which is so only in a damaged installation.
    """
    viewer = files("tempo_mlx") / "server" / "web" / "dist" / "standalone.html"
    try:
        page = viewer.read_text(encoding="utf-8")
    except OSError as error:
        raise OutputError(f"Cannot read {viewer}: {error.strerror}; build it with `make web`.") from error
    shown = [asdict(phrase) for phrase in phrases]
    for name, content in (("run", run_json.strip()), ("phrases", json.dumps(shown, ensure_ascii=False))):
        before, place, after = page.partition(PLACES[name])
        if not place:
            raise OutputError(f"{viewer} has no place for a run; build it again with `make web`.")
        inside = content.replace("<", "\\u003c")  # the same JSON: "<" occurs in strings only
        page = before + place.replace("></", f">{inside}</") + after
    return page
