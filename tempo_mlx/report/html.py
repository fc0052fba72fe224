"""A run as one HTML file: the web page's viewer, built into a single file, with the run inside.

The file needs no network and no server; its own content security policy forbids both.
"""

from __future__ import annotations

from importlib.resources import files

from tempo_mlx.errors import OutputError

PLACE = '<script type="application/json" id="run"></script>'


def to_html(run_json: str) -> str:
    """The viewer with the run of `run_json` (Run.to_json) in it.

    Raises OutputError when the viewer is not there, which is so only in a damaged installation.
    """
    viewer = files("tempo_mlx") / "server" / "web" / "dist" / "standalone.html"
    try:
        template = viewer.read_text(encoding="utf-8")
    except OSError as error:
        raise OutputError(f"Cannot read {viewer}: {error.strerror}; build it with `make web`.") from error
    before, place, after = template.partition(PLACE)
    if not place:
        raise OutputError(f"{viewer} has no place for a run; build it again with `make web`.")
    content = run_json.strip().replace("<", "\\u003c")  # the same JSON: "<" occurs in strings only
    return before + place.replace("></", f">{content}</") + after
