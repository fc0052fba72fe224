"""The run as one HTML file: self-contained, under a strict policy, and with exactly the run inside."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tempo_mlx.cli.main import main
from tempo_mlx.report.html import built, to_embed, to_html
from tempo_mlx.report.phrases import Alternative, Phrase
from tempo_mlx.report.run import Run


class Page(HTMLParser):
    """Collects attributes and contents of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.contents: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.contents.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            tag, attributes, content = self.contents[-1]
            self.contents[-1] = (tag, attributes, content + data)


NASTY = {"text": "</script><script>alert(1)</script><!-- \u2028 & \\ \U0001f30d", "n": 0.1}


FORK = Phrase("</script><b>", 0.7, (Alternative("sea", 0.3, (), " side"),), 0, 1)


def page_of(run: object) -> Page:
    return Page(to_html(json.dumps(run, ensure_ascii=False), [FORK]))


def test_the_run_comes_back_and_cannot_break_out() -> None:
    page = page_of(NASTY)
    [(_, _, content)] = [item for item in page.contents if item[1].get("type") == "application/json"]
    shown = json.loads(content)
    assert shown["run"] == NASTY
    sea = {"text": "sea", "share": 0.3, "slots": [], "follows": " side"}
    assert shown["phrases"] == [
        {"text": FORK.text, "share": 0.7, "alternatives": [sea], "start": 0, "end": 1}
    ]
    assert len([item for item in page.contents if item[0] == "script"]) == 2


def test_what_other_pages_embed_is_one_file_of_less_than_100_kb_that_fetches_nothing_by_itself() -> None:
    script = built("tempo-run.js")
    assert len(gzip.compress(script.encode(), 9)) < 100_000
    assert script.count("fetch(") == 1, "only what src names"
    assert "@styles" not in script and "import(" not in script
    assert json.loads(to_embed(json.dumps(NASTY), [FORK])) == {
        "run": NASTY,
        "phrases": [json.loads(json.dumps(asdict(FORK)))],
    }


def test_nothing_is_fetched_and_only_what_was_built_may_run() -> None:
    page = page_of(NASTY)
    for tag, attributes in page.elements:
        assert "src" not in attributes and tag not in ("link", "img", "iframe"), (tag, attributes)
    [policy] = [str(a["content"]) for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src" not in policy
    for tag, attributes, content in page.contents:
        if attributes.get("type") == "application/json":
            continue
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert re.search(rf"{tag}-src 'sha256-{re.escape(digest)}'", policy), f"{tag} would not run"


def test_the_command_line_saves_what_a_page_embeds_and_prints_what_goes_into_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next((Path(__file__).parent / "fixtures" / "runs-0.1.0").glob("*.json"))
    run = Run.load(file)
    assert main(["show", str(file), "--embed", str(tmp_path / "blog")]) == 0
    element = f'<tempo-run src="{file.stem}.phrases.json"></tempo-run>'
    assert capsys.readouterr().out == f'<script src="tempo-run.js" defer></script>\n{element}\n'
    assert (tmp_path / "blog" / "tempo-run.js").read_text() == built("tempo-run.js")
    embedded = json.loads((tmp_path / "blog" / f"{file.stem}.phrases.json").read_text())
    assert Run.from_json(json.dumps(embedded["run"])) == run
    assert "".join(phrase["text"] for phrase in embedded["phrases"]) == run.final_text
