"""Links of README and docs: what is in the repository is there, its heading too; others have a proper form."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md")]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def without_code(path: Path) -> str:
    return re.sub(r"^```.*?^```|^    .*?$|`[^`\n]*`", "`code`", path.read_text("utf-8"), flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """As GitHub names headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S)
    heads = (re.sub(r"[^\w\- ]", "", head.lower()) for head in re.findall(r"^#+ (.*)$", text, re.M))
    return {head.strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for picture, words, target in LINK.findall(without_code(page)):
        assert words.strip(), f"{page.name}: {target} has no words"
        if re.match(r"[a-z]+:", target):
            assert re.fullmatch(r"(https://|http://localhost)[\w.:-]+(/\S*)?", target) and not picture, target
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


def test_every_page_can_be_reached() -> None:
    seen, left = set(), [DOCS / "index.md"]
    while left:
        page = left.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        left += [
            (page.parent / t.partition("#")[0]).resolve()
            for _, _, t in LINK.findall(without_code(page))
            if ":" not in t
        ]
    assert set(DOCS.glob("*.md")) <= seen


def test_every_picture_is_shown() -> None:
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    shown = {path.name for path in (DOCS / "images").iterdir() if path.name in text}
    twins = {name.replace(".svg", ".png") for name in shown}
    assert {path.name for path in (DOCS / "images").iterdir()} <= shown | twins


def test_every_page_is_on_the_site() -> None:
    named = set(re.findall(r'"([\w-]+\.md)"', (ROOT / "zensical.toml").read_text("utf-8")))
    assert named == {path.name for path in DOCS.glob("*.md")}


@pytest.mark.slow
def test_the_site_builds_and_its_links_hold() -> None:
    """With what it shows in it: nothing is fetched from elsewhere."""
    pytest.importorskip("zensical")
    command = [sys.executable, str(ROOT / "scripts" / "site.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_gallery_is_its_files() -> None:
    gallery = runpy.run_path(str(ROOT / "scripts" / "write_gallery.py"))
    assert gallery["PAGE"].read_text("utf-8") == gallery["page"](), "run: python scripts/write_gallery.py"
    assert {path.stem for path in gallery["FOLDER"].iterdir()} == set(gallery["RUNS"])
