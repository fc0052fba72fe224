"""No figure without its results: prose against pages (tests/figures.toml), pages against what a benchmark writes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
CLAIMS: dict[str, list[dict[str, Any]]] = {
    page: entry["claims"]
    for page, entry in tomllib.loads((ROOT / "tests" / "figures.toml").read_text("utf-8")).items()
}
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?%?")
FIGURE = re.compile(r"(?<![\w./-])(?:\d[\d,]*\.\d+(?:e-?\d+)?%?|\d+%)(?![\w/])")
SETTINGS = {"0.90", "0.95", "0.98", "0.99", "0.1", "0.2", "0.5", "0.7", "95%"}  # targets, thresholds, levels
VERSION = re.compile(
    r"\d+\.\d+\.\d+\.\d+|(?:Python|glibc|macOS|Debian|Ubuntu|arXiv|MLX|versions?|Node(?:\.js)?)"
    r" \d[\d.:]*(?: to \d[\d.]*)?"
)
RESULTS = ROOT / "benchmarks" / "results"


def prose(page: str) -> str:
    """The text of a page without code, links' targets and versions, its line breaks as blanks."""
    text = (ROOT / page).read_text("utf-8")
    text = re.sub(r"^```.*?^```|^    .*?$|<!--.*?-->", " ", text, flags=re.M | re.S)
    text = re.sub(r"`[^`]*`", "`code`", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return VERSION.sub("", " ".join(text.split()))


def numbers(text: str) -> set[str]:
    return {number.rstrip(",") for number in NUMBER.findall(text)}


def row_of(source: str, start: str) -> str:
    """The only line with it; of a page about several models, which says the same of each, the first one's."""
    text, _, _ = (ROOT / source).read_text("utf-8").partition("\n## Texts of ")
    found = [line for line in text.splitlines() if start in line]
    assert len(found) == 1, f"{source} has {len(found)} lines with {start!r}"
    return found[0]


def column(line: str, index: int) -> float:
    return float(line.split("|")[index].split()[0])


def check(page: str, text: str) -> list[str]:
    """What is wrong with the figures of a page whose prose is `text`."""
    wrong, left = [], text
    for claim in CLAIMS[page]:
        if claim["text"] not in text:
            wrong.append(f"{claim['text']!r} of tests/figures.toml is not in {page}")
            continue
        left = left.replace(claim["text"], " ")
        if "said" in claim:
            continue
        if "ratio" in claim:
            one, other = (column(row_of(claim["source"], row), claim["column"]) for row in claim["ratio"])
            known = {f"{one / other:.2f}"}
            wanted = {next(iter(FIGURE.findall(claim["text"])))}
        else:
            known, wanted = numbers(row_of(claim["source"], claim["row"])), numbers(claim["text"])
        wrong += [f"{number} of {claim['text']!r} is not in {claim['source']}" for number in wanted - known]
    wrong += [f"{page} says {n}, which tests/figures.toml has no source for" for n in FIGURE.findall(left)
              if n not in SETTINGS]  # fmt: skip
    return wrong


@pytest.mark.parametrize("page", CLAIMS)
def test_every_figure_has_a_source(page: str) -> None:
    assert check(page, prose(page)) == []


@pytest.mark.parametrize("page", CLAIMS)
def test_a_changed_digit_is_noticed(page: str) -> None:
    text = prose(page)
    for found in FIGURE.finditer(text):
        if found.group() in SETTINGS:
            continue
        place = max(i for i in range(*found.span()) if text[i].isdigit())
        changed = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
        assert check(page, changed), f"{found.group()} changed in {page}, and nobody noticed"


# Compared below with what writes them, generated from the code, or (scale) without results that were kept.
OTHERWISE = {"acceptance", "attention", "early-exit-figures", "pruning-ablation", "quality", "speed", "tasks", "api",
             "cli", "models", "run-file", "settings", "scale", "superposition"}  # fmt: skip


def test_no_other_page_has_figures() -> None:
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.stem not in OTHERWISE}
    for page in sorted(pages - set(CLAIMS)):
        assert not [figure for figure in FIGURE.findall(prose(page)) if figure not in SETTINGS], page


def kept(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text("utf-8").splitlines()]


def test_the_tables_of_several_machines_are_their_results() -> None:
    pytest.importorskip("mlx")
    from benchmarks import scale

    page = (ROOT / "docs" / "scale.md").read_text("utf-8")
    tables = {"measured": scale.table(scale.kept(RESULTS / "scale.jsonl")), "predicted": scale.predictions()}
    assert scale.renewed(page, tables) == page


def test_the_early_exit_figures_are_their_results() -> None:
    pytest.importorskip("mlx")
    from benchmarks.early_exit import page

    assert (ROOT / "docs" / "early-exit-figures.md").read_text("utf-8") == page()


def test_the_acceptance_report_is_its_results() -> None:
    pytest.importorskip("torch")
    from benchmarks.acceptance import picture, report, rows_of

    kept = json.loads((RESULTS / "acceptance.json").read_text("utf-8"))
    assert (ROOT / "docs" / "acceptance.md").read_text("utf-8") == report(kept)
    assert (ROOT / "docs" / "images" / "acceptance.svg").read_text("utf-8") == picture(rows_of(kept))


@pytest.mark.slow
@pytest.mark.parametrize(("study", "written"), [("pruning", "pruning-ablation"), ("attention", "attention")])
def test_a_study_is_its_results(study: str, written: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx")
    pytest.importorskip("matplotlib")
    from benchmarks import attention_study, pruning_page

    write, folder = {
        "pruning": (pruning_page.write_page, "pruning_ablation"),
        "attention": (attention_study.write_page, "attention_study"),
    }[study]
    write(tmp_path / "page.md", RESULTS / folder / "smollm2-135m")
    assert (ROOT / "docs" / f"{written}.md").read_text("utf-8") == (tmp_path / "page.md").read_text("utf-8")
    for picture in (tmp_path / "images").iterdir():
        assert (ROOT / "docs" / "images" / picture.name).exists()


@pytest.mark.slow
def test_the_tasks_page_is_its_results(tmp_path: Path) -> None:
    from benchmarks.tasks.page import write_page

    pytest.importorskip("matplotlib")
    write_page(RESULTS / "tasks", tmp_path / "tasks.md")
    assert (ROOT / "docs" / "tasks.md").read_text("utf-8") == (tmp_path / "tasks.md").read_text("utf-8")
    for picture in (tmp_path / "images").iterdir():
        assert (ROOT / "docs" / "images" / picture.name).exists()


@pytest.mark.slow
def test_the_superposition_page_is_its_results(tmp_path: Path) -> None:
    for needed in ("mlx", "matplotlib", "sacrebleu", "rapidfuzz"):
        pytest.importorskip(needed)
    from benchmarks.superposition_page import write_page

    write_page(RESULTS / "superposition", tmp_path / "superposition.md")
    page = (ROOT / "docs" / "superposition.md").read_text("utf-8")
    assert page == (tmp_path / "superposition.md").read_text("utf-8")
    for picture in (tmp_path / "images").iterdir():
        assert (ROOT / "docs" / "images" / picture.name).exists()


@pytest.mark.slow
def test_the_quality_page_is_its_results(tmp_path: Path) -> None:
    from benchmarks.quality.page import write_page

    pytest.importorskip("matplotlib")
    write_page(RESULTS / "quality", "full", tmp_path / "quality.md")
    assert (ROOT / "docs" / "quality.md").read_text("utf-8") == (tmp_path / "quality.md").read_text("utf-8")


def test_the_speed_page_is_its_results() -> None:
    """Every row of its tables is a row kept, and every row kept is there."""
    from tempo_mlx.bench.results import Result, cells

    stored = json.loads((RESULTS / "speed.json").read_text("utf-8"))["suites"]
    rows = {"| " + " | ".join(cells(row)) + " |" for suite in stored for row in Result.from_dict(suite).rows}
    page = (ROOT / "docs" / "speed.md").read_text("utf-8").splitlines()
    said = {
        line.replace("|  |", "|  |")
        for line in page
        if re.search(r"\| [\d.]+ (ms|MB|s) \| [\d.]+ (ms|MB|s) \|", line)
    }
    assert said == rows
