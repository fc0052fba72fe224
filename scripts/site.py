"""Build the documentation as a site, in build/site: `make site`.

Pages in docs/ are written for GitHub, where links may leave the folder. Here what they show is copied beside them, and
what they name is linked to where the repository is; then zensical builds the pages, and every link is looked up.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
DOCS, STAGED, SITE = ROOT / "docs", ROOT / "build" / "docs", ROOT / "build" / "site"
VIEWER = ROOT / "tempo_mlx" / "server" / "web" / "dist" / "tempo-run.js"
REPOSITORY = "https://github.com/tempo-mlx/tempo-mlx/blob/main/"
STYLE = "tempo-run { display: block; margin: 1em 0 }\n.language-text code { white-space: pre-wrap }\n"
FETCHED = {
    "script": "src",
    "img": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "tempo-run": "src",
}


def stage() -> None:
    """Copy docs/, with all that its pages show, and the viewer."""
    shutil.rmtree(STAGED, ignore_errors=True)
    shutil.copytree(DOCS, STAGED)
    shutil.copy(VIEWER, STAGED)
    (STAGED / "site.css").write_text(STYLE, "utf-8")
    for page in STAGED.glob("*.md"):
        text = page.read_text("utf-8")
        text = re.sub(r"```mermaid\n(.*?)```\n", numbered, text, flags=re.S)
        page.write_text(re.sub(r"(!?)\[([^\]]*)\]\(\.\./([^)]+)\)", outside, text), "utf-8")


def numbered(chart: re.Match[str]) -> str:
    """The numbered boxes of a chart as a list: what draws it on GitHub would be fetched from elsewhere here."""
    boxes = sorted(re.findall(r'\["(\d) (\w+): ([^"]+)"\]', chart[1]))
    return "".join(f"{number}. *{name}*: {words.replace('<br/>', ': ')}\n" for number, name, words in boxes)


def outside(link: re.Match[str]) -> str:
    """A link out of docs/: a picture comes along, anything else is where the repository is."""
    picture, words, path = link.groups()
    if not picture:
        return f"[{words}]({REPOSITORY}{path})"
    copy = STAGED / "images" / Path(path).name
    shutil.copy(ROOT / path, copy)
    return f"![{words}](images/{copy.name})"


class Links(HTMLParser):
    """What a page links to, what it fetches, and the places in it that can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.places = {""}
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.places |= {found.get("id", ""), found.get("name", "")}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        fetches = tag != "link" or found.get("rel") in ("stylesheet", "icon", "preload", "modulepreload")
        if fetches and FETCHED.get(tag, "") in found:
            self.fetched.append(found[FETCHED[tag]])


def broken(site: Path) -> list[str]:
    """Links of the built pages that lead nowhere, and what is fetched from elsewhere."""
    pages = {page: Links(page) for page in site.rglob("*.html")}
    wrong = []
    for page, found in pages.items():
        name = page.relative_to(site)
        wrong += [f"{name} fetches {target}" for target in found.fetched if re.match(r"(\w+:)?//", target)]
        for target in [*found.links, *found.fetched]:
            url = urlsplit(target)
            if url.scheme or url.netloc or name.name == "404.html":
                continue
            there = (page.parent / unquote(url.path)).resolve() if url.path else page
            there = there / "index.html" if there.is_dir() else there
            if not there.exists():
                wrong.append(f"{name} links to {target}, which is not there")
            elif there in pages and unquote(url.fragment) not in pages[there].places:
                wrong.append(f"{name} links to {target}, where that heading is not")
    return sorted(set(wrong))


def main() -> int:
    stage()
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--clean", "--strict"], cwd=ROOT)
    wrong = broken(SITE) if done.returncode == 0 else []
    print(*wrong, f"{SITE}: {len(list(SITE.rglob('*.html')))} pages", sep="\n")
    return done.returncode or bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
