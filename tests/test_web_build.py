"""The page that is shipped was built from the sources beside it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

WEB = Path(__file__).parent.parent / "tempo_mlx" / "server" / "web"
SOURCES = ("build", "index.html", "package-lock.json", "public", "src", "svelte.config.js", "vite.config.ts")


def hash_of_sources() -> str:
    """As hashOfSources in build/plugins.ts, which writes it into the build."""
    paths = [
        path for source in SOURCES for path in (WEB / source, *(WEB / source).rglob("*")) if path.is_file()
    ]
    names = sorted(path.relative_to(WEB).as_posix() for path in paths)
    digest = hashlib.sha256()
    for name in names:
        if name.startswith("src/testing/") or name.endswith(".test.ts"):
            continue
        digest.update(name.encode() + b"\0" + (WEB / name).read_bytes() + b"\0")
    return digest.hexdigest()


def test_the_build_is_up_to_date() -> None:
    built_from = (WEB / "dist" / "SOURCES.sha256").read_text().strip()
    assert built_from == hash_of_sources(), (
        "the page's sources have changed since it was built: run `make web`"
    )


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = (WEB / "dist" / "index.html").read_text()
    assert "default-src 'none'" in page and "unsafe" not in page
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert named and all((WEB / "dist" / name).is_file() for name in named), named
    for path in (WEB / "dist").rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        for address in re.findall(r"https?://[\w.-]+", text):  # in names and messages, never fetched
            allowed = ("http://www.w3.org", "https://svelte.dev", "https://github.com")
            assert address in allowed, f"{path.name}: {address}"
