"""How good and how different are the texts of every decoder, beside each other, on prompts of six kinds?

    python -m benchmarks.quality [--quick] [--model NAME] [STAGE ...]

Stages, all of them unless named: `test` (what docs/quality.md reports), `divergence` (superposed rows beside exact
ones), `tuning` (what was tried, on prompts of their own), `prices` (seconds of a pass by its rows; wants an idle
machine), `judge` (perplexity of the texts under the model named by --judge), `report` (tables, plots, the page).

Results are kept in --out, a line a prompt and arm: what is there is not computed again, so an interrupted run goes
on where it stopped, and --minutes ends one part of a long run. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tempo_mlx
from benchmarks.quality import arms as table
from benchmarks.quality.arms import Arm
from benchmarks.quality.divergence import run_divergence
from benchmarks.quality.judge import run_judge
from benchmarks.quality.page import write_page
from benchmarks.quality.prices import measure_prices
from benchmarks.quality.prompts import Prompt, read_prompts
from benchmarks.quality.running import run_arm
from benchmarks.studies import versions

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ("test", "divergence", "tuning", "prices", "judge", "report")
TOKENS = {"test": 32, "tuning": 40, "divergence": 24}
PROMPTS = {"test": None, "tuning": None, "divergence": 8}
QUICK = {"tokens": 6, "prompts": 2}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--judge", help="a second model that rates the texts")
    parser.add_argument("--quick", action="store_true", help="2 prompts, 6 tokens: does everything work?")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms")
    parser.add_argument("--prompts", type=int, help="at most so many prompts of a split, for now")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop decoding after so long")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality")
    parser.add_argument(
        "--page", type=Path, help="the page to write (docs/quality.md; under --quick in --out)"
    )
    options = parser.parse_args(arguments)
    stages = options.stages or [s for s in STAGES if s != "judge" or options.judge]
    if unknown := set(stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; choose from {', '.join(STAGES)}")
    if "judge" in stages and not options.judge:
        parser.error("the judge stage needs --judge MODEL")
    loaded = tempo_mlx.load(options.model)
    about = versions(loaded.model.info)
    folder = options.out / Path(about["id"]).name / ("quick" if options.quick else "full")
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    for stage in stages:
        if stage == "prices":
            prices = measure_prices(loaded.model, 1 if options.quick else 5)
            source = f"measured by the stage `prices` at a load average of {os.getloadavg()[0]:.1f}"
            (folder / "prices.json").write_text(json.dumps({"seconds": prices, "source": source}) + "\n")
        elif stage == "report":
            page = options.page or (folder / "quality.md" if options.quick else ROOT / "docs" / "quality.md")
            write_page(folder, page, loaded.tokenizer)
            print(f"wrote {page}")
        else:
            (folder / "about.json").write_text(json.dumps({**about, "id": Path(about["id"]).name}))
            for line in decode(stage, loaded, options, folder):
                print(line, flush=True)
                if time.monotonic() > end:
                    print(f"{options.minutes:g} minutes are over; the same command goes on from here.")
                    return


def decode(stage: str, loaded: Any, options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Do what a stage has left to do; a line for each prompt done."""
    if stage == "judge":
        yield from run_judge(tempo_mlx.load(options.judge), loaded.tokenizer, folder, options.judge)
        return
    tokens = QUICK["tokens"] if options.quick else TOKENS[stage]
    count = QUICK["prompts"] if options.quick else PROMPTS[stage]
    prompts: list[Prompt] = read_prompts("tuning" if stage == "tuning" else "test")[:count][: options.prompts]
    if stage == "divergence":
        for line in run_divergence(loaded, prompts, tokens, folder / "divergence.jsonl"):
            yield f"divergence: {line['attend']}, at most {line['cap']}: {line['prompt']}"
        return
    for arm in chosen(stage, options):
        for record in run_arm(loaded, arm, prompts, tokens, folder / stage / f"{arm.name}.jsonl"):
            yield f"{stage}: {arm.label}: {record['prompt']} in {record['seconds']} s"


def chosen(stage: str, options: argparse.Namespace) -> list[Arm]:
    arms = list(table.TUNING if stage == "tuning" else (*table.MAIN, *table.STUDIES))
    if options.only:
        arms = [arm for arm in arms if arm.name in options.only]
    return [replace(arm, prompts=None) for arm in arms] if options.quick else arms


if __name__ == "__main__":
    main()
